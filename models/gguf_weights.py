"""The weights of a llama-architecture GGUF file, as the blocks they are stored in.

Invariants: nothing is rounded here; every array is a function of the file's bytes alone. Rows of the query and key
projections are returned in the half-split order of rotary embeddings (llama.cpp stores them interleaved).
Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; Q4_1 is `d*q + m`, Q8_0 is `d*q`, per 32 values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

from models.errors import ModelError

BLOCK = 32
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class UnsupportedModel(ModelError):
    """The file is not a model this toolchain can convert; the message says what it is, the hint what would do."""


@dataclass(frozen=True)
class Shape:
    """Dimensions and constants of a llama-architecture decoder."""

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


class GgufWeights:
    """Reads tensors and metadata of one GGUF file. Raises UnsupportedModel when it is not one we convert."""

    def __init__(self, path: Path) -> None:
        try:
            reader = GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise UnsupportedModel(f"{path.name} is not a readable GGUF file: {error}") from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = self.meta("general.architecture")
        if architecture != "llama":
            raise UnsupportedModel(f"{path.name} has architecture {architecture!r}; only 'llama' is converted")
        if "output.weight" in self._tensors:
            raise UnsupportedModel(f"{path.name} has an untied output matrix; only tied embeddings are converted")
        width, heads = int(self.meta("llama.embedding_length")), int(self.meta("llama.attention.head_count"))
        self.shape = Shape(
            layers=int(self.meta("llama.block_count")),
            width=width,
            hidden=int(self.meta("llama.feed_forward_length")),
            heads=heads,
            kv_heads=int(self.meta("llama.attention.head_count_kv")),
            head_size=width // heads,
            vocabulary=int(self.meta("llama.vocab_size")),
            context=int(self.meta("llama.context_length")),
            rope_base=float(self.meta("llama.rope.freq_base")),
            epsilon=float(self.meta("llama.attention.layer_norm_rms_epsilon")),
        )

    def meta(self, key: str) -> Any:
        """A metadata value. Raises UnsupportedModel when the file has none."""
        field = self._fields.get(key)
        if field is None:
            raise UnsupportedModel(f"the GGUF file has no {key}")
        return field.contents()

    def vector(self, name: str) -> Floats:
        """An unquantized tensor, such as a norm's weight."""
        return np.array(self._raw(name, "F32"), dtype=np.float32)

    def q4_1(self, name: str) -> tuple[Bytes, Floats, Floats]:
        """Blocks of a linear layer: q (rows, blocks, 32) in 0..15, d and m (rows, blocks): weight = d*q + m."""
        raw = self._raw(name, "Q4_1").view(np.uint8)
        raw = raw.reshape(raw.shape[0], -1, 4 + BLOCK // 2)
        quants = np.concatenate([raw[..., 4:] & 15, raw[..., 4:] >> 4], axis=-1)
        return (
            self._half_split(name, quants),
            self._half_split(name, _halves(raw[..., 0:2])),
            self._half_split(name, _halves(raw[..., 2:4])),
        )

    def q8_0(self, name: str) -> tuple[NDArray[np.int8], Floats]:
        """Blocks of a matrix: q (rows, blocks, 32) and d (rows, blocks): weight = d*q."""
        raw = self._raw(name, "Q8_0").view(np.uint8)
        raw = raw.reshape(raw.shape[0], -1, 2 + BLOCK)
        return raw[..., 2:].view(np.int8), _halves(raw[..., 0:2])

    def dense(self, name: str) -> Floats:
        """A quantized matrix as float32 (rows, columns)."""
        if self._tensors[name].tensor_type.name == "Q8_0":
            eights, scale = self.q8_0(name)
            return (scale[..., None] * eights).reshape(eights.shape[0], -1)
        quants, scale, least = self.q4_1(name)
        return (scale[..., None] * quants + least[..., None]).reshape(quants.shape[0], -1)

    def _raw(self, name: str, kind: str) -> NDArray[Any]:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise UnsupportedModel(f"the GGUF file has no tensor {name}")
        if tensor.tensor_type.name != kind:
            raise UnsupportedModel(
                f"{name} is stored as {tensor.tensor_type.name}, not {kind}",
                "linear layers are converted from Q4_1, embeddings from Q8_0: requantize with llama-quantize … q4_1",
            )
        return np.asarray(tensor.data)

    def _half_split(self, name: str, rows: NDArray[Any]) -> NDArray[Any]:
        heads = {"attn_q": self.shape.heads, "attn_k": self.shape.kv_heads}.get(name.split(".")[-2])
        if heads is None:
            return rows
        split = rows.reshape(heads, self.shape.head_size // 2, 2, *rows.shape[1:])
        return split.swapaxes(1, 2).reshape(rows.shape)


def _halves(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32)
