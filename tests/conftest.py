"""Model files for the tests: fetched and built once into the cache (`OUTRIDER_CACHE`, default `.cache`)."""

import os
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("OUTRIDER_CACHE") or Path(__file__).parents[1] / ".cache")


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """The folder that keeps fetched and built models between runs."""
    return CACHE


@pytest.fixture(scope="session")
def smollm2_gguf(model_cache: Path) -> Path:
    """SmolLM2-135M-Instruct, Q4_1, GGUF."""
    from models.fetch import fetch

    return fetch("smollm2", model_cache)


@pytest.fixture(scope="session")
def smollm2_folder(model_cache: Path) -> Path:
    """The onnxruntime-genai folder built from `smollm2_gguf`."""
    from models.package import build

    return build("smollm2", model_cache)


@pytest.fixture(scope="session")
def ppocr_models(model_cache: Path) -> dict[str, Path]:
    """The PP-OCRv6 ONNX files: `det` and `rec`."""
    from models.fetch import fetch

    return {part: fetch(f"ppocr-{part}", model_cache) for part in ("det", "rec")}
