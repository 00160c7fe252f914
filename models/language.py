"""Precisions of a language model, as recipes measure them: perplexity on prose, and tokens a second when served.

Invariants: `fp32` has the checkpoint's weights in float32, so it is what the others are compared with; the prose is
the docstrings of numpy (BSD-3-Clause), the same for all precisions: technical English that no recipe trains on.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime_genai as og
from llguidance import LLTokenizer

from edge_agent.engines.base import Generate
from edge_agent.engines.genai import GenaiModel
from edge_agent.wire.bundle import scan
from models.errors import ModelError
from models.fetch import Progress
from models.genai_build import write_genai_folder
from models.genai_graph import TAIL
from models.metrics import perplexity
from models.weights import Weights

BITS = {"fp32": 32, "int8": 8, "int4": 4}
WINDOW, ROUNDS = 512, 5


def prose() -> str:
    """Paragraphs of numpy's docstrings: sentences, not examples, tables or lists of parameters."""
    texts = [inspect.getdoc(getattr(np, name)) or "" for name in sorted(np.__all__)]
    paragraphs = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
    kept = [p for p in paragraphs if p.endswith(".") and len(p.split()) > 20 and not set(p) & set(">:[]=|")]
    return "\n\n".join(dict.fromkeys(kept))


def measured(
    weights: Weights, work: Path, count: int, speed: dict[str, list[int]], progress: Progress
) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Folders of all precisions below `work`, and what was measured: perplexity over `count` tokens, speeds.

    `speed` has `prompt` and `decode`, words read and tokens written in a timed run.
    """
    made, rows = {name: work / name for name in BITS}, dict[str, dict[str, Any]]()
    for name, bits in BITS.items():
        write_genai_folder(weights, made[name], progress, bits)
    models = {name: GenaiModel(folder) for name, folder in made.items()}
    parts = windows(made["fp32"], prose(), count)
    tops: dict[str, list[int]] = {}
    for name, folder in made.items():
        progress(f"perplexity of {name}", 0, 0)
        lost, tops[name] = losses(folder, parts)
        same = float(np.mean(np.equal(tops[name], tops["fp32"])))
        size = sum(entry.size for entry in scan(folder))
        rows[name] = {"bytes": size, "metric": "perplexity", "value": perplexity(lost), "top_1_of_fp32": same}
    for name, times in _speeds(models, speed["prompt"][0], speed["decode"][0], progress).items():
        prefill, decode = (round(float(np.quantile(some, 0.75)), 1) for some in zip(*times, strict=True))
        rows[name] |= {"ms": round(1000 / decode, 3), "prefill": prefill, "decode": decode}
    return made, rows


def windows(folder: Path, text: str, count: int) -> list[list[int]]:
    """The first `count` tokens of a text as a model's folder has them, in windows that are read apart."""
    try:
        facts = json.loads((folder / "genai_config.json").read_text())["model"]
        tokens = LLTokenizer(str(folder / "tokenizer.json"), n_vocab=facts["vocab_size"]).tokenize_str(text)[:count]
        size = min(WINDOW, int(facts["context_length"]) - 1)
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(f"{folder} is no language model: {error}", "outrider models import makes one") from error
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def losses(folder: Path, parts: list[list[int]]) -> tuple[list[float], list[int]]:
    """Negative logarithms of the tokens' probabilities, and the likeliest token at each position. Raises ModelError."""
    try:
        model, found, tops = og.Model(str(folder)), list[float](), list[int]()
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=max(map(len, parts)) + 1)
        generator = og.Generator(model, params)
        for window in parts:
            generator.rewind_to(0)
            for start in range(0, len(window) - 1, TAIL):
                read, wanted = window[start : start + TAIL], window[start + 1 : start + 1 + TAIL]
                generator.append_tokens(np.array(read, np.int32))
                logits = np.asarray(generator.get_output("tail"), np.float64)[-len(read) :][: len(wanted)]
                top = logits.max(-1)
                whole = top + np.log(np.exp(logits - top[:, None]).sum(-1))
                found += (whole - logits[np.arange(len(wanted)), wanted]).tolist()
                tops += logits.argmax(-1).tolist()
    except RuntimeError as error:
        raise ModelError(f"{folder} cannot be read with: {error}", "outrider models import makes its folder") from error
    return found, tops


def _speeds(
    models: dict[str, GenaiModel], prompt: int, decode: int, progress: Progress
) -> dict[str, list[tuple[float, float]]]:
    """Tokens a second read and written of each precision, in turns; every turn reads another `prompt` words."""
    words, times = prose().split(), {name: list[tuple[float, float]]() for name in models}
    for turn in range(ROUNDS):
        progress("measuring speed", turn, ROUNDS)
        request = Generate("", " ".join(words[turn * prompt :][:prompt]), max_tokens=decode)
        for name, model in models.items():
            last = list(model.generate(request, lambda: False))[-1]
            written = (last.output_tokens - 1) / max(last.total_s - last.first_token_s, 1e-9)
            times[name].append((last.prompt_tokens / last.first_token_s, written))
    return times
