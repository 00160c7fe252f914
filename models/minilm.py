"""all-MiniLM-L6-v2 as an ONNX graph, from the weights of its package, with no PyTorch.

Invariants: the graph takes `ids` and `mask` (batch, tokens) int64, tokens at most 512, and gives `vectors` (batch, 384)
float32, unit length: the mean of the last layer over the tokens that the mask has. Sources: Devlin et al. 2018
(arXiv:1810.04805) for the layers, Reimers and Gurevych 2019 (arXiv:1908.10084) for the pooling.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.errors import ModelError
from models.fetch import Progress, quiet

LAYERS, WIDTH, HEADS = 6, 384, 12
EPSILON = 1e-12


def make(source: Path, target: Path, _: Progress = quiet) -> Path:
    """Write the graph of a weight file. Raises ModelError when it is another file."""
    try:
        graph = _Graph(read(source))
        model = graph.build()
    except (LookupError, ValueError, TypeError) as error:
        raise ModelError(f"{source.name} holds no MiniLM-L6 weights: {error}") from error
    onnx.checker.check_model(model)
    onnx.save(model, str(target))
    return target


def read(source: Path) -> dict[str, NDArray[np.float32]]:
    """The float32 tensors of a safetensors file (huggingface.co/docs/safetensors, "Format")."""
    data = source.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if entry.get("dtype") == "F32":
            first, last = (start + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(data[first:last], "<f4").reshape(entry["shape"])
    return found


def probe() -> dict[str, NDArray[Any]]:
    """Two short texts, one of them padded."""
    ids = np.array([[101, 2129, 3231, 2003, 2240, 1016, 102], [101, 6519, 102, 0, 0, 0, 0]], np.int64)
    return {"ids": ids, "mask": (ids > 0).astype(np.int64)}


class _Graph:
    def __init__(self, weights: dict[str, NDArray[np.float32]]) -> None:
        self._weights, self._nodes, self._constants, self._n = weights, [], [], 0  # type: ignore[var-annotated]

    def build(self) -> onnx.ModelProto:
        tokens = self._add("Unsqueeze", self._add("Range", self._int(0), self._tokens(), self._int(1)), self._ints(0))
        x = self._add("Add", self._gather("word", "ids"), self._gather("position", tokens))
        x = self._norm("embeddings.LayerNorm", self._add("Add", x, self._constant(self._types())))
        wide = self._add("Cast", self._add("Unsqueeze", "mask", self._ints(1, 2)), to=TensorProto.FLOAT)
        bias = self._add("Mul", self._add("Sub", wide, self._float(1)), self._float(1e9))
        for n in range(LAYERS):
            x = self._layer(f"encoder.layer.{n}", x, bias)
        kept = self._add("Cast", self._add("Unsqueeze", "mask", self._ints(2)), to=TensorProto.FLOAT)
        total = self._add("ReduceSum", self._add("Mul", x, kept), self._ints(1), keepdims=0)
        length = self._add("Max", self._add("ReduceL2", total, self._ints(1)), self._float(1e-9))
        self._nodes.append(helper.make_node("Div", [total, length], ["vectors"]))
        shape = ["batch", "tokens"]
        graph = helper.make_graph(
            self._nodes,
            "minilm",
            [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("ids", "mask")],
            [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["batch", WIDTH])],
            self._constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    def _layer(self, name: str, x: str, bias: str) -> str:
        q, k, v = (self._heads(self._dense(f"{name}.attention.self.{part}", x)) for part in ("query", "key", "value"))
        scores = self._add("MatMul", q, self._add("Transpose", k, perm=[0, 1, 3, 2]))
        scaled = self._add("Mul", scores, self._float((WIDTH // HEADS) ** -0.5))
        shares = self._add("Softmax", self._add("Add", scaled, bias), axis=-1)
        mixed = self._add("Transpose", self._add("MatMul", shares, v), perm=[0, 2, 1, 3])
        flat = self._dense(f"{name}.attention.output.dense", self._add("Reshape", mixed, self._ints(0, 0, WIDTH)))
        x = self._norm(f"{name}.attention.output.LayerNorm", self._add("Add", flat, x))
        inner = self._add("Gelu", self._dense(f"{name}.intermediate.dense", x))
        return self._norm(f"{name}.output.LayerNorm", self._add("Add", self._dense(f"{name}.output.dense", inner), x))

    def _heads(self, x: str) -> str:
        split = self._add("Reshape", x, self._ints(0, 0, HEADS, WIDTH // HEADS))
        return self._add("Transpose", split, perm=[0, 2, 1, 3])

    def _dense(self, name: str, x: str) -> str:
        product = self._add("MatMul", x, self._constant(self._weights[f"{name}.weight"].T))
        return self._add("Add", product, self._constant(self._weights[f"{name}.bias"]))

    def _norm(self, name: str, x: str) -> str:
        scale, bias = (self._constant(self._weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        return self._add("LayerNormalization", x, scale, bias, axis=-1, epsilon=EPSILON)

    def _gather(self, kind: str, ids: str) -> str:
        return self._add("Gather", self._constant(self._weights[f"embeddings.{kind}_embeddings.weight"]), ids)

    def _types(self) -> NDArray[np.float32]:
        first: NDArray[np.float32] = self._weights["embeddings.token_type_embeddings.weight"][0]
        return first

    def _tokens(self) -> str:
        return self._add("Squeeze", self._add("Shape", "ids", start=1, end=2))

    def _add(self, op: str, *inputs: str, **attributes: Any) -> str:
        self._n += 1
        name = f"{op.lower()}{self._n}"
        self._nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def _constant(self, value: NDArray[Any]) -> str:
        self._n += 1
        name = f"w{self._n}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _int(self, value: int) -> str:
        return self._constant(np.array(value, np.int64))

    def _ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def _float(self, value: float) -> str:
        return self._constant(np.array(value, np.float32))
