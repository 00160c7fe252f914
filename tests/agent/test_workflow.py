"""A workflow with a mistake is refused before it runs, with the line and column of the mistake and what to do."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from pathlib import Path
from typing import TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edge_agent.agent.calls import Call
from edge_agent.agent.tool import tool
from edge_agent.agent.transcript import Step, Task, Transcripts, migrations
from edge_agent.agent.workflow import Problem, read
from edge_agent.agent.workflow_cli import app, examine
from edge_agent.agent.workflow_simulate import estimate
from edge_agent.store import Store
from edge_agent.sync.twin import GrantsCache
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, sign_grants
from tests.agent import plant
from tests.e2e.daemon_process import DaemonProcess

DOCS = Path(__file__).parents[2] / "docs/workflows.md"
HEAD = 'workflow: w\nversion: "1"\nrun_as: [operator]\n'


class Gauge(TypedDict):
    value: float
    count: int
    name: str
    alarms: list[str]


@tool()
def read_gauge(line: plant.Line) -> Gauge:
    """Read a gauge."""
    return {"value": 1.5, "count": 1, "name": "g", "alarms": ["hot"]}


SPECS = [read_gauge.spec, *(item.spec for item in plant.ALL)]
LOOK = "  - {id: look, tool: read_gauge, args: {line: 1}}\n"


def problems(text: str, specs: list[plant.ToolSpec] | None = None) -> list[Problem]:  # type: ignore[name-defined]
    return examine(text, SPECS if specs is None else specs)[2]


def test_a_right_workflow_has_no_problem() -> None:
    text = f"""{HEAD}inputs:
  - {{name: line, kind: int, low: 1, high: 3, default: 2}}
triggers:
  - cron: "*/10 * * * *"
  - {{stream: 'read_gauge(line=2)', value: result.value, above: 7.1, clear: 6.5, for_s: 30}}
  - event: task.failed
steps:
  - {{id: look, tool: read_gauge, args: {{line: "${{inputs.line}}"}}, retry: {{times: 2}}, timeout_s: 5}}
  - id: slow
    tool: set_speed
    depends_on: [look]
    when: steps.look.result.value > 7
    args: {{line: "${{inputs.line}}", percent: "${{steps.look.result.value * 2.0}}", note: "at ${{inputs.line}}"}}
    on_error: tell
  - id: each
    depends_on: [look]
    for_each: steps.look.result.alarms
    tool: stamp
    args: {{text: "${{item}}"}}
  - {{id: tell, tool: stamp, args: {{text: "${{steps.slow.error}}"}}}}
