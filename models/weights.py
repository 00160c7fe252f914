"""What a decoder's weights are to the graph, wherever they come from: tensors by the names that GGUF gives them.

Invariants: a matrix is (outputs, inputs), in the half-split order of rotary embeddings; every array is a function of
the files' bytes alone; what `check` accepts has all tensors, of the shapes that the configuration says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from numpy.typing import NDArray

from models.errors import ModelError

BLOCK = 32
MAX_CONTEXT = 8192  # positions in the rotary tables; engines take fewer
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class UnsupportedModel(ModelError):
    """The file is not a model this toolchain can convert; the message says what it is, the hint what would do."""


@dataclass(frozen=True)
class Shape:
    """Dimensions and constants of a decoder of the Llama or Qwen family."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    rope_base: float
    epsilon: float


class Weights(ABC):
    """A checkpoint. `ends`: tokens that end a text; `bos` begins one, `pad` fills; `stretch`: divides frequencies."""

    shape: Shape
    bos: int
    ends: list[int]
    pad: int
    stretch: Floats | None = None
    stored = "int8"
    """The precision that loses least for its size."""

    @abstractmethod
    def dims(self, name: str) -> tuple[int, ...] | None:
        """A tensor's shape; None when there is no such tensor."""

    @abstractmethod
    def dense(self, name: str) -> Floats:
        """A tensor as float32. Raises UnsupportedModel when there is none, or its type is not converted."""

    @abstractmethod
    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json and tokenizer_config.json as documents. Raises UnsupportedModel."""

    def vector(self, name: str) -> Floats:
        """A norm's weight or a bias."""
        return self.dense(name)

    def q4_1(self, name: str) -> tuple[Bytes, Floats, Floats]:
        """Blocks of a matrix: q (rows, blocks, 32) in 0..15, d and m (rows, blocks): weight = d*q + m."""
        return fours(quantize(self.dense(name), Kind.Q4_1), Kind.Q4_1)

    def q8_0(self, name: str) -> tuple[NDArray[np.int8], Floats]:
        """Blocks of a matrix: q (rows, blocks, 32) and d (rows, blocks): weight = d*q."""
        return eights(quantize(self.dense(name), Kind.Q8_0))

    @property
    def frequencies(self) -> NDArray[np.float64]:
        """Radians a position of each pair of a head."""
        s = self.shape
        plain = s.rope_base ** (-np.arange(0, s.head_size, 2) / s.head_size)
        return plain if self.stretch is None else plain / self.stretch

    def check(self) -> None:
        """Raises UnsupportedModel for a tensor that is missing or of another shape, and for sizes without a graph."""
        s = self.shape
        query, key = s.heads * s.head_size, s.kv_heads * s.head_size
        if s.heads % s.kv_heads or any(size % BLOCK for size in (s.width, s.hidden, query)) or s.head_size % 16:
            raise UnsupportedModel(f"its sizes have no graph: {s}", f"widths in steps of {BLOCK}, heads in steps of 16")
        layer = {"attn_q": (query, s.width), "attn_k": (key, s.width), "attn_v": (key, s.width)}
        layer |= {"attn_output": (s.width, query), "ffn_gate": (s.hidden, s.width), "ffn_up": (s.hidden, s.width)}
        layer |= {"ffn_down": (s.width, s.hidden)}
        norms: dict[str, tuple[int, ...]] = {"attn_norm": (s.width,), "ffn_norm": (s.width,)}
        wanted = {f"blk.{i}.{part}.weight": dims for i in range(s.layers) for part, dims in (layer | norms).items()}
        wanted |= {"token_embd.weight": (s.vocabulary, s.width), "output_norm.weight": (s.width,)}
        for name, dims in wanted.items():
            if (found := self.dims(name)) != dims:
                said = "missing" if found is None else f"{list(found)}"
                hint = "is the configuration of another model, or the file cut short? fetch both again"
                raise UnsupportedModel(f"{name} is {said}, the configuration says {list(dims)}", hint)


def fours(raw: Bytes, kind: Kind) -> tuple[Bytes, Floats, Floats]:
    """The numbers of Q4_0 (`d*(q-8)`) or Q4_1 blocks."""
    head = 2 if kind == Kind.Q4_0 else 4
    raw = raw.reshape(raw.shape[0], -1, head + BLOCK // 2)
    scale = _halves(raw[..., 0:2])
    least = -8 * scale if kind == Kind.Q4_0 else _halves(raw[..., 2:4])
    return np.concatenate([raw[..., head:] & 15, raw[..., head:] >> 4], axis=-1), scale, least


def eights(raw: Bytes) -> tuple[NDArray[np.int8], Floats]:
    """The numbers of Q8_0 blocks."""
    raw = raw.reshape(raw.shape[0], -1, 2 + BLOCK)
    return raw[..., 2:].view(np.int8), _halves(raw[..., 0:2])


def _halves(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32)
