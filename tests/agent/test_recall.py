"""Examples come from what went well for the same person, never from a tool's text, and never choose a tool."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent.calls import Call, render
from edge_agent.agent.chat import FORMS
from edge_agent.agent.decide import Speaker
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.prompt import Form, form
from edge_agent.agent.recall import KEEP, Recall, alike
from edge_agent.agent.transcript import Step, Task, Transcripts, migrations
from edge_agent.store import Store
from edge_agent.wire.grants import Subject
from tests.agent import plant
from tests.fakes import LocalTools, ScriptedModel

ADA, OTTO = Subject("ada", ["admin"], 1.0), Subject("otto", ["admin"], 1.0)
READ = 'read_sensor(sensor="vibration", line=1)'
SPECS = [each.spec for each in plant.ALL]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = Store(tmp_path / "s.db", migrations)
    yield made
    made.close()


async def ask(store: Store, id: str, text: str, *says: str, who: Subject = ADA, endpoint: bool = True) -> ScriptedModel:
    model = ScriptedModel(*says)
    parts: Any = (model, LocalTools(*plant.ALL), Transcripts(store), lambda *_: True)
    loop = AgentLoop(*parts, speakers=lambda: [Speaker(endpoint=endpoint)])
    await loop.accept(id, text, who)
    await loop.run(id)
    return model


def shown(model: ScriptedModel) -> list[str]:
    """The requests of the examples."""
    return [m["content"] for m in model.asked[0].chat["messages"] if m["role"] == "user"][:-1]


async def test_what_went_well_is_an_example_for_the_same_person_and_for_an_endpoint(store: Store) -> None:
    await ask(store, "t1", "how much does line one rumble", READ)
    model = await ask(store, "t2", "how much does line two rumble", "none()")
    assert shown(model)[-1] == "how much does line one rumble"
    called = [m for m in model.asked[0].chat["messages"] if "tool_calls" in m][-1]["tool_calls"][0]["function"]
    assert (called["name"], called["arguments"]) == ("read_sensor", '{"sensor": "vibration", "line": 1}')
    other = await ask(store, "t3", "how much does line two rumble", "none()", who=OTTO)
    assert "how much does line one rumble" not in shown(other)
    own = await ask(store, "t4", "how much does line two rumble", "none()", endpoint=False)
    assert "line one rumble" not in own.asked[0].prefix + own.asked[0].prompt


async def test_the_tools_own_examples_are_the_curated_library_the_most_like_last(store: Store) -> None:
    model = await ask(store, "t", "how hot is line 3 and run line 1 at 20 percent", "none()")
    assert shown(model) == ["how hot is line 2", "run line 1 at 40 percent"]


async def test_a_question_has_no_example_of_an_act_which_is_not_on_offer(store: Store) -> None:
    model = await ask(store, "t", "is line 1 at 40 percent?", "none()")
    chat = model.asked[0].chat
    named = {each["function"]["name"] for each in chat["tools"]}
    called = {call["function"]["name"] for said in chat["messages"] for call in said.get("tool_calls", [])}
    assert called <= named, "run line 1 at 40 percent is an order's example"


@pytest.mark.parametrize(
    "says",
    [
        ("none()",),
        ("gibberish", READ),
        ("jam()", 'answer("no")'),
        ('stamp(text="a")', *['stamp(text="b")'] * 2),  # checked: decided after a text was read
        ('answer("hello")',),
    ],
)
async def test_what_was_wrong_refused_checked_or_did_nothing_is_no_example(store: Store, says: tuple[str, ...]) -> None:
    await ask(store, "t1", "please do the thing", *says)
    assert shown(await ask(store, "t2", "please do the thing", "none()")) == []


async def test_a_device_without_an_endpoint_keeps_no_requests(store: Store) -> None:
    await ask(store, "t1", "how much does line one rumble", READ, endpoint=False)
    assert await store.read(lambda db: db.execute("SELECT * FROM examples").fetchall()) == []


async def test_only_what_was_decided_before_any_result_is_kept_and_a_bounded_number(store: Store) -> None:
    recall, call = Recall(store), Call("stamp", {"text": "of a label"})
    for n in range(KEEP + 20):
        steps = [Step("model", READ), Step("intent", call=call), Step("tool", call=call), Step("model", render(call))]
        await recall.keep(Task(f"t{n}", f"request {n}", ADA, 1.0, "succeeded", steps=steps))
    rows = await store.read(lambda db: db.execute("SELECT calls, COUNT(*) FROM examples GROUP BY calls").fetchall())
    assert [tuple(row) for row in rows] == [(READ, KEEP)]
    turns = await recall.like(Task("t", "request 300", ADA, 1.0), [spec for spec in SPECS if spec.name == "jam"])
    assert turns == [], "an example of a tool that is not there"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("How hot is line 2?", "question"),
        ("is anything wrong", "question"),
        ("Compare the wear of all lines.", "analysis"),
        ("Stop line 2.", "command"),
    ],
)
def test_the_form_of_a_request_says_how_to_go_about_it_and_names_no_tool(text: str, found: Form) -> None:
    assert form(text) == found
    assert not any(f" {spec.name}" in words for words in FORMS.values() for spec in SPECS)


def test_likeness_is_of_words_whatever_their_order() -> None:
    assert alike("stop line 2", "line 2: STOP!") == pytest.approx(1.0)
    assert alike("stop line 2", "tell a joke") == alike("", "x") == 0.0