result: steps.look.result.value
"""
    assert problems(text) == []


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (HEAD, "workflow", "missing required field `steps`"),
        (f"{HEAD}steps: [", "", "not YAML"),
        (f"{HEAD}steps:\n  - {{id: a, tool: read_gauge, argz: {{}}}}", "argz", "unknown field `argz`"),
        (f"{HEAD}steps:\n  - {{id: a, tool: 7}}", "7}", "Expected `str`, got `int`"),
        (f"{HEAD}steps:\n  - &x {{id: a, tool: jam}}\n  - *x", "&x", "anchors"),
        (f"{HEAD}steps:\n  - {{id: a, id: b, tool: jam}}", "id: b", "'id' is not taken"),
        (f"{HEAD}steps:\n  - {{id: a, tool: !!python/name:os.system jam}}", "!!python", "tags are not taken"),
        (f"{HEAD}steps:\n  - {{id: a, tool: launch}}", "launch", "there is no tool 'launch'"),
        (f"{HEAD}steps:\n{LOOK}  - {{id: look, tool: jam}}", "look, tool: jam", "is taken"),
        (f"{HEAD}steps:\n  - {{id: a, tool: jam, depends_on: [b]}}", "b]", "there is no step 'b'"),
        (f"{HEAD}steps:\n  - {{id: a, tool: jam, on_error: b}}", "b}", "'b' is no step"),
        (
            f"{HEAD}steps:\n  - {{id: a, tool: jam, depends_on: [b]}}\n  - {{id: b, tool: jam, depends_on: [a]}}",
            "depends_on: [b]",
            "the steps wait for each other: a → b → a",
        ),
        (f"{HEAD}steps:\n  - {{id: a, tool: read_gauge}}", "{id: a", "needs the argument line"),
        (f"{HEAD}steps:\n  - {{id: a, tool: read_gauge, args: {{line: 9}}}}", "9}", "out of range: 1 to 3"),
        (f"{HEAD}steps:\n  - {{id: a, tool: read_gauge, args: {{line: 1, x: 2}}}}", "2}", "no argument x"),
        (
            f"{HEAD}steps:\n{LOOK}  - {{id: b, tool: jam, when: 'steps.look.result.value > 1'}}",
            "'steps.look",
            "need not have run",
        ),
        (
            f"{HEAD}steps:\n{LOOK}  - {{id: b, tool: jam, depends_on: [look], when: 'steps.look.result.nope > 1'}}",
            "'steps.look",
            "there is no nope",
        ),
        (
            f"{HEAD}steps:\n{LOOK}  - {{id: b, tool: jam, depends_on: [look], when: steps.look.result.name > 1}}",
            "steps.look",
            "No such overload",
        ),
        (
            f"{HEAD}steps:\n  - {{id: b, tool: jam, when: 'true && nope'}}",
            "'true",
            "Undefined variable or function: 'nope'",
        ),
        (f"{HEAD}steps:\n  - {{id: b, tool: jam, when: 1 + }}", " }", "Syntax error"),
        (f"{HEAD}steps:\n  - {{id: b, tool: jam, when: '1'}}", "'1'", "it must be true or false"),
        (f"{HEAD}steps:\n  - {{id: b, tool: jam, when: duration('1h')}}", "duration", "a timedelta; it must be true"),
        (
            f"{HEAD}steps:\n  - {{id: a, tool: stamp, args: {{text: \"${{timestamp('2026-01-01T00:00:00Z')}}\"}}}}",
            '"${time',
            "gives a datetime; text is a text",
        ),
        (f"{HEAD}steps:\n  - {{id: a, tool: stamp, args: {{text: \"${{b'x'}}\"}}}}", '"${b', "gives a bytes"),
        (
            f"{HEAD}steps:\n{LOOK}  - {{id: b, tool: read_gauge, depends_on: [look], args: "
            '{line: "${steps.look.result.value}"}}',
            '"${steps',
            "gives a number with decimals; line is a whole number",
        ),
        (
            f"{HEAD}steps:\n{LOOK}  - {{id: b, tool: jam, depends_on: [look], for_each: steps.look.result}}",
            "steps.look.result}",
            "a list",
        ),
        (f"{HEAD}steps:\n  - {{id: a, tool: jam, timeout_s: 99}}", "99", "has at most 10 s"),
        (f"{HEAD}triggers: [{{cron: '* *'}}]\nsteps:\n{LOOK}", "'* *'", "is no cron line"),
        (f"{HEAD}zone: Mars/Crater\ntriggers: [{{event: task.failed}}]\nsteps:\n{LOOK}", "Mars", "is not known here"),
        (f"{HEAD}triggers: [{{mqtt: 'a/#/b'}}]\nsteps:\n{LOOK}", "'a/#/b'", "# for all that is left"),
        (f"{HEAD}triggers: [{{mqtt: a, when: payload.x > 1 &&}}]\nsteps:\n{LOOK}", "payload", "Syntax error"),
        (f"{HEAD}triggers: [{{mqtt: a, when: inputs.x > 1}}]\nsteps:\n{LOOK}", "inputs", "there is no inputs"),
        (f"{HEAD}triggers: [{{mqtt: a, event: task.failed}}]\nsteps:\n{LOOK}", "{mqtt", "one of cron, stream, event"),
        (f"{HEAD}triggers: [{{event: boom}}]\nsteps:\n{LOOK}", "boom", "there is no event"),
        (f"{HEAD}triggers: [{{event: 'alarm.raised:x'}}]\nsteps:\n{LOOK}", "'alarm", "there is no tool 'past_alarms'"),
        (f"{HEAD}triggers: [{{event: 'workflow.failed:w'}}]\nsteps:\n{LOOK}", "'workflow.failed", "start it again"),
        (
            f"{HEAD}triggers: [{{stream: 'stamp(text=\"x\")', above: 1}}]\nsteps:\n{LOOK}",
            "'stamp",
            "does more than read",
        ),
        (
            f"{HEAD}triggers: [{{stream: read_gauge(line=1), above: 5, clear: 6, value: '1'}}]\nsteps:\n{LOOK}",
            "6,",
            "beyond",
        ),
        (
            f"{HEAD}triggers: [{{stream: read_gauge(line=1), above: 5}}]\nsteps:\n{LOOK}",
            "read_gauge(line=1), above",
            "is no number",
        ),
        (f"{HEAD}inputs: [{{name: a, kind: int, max: 3}}]\nsteps:\n{LOOK}", "3}]", "unknown field `max`"),
        (
            'workflow: w\nversion: "1"\nrun_as: [auditor]\nsteps:\n  - {id: a, tool: stamp, args: {text: x}}',
            "stamp",
            "may not use stamp",
        ),
        (f'workflow: w\nversion: "1"\ntriggers: [{{event: task.failed}}]\nsteps:\n{LOOK}', "triggers", "have no roles"),
    ],
)
def test_a_mistake_is_told_with_its_place(text: str, place: str, message: str) -> None:
    found = problems(text)
    assert found, "no problem found"
    assert message in found[0].message
    assert text.splitlines()[found[0].line - 1][found[0].column - 1 :].startswith(place)


def test_what_a_tool_says_nothing_of_is_not_guessed() -> None:
    text = f"{HEAD}steps:\n  - {{id: a, tool: read_sensor, args: {{sensor: vibration, line: 1}}}}\n"
    text += "  - {id: b, tool: jam, depends_on: [a], when: steps.a.result.value > 1}\n"
    assert problems(text) == []


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_broken(text: str) -> None:
    for each in (text, f"{HEAD}steps:\n{LOOK}result: {json.dumps(text)}"):
        flow, _, found = examine(each, SPECS)
        assert flow is not None or found


def _examples(folder: Path) -> list[tuple[str, str]]:
    """Writes the page's definitions under their names; gives its commands with what they print."""
    text = DOCS.read_text()
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        (folder / f"{read(block)[0].workflow}.yaml").write_text(block)
    for name, block in re.findall(r"```toml (\S+)\n(.*?)```", text, re.DOTALL):
        (folder / name).write_text(block)
    commands = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            commands.append((command.removeprefix("outrider workflow "), printed))
    return commands


