"""Builds an onnxruntime-genai folder from a checkpoint, without torch or transformers.

Invariants: the same checkpoint gives the same folder, byte for byte, whose name is its content digest; the folder
appears whole or not at all (written beside, then renamed).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from edge_agent.wire.bundle import content_digest, scan
from models.fetch import Progress, quiet
from models.genai_graph import write_graph
from models.gguf_weights import GgufWeights
from models.weights import Weights


def build_genai_folder(gguf: Path, out: Path, progress: Progress = quiet) -> str:
    """Convert `gguf` to the folder `out` (replaced if it exists); returns its content digest.

    Raises UnsupportedModel when the file is not one we convert.
    """
    return write_genai_folder(GgufWeights(gguf), out, progress)


def write_genai_folder(weights: Weights, out: Path, progress: Progress = quiet, bits: int = 4) -> str:
    """Convert weights that are open, to linear layers of 4, 8 or 32 bits; returns the folder's content digest."""
    weights.check()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        documents = {"genai_config.json": _genai_config(weights), **weights.tokenizer()}
        for name, document in documents.items():
            (work / name).write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        write_graph(weights, work, progress, bits)
        digest = content_digest(scan(work))
        work.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return digest


def _genai_config(weights: Weights) -> dict[str, Any]:
    shape = weights.shape
    return {
        "model": {
            "type": "llama",
            "bos_token_id": weights.bos,
            "eos_token_id": weights.ends,
            "pad_token_id": weights.pad,
            "vocab_size": shape.vocabulary,
            "context_length": shape.context,
            "decoder": {
                "session_options": {"log_id": "outrider", "provider_options": []},
                "filename": "model.onnx",
                "head_size": shape.head_size,
                "hidden_size": shape.width,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "num_hidden_layers": shape.layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "num_beams": 1, "max_length": 2048, "past_present_share_buffer": True},
    }
