"""Answers to inputs that came before, by their hash.

Invariants: at most `limit` bytes are kept, the least recently used go first; a model's go with it.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping

from edge_agent.wire.tensor import Tensor

Tensors = Mapping[str, Tensor]


def key(inputs: Tensors) -> bytes:
    """A digest of names, types, shapes and data."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(inputs.items()):
        digest.update(repr((name, tensor.dtype, tensor.shape, len(tensor.data))).encode())
        digest.update(tensor.data)
    return digest.digest()


class Cache:
    """The answers of one model; used from two threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size, self._lock = limit, 0, threading.Lock()
        self._kept: OrderedDict[bytes, dict[str, Tensor]] = OrderedDict()

    def get(self, of: bytes) -> dict[str, Tensor] | None:
        with self._lock:
            if of in self._kept:
                self._kept.move_to_end(of)
            return self._kept.get(of)

    def put(self, of: bytes, outputs: dict[str, Tensor]) -> None:
        """Keep an answer, if it fits at all."""
        with self._lock:
            if of in self._kept or _size(outputs) > self._limit:
                return
            self._kept[of] = {n: Tensor(t.dtype, t.shape, bytes(t.data)) for n, t in outputs.items()}  # views pass
            self._size += _size(outputs)
            while self._size > self._limit:
                self._size -= _size(self._kept.popitem(last=False)[1])


def _size(outputs: Tensors) -> int:
    return sum(len(tensor.data) + 200 for tensor in outputs.values())
