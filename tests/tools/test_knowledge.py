"""The memory as tools: with the real embedding network where it is built, by words alone where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edge_agent.agent.tool import ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.wire.tensor import Tensor
from models.fetch import fetch
from models.package import build
from tools.knowledge import WordPiece, pack


class Networks:
    """What a tool may ask of the device, with the network in this process."""

    def __init__(self, model: Path | None) -> None:
        self._session = onnxruntime.InferenceSession(str(model / "model.onnx")) if model else None

    def infer(self, model: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._session is None:
            raise ToolError(f"the network {model} is not installed")
        fed = {name: np.frombuffer(t.data, t.dtype).reshape(t.shape) for name, t in inputs.items()}
        (found,) = self._session.run(None, fed)
        return {"vectors": Tensor("float32", list(found.shape), found.tobytes())}

    def now(self) -> float:
        return 1.0


def test_words_alone_serve_until_the_network_is_there(tmp_path: Path, model_cache: Path) -> None:
    vocabulary = fetch("minilm", model_cache).with_name("vocab.txt")
    call = {t.spec.name: t.function for t in pack(tmp_path, {"vocabulary": str(vocabulary)})}
    (tmp_path / "documents/manual.md").write_text(
        "# Pump\n\nPrime the pump with clean water.\n\n# Fan\n\nDust it weekly."
    )
    without, network = Networks(None), Networks(build("minilm", model_cache))
    assert "found by words alone" in call["add_document"](name="manual.md", ctx=without)
    found = call["search_knowledge"](question="how is the pump primed", ctx=without)
    assert (found["passages"][0]["source"], found["passages"][0]["title"]) == ("manual.md", "Pump")
    assert "no embedding network" in found["by"]
    found = call["search_knowledge"](question="upkeep of a ventilator", ctx=network)
    assert (found["passages"][0]["title"], found["by"]) == ("Fan", "words and meaning")
    assert call["remember"](topic="shift", text="Line 2 was oiled.", ctx=network) == "kept note: shift in 1 parts"
    assert call["forget"](source="note: shift") == "forgot note: shift"
    assert call["list_sources"]() == {"sources": ["manual.md (2 parts)"]}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "gone.md"])
def test_documents_come_from_their_folder_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("s")
    call = {t.spec.name: t.function for t in pack(tmp_path, {})}
    with pytest.raises(ToolError, match="there is no document"):
        call["add_document"](name=name, ctx=Networks(None))


def test_several_packs_load_with_their_own_options(tmp_path: Path) -> None:
    tools = load("tools.sim.pack,tools.knowledge", tmp_path, {"seed": "3", "knowledge.days": "30"})
    assert {"read_sensor", "search_knowledge"} <= {tool.spec.name for tool in tools}


def test_word_pieces_are_berts(model_cache: Path) -> None:
    words = WordPiece(fetch("minilm", model_cache).with_name("vocab.txt").read_text().splitlines())
    # by the tokenizer that came with the weights
    assert words.ids("naïve Café — 你好 unaffable $5.00") == [
        101, 15743, 7668, 1517, 100, 100, 14477, 20961, 3468, 1002, 1019, 1012, 4002, 102,
    ]  # fmt: skip
    assert len(words.ids("word " * 999)) == 256
