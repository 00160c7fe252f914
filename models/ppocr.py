"""The PP-OCR recognition network, finished so that it speaks text.

Invariants: the published network gives class probabilities (batch, step, 18,710), 3 MB for a line of 320 pixels,
and keeps its character list in its metadata. The finished one gives `codepoint` (int32, 0 is the CTC blank) and
`confidence` (float32), both (batch, step): the same answer in a few hundred bytes, and the list cannot be mixed up.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.errors import ModelError
from models.fetch import Progress, quiet


def finish(source: Path, target: Path, _: Progress = quiet) -> Path:
    """Append arg max, its probability and the code point lookup. Raises ModelError when it is another network."""
    model = onnx.load(str(source))
    graph = model.graph
    listed = next((p.value for p in model.metadata_props if p.key == "character"), "")
    characters = listed.rstrip("\n").split("\n")
    probabilities = graph.output[0]
    classes = probabilities.type.tensor_type.shape.dim[-1].dim_value
    if len(graph.output) != 1 or any(len(c) != 1 for c in characters) or classes != len(characters) + 2:
        raise ModelError(
            f"{source.name} is no PP-OCR recognition network: {len(characters)} characters, {classes} classes"
        )
    points = np.array([0, *map(ord, characters), ord(" ")], np.int32)
    graph.initializer.append(numpy_helper.from_array(points, "codepoints"))
    name = probabilities.name
    graph.node.extend(
        [
            helper.make_node("ArgMax", [name], ["best"], axis=2, keepdims=0),
            helper.make_node("Gather", ["codepoints", "best"], ["codepoint"]),
            helper.make_node("ReduceMax", [name], ["confidence"], axes=[2], keepdims=0),
        ]
    )
    dims = ["batch", "steps"]
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("codepoint", TensorProto.INT32, dims))
    graph.output.append(helper.make_tensor_value_info("confidence", TensorProto.FLOAT, dims))
    onnx.checker.check_model(model)
    onnx.save(model, str(target))
    return target
