"""Written groups and the bunches made of them: readable, right, and one preamble a bunch."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.agent import prompt
from edge_agent.agent.calls import Call, parse_all, validate
from edge_agent.agent.tool import Param, ToolSpec
from models.toolcaller.data.bunches import bunches
from models.toolcaller.data.catalogue import blocked, name_hash
from models.toolcaller.data.scene import Example
from models.toolcaller.data.written import WrittenError, groups, read, tool

OVEN = """[oven]
@ heat_oven(degrees: int 50..250 °C (Target, in Celsius (not F).), mode?: "bake"|"grill") - Heat the oven.
~ degrees: 200
@ probe_meat(probe: int 1..2) - Read a probe.
"""


@pytest.fixture(scope="module")
def made() -> list[list[Example]]:
    return list(itertools.islice(bunches(7), 400))


def test_every_written_line_is_read_and_there_are_thousands() -> None:
    requests = [request for group in groups() for request in group.requests]
    assert len(groups()) >= 300
    assert len(requests) >= 5000
    assert sum(len(request.calls) > 1 for request in requests) > 800
    assert sum(bool(request.story) for request in requests) > 500
    assert 0.15 < sum(not r.calls and not r.story for r in requests) / len(requests) < 0.3


def test_the_same_seed_gives_the_same_bunches(made: list[list[Example]]) -> None:
    again = list(itertools.islice(bunches(7), 40))
    assert [[e.row() for e in bunch] for bunch in again] == [[e.row() for e in bunch] for bunch in made[:40]]


def test_a_bunch_has_one_preamble_and_every_completion_fits_its_tools(made: list[list[Example]]) -> None:
    for bunch in made:
        system = prompt.SYSTEM_ALL if bunch[0].several else prompt.SYSTEM
        start = prompt.preamble(bunch[0].tools, system)
        for example in bunch:
            assert example.prompt.startswith(start)
            calls = [call for call in parse_all(example.completion) if isinstance(call, Call)]
            assert [validate(call, example.tools) for call in calls] == calls


def test_shown_tools_have_names_of_their_own_and_none_that_is_held_back(made: list[list[Example]]) -> None:
    for bunch in made:
        names = [spec.name for spec in bunch[0].tools]
        assert len(set(names)) == len(names)
        assert not blocked().intersection(map(name_hash, names))


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("> hot\nheat_oven(degrees=400)", "out of range"),
        ("> hot\nheat_stove(degrees=200)", "unknown tool"),
        ('> hot\nheat_oven(mode="grill", degrees=200)', "declared order"),
        ("> hot\nheat_oven(degrees=200)\nnone()", "do not end with none()"),
        ("> hot\nprobe_meat(probe=1)\n~ value: 3", "ends with none()"),
        ("> hot\n~ value: 3", "behind each call"),
        ("> hot", "calls or none()"),
        ("@ heat_oven() - Again.\n> hot\nnone()", "declared twice"),
    ],
)
def test_a_line_that_is_not_right_is_named_with_its_reason(tmp_path: Path, lines: str, reason: str) -> None:
    file = tmp_path / "x.txt"
    file.write_text(OVEN + lines + "\n> cold\nnone()\n")
    _, wrong = read(file)
    assert len(wrong) == 1
    assert reason in wrong[0]


@pytest.mark.parametrize("text", ["f(", "f(a int) - x", "f(a: int)", "f(a: what) - x", 'f(a: "x) - x', "none() - x"])
def test_a_signature_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(WrittenError):
        tool(text)


names = st.from_regex(r"[a-z]{3,8}", fullmatch=True)
notes = st.sampled_from(["", "In mm.", "City, State (e.g. Reno, NV)."])
simple = st.builds(
    Param, names, st.sampled_from(["int", "float", "bool", "str", "dict"]), required=st.booleans(), about=notes
)
bounded = st.builds(
    Param,
    names,
    st.sampled_from(["int", "float"]),
    low=st.just(-2.0),
    high=st.just(3.5),
    unit=st.sampled_from(["", "mm", "%"]),
)
choice = st.builds(Param, names, st.just("choice"), choices=st.lists(names, min_size=1, max_size=3), about=notes)
nameless = (simple | choice).map(lambda p: Param("", p.kind, p.choices))
lists = st.builds(Param, names, st.just("list"), items=st.none() | nameless, about=notes)
objects = st.builds(
    Param, names, st.just("dict"), fields=st.lists(simple | lists, min_size=1, max_size=3, unique_by=lambda p: p.name)
)
params = st.lists(simple | bounded | choice | lists | objects, max_size=5, unique_by=lambda p: p.name)


@given(params)
def test_a_signature_is_read_as_the_prompt_writes_it(made_of: list[Param]) -> None:
    spec = ToolSpec("do_it", "Does it.", made_of)
    assert tool(prompt.signature(spec)) == spec