def test_the_pages_examples_print_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = _examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(commands) >= 4
    for command, printed in commands:
        assert CliRunner().invoke(app, shlex.split(command)).output == printed, command


def test_check_and_simulate_tell_machines_the_same(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(f"{HEAD}steps:\n  - {{id: a, tool: launch}}\n")
    told = CliRunner().invoke(app, ["check", str(tmp_path / "bad.yaml"), "--json"])
    assert told.exit_code == 1
    assert json.loads(told.output)[0]["line"] == 5
    again = CliRunner().invoke(app, ["simulate", str(tmp_path / "bad.yaml"), "--json"])
    assert (again.exit_code, again.output) == (1, told.output)
    text = f"{HEAD}steps:\n  - {{id: a, tool: list_alarms}}\n"
    (tmp_path / "good.yaml").write_text(text)
    told = CliRunner().invoke(app, ["simulate", str(tmp_path / "good.yaml"), "--json"])
    assert told.exit_code == 0
    assert json.loads(told.output)["calls"] == {"read": 1}
    (tmp_path / "danger.yaml").write_text(f"{HEAD}steps:\n  - {{id: a, tool: purge}}\n")
    told = CliRunner().invoke(app, ["simulate", str(tmp_path / "danger.yaml"), "--pack", "tests.agent.plant"])
    assert told.output.splitlines()[-1] == "succeeded; calls: 1 danger; at most 10 s"


def simulated(folder: Path, steps: str, *more: str) -> list[str]:
    (folder / "w.yaml").write_text(f"{HEAD}{steps}")
    return (
        CliRunner()
        .invoke(app, ["simulate", str(folder / "w.yaml"), "--pack", "tests.agent.plant", *more])
        .output.splitlines()
    )


BLOW = (
    "steps:\n  - {id: blow, tool: purge, on_error: calm}\n"
    "  - {id: calm, tool: stamp, args: {text: '${steps.blow.error}'}}\n"
)


def test_a_dangerous_call_is_approved_or_denied_in_simulation_and_what_follows_is_shown(tmp_path: Path) -> None:
    assert simulated(tmp_path, BLOW) == [
        "blow             approved   purge()",
        "blow             succeeded  purge() text",
        "succeeded; calls: 1 danger; at most 10 s",
    ]
    assert simulated(tmp_path, BLOW, "--deny") == [
        "blow             denied     purge()",
        "blow             failed     purge() simulate denied purge()",
        'calm             succeeded  stamp(text="simulate denied purge()") text',
        "succeeded; calls: 1 act; at most 10 s",
    ]


def test_the_interlocks_of_a_policy_file_hold_in_simulation(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(
        '[[interlocks]]\nname = "hot"\ntools = ["set_speed"]\nnever = "heat.value > 90.0"\n'
        'look.heat = { tool = "read_sensor", args = { sensor = "temperature", line = "${args.line}" } }\n'
    )
    steps = "steps:\n  - {id: fast, tool: set_speed, args: {line: 1, percent: 100}}\n"
    rules = ("--policy", str(tmp_path / "policy.toml"))
    assert simulated(tmp_path, steps, *rules)[-1].startswith("succeeded; calls: 1 act")
    hot = simulated(tmp_path, steps, *rules, "--result", 'read_sensor={"value": 95.0}')
    assert hot[-1].startswith("failed: step fast: set_speed is not done: the interlock hot forbids it")


@pytest.mark.parametrize(
    ("head", "took", "seconds"),
    [
        ("", {"a": [1.0] * 5, "b": [0.5]}, 2.0),  # four at once: two rounds of a, b beside them
        ("parallel: 2\n", {"a": [1.0] * 4, "p": [3.0]}, 3.0),
        ("", {"a": [1.0], "p": [3.0], "q": [2.0], "c": [0.25]}, 6.25),
        ("parallel: 2\n", {"a": [1.0], "p": [3.0], "q": [2.0], "c": [0.25]}, 3.25),
    ],
)
def test_the_estimate_follows_the_order_in_which_the_runner_begins(
    head: str, took: dict[str, list[float]], seconds: float
) -> None:
    steps = LOOK.replace("look", "a") + LOOK.replace("look", "b") + "  - {id: p, tool: stamp, args: {text: x}}\n"
    steps += "  - {id: q, tool: stamp, args: {text: x}}\n  - {id: c, tool: jam, depends_on: [p, q]}\n"
    flow = read(f"{HEAD}{head}steps:\n{steps}")[0]
    assert estimate(flow, {spec.name: spec for spec in SPECS}, took) == seconds


def test_on_a_device_its_own_roles_packs_times_and_broker_count(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "state")
    roles = SHIPPED_ROLES | {"night-shift": ["read:tool", "call:tool:tool=stamp"]}
    grants = Grants(2, 0.0, 1e12, roles, [])
    store = Store(daemon.state / "outrider.db", migrations)

    async def fill() -> None:
        cache = await GrantsCache.open(store, daemon.hub_key.public)
        await cache.accept(sign_grants(daemon.hub_key, grants))
        transcripts = Transcripts(store)
        task = await transcripts.add(Task("t", "x", Subject("ada", [], 0.0), 0.0))
        for ms in (100.0, 250.0, 9000.0):
            await transcripts.append(task, Step("tool", call=Call("stamp", {"text": "x"}), ms=ms))

    try:
        asyncio.run(fill())
        (tmp_path / "device.toml").write_text(f'state = "{daemon.state}"\npack = "tests.agent.plant"\n')
        text = 'workflow: w\nversion: "1"\nrun_as: [night-shift]\ntriggers: [{mqtt: door}]\nsteps:\n'
        (tmp_path / "w.yaml").write_text(text + "  - {id: s, tool: stamp, args: {text: x}}\n")

        def run(*argv: str) -> list[str]:  # the store is open, as while the daemon runs
            return CliRunner().invoke(app, [argv[0], str(tmp_path / "w.yaml"), *argv[1:]]).output.splitlines()

        assert any("may not use stamp" in line for line in run("check", "--pack", "tests.agent.plant"))
        config = ("--config", str(tmp_path / "device.toml"))
        told = run("check", *config)
        assert [line.partition("w.yaml")[2] for line in told] == [
            ":4:19: this device has no site's broker to hear it from (add [site] to its settings)"
        ]
        with (tmp_path / "device.toml").open("a") as file:
            file.write('[site]\nbroker = "mqtt://plc"\n')
        assert run("check", *config) == []
        assert run("simulate", *config)[-1] == "succeeded; calls: 1 act; about 0.25 s, at most 10 s"
    finally:
        store.close()
