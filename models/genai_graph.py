"""Writes a decoder of the Llama or Qwen family as an ONNX graph for onnxruntime-genai.

Invariants: same weights, same bytes; with 4 bits a Q4_0 or Q4_1 block of a GGUF file is exact, with 8 bits a Q8_0
block, and other weights are rounded once; 32 bits are the weights in float32. A Q4_1 block `d*q + m` is computed as
`d*(q-8)` (a symmetric int4 MatMulNBits, which has fast kernels) plus `m + 8d` times the sum of the inputs over the
block (a product 1/32 the size). Layers that share an input share those sums: q, k and v are one product, gate and up
another. The matrix of embeddings is stored once and read as table and as output layer. Logits are those of the last
position; `tail` has those of the last TAIL, for an engine that reads guessed tokens ahead. Every linear product has
the side path `x A B` of a LoRA adapter (Hu et al. 2021, arXiv:2106.09685): A and B (`blk.0.qkv.a`, …) are inputs with a
default of rank 0, which changes no bit of the result and costs little (docs/performance.md). The form follows
onnxruntime-genai's own model builder (GroupQueryAttention with packed QKV and rotary).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.fetch import Progress
from models.weights import BLOCK, Floats, Weights

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
    """The decoder: call `start`, `layer` for each layer in order, then `finish`."""

    def __init__(self, weights: Weights, data: BinaryIO, location: str, bits: int = 4) -> None:
        super().__init__(data, location)
        self.weights, self.shape, self.bits = weights, weights.shape, bits
        s = self.shape
        self._untied = weights.dims("output.weight") is not None
        self._attended = "rows" if s.heads * s.head_size == s.width else "attended_rows"
        self._sides: list[onnx.ValueInfoProto] = []
        self._residual, self._update = "", ""

    def start(self) -> None:
        """Inputs, lengths, rotary tables and the embedding."""
        s = self.shape
        self._table("token_embd.weight", "embed", "" if self._untied else "head")
        if self._untied:
            self._table("output.weight", "", "head")
        angles = np.arange(s.context)[:, None] * self.weights.frequencies
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
            self._attended: [-1, s.heads * s.head_size],
            f"blocks_{s.width}": [-1, s.width // BLOCK, BLOCK],
            f"blocks_{s.heads * s.head_size}": [-1, s.heads * s.head_size // BLOCK, BLOCK],
            f"blocks_{s.hidden}": [-1, s.hidden // BLOCK, BLOCK],
            "qkv_width": [(s.heads + 2 * s.kv_heads) * s.head_size],
            "logits_shape": [1, 1, s.vocabulary],
        }.items():
            self.constant(name, np.array(value, dtype=np.int64))
        if self.bits == 32:
            self.node("Gather", ["embed.w", "input_ids"], "embedded", axis=0)
        else:
            how = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
            self.node("GatherBlockQuantized", ["embed.q", "input_ids", "embed.d"], "embedded", domain=_MICROSOFT, **how)
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
        biases = [f"{prefix}attn_{part}.bias" for part in "qkv"]
        if self.weights.dims(biases[0]):
            bias = self.constant(prefix + "qkv_bias", np.concatenate([self.weights.vector(name) for name in biases]))
            qkv = self.node("Add", [qkv, bias], prefix + "qkv_biased")
        packed = [self.node("Reshape", [qkv, "qkv_shape"], prefix + "qkv_packed"), "", ""]
        if self.weights.dims(prefix + "attn_q_norm.weight"):
            packed = self._normed_heads(packed[0], prefix)
        past = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        self.node(
            "GroupQueryAttention",
            [*packed, *past, "seqlens_k", "total_length", "cos", "sin"],
            prefix + "attention",
            *(f"present.{index}.{kind}" for kind in ("key", "value")),
            domain=_MICROSOFT,
            num_heads=s.heads,
            kv_num_heads=s.kv_heads,
            scale=s.head_size**-0.5,
            do_rotary=1,
        )
        attended = self.node("Reshape", [prefix + "attention", self._attended], prefix + "attended")
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
            self.node("Gemm", [normed, "head.w"], "head/base", transB=1)
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
        correction = (least + 8 * scale).T
        if not correction.any():  # Q4_0
            self._matmul_nbits(x, name, name + "/base", rows, blocks * BLOCK, bits=4)
            return blocks * BLOCK, rows
        self.stored(correction, **{f"{name}.c": (blocks, rows)})
        self._matmul_nbits(x, name, name + "/symmetric", rows, blocks * BLOCK, bits=4)
        blocked = self.node("Reshape", [x, f"blocks_{blocks * BLOCK}"], name + "/blocked")
        sums = self.node("ReduceSum", [blocked, "last_axis"], name + "/sums", keepdims=0)
        self.node("Gemm", [sums, f"{name}.c", name + "/symmetric"], name + "/base")
        return blocks * BLOCK, rows

    def _eights(self, x: str, name: str, tensors: list[str]) -> tuple[int, int]:
        parts = [self.weights.q8_0(tensor) for tensor in tensors]
        quants, scale = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        self._stored_eights(quants, scale, "", name)
        rows, columns = len(scale), scale.shape[1] * BLOCK
        self._matmul_nbits(x, name, name + "/base", rows, columns, bits=8)
        return columns, rows

    def _stored_eights(self, quants: NDArray[np.int8], scale: Floats, table: str, product: str) -> None:
        """8-bit blocks under the names of a table to gather from, of a product, or of both."""
        shifted = quants.view(np.uint8) ^ 0x80  # two's complement to offset 128
        flat = (len(scale), scale.shape[1] * BLOCK)
        q = {"q": (flat, (*scale.shape, BLOCK)), "d": (scale.shape, (scale.size,))}
        for value, part in ((shifted, "q"), (scale, "d")):
            self.stored(value, **{f"{n}.{part}": dims for n, dims in zip((table, product), q[part], strict=True) if n})

    def _table(self, tensor: str, table: str, product: str) -> None:
        """A matrix of the vocabulary, in the names that read it."""
        if self.bits == 32:
            dense = self.weights.dense(tensor)
            self.stored(dense, **{f"{name}.w": dense.shape for name in (table, product) if name})
        else:
            self._stored_eights(*self.weights.q8_0(tensor), table, product)

    def _normed_heads(self, packed: str, prefix: str) -> list[str]:
        """Queries, keys and values apart, each head of the first two behind its norm."""
        s, names = self.shape, [f"{prefix}{part}_apart" for part in "qkv"]
        widths = [s.heads * s.head_size] + [s.kv_heads * s.head_size] * 2
        sizes = self.constant(prefix + "apart", np.array(widths, dtype=np.int64))
        self.node("Split", [packed, sizes], *names, axis=-1)
        for index, (part, width) in enumerate(zip("qk", widths, strict=False)):
            heads = self.constant(f"{names[index]}_heads", np.array([0, 0, -1, s.head_size], dtype=np.int64))
            back = self.constant(f"{names[index]}_width", np.array([0, 0, width], dtype=np.int64))
            weight = self.constant(f"{prefix}{part}_norm", self.weights.vector(f"{prefix}attn_{part}_norm.weight"))
            split = self.node("Reshape", [names[index], heads], f"{names[index]}/heads")
            how: dict[str, Any] = {"epsilon": s.epsilon, "axis": -1, "stash_type": 1}
            normed = self.node("SimplifiedLayerNormalization", [split, weight], f"{names[index]}/normed", **how)
            names[index] = self.node("Reshape", [normed, back], f"{names[index]}/whole")
        return names

    def _floats(self, x: str, name: str, tensors: list[str]) -> tuple[int, int]:
        dense = np.concatenate([self.weights.dense(tensor) for tensor in tensors])
        self.stored(dense.T, **{f"{name}.w": dense.T.shape})
        self.node("MatMul", [x, f"{name}.w"], name + "/base")
        return dense.shape[1], dense.shape[0]

    def _matmul_nbits(self, x: str, weight: str, output: str, rows: int, columns: int, *, bits: int) -> str:
        form = {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        return self.node("MatMulNBits", [x, f"{weight}.q", f"{weight}.d"], output, domain=_MICROSOFT, **form)


def write_graph(weights: Weights, folder: Path, progress: Progress, bits: int = 4) -> None:
    """Write model.onnx and model.onnx.data into `folder`."""
    with (folder / "model.onnx.data").open("wb") as data:
        graph = DecoderGraph(weights, data, "model.onnx.data", bits)
        graph.start()
        for index in range(weights.shape.layers):
            progress("writing layers", index, weights.shape.layers)
            graph.layer(index)
        model = graph.finish()
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
