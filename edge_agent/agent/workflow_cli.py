"""`outrider workflow`: check a definition, and try it without a device.

Invariants: neither verb makes a call; what tools there are and what they give is the pack's declarations; simulation is
the device's own runner over tools that answer with samples, or with what `--result` and `--fail` say.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from edge_agent.agent.calls import render
from edge_agent.agent.tool import ToolError, ToolSpec
from edge_agent.agent.toolrunner import load
from edge_agent.agent.transcript import Transcripts, migrations
from edge_agent.agent.workflow import Broken, Marks, Problem, Workflow, read, sample
from edge_agent.agent.workflow_check import check, runs_as
from edge_agent.agent.workflow_run import AT, Runner
from edge_agent.errors import Refused
from edge_agent.store import Store
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, allowed

app = typer.Typer(no_args_is_help=True, help="Check workflows, and try them without a device.")
File = Annotated[Path, typer.Argument(help="A definition in YAML; see docs/workflows.md.")]
Pack = Annotated[str, typer.Option(help="The tool packs of the device, MODULE[:attr], with commas between them.")]
Role = Annotated[list[str] | None, typer.Option(help="Check for this role instead of the file's run_as.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
_GRANTS = Grants(1, 0.0, float("inf"), SHIPPED_ROLES, [])


def _allowed(subject: Subject, action: str, resource: str) -> bool:
    return allowed(_GRANTS, subject, action, resource, now=0.0)


def examine(
    text: str, specs: Sequence[ToolSpec], roles: Sequence[str] = ()
) -> tuple[Workflow | None, Marks, list[Problem]]:
    """The definition if it can be read, and all that is wrong, by the roles that ship."""
    try:
        flow, marks = read(text)
    except Broken as broken:
        return None, Marks(), broken.problems
    subject = Subject("check", list(roles), 0.0) if roles else runs_as(flow, 0.0)
    return flow, marks, check(flow, marks, specs, _allowed, subject)


def _open(file: Path, pack: str, roles: Sequence[str]) -> tuple[Workflow | None, list[ToolSpec], list[Problem], str]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read: {error}", "a YAML file") from error
    with tempfile.TemporaryDirectory(prefix="workflow-") as state:
        specs = [tool.spec for tool in load(pack, Path(state), {})]
    flow, _, found = examine(text, specs, roles)
    return flow, specs, found, text


def _tell(file: Path, found: Sequence[Problem]) -> None:
    for problem in found:
        hint = f" ({problem.hint})" if problem.hint else ""
        typer.echo(f"{file}:{problem.line}:{problem.column}: {problem.message}{hint}")


@app.command("check")
def check_(file: File, pack: Pack = "tools.sim.pack", role: Role = None, as_json: Json = False) -> None:
    """Schema, cycles, unknown tools, types between steps, permissions; exits 1 when something is wrong."""
    _, _, found, _ = _open(file, pack, role or [])
    if as_json:
        fields = ("line", "column", "message", "hint")
        typer.echo(json.dumps([{"file": str(file)} | {f: getattr(p, f) for f in fields} for p in found], indent=1))
    else:
        _tell(file, found)
    raise typer.Exit(bool(found))


@app.command()
def simulate(
    file: File,
    given: Annotated[list[str] | None, typer.Option("--input", metavar="NAME=JSON", help="An input.")] = None,
    result: Annotated[
        list[str] | None, typer.Option(metavar="STEP=JSON", help="What a step's tool gives; fields over the sample's.")
    ] = None,
    fail: Annotated[list[str] | None, typer.Option(metavar="STEP=TEXT", help="A step whose tool fails.")] = None,
    pack: Pack = "tools.sim.pack",
    role: Role = None,
    as_json: Json = False,
) -> None:
    """Run against simulated tools: the path, its calls, its longest time; exits 1 when the run fails."""
    flow, specs, found, text = _open(file, pack, role or [])
    if flow is None or found:
        _tell(file, found)
        raise typer.Exit(1)
    subject = Subject("simulate", role or flow.run_as or ["admin"], 0.0)
    told = asyncio.run(_simulated(flow, text, specs, (given or [], result or [], fail or []), subject))
    if as_json:
        typer.echo(json.dumps(told, indent=1))
    else:
        for at in told["path"]:
            typer.echo(f"{at['step']:<16} {at['state']:<10} {at['call']} {at['text']}".rstrip())
        calls = ", ".join(f"{count} {risk}" for risk, count in told["calls"].items()) or "none"
        typer.echo(
            f"{told['state']}{told['error'] and ': '}{told['error']}; calls: {calls}; at most {told['worst_s']:g} s"
        )
    raise typer.Exit(told["state"] != "succeeded")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise Refused(f"{text!r} is not NAME=VALUE", "such as line=2")
    return name, value


def json_of(text: str) -> Any:
    """The value, or the text itself where it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


class _Simulated(Transcripts):
    """Tools that answer with samples, and the journal. Dangerous calls are made."""

    def __init__(self, store: Store, specs: Sequence[ToolSpec], answers: dict[str, Any], fail: dict[str, str]) -> None:
        super().__init__(store)
        self._specs, self._answers, self._fail = specs, answers, fail

    async def specs(self) -> Sequence[ToolSpec]:
        return [msgspec.structs.replace(s, risk="act") if s.risk == "danger" else s for s in self._specs]

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        step = AT.get().partition("[")[0]
        if step in self._fail:
            raise ToolError(self._fail[step])
        value = sample(next(spec.returns for spec in self._specs if spec.name == name))
        value = value | {key: args[key] for key in args.keys() & value.keys()} if isinstance(value, dict) else value
        given = self._answers.get(AT.get(), self._answers.get(step, value))
        return value | given if isinstance(value, dict) and isinstance(given, dict) else given


async def _simulated(
    flow: Workflow, text: str, specs: Sequence[ToolSpec], given: Sequence[Sequence[str]], subject: Subject
) -> dict[str, Any]:
    """Path, calls by risk, and the longest time in seconds of one simulated run. Raises Refused."""
    inputs, answers, fail = ([_pair(each) for each in texts] for texts in given)
    slept = [0.0]

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    with tempfile.TemporaryDirectory(prefix="simulate-") as state:
        store = Store(Path(state) / "runs.db", migrations)
        tools = _Simulated(store, specs, {name: json_of(value) for name, value in answers}, dict(fail))
        runner = Runner(tools, tools, _allowed, clock=time.time, sleep=sleep)
        await runner.accept("simulated", text, {name: json_of(value) for name, value in inputs}, subject, {})
        task = await runner.run("simulated")
        store.close()
    by_name, by_id = {spec.name: spec for spec in specs}, {step.id: step for step in flow.steps}
    path, calls, worst = [], Counter[str](), sum(slept)
    for entry in (entry for entry in task.steps if entry.role == "tool"):
        state = "skipped" if entry.call is None else "succeeded" if entry.ok else "failed"
        call = render(entry.call) if entry.call else ""
        path.append({"step": entry.at, "state": state, "call": call, "text": entry.text, "result": entry.result})
        if entry.call:
            spec = by_name[entry.call.name]
            calls[spec.risk] += 1
            worst += by_id[entry.at.partition("[")[0]].timeout_s or spec.timeout_s
    return {
        "workflow": flow.workflow,
        "version": flow.version,
        "state": task.state,
        "error": task.error,
        "result": task.result,
        "path": path,
        "calls": dict(calls),
        "worst_s": min(worst, flow.timeout_s),
    }
