"""Calls: the text form is a bijection with valid decisions, the grammar accepts it, and bad text is explained."""

from __future__ import annotations

import contextlib
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.agent import grammar
from edge_agent.agent.calls import MAX_TEXT, Answer, Call, CallError, Decision, Nothing, parse, render, validate
from edge_agent.agent.tool import Param, ToolSpec
from tests.agent import plant

SPECS = [tool.spec for tool in plant.ALL]
BYTES = llguidance.LLTokenizer("byte")
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_TEXT)


def accepts(lark: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(BYTES, lark, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    taken = matcher.try_consume_tokens(list(text.encode()))
    return taken == len(text.encode()) and matcher.is_accepting()


@st.composite
def params(draw: st.DrawFn) -> Param:
    kind = draw(st.sampled_from(["int", "float", "bool", "str", "choice"]))
    choices = (
        draw(st.lists(TEXTS.filter(str.isprintable), min_size=1, max_size=4, unique=True)) if kind == "choice" else []
    )
    bounds = sorted(draw(st.tuples(st.integers(-(10**8), 10**8), st.integers(-(10**8), 10**8))))
    low, high = bounds if draw(st.booleans()) else (None, None)
    return Param(draw(NAMES), kind, choices, low, high, required=draw(st.booleans()))


@st.composite
def specs(draw: st.DrawFn) -> list[ToolSpec]:
    names = draw(st.lists(NAMES.filter(lambda n: n not in ("answer", "none")), min_size=1, max_size=3, unique=True))
    return [ToolSpec(n, "D.", draw(st.lists(params(), max_size=4, unique_by=lambda p: p.name))) for n in names]


def values(param: Param) -> st.SearchStrategy[Any]:
    low = -(10**9) + 1 if param.low is None else int(param.low)
    high = 10**9 - 1 if param.high is None else int(param.high)
    return {
        "int": st.integers(low, high),
        "float": st.floats(low, high, allow_nan=False),
        "bool": st.booleans(),
        "str": TEXTS,
        "choice": st.sampled_from(param.choices or [""]),
    }[param.kind]


@st.composite
def decisions(draw: st.DrawFn) -> tuple[list[ToolSpec], Decision]:
    catalogue = draw(specs())
    if draw(st.integers(0, 4)) == 0:
        return catalogue, draw(st.one_of(st.just(Nothing()), TEXTS.map(Answer)))
    spec = draw(st.sampled_from(catalogue))
    given_ = [p for p in spec.params if p.required or draw(st.booleans())]
    args = {p.name: draw(values(p)) for p in draw(st.permutations(given_))}
    return catalogue, validate(Call(spec.name, args), catalogue)


@settings(max_examples=600, deadline=None)
@given(decisions())
def test_what_is_rendered_is_parsed_back_and_accepted_by_the_grammar(case: tuple[list[ToolSpec], Decision]) -> None:
    catalogue, decision = case
    text = render(decision)
    back = parse(text)
    assert back == decision
    assert accepts(grammar.build(catalogue), text)
    if isinstance(back, Call):
        assert validate(back, catalogue) == decision


@given(st.text(max_size=200) | st.text('()"\\,=-0.1 truefalsanwNone_\n', max_size=60))
def test_no_text_crashes_the_parser(text: str) -> None:
    with contextlib.suppress(CallError):
        assert parse(render(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not a call"),
        ("stop", "not a call"),
        ("stop(", "expected"),
        ('stop("now")', "arguments are named: stop(argument="),
        ("stop(line=1, line=2)", "twice"),
        ("stop(line=1) stop(line=2)", "only one call"),
        ("stop(line=[1])", "expected"),
        ("answer(5)", "answer takes one text"),
        ("none(1)", "none takes no arguments"),
        ('answer("\\q")', "bad value"),
        ('answer("\\ud800")', "bad value"),
        ("x" * 9000, "longer"),
        ("stop(line=" + "9" * 5000 + ")", "expected"),
    ],
)
def test_bad_text_is_explained(text: str, part: str) -> None:
    with pytest.raises(CallError, match=part.replace("(", r"\(")):
        parse(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("launch()", "unknown tool launch; the tools are: read_sensor"),
        ('read_sensor(sensor="vibration")', "needs the argument line"),
        ('read_sensor(sensor="smell", line=1)', "one of vibration, temperature"),
        ('read_sensor(sensor="vibration", line=4)', "out of range: 1 to 3, not 4"),
        ('read_sensor(sensor="vibration", line=1.5)', "is a whole number"),
        ('read_sensor(sensor="vibration", line=true)', "is a whole number"),
        ('read_sensor(sensor="vibration", line=1, depth=2)', "no argument depth"),
        ("set_speed(line=1, percent=101)", "out of range: 0 to 100 %, not 101"),
        ('set_speed(line=1, percent="fast")', "is a number"),
        ("stamp(text=5)", "text of at most"),
        ('stamp(text="a", hard=1)', "true or false"),
        (f'stamp(text="{"a" * 241}")', "text of at most"),
    ],
)
def test_a_call_that_does_not_fit_its_tool_is_explained(text: str, part: str) -> None:
    decision = parse(text)
    assert isinstance(decision, Call)
    with pytest.raises(CallError, match=part):
        validate(decision, SPECS)


def test_validation_converts_numbers_and_orders_arguments() -> None:
    decision = parse("set_speed( percent = 40 ,line=2.0)")
    assert isinstance(decision, Call)
    assert render(validate(decision, SPECS)) == "set_speed(line=2, percent=40.0)"


def test_the_grammar_leaves_ranges_to_validation_so_that_a_wrong_line_is_refused_and_not_bent() -> None:
    lark = grammar.build(SPECS)
    assert accepts(lark, 'read_sensor(sensor="vibration", line=7)')
    assert not accepts(lark, 'read_sensor(sensor="smell", line=1)')
    assert not accepts(lark, 'read_sensor(sensor="vibration",line=1)')
    assert not accepts(lark, "launch()")


def test_a_tool_cannot_take_a_reserved_name() -> None:
    with pytest.raises(ValueError, match="answer"):
        grammar.build([ToolSpec("answer", "No.", [])])
