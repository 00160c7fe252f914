"""The conversion of a GGUF file: same bytes out, nothing half done, clear refusals, exact weights."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from edge_agent.wire.bundle import content_digest, scan
from models.genai_build import build_genai_folder
from models.gguf_weights import GgufWeights, UnsupportedModel


def test_the_same_file_gives_the_same_folder(smollm2_gguf: Path, tmp_path: Path) -> None:
    told: list[int] = []
    first = build_genai_folder(smollm2_gguf, tmp_path / "a", lambda _, done, total: told.append(done))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "left-over").write_text("of an older build")
    second = build_genai_folder(smollm2_gguf, tmp_path / "b")
    assert first == second == content_digest(scan(tmp_path / "b"))
    assert told == list(range(30))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_the_graph_holds_the_weights_exactly(smollm2_gguf: Path, smollm2_folder: Path) -> None:
    weights = GgufWeights(smollm2_gguf)
    model = onnx.load(smollm2_folder / "model.onnx", load_external_data=False)
    data = np.memmap(smollm2_folder / "model.onnx.data", mode="r")
    arrays = {}
    for tensor in model.graph.initializer:
        if tensor.name.startswith("blk.3.ffn_down.") and tensor.external_data:
            where = {entry.key: entry.value for entry in tensor.external_data}
            raw = data[int(where["offset"]) :][: int(where["length"])]
            arrays[tensor.name] = raw.view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tensor.dims)
    packed = arrays["blk.3.ffn_down.q"]
    quants = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1, 32).astype(np.float64)
    scale = arrays["blk.3.ffn_down.d"].reshape(quants.shape[:2])[..., None]
    rebuilt = scale * (quants - 8) + arrays["blk.3.ffn_down.c"].T[..., None]
    # the sum m + 8d is the only rounding, to float32
    np.testing.assert_allclose(
        rebuilt.reshape(packed.shape[0], -1), weights.dense("blk.3.ffn_down.weight"), atol=2e-7, rtol=1e-5
    )


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 100])
def test_a_file_that_is_no_model_is_refused_and_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(UnsupportedModel, match=r"bad\.gguf"):
        build_genai_folder(tmp_path / "bad.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


def test_a_cut_file_is_refused(smollm2_gguf: Path, tmp_path: Path) -> None:
    with smollm2_gguf.open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(4 << 20))
    with pytest.raises(UnsupportedModel, match=r"cut\.gguf"):
        build_genai_folder(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
