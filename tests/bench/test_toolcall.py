"""The race to a complete call: its cases are right by their own tools, and its rows have the form of all benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from bench import toolcall
from bench.rows import FIELDS, show
from edge_agent.agent import grammar
from edge_agent.agent.calls import Call, parse, render, validate
from edge_agent.agent.decide import Speaker
from edge_agent.agent.tool import ToolSpec
from edge_agent.engines.base import Generate, Piece


def test_every_utterance_has_one_right_call_of_its_tools() -> None:
    sizes = toolcall.catalogues()
    assert {size: len(specs) for size, (specs, _) in sizes.items()} == {"ten": 10, "fifty": 50}
    for specs, cases in sizes.values():
        assert len({spec.name for spec in specs}) == len(specs)
        assert len({case.text for case in cases}) == len(cases) >= 30
        grammar.build(specs)
        for case in cases:
            call = parse(case.call)
            assert isinstance(call, Call)
            assert render(validate(call, specs)) == case.call
    specs, cases = sizes["fifty"]
    assert {spec.name for spec in specs[10:]} <= {case.call.partition("(")[0] for case in cases}
    assert not {case.text for case in sizes["ten"][1]} & {case.text for case in cases}


class Engine:
    """Says the same to everything."""

    def __init__(self, *pieces: str) -> None:
        self.pieces, self.asked = pieces, Generate("", "")

    def generate(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Piece]:
        self.asked = request
        return (Piece(piece) for piece in self.pieces)


def opening(seen: list[str], wrong: str = "") -> toolcall.Open:
    answers = {case.text: case.call for _, cases in toolcall.catalogues().values() for case in cases}

    if wrong:
        answers["Stop feeding pen 4."] = wrong

    @contextmanager
    def opened(specs: Sequence[ToolSpec]) -> Iterator[toolcall.Ask]:
        seen.append(f"opened with {len(specs)}")
        yield lambda text: seen.append(text) or answers.get(text, "none()")

    return opened


def test_a_model_is_asked_as_the_agent_asks_it_and_its_call_validated() -> None:
    specs, _ = toolcall.catalogues()["ten"]
    engine = Engine("feed_pen(pen=", "3, kilograms=40)")
    assert toolcall.ask(engine, Speaker(adapter="a"), specs, "Feed them!") == "feed_pen(pen=3, kilograms=40.0)"
    assert engine.asked.adapter == "a"
    assert "Feed them!" in engine.asked.prompt
    assert "none()" in engine.asked.grammar
    assert toolcall.ask(Engine('answer("hm")'), Speaker(), specs, "Feed them!") == 'answer("hm")'
    assert "out of range" in toolcall.ask(Engine("feed_pen(pen=13, kilograms=1)"), Speaker(), specs, "Feed them!")


def test_the_peers_calls_are_validated_too() -> None:
    specs, _ = toolcall.catalogues()["ten"]
    said = '{"name": "stop_feeding", "arguments": {"pen": 4}}'
    assert toolcall.from_json(said, specs) == "stop_feeding(pen=4)"
    assert toolcall.from_json('{"name": "none", "arguments": {}}', specs) == "none()"
    for bad in (said[:-9], said.replace("4", "40"), '{"name": "stop_feeding"}', "[]"):
        assert toolcall.from_json(bad, specs).startswith(bad)


def test_rows_have_the_form_of_all_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    ours: list[str] = []
    show(toolcall.rows(toolcall.catalogues(), opening(ours, "none()"), opening([]), "a peer"), True)
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    warm = {"ten", "ten.p95", "fifty", "fifty.p95"}
    cold = {"ten.cold", "ten.start", "fifty.cold", "fifty.start"}
    assert set(rows) == warm | cold | {"llama", "llama.cold", "right"}
    assert all(set(FIELDS) <= set(row) for row in rows.values())
    assert all((row["peer"] is None) == (row["ratio"] is None) for row in rows.values())
    assert {name for name, row in rows.items() if row["peer"]} == {"llama", "llama.cold"}
    assert {name for name, row in rows.items() if "goal" in row} == set(toolcall.GOALS)
    assert rows["ten"]["held"]
    assert (rows["right"]["unit"], rows["right"]["ten"], rows["right"]["fifty"]) == ("share", 0.969, 1.0)
    assert rows["right"]["n"] == rows["ten"]["n"] + rows["fifty"]["n"]
    openings = [at for at, text in enumerate(ours) if text.startswith("opened")]
    asked = [ours[at:end] for at, end in zip(openings, [*openings[1:], None], strict=True)]
    assert all(len(set(texts)) == len(texts) for texts in asked)  # a text is asked once of a model


def test_without_the_peer_our_rows_remain() -> None:
    rows = {row["name"]: row for row in toolcall.rows(toolcall.catalogues(), opening([]), None, "")}
    assert {"ten", "fifty", "ten.cold", "right"} <= set(rows)
    assert not {"llama", "llama.cold"} & set(rows)
    assert {row["peer"] for row in rows.values()} == {None}
    assert rows["right"]["value"] == 1
