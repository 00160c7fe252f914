"""Calls: the text form is a bijection with valid decisions, the grammar accepts it, and bad text is explained."""

from __future__ import annotations

import contextlib
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.agent import grammar
from edge_agent.agent.calls import (
    MAX_TEXT,
    Answer,
    Call,
    CallError,
    Decision,
    Nothing,
    parse,
    parse_all,
    render,
    render_all,
    validate,
)
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
def nested(draw: st.DrawFn) -> Param:
    flat, shape = draw(params()), draw(st.sampled_from(["flat", "list", "lists", "dict", "any list", "any dict"]))
    listed = Param(flat.name, "list", required=flat.required, items=flat)
    match shape:
        case "list":
            return listed
        case "lists":
            return Param(flat.name, "list", required=flat.required, items=listed)
        case "dict":
            fields = draw(st.lists(params(), min_size=1, max_size=3, unique_by=lambda p: p.name))
            return Param(flat.name, "dict", required=flat.required, fields=[*fields])
        case "any list" | "any dict":
            return Param(flat.name, "list" if shape == "any list" else "dict", required=flat.required)
    return flat


@st.composite
def specs(draw: st.DrawFn) -> list[ToolSpec]:
    names = draw(st.lists(NAMES.filter(lambda n: n not in ("answer", "none")), min_size=1, max_size=3, unique=True))
    return [ToolSpec(n, "D.", draw(st.lists(nested(), max_size=4, unique_by=lambda p: p.name))) for n in names]


PLAIN = st.recursive(
    st.integers(-(10**9), 10**9) | TEXTS | st.booleans() | st.floats(-1e6, 1e6).map(lambda f: round(f, 4) + 0.0),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


def values(param: Param) -> st.SearchStrategy[Any]:
    low = -(10**9) + 1 if param.low is None else int(param.low)
    high = 10**9 - 1 if param.high is None else int(param.high)
    if param.kind == "list":
        return st.lists(values(param.items) if param.items else PLAIN, max_size=3)
    if param.kind == "dict" and param.fields:
        return st.fixed_dictionaries(
            {f.name: values(f) for f in param.fields if f.required},
            optional={f.name: values(f) for f in param.fields if not f.required},
        )
    if param.kind == "dict":
        return st.dictionaries(TEXTS, PLAIN, max_size=3)
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


@settings(deadline=None)
@given(st.lists(decisions(), min_size=1, max_size=4))
def test_several_calls_stand_one_on_each_line(cases: list[tuple[list[ToolSpec], Decision]]) -> None:
    catalogue = [
        ToolSpec(f"t{i}_{spec.name}", "D.", spec.params) for i, (specs, _) in enumerate(cases) for spec in specs
    ]
    calls = [Call(f"t{i}_{d.name}", d.args) for i, (_, d) in enumerate(cases) if isinstance(d, Call)]
    text = render_all(calls)
    assert parse_all(text) == (calls or [Nothing()])
    assert accepts(grammar.build(catalogue, several=4), text)


def test_a_call_that_is_said_again_is_one_call() -> None:
    again = "stop(line=1)\nstop(line=2)\nstop(line=1)"
    assert parse_all(again) == [Call("stop", {"line": 1}), Call("stop", {"line": 2})]


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
        ("stop(line=[1)", "expected , or ]"),
        ("stop(line={1: 2})", 'expected "key"'),
        ("stop(line=" + "[" * 9 + "]" * 9 + ")", "at most 5 deep"),
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
