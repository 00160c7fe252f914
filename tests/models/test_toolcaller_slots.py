"""Requests that are drawn from what is said of each parameter: a call holds what its request says, and no more."""

from pathlib import Path
from random import Random

import pytest

from edge_agent.agent.calls import validate
from models.toolcaller.data.slots import Slot, draw, read, scenes
from models.toolcaller.data.written import WrittenError

TABLE = """[tables]
@ findTable(town: str (City, Country), terrace?: bool, for_?: int 1..12, on?: str (DD.MM.YYYY), dishes?: [str]) - Finds.
~ found: 3
= find me a table | any table free
+ town: in {} | over in {} :: Oslo, Norway = Oslo / the Norwegian capital | Lima, Peru
+ terrace: {} :: true = outside | false = not outside
+ for_: for {} people | We are {}. :: @int 1..12
+ on: on {} :: @date DD.MM.YYYY
+ dishes: with {} :: soup | pie | eel
"""


def table(folder: Path, text: str) -> Path:
    (folder / "x.txt").write_text(text)
    return folder / "x.txt"


def spoken(slot: Slot, value: object) -> list[str]:
    """The words for a value, where they are written."""
    written = "true" if value is True else "false" if value is False else value
    return [word for known, words in slot.values for word in words if known == str(written)]


def test_every_call_fits_its_tool_and_holds_what_its_request_says() -> None:
    assert sum(len(scene.apis) for scene in scenes()) >= 100
    seen = 0
    for scene in scenes():
        slots = {api.spec.name: api.slots for api in scene.apis}
        for request in draw(scene, Random(scene.name)).requests:
            (call,) = request.calls
            assert validate(call, [api.spec for api in scene.apis]) == call
            for name, value in call.args.items():
                for one in value if isinstance(value, list) else [value]:
                    words = spoken(slots[call.name][name], one)
                    assert not words or any(word in request.text for word in words)
                    seen += 1
    assert seen > 1000


def test_what_must_be_there_is_said_what_may_be_left_out_comes_and_goes_and_sentences_stand_last(
    tmp_path: Path,
) -> None:
    (scene,) = read(table(tmp_path, TABLE))
    requests = [request for seed in range(40) for request in draw(scene, Random(seed)).requests]
    calls = [request.calls[0].args for request in requests]
    assert all("Oslo" in r.text or "Lima" in r.text or "Norwegian" in r.text for r in requests)
    for name in ("terrace", "for_", "on", "dishes"):
        assert 0.2 < sum(name in args for args in calls) / len(calls) < 0.6
    assert {True, False} <= {args.get("terrace") for args in calls}
    assert {1, 2, 3} <= {len(args["dishes"]) for args in calls if "dishes" in args}
    assert all(r.text.endswith((".", "pls", "please")) for r in requests if "We are" in r.text)
    assert not [r.text for r in requests if "outside" in r.text and "terrace" not in r.calls[0].args]


def test_the_same_random_source_draws_the_same(tmp_path: Path) -> None:
    (scene,) = read(table(tmp_path, TABLE))
    assert draw(scene, Random(3)) == draw(scene, Random(3)) != draw(scene, Random(4))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("+ on: on {}", "+ on: on", "x.txt:8: name: phrases with {}"),
        ("+ on: on {} ::", "+ on: on {} =", "x.txt:8: name: phrases with {}"),
        ("@date", "@day", "x.txt:8: @day DD.MM.YYYY: @date FORM"),
        ("+ on: on {} :: @date DD.MM.YYYY\n", "", "findTable wants = and a + for each"),
        ("= find", "find", "x.txt:4: a line begins with one of"),
    ],
)
def test_a_line_that_is_not_right_is_named_with_its_reason(tmp_path: Path, old: str, new: str, reason: str) -> None:
    with pytest.raises(WrittenError) as told:
        read(table(tmp_path, TABLE.replace(old, new)))
    assert reason in str(told.value)
