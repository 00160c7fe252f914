"""The weights of a GGUF file, as the blocks they are stored in.

Invariant: what is stored in blocks is not rounded. Rows of the query and key projections of `llama` are stored
interleaved by llama.cpp and given half-split.
Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from models.weights import BLOCK, MAX_CONTEXT, Bytes, Floats, Shape, UnsupportedModel, Weights, eights, fours

__all__ = ["BLOCK", "Bytes", "Floats", "GgufWeights", "Shape", "UnsupportedModel"]

ARCHITECTURES = ("llama", "qwen2", "qwen3")
KINDS = (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.BF16, Kind.F32)
_ENDS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")


class GgufWeights(Weights):
    """Reads tensors and metadata of one GGUF file. Raises UnsupportedModel when it is not one we convert."""

    def __init__(self, path: Path) -> None:
        try:
            reader = GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            hint = "a whole GGUF file? fetch it again"
            raise UnsupportedModel(f"{path.name} is not a readable GGUF file: {error}", hint) from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.meta("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            hint = f"converted are {', '.join(ARCHITECTURES)}"
            raise UnsupportedModel(f"{path.name} has architecture {self.architecture!r}", hint)
        own = f"{self.architecture}."
        if (scaling := self.meta(f"{own}rope.scaling.type", "none")) != "none":
            raise UnsupportedModel(f"{path.name} stretches its positions by {scaling!r}", "a file without that")
        width, heads = int(self.meta(f"{own}embedding_length")), int(self.meta(f"{own}attention.head_count"))
        tokens = self.dims("token_embd.weight") or (0,)
        self.shape = Shape(
            layers=int(self.meta(f"{own}block_count")),
            width=width,
            hidden=int(self.meta(f"{own}feed_forward_length")),
            heads=heads,
            kv_heads=int(self.meta(f"{own}attention.head_count_kv", heads)),
            head_size=int(self.meta(f"{own}attention.key_length", width // heads)),
            vocabulary=tokens[0],
            context=min(int(self.meta(f"{own}context_length")), MAX_CONTEXT),
            rope_base=float(self.meta(f"{own}rope.freq_base", 10000.0)),
            epsilon=float(self.meta(f"{own}attention.layer_norm_rms_epsilon")),
        )
        if (down := self._tensors.get("blk.0.ffn_down.weight")) and down.tensor_type in (Kind.Q4_0, Kind.Q4_1):
            self.stored = "int4"
        if self.dims("rope_freqs.weight"):
            self.stretch = self.dense("rope_freqs.weight")
        end = int(self.meta("tokenizer.ggml.eos_token_id"))
        names = self.meta("tokenizer.ggml.tokens")
        self.ends = sorted({end} | {i for i, name in enumerate(names) if name in _ENDS}, reverse=True)
        self.bos = int(self.meta("tokenizer.ggml.bos_token_id", end))
        self.pad = int(self.meta("tokenizer.ggml.padding_token_id", end))

    def meta(self, key: str, default: Any = None) -> Any:
        """A metadata value. Raises UnsupportedModel when the file has none and there is no default."""
        field = self._fields.get(key)
        if field is None and default is None:
            raise UnsupportedModel(f"the GGUF file has no {key}", "a vocabulary alone, or cut short? fetch it again")
        return default if field is None else field.contents()

    def dims(self, name: str) -> tuple[int, ...] | None:
        tensor = self._tensors.get(name)
        return None if tensor is None else tuple(int(d) for d in reversed(tensor.shape))

    def tokenizer(self) -> dict[str, Any]:
        from models.tokenizer_files import tokenizer_files

        return tokenizer_files(self)

    def dense(self, name: str) -> Floats:
        raw, kind = self._raw(name)
        return self._half_split(name, np.array(dequantize(raw, kind), np.float32))

    def q4_1(self, name: str) -> tuple[Bytes, Floats, Floats]:
        raw, kind = self._raw(name)
        if kind not in (Kind.Q4_0, Kind.Q4_1):
            return super().q4_1(name)
        quants, scale, least = fours(raw, kind)
        return self._half_split(name, quants), self._half_split(name, scale), self._half_split(name, least)

    def q8_0(self, name: str) -> tuple[NDArray[np.int8], Floats]:
        raw, kind = self._raw(name)
        if kind != Kind.Q8_0:
            return super().q8_0(name)
        quants, scale = eights(raw)
        return self._half_split(name, quants), self._half_split(name, scale)

    def _raw(self, name: str) -> tuple[NDArray[Any], Kind]:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise UnsupportedModel(f"the GGUF file has no tensor {name}", "fetch it again")
        kind, outer = Kind(tensor.tensor_type), name in ("token_embd.weight", "output.weight")
        if kind not in KINDS and not (outer and kind == Kind.Q6_K):
            hint = f"converted are {', '.join(k.name for k in KINDS)}: requantize with llama-quantize … q4_1"
            raise UnsupportedModel(f"{name} is stored as {kind.name}", hint)
        return np.asarray(tensor.data), kind

    def _half_split(self, name: str, rows: NDArray[Any]) -> NDArray[Any]:
        heads = {"attn_q": self.shape.heads, "attn_k": self.shape.kv_heads}.get(name.split(".")[-2])
        if heads is None or self.architecture != "llama":
            return rows
        split = rows.reshape(heads, self.shape.head_size // 2, 2, *rows.shape[1:])
        return split.swapaxes(1, 2).reshape(rows.shape)
