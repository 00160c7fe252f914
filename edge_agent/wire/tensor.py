"""An array that crosses a process or a file: numpy dtype name, shape, C-order bytes."""

import msgspec


class Tensor(msgspec.Struct, frozen=True):
    """dtype is numpy's name (`float32`), data is C-order and `len(data) == prod(shape) * itemsize`."""

    dtype: str
    shape: list[int]
    data: bytes
