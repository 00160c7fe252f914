"""Rows of several requests as one run, and its answers apart again.

Invariants: only requests that agree in everything but the first dimension are joined; what is parted has as many rows
as were joined, or nothing is. Tensors are C-order bytes, so joining is concatenating.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

from edge_agent.errors import Refused
from edge_agent.wire.tensor import Tensor

Tensors = Mapping[str, Tensor]


def alike(model: str, inputs: Tensors) -> tuple[Hashable, int]:
    """What requests must have in common to run together, and this one's rows; None when it must run alone."""
    rows = {tensor.shape[0] if tensor.shape else 0 for tensor in inputs.values()}
    if len(rows) != 1 or (count := rows.pop()) < 1:
        return None, 1
    if any(len(t.data) % count or math.prod(t.shape) == 0 for t in inputs.values()):
        return None, 1
    shapes = ((name, t.dtype, tuple(t.shape[1:]), len(t.data) // count) for name, t in sorted(inputs.items()))
    return (model, *shapes), count


def joined(asked: Sequence[Tensors]) -> Tensors:
    """The inputs of one run."""
    if len(asked) == 1:
        return asked[0]
    return {name: _join([inputs[name] for inputs in asked]) for name in asked[0]}


def parted(outputs: Tensors, rows: Sequence[int]) -> list[dict[str, Tensor]]:
    """The outputs of each request. Raises Refused when an output's first dimension is not the rows."""
    total, answers = sum(rows), [dict[str, Tensor]() for _ in rows]
    for name, tensor in outputs.items():
        if not tensor.shape or tensor.shape[0] != total:
            raise Refused(f"output {name} has shape {tensor.shape} for {total} rows", "serve it with max_batch = 1")
        row, start = len(tensor.data) // total, 0
        for answer, count in zip(answers, rows, strict=True):
            data = tensor.data[start * row : (start + count) * row]
            answer[name] = Tensor(tensor.dtype, [count, *tensor.shape[1:]], data)
            start += count
    return answers


def _join(parts: Sequence[Tensor]) -> Tensor:
    rows = sum(part.shape[0] for part in parts)
    return Tensor(parts[0].dtype, [rows, *parts[0].shape[1:]], b"".join(part.data for part in parts))
