"""What an engine of TensorRT for RTX holds, read with no GPU: no interface of TensorRT tells it without one.

The header (form, size, version, compute capabilities) and the text of the compiled graph (the ONNX layers it came from,
the types and sizes of its constants) were read off engines of TensorRT for RTX 1.7; NVIDIA documents neither.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from typing import NamedTuple

from edge_agent.engines.tensorrt_build import CAPABILITIES, MAGIC

HEADER = struct.Struct("<4s4xQQ4B4sQ")  # magic, form, size of the file, version, magic, bits of compute capabilities


class Contents(NamedTuple):
    """`weights` are bytes of constants by element type."""

    version: str
    targets: list[str]
    layers: list[str]
    weights: dict[str, int]


def contents(engine: bytes) -> Contents:
    fields = HEADER.unpack(engine[: HEADER.size])
    assert fields[0] == fields[7] == MAGIC
    assert fields[2] == len(engine)
    targets = [name for bit, name in enumerate(CAPABILITIES) if fields[8] >> bit & 1]
    layers = {name.decode(errors="replace") for name in re.findall(rb"\[ONNX Layer: ([^\]\n]{1,500})\]", engine)}
    weights: Counter[str] = Counter()
    for size, kind in re.findall(rb"tensor=\{[^{}\n]*\bconst_payload_size=(\d+)[^\n]*?\btype=(\w+) \}", engine):
        weights[kind.decode()] += int(size)
    return Contents(".".join(map(str, fields[3:7])), targets, sorted(layers), dict(weights))
