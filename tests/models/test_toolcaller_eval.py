"""The evaluation says what it means: conversion, BFCL's own checker, intervals, calibration, and what is kept apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.agent import grammar, prompt
from edge_agent.agent.calls import Call, render_all
from edge_agent.engines.base import EngineInfo, Generate, Piece
from edge_agent.errors import Refused
from models.errors import ModelError
from models.toolcaller.evaluate import bfcl, figures, run
from models.toolcaller.evaluate.convert import convert

AREA = {
    "name": "geometry.area-of",
    "description": "The area of a shape.",
    "parameters": {
        "type": "dict",
        "required": ["shape", "sides"],
        "properties": {
            "shape": {"type": "string", "enum": ["square", "rectangle"], "description": "What it is."},
            "sides": {"type": "array", "items": {"type": "float"}, "description": "Lengths."},
            "unit": {"type": "string", "description": "Default is cm."},
            "class": {"type": "integer", "enum": [1, 2], "description": "Accuracy."},
            "style": {"type": "dict", "properties": {"bold": {"type": "boolean"}}, "description": "How."},
            "extra": {"type": "any", "description": "Anything."},
        },
    },
}
ANSWER = {"geometry.area-of": {"shape": ["rectangle"], "sides": [[2.0, 3.0]], "unit": ["", "cm"]}}
GOOD = 'geometry_area_of(shape="rectangle", sides=[2, 3])'


def case(
    category: str = "simple_python",
    answers: list[dict[str, Any]] | None = None,
    id: str = "mine_1",
    text: str = "How large is a rectangle of 2 by 3?",
) -> bfcl.Case:
    asked = [("system", "Be brief."), ("user", text)]
    return bfcl.Case(id, category, asked, [AREA], None if "relevance" in category else answers or [ANSWER])


@pytest.fixture(scope="session")
def check(model_cache: Path) -> bfcl.Check:
    try:
        return bfcl.checker(bfcl.fetch_wheel(model_cache))
    except ModelError as error:
        pytest.skip(f"bfcl-eval is not here: {error}")


def test_a_schema_becomes_a_tool_and_what_it_cannot_say_is_listed() -> None:
    tools = convert([AREA])
    assert prompt.signature(tools.specs[0]) == (
        'geometry_area_of(shape: "square"|"rectangle" (What it is.), sides: [float] (Lengths.), '
        "unit?: str (Default is cm.), class?: int (one of 1, 2; Accuracy.), style?: {bold?: bool} (How.), "
        "extra?: str (Anything.)) - The area of a shape."
    )
    assert tools.loose == ["choices of integer", "type any"]
    grammar.build(tools.specs, answer=False, several=run.SEVERAL)


def test_names_are_made_identifiers_and_come_back() -> None:
    odd = {"type": "dict", "properties": {"$top": {"type": "integer"}, "_top": {"type": "integer"}}, "required": []}
    tools = convert([{"name": name, "description": "", "parameters": odd} for name in ("a.b", "a_b", "none", "2x")])
    assert [spec.name for spec in tools.specs] == ["a_b", "a_b_2", "none_2", "f_2x"]
    calls = [Call(spec.name, {"_top": 1, "_top_2": 2}) for spec in tools.specs]
    assert tools.back(calls) == [{name: {"$top": 1, "_top": 2}} for name in ("a.b", "a_b", "none", "2x")]


def test_a_tool_of_thirty_optional_arguments_is_converted_and_has_a_grammar_at_once() -> None:
    inner = {f"i{n}": {"type": "string", "description": "x" * 500} for n in range(30)}
    outer = {f"p{n}": {"type": "dict", "properties": inner} for n in range(3)}
    outer |= {f"q{n}": {"type": "integer"} for n in range(30)}
    tools = convert([{"name": "f", "description": "y. " * 300, "parameters": {"properties": outer}}])
    assert len(grammar.build(tools.specs)) < 10**6
    assert len(tools.specs[0].description) <= 600


def test_a_note_is_shown_to_its_end_where_it_says_how_a_value_is_written() -> None:
    note = "Identifier of the service. The list is the same for every branch and is extended now and then. "
    note += "For example, '1' stands for cleaning, '2' for ironing and '3' for both of them."
    found = convert([{"name": "f", "parameters": {"properties": {"service": {"type": "string", "description": note}}}}])
    assert found.specs[0].params[0].about == note


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        (GOOD, ""),
        ('geometry_area_of(shape="rectangle", sides=[2, 3], unit="CM")', ""),
        ('geometry_area_of(shape="square", sides=[2, 3])', "wrong value"),
        ('geometry_area_of(shape="rectangle", sides=[2, 4])', "wrong value"),
        ('geometry_area_of(shape="rectangle", sides=[2, 3], class=1)', ""),
        ('geometry_area_of(shape="round", sides=[2, 3])', "unparsable"),
        ('geometry_area_of(shape="rectangle", si', "unparsable"),
        (f"{GOOD}\n{GOOD}", ""),
        (f"{GOOD}\n{GOOD[:-3]}4])", "extra call"),
        ("none()", "none for a call"),
    ],
)
def test_one_call_is_judged_by_bfcls_own_checker(check: bfcl.Check, text: str, failure: str) -> None:
    assert run.judge(case(), convert([AREA]), text, check) == failure


def test_an_option_is_wrong_where_the_request_gives_a_reason_for_it(check: bfcl.Check) -> None:
    of, text = case(text="How large is a rectangle of 2 by 3, in class 1?"), f"{GOOD[:-1]}, class=1)"
    assert run.judge(of, convert([AREA]), text, check) == "extra argument"


def test_several_calls_are_right_in_any_order_and_the_nearest_error_is_named(check: bfcl.Check) -> None:
    second = {"geometry.area-of": {"shape": ["square"], "sides": [[4.0]], "unit": ["mm"]}}
    of, tools = case("parallel", [ANSWER, second]), convert([AREA])
    other = 'geometry_area_of(shape="square", sides=[4.0], unit="mm")'
    assert run.judge(of, tools, f"{other}\n{GOOD}", check) == ""
    assert run.judge(of, tools, GOOD, check) == "missing call"
    assert run.judge(of, tools, f'{GOOD}\ngeometry_area_of(shape="square", sides=[4.0])', check) == "missing argument"


def test_relevance_asks_only_whether_there_is_a_call(check: bfcl.Check) -> None:
    tools = convert([AREA])
    assert run.judge(case("irrelevance"), tools, "none()", check) == ""
    assert run.judge(case("live_irrelevance"), tools, GOOD, check) == "call for none"
    assert run.judge(case("live_relevance"), tools, GOOD, check) == ""
    assert run.judge(case("live_relevance"), tools, "none()", check) == "none for a call"


class Saying:
    """A model with one answer."""

    info = EngineInfo("fake", "", "fake", "d" * 64, 0.0)

    def __init__(self, text: str, refuse: bool = False) -> None:
        self.text, self.refuse = text, refuse
        self.asked: list[Generate] = []

    def generate(self, request: Generate, cancelled: object) -> Iterator[Piece]:
        self.asked.append(request)
        if self.refuse:
            raise Refused("the prompt has 9000 tokens")
        yield Piece(self.text[:5])
        yield Piece(self.text[5:], done=True, finish="stop", output_tokens=9, total_s=0.5, mean_logprob=-0.1)

    def close(self) -> None: ...


def test_a_report_has_a_row_a_category_with_the_peer_and_goes_on_where_it_was_stopped(
    check: bfcl.Check, tmp_path: Path
) -> None:
    cases = [case(), case("irrelevance"), case(id="mine_2", answers=[{"geometry.area-of": {"shape": ["square"]}}])]
    model = Saying(GOOD)
    for _ in range(2):
        results = list(run.evaluate(model, cases, check, run.Kept(tmp_path / "kept.jsonl")))
        assert [result.failure for result in results] == ["", "call for none", "wrong value"]
    assert len(model.asked) == 1  # the same tools and question
    assert "Be brief.\nHow large" in model.asked[0].prompt
    rows = {row["name"]: row for row in run.rows(results, "dev")}
    assert rows["simple_python"] | {"low": 0, "high": 0} == {
        "name": "simple_python", "value": 50.0, "unit": "%", "peer": "FunctionGemma-270M", "peer_value": 61.6,
        "ratio": 0.812, "n": 2, "low": 0, "high": 0, "split": "dev",
    }  # fmt: skip
    assert (rows["irrelevance"]["value"], rows["latency p50"]["value"]) == (0.0, 500.0)
    assert rows["failure: call for none"]["where"] == {"irrelevance": 1}
    with (tmp_path / "kept.jsonl").open("ab") as file:
        file.write(b"\n[torn")
    assert len(list(run.evaluate(model, cases, check, run.Kept(tmp_path / "kept.jsonl")))) == 3
    refused = list(run.evaluate(Saying("", refuse=True), cases, check, run.Kept(tmp_path / "other.jsonl")))
    assert {result.failure for result in refused} == {"too long"}


def test_cases_with_the_same_tools_follow_each_other_so_that_the_engine_reads_them_once(
    check: bfcl.Check, tmp_path: Path
) -> None:
    other = bfcl.Case("mine_2", "simple_python", [("user", "Beep.")], [AREA | {"name": "beep"}], [ANSWER])
    model = Saying(GOOD)
    cases = [case(id="mine_1"), other, case(id="mine_3", text="And one of 4 by 5?")]
    results = list(run.evaluate(model, cases, check, run.Kept(tmp_path / "kept.jsonl")))
    assert [result.id for result in results] in (["mine_1", "mine_3", "mine_2"], ["mine_2", "mine_1", "mine_3"])
    assert [("beep" in asked.prompt) for asked in model.asked] in ([False, False, True], [True, False, False])


def test_only_development_cases_can_be_written_out() -> None:
    ids = [f"mine_{n}" for n in range(2000)]
    dev = [id for id in ids if bfcl.split(id) == "dev"]
    assert 0.17 < len(dev) / len(ids) < 0.23
    hidden = next(id for id in ids if bfcl.split(id) == "test")
    for id, allowed in ((dev[0], True), (hidden, False)):
        results = [run.Result(id, "simple_python", "wrong tool", 1.0, 0.5, 3, text="x()")]
        if allowed:
            assert json.dumps(list(run.wrong(results, [case(id=id)])))
        else:
            with pytest.raises(Refused, match="never shown"):
                list(run.wrong(results, [case(id=id)]))


def test_the_splits_of_a_category_are_apart_and_whole(model_cache: Path, check: bfcl.Check) -> None:
    wheel = bfcl.fetch_wheel(model_cache)
    counts = {}
    for category in bfcl.PUBLISHED:
        dev, test = (bfcl.cases(wheel, category, part) for part in ("dev", "test"))
        assert not {of.id for of in dev} & {of.id for of in test}
        counts[category] = len(dev) + len(test)
        assert [of.id for of in bfcl.cases(wheel, category, "dev", 2)] == [of.id for of in dev[:2]]
    assert (counts["simple_python"], counts["live_multiple"], counts["irrelevance"]) == (400, 1053, 240)
    with pytest.raises(ModelError, match="no single-turn"):
        bfcl.cases(wheel, "simple_java", "dev")


def test_wilsons_interval_is_the_published_one() -> None:
    low, high = figures.wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert figures.wilson(0, 0) == (0.0, 1.0)


@given(st.integers(0, 500), st.integers(0, 500))
def test_wilsons_interval_holds_the_share(right: int, more: int) -> None:
    low, high = figures.wilson(right, right + more)
    assert 0 <= low <= high <= 1
    if right + more:
        assert low - 1e-9 <= right / (right + more) <= high + 1e-9


def test_calibration_is_the_gap_between_confidence_and_share() -> None:
    honest = [(0.75, n % 4 != 0) for n in range(400)]
    assert figures.calibration_error(figures.reliability(honest)) == pytest.approx(0.0)
    vain = [(1.0, n % 2 == 0) for n in range(10)] + [(0.0, False)] * 10
    table = figures.reliability(vain)
    assert [(row.low, row.n, row.right) for row in table] == [(0.0, 10, 0.0), (0.9, 10, 0.5)]
    assert figures.calibration_error(table) == pytest.approx(0.25)
    assert figures.calibration_error([]) is None


def test_gold_calls_survive_the_compact_form(check: bfcl.Check) -> None:
    calls = [Call("geometry_area_of", {"shape": "rectangle", "sides": [2.0, 3.0]})]
    assert run.judge(case(), convert([AREA]), render_all(calls), check) == ""
