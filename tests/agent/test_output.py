"""An answer that breaks the policy's rules is withheld with their names, and the audit log has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.output import shown
from edge_agent.agent.rules import OutputRule, Policy, PolicyFile
from edge_agent.agent.transcript import Task, Transcripts, migrations
from edge_agent.errors import Refused
from edge_agent.store import Store
from edge_agent.wire.grants import Subject
from tests.agent.test_work import rig
from tests.fakes import LocalTools, ScriptedModel

RULES = [
    OutputRule("no-serials", r"\bSN ?\d{8}\b"),
    OutputRule("too-long", when="size(answer) > 100", weight=0.3),
    OutputRule("rude", "(?i)idiot", weight=0.4),
    OutputRule("cannot-be-asked", when="answer.nothing > 3", weight=0.1),
]


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ("all calm", []),
        ("it has SN 12345678", ["no-serials", "cannot-be-asked"]),
        ("you idiot", []),
        ("you idiot " + "x" * 100, ["too-long", "rude", "cannot-be-asked"]),
        ("", []),
    ],
)
def test_rules_add_up_and_what_falls_below_the_threshold_is_withheld(answer: str, names: list[str]) -> None:
    told, withheld = shown(answer, Policy(output=RULES))
    assert withheld == names
    assert (told == answer) != bool(names)
    assert all(name in told for name in names)


async def test_a_withheld_answer_leaves_no_result_beside_it(tmp_path: Path) -> None:
    store, rules = Store(tmp_path / "s.db", migrations), Policy(output=RULES)
    model = ScriptedModel('answer("SN 12345678")')
    loop = AgentLoop(model, LocalTools(), Transcripts(store), lambda *_: True, rules=lambda: rules)
    await loop.accept("t", "what is its number", Subject("ada", ["admin"], 1.0))
    task = await loop.run("t")
    store.close()
    assert (task.state, task.withheld, task.result) == ("succeeded", ["no-serials", "cannot-be-asked"], None)
    assert task.answer == "withheld: no-serials, cannot-be-asked (score 0.00, at least 0.50 is shown)"


class Log:
    def __init__(self, lines: list[tuple[str, Any]]) -> None:
        self._lines = lines

    async def append(self, event: str, subject: str, **detail: Any) -> None:
        self._lines.append((event, detail))


async def test_the_audit_log_says_which_rules_withheld_it(tmp_path: Path) -> None:
    async with rig(tmp_path / "s.db") as device:
        task = Task("t", "hello", Subject("ada", ["admin"], 1.0), 1.0, "succeeded", withheld=["rude"])
        audited = list[tuple[str, Any]]()
        device.work._audit = Log(audited)
        await device.work._ended(task)
    assert audited == [("withheld", {"task": "t", "rules": ["rude"]})]


@pytest.mark.parametrize(
    "text",
    ["match = '('", "match = 'x'\nwhen = 'true'", "weight = 0.5", "when = '1 +'", "match = 'x'\nweight = 2.0"],
)
def test_a_rule_that_cannot_be_used_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.toml").write_text(f"[[output]]\nname = 'r'\n{text}\n")
    with pytest.raises(Refused, match="cannot be used"):
        PolicyFile(tmp_path / "policy.toml").read()
