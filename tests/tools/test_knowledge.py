"""The memory as tools: with the real embedding network where it is built, by words alone where it is not."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner, Result

from edge_agent.agent.tool import ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.wire.tensor import Tensor
from models.fetch import fetch
from models.package import build
from tools.knowledge import WordPiece, pack
from tools.knowledge_cli import app


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


def install(root: Path, bundle: str, version: str, **documents: str | bytes) -> None:
    files = root / bundle / "versions" / version / "files"
    for name, text in documents.items():
        path = files / "documents" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    files.mkdir(parents=True, exist_ok=True)
    link = root / bundle / "current"
    link.unlink(missing_ok=True)
    link.symlink_to(Path("versions") / version)


def test_documents_of_bundles_come_and_go_with_their_versions(tmp_path: Path) -> None:
    bundles, state = tmp_path / "bundles", tmp_path / "tools"
    state.mkdir()
    install(bundles, "manuals", "v1", pump="# Pump\n\nPrime it with water.", fan="# Fan\n\nDust it weekly.")
    install(bundles, "other", "v1", broken=b"\xff\xfe", press="# Press\n\nGrease the slide.")

    def sources() -> list[str]:
        call = {t.spec.name: t.function for t in pack(state, {})}  # as after a restart
        return sorted(source.partition(" (")[0] for source in call["list_sources"]()["sources"])

    assert sources() == ["manuals/fan.md", "manuals/pump.md", "other/press.md"]
    call = {t.spec.name: t.function for t in pack(state, {})}
    call["forget"](source="manuals/fan.md")
    assert sources() == ["manuals/pump.md", "other/press.md"]  # what somebody forgot stays so while the version does
    install(bundles, "manuals", "v2", pump="# Pump\n\nPrime it with oil.")
    found = call["search_knowledge"](question="what is the pump primed with", ctx=Networks(None))
    assert (found["passages"][0]["source"], found["passages"][0]["text"]) == ("manuals/pump.md", "Prime it with oil.")
    assert sources() == ["manuals/pump.md", "other/press.md"]
    (bundles / "manuals/current").unlink()
    assert sources() == ["other/press.md"]


def test_the_vocabulary_comes_with_the_bundle_of_the_network_also_later_on(tmp_path: Path, model_cache: Path) -> None:
    state = tmp_path / "tools"
    state.mkdir()
    call = {t.spec.name: t.function for t in pack(state, {})}
    call["remember"](topic="fan", text="Dust the ventilator weekly.", ctx=Networks(None))
    question = "upkeep of a fan"
    assert "no embedding network" in call["search_knowledge"](question=question, ctx=Networks(None))["by"]
    built = build("minilm", model_cache)
    version = tmp_path / "bundles/minilm/versions/v1"
    version.mkdir(parents=True)
    (version / "files").symlink_to(built)
    (tmp_path / "bundles/minilm/current").symlink_to("versions/v1")
    assert call["search_knowledge"](question=question, ctx=Networks(built))["by"] == "words and meaning"


def outrider(*argv: str) -> Result:
    return CliRunner().invoke(app, argv)


def test_documents_are_added_listed_found_and_forgotten_from_the_command_line_while_the_tools_run(
    tmp_path: Path,
) -> None:
    state, manual = tmp_path / "state", tmp_path / "manual.md"
    state.mkdir()
    manual.write_text("# Pump\n\nPrime the pump with clean water.\n\n# Fan\n\nDust it weekly.")
    own = ("--state", str(state))
    (state / "tools").mkdir()
    call = {t.spec.name: t.function for t in pack(state / "tools", {})}
    assert outrider("add", str(manual), *own).output == "kept manual.md in 2 parts\n"
    assert json.loads(outrider("add", str(manual), "--name", "m", "--json", *own).output) == {"m": 2}
    assert {name.partition(" ")[0] for name in call["list_sources"]()["sources"]} == {"m", "manual.md"}
    call["remember"](topic="shift", text="Line 2 was oiled.", ctx=Networks(None))
    assert "note: shift" in outrider("list", *own).output
    assert json.loads(outrider("list", "--json", *own).output)[0]["name"] == "note: shift"
    found = outrider("search", "prime the pump", "--count", "1", *own)
    assert (found.exit_code, found.output.splitlines()) == (
        0,
        ["manual.md, part 1: Pump", "  Prime the pump with clean water."],
    )
    assert outrider("search", "zebra", *own).exit_code == 1
    assert outrider("forget", "m", "none", *own).exit_code == 1
    assert json.loads(outrider("search", "dust", "--json", *own).output)[0]["source"] == "manual.md"


def test_what_cannot_be_kept_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, image = tmp_path / "state", tmp_path / "image.png"
    image.write_bytes(b"\x89PNG\xff")
    own = ("--state", str(state))
    assert "no state directory" in str(outrider("list", *own).exception)
    state.mkdir()
    assert "cannot be read" in str(outrider("add", str(image), *own).exception)
    assert "--name is for one file" in str(outrider("add", str(image), str(image), "--name", "x", *own).exception)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert "run it as that user" in str(outrider("list", *own).exception)
