"""Precisions of a language model, as recipes measure them: perplexity on prose, and tokens a second when served.

Invariants: `fp32` has the checkpoint's weights in float32, so it is what the others are compared with; the prose is
the docstrings of numpy (BSD-3-Clause), the same for all precisions: technical English that no recipe trains on.
"""

from __future__ import annotations

import inspect
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
from models.fetch import Progress
from models.genai_build import write_genai_folder
from models.genai_graph import TAIL
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
    tokenizer = LLTokenizer(str(made["fp32"] / "tokenizer.json"), n_vocab=weights.shape.vocabulary)
    tokens = tokenizer.tokenize_str(prose())[:count]
    windows = [tokens[start : start + WINDOW] for start in range(0, len(tokens), WINDOW)]
    tops: dict[str, list[int]] = {}
    for name, folder in made.items():
        progress(f"perplexity of {name}", 0, 0)
        value, tops[name] = perplexity(folder, windows)
        same = float(np.mean(np.equal(tops[name], tops["fp32"])))
        size = sum(entry.size for entry in scan(folder))
        rows[name] = {"bytes": size, "metric": "perplexity", "value": value, "top_1_of_fp32": same}
    for name, times in _speeds(models, speed["prompt"][0], speed["decode"][0], progress).items():
        prefill, decode = (round(float(np.quantile(some, 0.75)), 1) for some in zip(*times, strict=True))
        rows[name] |= {"ms": round(1000 / decode, 3), "prefill": prefill, "decode": decode}
    return made, rows


def perplexity(folder: Path, windows: list[list[int]]) -> tuple[float, list[int]]:
    """Perplexity over windows of tokens that are read apart, and the likeliest token at each position."""
    model, losses, tops = og.Model(str(folder)), list[float](), list[int]()
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=max(map(len, windows)) + 1)
    generator = og.Generator(model, params)
    for window in windows:
        generator.rewind_to(0)
        for start in range(0, len(window) - 1, TAIL):
            read, wanted = window[start : start + TAIL], window[start + 1 : start + 1 + TAIL]
            generator.append_tokens(np.array(read, np.int32))
            logits = np.asarray(generator.get_output("tail"), np.float64)[-len(read) :][: len(wanted)]
            top = logits.max(-1)
            whole = top + np.log(np.exp(logits - top[:, None]).sum(-1))
            losses += (whole - logits[np.arange(len(wanted)), wanted]).tolist()
            tops += logits.argmax(-1).tolist()
    return float(np.exp(np.mean(losses))), tops


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
