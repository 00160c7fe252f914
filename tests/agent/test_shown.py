"""A transcript is shown whole to people, and short to the hub, whatever its steps hold."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.agent import shown
from edge_agent.agent.approval import Approvals
from edge_agent.agent.calls import Call
from edge_agent.agent.transcript import Step, Task
from edge_agent.wire.grants import Subject
from edge_agent.wire.signing import SigningKey

ANN = Subject("ann", ["admin"], 1.0)
PURGE = Call("purge", {"line": 2})


def task(*steps: Step) -> Task:
    return Task("t1", "empty line 2", Subject("otto", ["operator"], 1.0), 100.0, "waiting", steps=list(steps))


def approved(given: bool) -> tuple[Task, Step]:
    approvals = Approvals(SigningKey.generate(), lambda *_: True)
    made = task()
    made.steps.append(approvals.ask(made, PURGE, "", 101.0))
    made.steps.append(approvals.give(made, made.steps[0].text, given, ANN, 102.0))
    return made, made.steps[1]


def test_a_line_says_what_was_called_by_whom_it_was_approved_and_how_long_it_took() -> None:
    made = task()
    model = Step("model", "purge(line=2)", ts=100.5, ms=847.0, prompt_tokens=256, cached_tokens=229, tokens=8)
    model = msgspec.structs.replace(model, adapter="toolcaller 1.2")
    line, tone = shown.line(model, made)
    expected = "0.50 s  model     purge(line=2)  [847.0 ms, 256 tokens read (229 kept), 8 said, toolcaller 1.2]"
    assert (line.strip(), tone) == (expected, "")
    ask = shown.line(Step("ask", "ab" * 32, PURGE, ts=101.0, expires=3700.0), made)
    assert "may purge(line=2) be done? until" in ask[0]
    assert (ask[1], "abababababab" in ask[0]) == ("wait", True)
    assert "ann approved purge(line=2)" in shown.line(approved(True)[1], made)[0]
    denied = shown.line(approved(False)[1], made)
    assert ("ann denied purge(line=2)" in denied[0], denied[1]) == (True, "bad")
    at = shown.line(Step("tool", "gone", PURGE, "gone", ms=3.0, at="blow[1]"), made)[0]
    assert at.endswith("tool      blow[1]: gone  [3.0 ms]")


def test_the_hub_is_told_calls_in_words_and_by_whom_but_no_signature_and_no_result_twice() -> None:
    made, step = approved(True)
    ask, approval = map(shown.told, made.steps)
    assert ask == {
        "role": "ask",
        "text": made.steps[0].text,
        "call": "purge(line=2)",
        "ts": 101.0,
        "expires": round(made.steps[0].expires, 3),
    }
    assert (approval["text"], approval["call"]) == ("ann", "purge(line=2)")
    assert step.text not in str(approval)
    assert "result" not in shown.told(Step("tool", "gone", PURGE, {"a": 1}))
    assert shown.told(Step("approval", "nonsense", PURGE))["text"] == "unreadable"


def test_the_documents_that_results_came_from_are_kept_with_their_parts() -> None:
    def found(*parts: tuple[str, int]) -> dict[str, object]:
        return {"passages": [{"source": source, "part": part, "text": "x"} for source, part in parts], "by": "words"}

    search = Call("search_knowledge", {"question": "x"})
    made = [
        Step("tool", call=search, result=found(("manual.md", 3), ("pump.md", 1), ("manual.md", 4), ("manual.md", 3))),
        Step("tool", call=search, result=found(("wrong.md", 1)), ok=False),
        Step("model", "x", result={"source": "no"}),
        Step("tool", call=search, result=[{"source": "note: shift"}, {"source": 7}, 3]),
    ]
    assert shown.cited(made) == ["manual.md 3, 4", "pump.md 1", "note: shift"]


steps = st.builds(
    Step,
    st.sampled_from(["model", "check", "intent", "tool", "plan", "ask", "approval"]),
    st.text(max_size=2000),
    st.none() | st.builds(Call, st.text(max_size=30), st.dictionaries(st.text(max_size=9), st.text(max_size=900))),
    st.none() | st.text(max_size=9) | st.dictionaries(st.text(max_size=9), st.integers()),
    st.booleans(),
    st.floats(0, 1e9),
    st.floats(0, 1e9),
)


@given(st.lists(steps, max_size=60))
def test_any_transcript_is_shown_and_told_within_its_bound(made: list[Step]) -> None:
    told = shown.told_all(made)
    assert len(msgspec.json.encode(told)) <= shown.MAX_BYTES + 200
    gap = [step for step in told if step["role"] == "…"]
    missing = int(gap[0]["text"].split()[0]) if gap else 0
    assert len(told) - len(gap) + missing == len(made)
    for step in made:
        text, tone = shown.line(step, task())
        assert ("\n" not in text, tone in ("", "bad", "wait")) == (True, True)
