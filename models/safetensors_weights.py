"""The weights of a Hugging Face checkpoint of the Llama or Qwen family: safetensors files, config.json, tokenizer.json.

Invariants: tensors are read one at a time; no PyTorch. Sources: the configurations of transformers' llama, qwen2 and
qwen3; Llama 3.1's stretch of the rotary frequencies as transformers computes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from models.weights import MAX_CONTEXT, Floats, Shape, UnsupportedModel, Weights

FAMILIES = ("llama", "qwen2", "qwen3")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


class SafetensorsWeights(Weights):
    """Reads the checkpoint in a folder. Raises UnsupportedModel when it is not one we convert."""

    def __init__(self, folder: Path) -> None:
        self.folder, files = folder, sorted(folder.glob("*.safetensors"))
        if not files:
            raise UnsupportedModel(f"{folder} has no .safetensors file", "the folder of a Hugging Face checkpoint")
        config = self._document("config.json")
        try:
            handles: list[Any] = [safe_open(file, "numpy") for file in files]
            self._files = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UnsupportedModel(f"{folder} has a file that cannot be read: {error}", "fetch it again") from error
        family, act = config.get("model_type"), config.get("hidden_act", "silu")
        if family not in FAMILIES or act != "silu" or config.get("quantization_config"):
            hint = f"converted are {', '.join(FAMILIES)} with silu, in float16, bfloat16 or float32"
            raise UnsupportedModel(f"{folder.name} is {family!r} with {act!r}, or quantized", hint)
        try:
            heads = int(config["num_attention_heads"])
            rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
            self.shape = Shape(
                layers=int(config["num_hidden_layers"]),
                width=int(config["hidden_size"]),
                hidden=int(config["intermediate_size"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_size=int(config.get("head_dim") or config["hidden_size"] // heads),
                vocabulary=int(config["vocab_size"]),
                context=min(int(config["max_position_embeddings"]), MAX_CONTEXT),
                rope_base=float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)),
                epsilon=float(config["rms_norm_eps"]),
            )
            self.stretch = self._stretch(rope)
            own = self._document("generation_config.json", {}) | config
            ends = own["eos_token_id"]
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UnsupportedModel(f"config.json of {folder.name}: {error!r}", "fetch it again") from error
        self.ends = sorted(set(ends if isinstance(ends, list) else [ends]), reverse=True)
        first, fill = own.get("bos_token_id"), own.get("pad_token_id")
        self.bos, self.pad = (self.ends[0] if token is None else int(token) for token in (first, fill))
        self._tied = bool(config.get("tie_word_embeddings", False))

    def dims(self, name: str) -> tuple[int, ...] | None:
        if name.startswith("output.") and self._tied:
            return None
        handle = self._files.get(_own(name))
        return None if handle is None else tuple(handle.get_slice(_own(name)).get_shape())

    def dense(self, name: str) -> Floats:
        if self.dims(name) is None:
            raise UnsupportedModel(f"{self.folder.name} has no tensor {_own(name)}", "fetch it again")
        found = self._files[_own(name)].get_tensor(_own(name))
        if found.dtype.name not in ("float32", "float16", "bfloat16"):
            raise UnsupportedModel(f"{_own(name)} is {found.dtype}", "a checkpoint in float16, bfloat16 or float32")
        return np.asarray(found, np.float32)

    def tokenizer(self) -> dict[str, Any]:
        names = ("tokenizer.json", "tokenizer_config.json")
        return {name: self._document(name, None if name == names[0] else {}) for name in names}

    def _document(self, name: str, default: Any = None) -> Any:
        path = self.folder / name
        if default is not None and not path.is_file():
            return default
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            hint = f"{name} of the same checkpoint belongs beside its .safetensors files"
            raise UnsupportedModel(f"{path} cannot be read: {error}", hint) from error

    def _stretch(self, rope: dict[str, Any]) -> Floats | None:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if kind != "llama3":
            raise UnsupportedModel(f"{self.folder.name} stretches its positions by {kind!r}", "default or llama3")
        turns = float(rope["original_max_position_embeddings"]) * self.frequencies / (2 * np.pi)
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        share = np.clip((turns - low) / (high - low), 0, 1)
        return np.asarray(1 / ((1 - share) / float(rope["factor"]) + share), np.float32)


def _own(name: str) -> str:
    """A GGUF name as the checkpoint has it."""
    *front, leaf, end = name.split(".")
    return ".".join(["model.layers", front[1], _NAMES[leaf], end] if front else [_NAMES[leaf], end])
