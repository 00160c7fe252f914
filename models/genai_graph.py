"""Writes a decoder as an ONNX graph for onnxruntime-genai, from the exact blocks of a GGUF file.

Invariants: same blocks, same bytes; no weight is rounded, unless 8 bits are asked for (dense weights, such as merged
ones, in symmetric blocks); 32 bits are the weights in float32, for comparison. A Q4_1 block `d*q + m` is computed as
`d*(q-8)` (a symmetric int4 MatMulNBits, which has fast kernels) plus `m + 8d` times the sum of the inputs over the
block (a product 1/32 the size). Layers that share an input share those sums: q, k and v are one product, gate and up
another. The matrix of embeddings is stored once and read as table and as output layer. Logits are those of the last
position; `tail` has those of the last TAIL, for an engine that reads guessed tokens ahead. Every linear product has
the side path `x A B` of a LoRA adapter (Hu et al. 2021, arXiv:2106.09685): A and B (`blk.0.qkv.a`, …) are inputs with a
default of rank 0, which changes no bit of the result and costs little (docs/performance.md). The form follows
onnxruntime-genai's own model builder (GroupQueryAttention with packed QKV and rotary).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.gguf_weights import BLOCK, GgufWeights

TAIL = 5
_MICROSOFT = "com.microsoft"
_PAGE = 4096
_FLOAT, _INT32, _INT64, _UINT8 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8


class Graph:
    """Nodes and initializers; large arrays go to one external data file, page-aligned so that it can be mapped."""

    def __init__(self, data: BinaryIO, location: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._data, self._location = data, location

    def node(self, op: str, inputs: list[str], output: str, *more: str, domain: str = "", **attributes: Any) -> str:
        """Append a node; returns the name of its first output."""
        name = f"{output}/{op}"
        self.nodes.append(helper.make_node(op, inputs, [output, *more], name=name, domain=domain, **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A small array inside the model file."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def stored(self, value: NDArray[Any], **views: tuple[int, ...]) -> None:
        """One array in the data file under one or more names, each with its own shape."""
        self._data.write(b"\0" * (-self._data.tell() % _PAGE))
        where = {"location": self._location, "offset": str(self._data.tell()), "length": str(value.nbytes)}
        self._data.write(np.ascontiguousarray(value).tobytes())
        for name, shape in views.items():
            tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(value.dtype), dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, text in where.items():
                tensor.external_data.add(key=key, value=text)
            self.initializers.append(tensor)


class DecoderGraph(Graph):
    """The llama decoder: call `start`, `layer` for each layer in order, then `finish`."""

    def __init__(self, weights: GgufWeights, data: BinaryIO, location: str, bits: int = 4) -> None:
        super().__init__(data, location)
        self.weights, self.shape, self.bits = weights, weights.shape, bits
        self._sides: list[onnx.ValueInfoProto] = []
        self._residual, self._update = "", ""

    def start(self) -> None:
        """Inputs, lengths, rotary tables and the embedding."""
        s = self.shape
        quants, scale = self.weights.q8_0("token_embd.weight")
        shifted = (quants.view(np.uint8) ^ 0x80).reshape(s.vocabulary, s.width)  # two's complement to offset 128
        self.stored(shifted, **{"embed.q": shifted.shape, "head.q": quants.shape})
        self.stored(scale, **{"embed.d": scale.shape, "head.d": (scale.size,)})
        angles = np.arange(s.context)[:, None] * s.rope_base ** (-np.arange(0, s.head_size, 2) / s.head_size)
        self.stored(np.cos(angles).astype(np.float32), cos=angles.shape)
        self.stored(np.sin(angles).astype(np.float32), sin=angles.shape)
        for name, value in {
            "last_axis": [-1],
            "axis_0": [0],
            "axis_1": [1],
            "tail_start": [-TAIL],
            "tail_end": [1 << 30],
            "one": [1],
            "rows": [-1, s.width],
            f"blocks_{s.width}": [-1, s.width // BLOCK, BLOCK],
            f"blocks_{s.hidden}": [-1, s.hidden // BLOCK, BLOCK],
            "qkv_width": [(s.heads + 2 * s.kv_heads) * s.head_size],
            "logits_shape": [1, 1, s.vocabulary],
        }.items():
            self.constant(name, np.array(value, dtype=np.int64))
        gather = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        self.node("GatherBlockQuantized", ["embed.q", "input_ids", "embed.d"], "embedded", domain=_MICROSOFT, **gather)
        self._residual = self.node("Reshape", ["embedded", "rows"], "embedding")
        self.node("ReduceSum", ["attention_mask", "axis_1"], "lengths", keepdims=0)
        self.node("Sub", ["lengths", "one"], "past_lengths")
        self.node("Cast", ["past_lengths"], "seqlens_k", to=_INT32)
        self.node("Shape", ["attention_mask"], "mask_shape", start=1, end=2)
        self.node("Squeeze", ["mask_shape"], "mask_length")
        self.node("Cast", ["mask_length"], "total_length", to=_INT32)
        self.node("Shape", ["input_ids"], "ids_shape")
        self.node("Concat", ["ids_shape", "qkv_width"], "qkv_shape", axis=0)

    def layer(self, index: int) -> None:
        """One decoder layer: attention and gated feed-forward, each behind a norm."""
        s, prefix = self.shape, f"blk.{index}."
        normed = self._norm(prefix + "attn_norm", _first=index == 0)
        qkv = self._linear(normed, prefix + "qkv", [f"{prefix}attn_{part}.weight" for part in "qkv"])
        self.node("Reshape", [qkv, "qkv_shape"], prefix + "qkv_packed")
        past = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        self.node(
            "GroupQueryAttention",
            [prefix + "qkv_packed", "", "", *past, "seqlens_k", "total_length", "cos", "sin"],
            prefix + "attention",
            *(f"present.{index}.{kind}" for kind in ("key", "value")),
            domain=_MICROSOFT,
            num_heads=s.heads,
            kv_num_heads=s.kv_heads,
            scale=s.head_size**-0.5,
            do_rotary=1,
        )
        attended = self.node("Reshape", [prefix + "attention", "rows"], prefix + "attended")
        self._update = self._linear(attended, prefix + "attn_output", [prefix + "attn_output.weight"])
        normed = self._norm(prefix + "ffn_norm")
        both = self._linear(normed, prefix + "ffn", [prefix + "ffn_gate.weight", prefix + "ffn_up.weight"])
        self.node("Split", [both], prefix + "gate", prefix + "up", axis=-1, num_outputs=2)
        self.node("QuickGelu", [prefix + "gate"], prefix + "silu", domain=_MICROSOFT, alpha=1.0)  # x*sigmoid(x)
        self.node("Mul", [prefix + "silu", prefix + "up"], prefix + "gated")
        self._update = self._linear(prefix + "gated", prefix + "ffn_down", [prefix + "ffn_down.weight"])

    def finish(self) -> onnx.ModelProto:
        """The last norm and the output layer, for the last positions."""
        s = self.shape
        tail = ["tail_start", "tail_end", "axis_0"]
        self._residual = self.node("Slice", [self._residual, *tail], "tail_residual")
        self._update = self.node("Slice", [self._update, *tail], "tail_update")
        normed = self._norm("output_norm")
        if self.bits == 32:
            self._floats(normed, "head", ["token_embd.weight"])
        else:
            self._matmul_nbits(normed, "head", "head/base", s.vocabulary, s.width, bits=8)
        self.node("Identity", ["head/base"], "tail")
        self.node("Gather", ["head/base", "last_axis"], "last_logits", axis=0)
        self.node("Reshape", ["last_logits", "logits_shape"], "logits")
        cache = ["batch", s.kv_heads, "length", s.head_size]
        keys = [f"{i}.{kind}" for i in range(s.layers) for kind in ("key", "value")]
        info = helper.make_tensor_value_info
        inputs = [info("input_ids", _INT64, ["batch", "new"]), info("attention_mask", _INT64, ["batch", "length"])]
        inputs += [info(f"past_key_values.{key}", _FLOAT, cache) for key in keys] + self._sides
        outputs = [info("logits", _FLOAT, ["batch", 1, s.vocabulary]), info("tail", _FLOAT, ["tail", s.vocabulary])]
        outputs += [info(f"present.{key}", _FLOAT, cache) for key in keys]
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="outrider")

    def _norm(self, name: str, *, _first: bool = False) -> str:
        weight = self.constant(name + ".weight", self.weights.vector(name + ".weight"))
        normed, summed, epsilon = name + "/normed", name + "/summed", self.shape.epsilon
        if _first:
            op = "SimplifiedLayerNormalization"
            return self.node(op, [self._residual, weight], normed, epsilon=epsilon, axis=-1, stash_type=1)
        inputs = [self._residual, self._update, weight]
        self.node(
            "SkipSimplifiedLayerNormalization", inputs, normed, "", "", summed, domain=_MICROSOFT, epsilon=epsilon
        )
        self._residual = summed
        return normed

    def _linear(self, x: str, name: str, tensors: list[str]) -> str:
        """One product for matrices that share an input, and the side path of an adapter."""
        base = {4: self._blocks, 8: self._eights, 32: self._floats}[self.bits]
        columns, rows = base(x, name, tensors)
        for part, shape in (("a", [columns, 0]), ("b", [0, rows])):
            self.constant(f"{name}.{part}", np.zeros(shape, np.float32))
            dims = [size or f"{name}.rank" for size in shape]
            self._sides.append(helper.make_tensor_value_info(f"{name}.{part}", _FLOAT, dims))
        low = self.node("MatMul", [x, f"{name}.a"], name + "/low")
        return self.node("Gemm", [low, f"{name}.b", name + "/base"], name)

    def _blocks(self, x: str, name: str, tensors: list[str]) -> tuple[int, int]:
        parts = [self.weights.q4_1(tensor) for tensor in tensors]
        quants, scale, least = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        rows, blocks = scale.shape
        self.stored(quants[..., 0::2] | quants[..., 1::2] << 4, **{f"{name}.q": (rows, blocks, BLOCK // 2)})
        self.stored(scale, **{f"{name}.d": (scale.size,)})
        self.stored((least + 8 * scale).T, **{f"{name}.c": (blocks, rows)})
        self._matmul_nbits(x, name, name + "/symmetric", rows, blocks * BLOCK, bits=4)
        blocked = self.node("Reshape", [x, f"blocks_{blocks * BLOCK}"], name + "/blocked")
        sums = self.node("ReduceSum", [blocked, "last_axis"], name + "/sums", keepdims=0)
        self.node("Gemm", [sums, f"{name}.c", name + "/symmetric"], name + "/base")
        return blocks * BLOCK, rows

    def _eights(self, x: str, name: str, tensors: list[str]) -> tuple[int, int]:
        dense = np.concatenate([self.weights.dense(tensor) for tensor in tensors])
        rows, columns = dense.shape
        blocks = dense.reshape(rows, -1, BLOCK)
        scale = np.maximum(np.abs(blocks).max(-1) / 127, np.float32(1e-12))
        quants = (np.rint(blocks / scale[..., None]) + 128).astype(np.uint8)
        self.stored(quants, **{f"{name}.q": quants.shape})
        self.stored(scale, **{f"{name}.d": (scale.size,)})
        self._matmul_nbits(x, name, name + "/base", rows, columns, bits=8)
        return columns, rows

    def _floats(self, x: str, name: str, tensors: list[str]) -> tuple[int, int]:
        dense = np.concatenate([self.weights.dense(tensor) for tensor in tensors])
        self.stored(dense.T, **{f"{name}.w": dense.T.shape})
        self.node("MatMul", [x, f"{name}.w"], name + "/base")
        return dense.shape[1], dense.shape[0]

    def _matmul_nbits(self, x: str, weight: str, output: str, rows: int, columns: int, *, bits: int) -> str:
        form = {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        return self.node("MatMulNBits", [x, f"{weight}.q", f"{weight}.d"], output, domain=_MICROSOFT, **form)


def write_graph(weights: GgufWeights, folder: Path, progress: Callable[[str, float], None], bits: int = 4) -> None:
    """Write model.onnx and model.onnx.data into `folder`; progress(text, fraction) after each layer."""
    with (folder / "model.onnx.data").open("wb") as data:
        graph = DecoderGraph(weights, data, "model.onnx.data", bits)
        graph.start()
        for index in range(weights.shape.layers):
            graph.layer(index)
            progress(f"layer {index + 1} of {weights.shape.layers}", (index + 1) / (weights.shape.layers + 1))
        model = graph.finish()
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
