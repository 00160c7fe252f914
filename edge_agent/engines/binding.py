"""An input or output of a network as its engine declares it, and the one check of a tensor against it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import numpy as np

from edge_agent.errors import Refused
from edge_agent.wire.tensor import Tensor

Shape = tuple[int, ...]
_FLOATS = ("float16", "float32", "float64")


class Binding(msgspec.Struct, frozen=True):
    """Name, dtype, shape: -1 is a free dimension, `ranges` the (min, max) of each profile of a compiled engine."""

    name: str
    dtype: str
    shape: Shape
    ranges: list[tuple[Shape, Shape]] = []

    def __str__(self) -> str:
        dims = ", ".join("?" if dim < 0 else str(dim) for dim in self.shape)
        within = " or ".join(f"{list(low)} to {list(high)}" for low, high in self.ranges)
        return f"{self.name}: {self.dtype}[{dims}]" + (f" from {within}" if -1 in self.shape and within else "")

    def array(self, tensor: Tensor) -> np.ndarray:
        """The tensor as an array. Raises Refused for a wrong dtype, rank, fixed dimension or length."""
        fits = len(tensor.shape) == len(self.shape) and all(
            got >= 1 and want in (-1, got) for got, want in zip(tensor.shape, self.shape, strict=True)
        )
        if tensor.dtype != self.dtype or not fits:
            raise Refused(f"{self.name} is {tensor.dtype}{list(tensor.shape)}, the model takes {self}")
        expected = math.prod(tensor.shape) * np.dtype(self.dtype).itemsize
        if len(tensor.data) != expected:
            raise Refused(f"{self.name} has {len(tensor.data)} bytes of data, its shape needs {expected}")
        return np.frombuffer(tensor.data, self.dtype).reshape(tensor.shape)

    def zeros(self, size: int) -> np.ndarray:
        """Zeros of this shape, free dimensions as `size` and a free first one as 1."""
        return np.zeros([dim if dim >= 0 else size if axis else 1 for axis, dim in enumerate(self.shape)], self.dtype)


def check_finite(inputs: Mapping[str, Tensor]) -> None:
    """Raises Refused for a floating-point input with NaN or infinite values."""
    for name, tensor in inputs.items():
        if tensor.dtype not in _FLOATS or len(tensor.data) % np.dtype(tensor.dtype).itemsize:
            continue
        values = np.frombuffer(tensor.data, tensor.dtype)
        if tensor.dtype == "float16":  # numpy has no fast form of it: its exponent tells
            bad = ((values.view(np.uint16) & 0x7C00) == 0x7C00).any()
        else:
            bad = not np.isfinite(values).all()
        if bad:
            hint = "mend what made it, or serve the model with finite = false where such values are meant"
            raise Refused(f"{name} has NaN or infinite values", hint)
