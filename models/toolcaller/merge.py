"""A LoRA adapter added to the weights of a GGUF file, with numpy alone.

Invariants: only what the adapter names changes. `dense` is the exact sum; as blocks, a changed matrix is quantized
once, to the same 4 bits with scale and minimum that the file has: the base model's form, size and speed, at a loss.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_agent.engines.adapters import DAMAGED, read_arrays
from models.errors import ModelError
from models.gguf_weights import BLOCK, Bytes, Floats, GgufWeights
from models.toolcaller.adapter import form_of

_SHRINKS = (1.0, 0.95, 0.9, 0.85)


class MergedWeights(GgufWeights):
    """The weights of `gguf` plus `scale * B A` of the adapter in a folder: a training run, or what ships of it.

    A is (rank, in), B is (out, rank). Raises ModelError when the adapter is not one for these weights.
    """

    def __init__(self, gguf: Path, adapter: Path) -> None:
        super().__init__(gguf)
        try:
            self._scale = float(form_of(adapter)["scale"])
            self._adapter = read_arrays(adapter / "adapter.npz")
        except DAMAGED as error:
            hint = "a folder of `outrider models toolcaller train`, or an adapter that ships"
            raise ModelError(f"{adapter} holds no readable adapter: {error}", hint) from error
        known = {f"{self._key(name)}.{part}" for name in self._tensors for part in "ab" if name.startswith("blk.")}
        if strange := sorted(set(self._adapter) - known):
            raise ModelError(
                f"{adapter} changes {strange[0]}, which {gguf.name} does not have", "is it for this model?"
            )

    def q4_1(self, name: str) -> tuple[Bytes, Floats, Floats]:
        """Blocks of the merged matrix, as of the base where the adapter says nothing."""
        blocks = super().q4_1(name)
        return quantize(self._sum(name, blocks)) if f"{self._key(name)}.a" in self._adapter else blocks

    def dense(self, name: str) -> Floats:
        """The merged matrix, unrounded."""
        merged = f"{self._key(name)}.a" in self._adapter
        return self._sum(name, super().q4_1(name)) if merged else super().dense(name)

    def _sum(self, name: str, blocks: tuple[Bytes, Floats, Floats]) -> Floats:
        quants, step, least = blocks
        key = self._key(name)
        base: Floats = (step[..., None] * quants + least[..., None]).reshape(quants.shape[0], -1)
        a, b = self._adapter[f"{key}.a"], self._adapter[f"{key}.b"]
        if (b.shape[0], a.shape[1]) != base.shape or a.shape[0] != b.shape[1]:
            raise ModelError(
                f"the adapter's {key} is {b.shape[0]}x{a.shape[1]}, not {base.shape}", "another base model?"
            )
        return base + np.float32(self._scale) * (b @ a)

    @staticmethod
    def _key(name: str) -> str:
        return name.removesuffix(".weight").replace("blk.", "layers.", 1)


def quantize(matrix: Floats) -> tuple[Bytes, Floats, Floats]:
    """q in 0..15, d and m of each 32 values of a row, of several ranges the one with the least squared error."""
    blocks = matrix.reshape(matrix.shape[0], -1, BLOCK)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best = np.zeros_like(blocks), half, low
    error = np.full(low.shape, np.inf, np.float32)
    for shrink in _SHRINKS:
        least = middle - shrink * half
        step = np.maximum(2 * shrink * half / 15, np.float32(1e-12))
        quants = np.clip(np.rint((blocks - least) / step), 0, 15)
        found = ((step * quants + least - blocks) ** 2).sum(-1, keepdims=True)
        better = found < error
        best = np.where(better, quants, best[0]), np.where(better, step, best[1]), np.where(better, least, best[2])
        error = np.minimum(error, found)
    quants, step, least = best
    return quants.astype(np.uint8), step[..., 0].astype(np.float32), least[..., 0].astype(np.float32)
