"""An adapter in the weights: what it changes, what it leaves, what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from models.errors import ModelError
from models.gguf_weights import GgufWeights
from models.toolcaller.adapter import write_adapter
from models.toolcaller.cli import app
from models.toolcaller.merge import MergedWeights, quantize

NAME = "blk.2.attn_q.weight"


def adapter(folder: Path, key: str = "layers.2.attn_q", rank: int = 4, width: int = 576) -> Path:
    random = np.random.default_rng(1)
    a, b = random.normal(size=(rank, 576)), random.normal(size=(width, rank)) * 0.01
    np.savez(folder / "adapter.npz", **{f"{key}.a": a.astype(np.float16), f"{key}.b": b.astype(np.float16)})
    (folder / "plan.json").write_text('{"alpha": 8, "rank": 4}')
    return folder


def dense(blocks: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    quants, step, least = blocks
    return (step[..., None] * quants + least[..., None]).reshape(quants.shape[0], -1)


def test_what_was_quantized_is_quantized_to_itself(smollm2_gguf: Path) -> None:
    matrix = GgufWeights(smollm2_gguf).dense(NAME)
    assert np.abs(dense(quantize(matrix)) - matrix).max() < 1e-5


def test_a_merged_matrix_is_base_plus_product_within_half_a_step(smollm2_gguf: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    base, merged = GgufWeights(smollm2_gguf), MergedWeights(smollm2_gguf, folder)
    with np.load(folder / "adapter.npz") as file:
        wanted = base.dense(NAME) + 2.0 * file["layers.2.attn_q.b"].astype(np.float32) @ file["layers.2.attn_q.a"]
    np.testing.assert_allclose(merged.dense(NAME), wanted, atol=1e-6)
    blocks = merged.q4_1(NAME)
    error = (dense(blocks) - wanted).reshape(blocks[0].shape)
    spread = np.ptp(wanted.reshape(blocks[0].shape), axis=-1, keepdims=True)
    assert np.sqrt((error**2).mean()) < (spread / 15).mean() / 3
    other = "blk.3.attn_q.weight"
    assert np.array_equal(merged.q4_1(other)[0], base.q4_1(other)[0])
    assert np.array_equal(merged.dense(other), base.dense(other))


@pytest.mark.parametrize(("key", "width"), [("layers.99.attn_q", 576), ("layers.2.attn_q", 192), ("embedding", 576)])
def test_an_adapter_of_another_model_is_refused(smollm2_gguf: Path, tmp_path: Path, key: str, width: int) -> None:
    with pytest.raises(ModelError):
        MergedWeights(smollm2_gguf, adapter(tmp_path, key, width=width)).q4_1(NAME)


def test_what_ships_of_a_run_merges_as_the_run_does(smollm2_gguf: Path, tmp_path: Path) -> None:
    write_adapter(adapter(tmp_path), tmp_path / "ships", "0" * 64)
    ships, run = MergedWeights(smollm2_gguf, tmp_path / "ships"), MergedWeights(smollm2_gguf, tmp_path)
    change = run.dense(NAME) - GgufWeights(smollm2_gguf).dense(NAME)
    assert np.abs(ships.dense(NAME) - run.dense(NAME)).max() < 0.03 * np.abs(change).max()


def test_what_is_no_adapter_is_refused(smollm2_gguf: Path, tmp_path: Path) -> None:
    (adapter(tmp_path) / "adapter.npz").write_bytes(b"not a zip")
    with pytest.raises(ModelError, match="no readable adapter"):
        MergedWeights(smollm2_gguf, tmp_path)


@pytest.mark.parametrize("command", [["adapter"], ["merge"], ["merge", "--bits", "5"]])
def test_a_folder_that_is_no_run_is_told(command: list[str], model_cache: Path, tmp_path: Path) -> None:
    adapter(tmp_path)
    plan = '{"alpha": 2, "rank": 1}' if "--bits" in command else "{}"
    (tmp_path / "plan.json").write_text(plan)
    arguments = [*command, str(tmp_path), "--out", str(tmp_path / "out"), "--cache", str(model_cache)]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 1
    assert said.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()
