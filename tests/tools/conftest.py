"""The real networks as a tool's context."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from edge_agent.agent.tool import ToolError
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.errors import Refused
from edge_agent.wire.tensor import Tensor
from models.ppocr import finish


class EngineContext:
    """A tool's context over engines in this process, with a clock that is set by hand."""

    def __init__(self, networks: Mapping[str, OnnxNetwork], now: float = 1_800_000_000.0) -> None:
        self.networks, self.time = networks, now

    def infer(self, model: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if model not in self.networks:
            raise ToolError(f"{model} is not installed")
        try:
            return self.networks[model].infer(inputs)
        except Refused as error:
            raise ToolError(str(error)) from error

    def now(self) -> float:
        return self.time


@pytest.fixture(scope="session")
def networks(ppocr_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, OnnxNetwork]:
    """PP-OCRv6 detection and finished recognition on this machine's CPU."""
    recognizer = finish(ppocr_models["rec"], tmp_path_factory.mktemp("rec") / "ppocr-rec.onnx")
    return {"ppocr-det": OnnxNetwork(ppocr_models["det"]), "ppocr-rec": OnnxNetwork(recognizer)}


@pytest.fixture
def ctx(networks: dict[str, OnnxNetwork]) -> EngineContext:
    return EngineContext(networks)


@pytest.fixture
def bare_ctx() -> EngineContext:
    """A device with no network installed."""
    return EngineContext({})
