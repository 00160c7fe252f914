"""How faithful a genai folder is to its source: top-1 agreement with float32 of the same weights.

Invariants: the reference is NumPy in float32 over the dequantized weights of the GGUF file, written independently of
the graph; both sides read the same tokens (the prompt and the reference's own greedy continuation) and are compared
at every position.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_agent.wire.bundle import content_digest, scan
from models.gguf_weights import Floats, GgufWeights

PROMPTS = [
    "What is the capital of France?",
    "Read the vibration of line 2 and tell me whether it is safe.",
    "Write a short poem about a factory at night.",
    "Explain how a heat exchanger works.",
    "def fibonacci(n):\n    ",
    "Set the speed of line 1 to 850 rpm.",
    "List three causes of bearing wear.",
    "Translate to French: the machine is stopped.",
    "Stop line 3, its temperature is 97.5 degrees.",
    "Summarize: The outbox keeps records until the hub has committed them. A cut cable loses nothing.",
    "What is 12 times 12?",
    "The quick brown fox jumps over",
    "Name the planets of the solar system in order.",
    "Why is the sky blue?",
    "SELECT name FROM devices WHERE",
    "Give me two tips for writing clear documentation.",
    "Read the label that camera 4 sees.",
    "Once upon a time in a small workshop,",
    "What does MQTT stand for?",
    "Which alarms are active now?",
]
CONTINUATION = 20


@dataclass
class Sequence:
    """Tokens seen so far with their keys and values, and the top-1 token after each of them."""

    tokens: list[int]
    keys: list[Floats] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)
    top: list[int] = field(default_factory=list)


class Reference:
    """The llama decoder in NumPy float32, over many sequences at once."""

    def __init__(self, weights: GgufWeights) -> None:
        self.shape = s = weights.shape
        self._embedding = weights.dense("token_embd.weight")
        self._final = weights.vector("output_norm.weight")
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        self._layers = [
            {name: weights.dense(f"blk.{i}.{name}.weight").T for name in names}
            | {name: weights.vector(f"blk.{i}.{name}.weight") for name in ("attn_norm", "ffn_norm")}
            for i in range(s.layers)
        ]
        self._inverse = s.rope_base ** (-np.arange(0, s.head_size, 2) / s.head_size)

    def extend(self, sequences: list[Sequence]) -> Floats:
        """Read the tokens that each sequence has no `top` for yet; returns the logits after each."""
        s = self.shape
        new = [sequence.tokens[len(sequence.top) :] for sequence in sequences]
        edges = np.cumsum([len(tokens) for tokens in new])[:-1]
        starts = [len(sequence.top) for sequence in sequences]
        positions = np.concatenate([np.arange(a, a + len(t)) for a, t in zip(starts, new, strict=True)])
        angle = (positions[:, None] * self._inverse)[:, None, :]
        turn = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        x = self._embedding[np.concatenate([np.array(tokens) for tokens in new])]
        for index, layer in enumerate(self._layers):
            normed = self._norm(x, layer["attn_norm"])
            query = _rotate((normed @ layer["attn_q"]).reshape(-1, s.heads, s.head_size), *turn)
            key = _rotate((normed @ layer["attn_k"]).reshape(-1, s.kv_heads, s.head_size), *turn)
            value = (normed @ layer["attn_v"]).reshape(-1, s.kv_heads, s.head_size)
            parts = zip(*(np.split(array, edges) for array in (query, key, value)), strict=True)
            attended = [self._attend(sequence, index, *qkv) for sequence, qkv in zip(sequences, parts, strict=True)]
            x = x + np.concatenate(attended) @ layer["attn_output"]
            normed = self._norm(x, layer["ffn_norm"])
            gate = normed @ layer["ffn_gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (normed @ layer["ffn_up"])) @ layer["ffn_down"]
        logits: Floats = self._norm(x, self._final) @ self._embedding.T
        for sequence, tokens in zip(sequences, np.split(logits.argmax(axis=-1), edges), strict=True):
            sequence.top += tokens.tolist()
        return logits

    def _norm(self, x: Floats, weight: Floats) -> Floats:
        scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self.shape.epsilon))
        return np.asarray(x * scale * weight, dtype=np.float32)

    def _attend(self, sequence: Sequence, index: int, query: Floats, key: Floats, value: Floats) -> Floats:
        if len(sequence.keys) == index:
            sequence.keys.append(key)
            sequence.values.append(value)
        else:
            key = sequence.keys[index] = np.concatenate([sequence.keys[index], key])
            value = sequence.values[index] = np.concatenate([sequence.values[index], value])
        group = self.shape.heads // self.shape.kv_heads
        key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", query, key) * np.float32(self.shape.head_size**-0.5)
        future = np.arange(len(key)) > np.arange(len(key) - len(query), len(key))[:, None]
        scores[:, future] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        attended: Floats = np.einsum("hqk,khd->qhd", scores, value)
        return attended.reshape(len(query), -1)


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


@dataclass(frozen=True)
class Faithfulness:
    """Share of positions where the folder's top-1 token is the reference's, reading one token or four at a time."""

    decode: float
    positions: int
    prefill: float
    prefill_positions: int
    digest: str


def measure(gguf: Path, folder: Path, prompts: list[str] = PROMPTS, continuation: int = CONTINUATION) -> Faithfulness:
    """Compare a folder built by `build_genai_folder` with the file it was built from."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime_genai as og
    from llguidance import LLTokenizer

    weights = GgufWeights(gguf)
    tokenizer = LLTokenizer(str(folder / "tokenizer.json"), n_vocab=weights.shape.vocabulary)
    form = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    sequences = [Sequence(tokenizer.tokenize_str(form.format(text), parse_special=True)) for text in prompts]
    reference = Reference(weights)
    reference.extend(sequences)
    for _ in range(continuation):
        for sequence in sequences:
            sequence.tokens.append(sequence.top[-1])
        reference.extend(sequences)
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=max(len(sequence.tokens) for sequence in sequences) + 1)
    generator = og.Generator(model, params)

    def agreement(step: int) -> tuple[float, int]:
        same = []
        for sequence in sequences:
            generator.rewind_to(0)
            for start in range(0, len(sequence.tokens) - step + 1, step):
                generator.append_tokens(np.array(sequence.tokens[start : start + step], dtype=np.int32))
                same.append(int(generator.get_logits().argmax()) == sequence.top[start + step - 1])
        return float(np.mean(same)), len(same)

    decode, prefill = agreement(1), agreement(4)
    return Faithfulness(*decode, *prefill, content_digest(scan(folder)))
