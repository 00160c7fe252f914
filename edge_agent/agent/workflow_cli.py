"""`outrider workflow`: check a definition, and try it without a device.

Invariants: neither verb makes a call; what tools there are and what they give is the pack's declarations. On a device,
with `--config` or `--state`, they are the packs of its settings, who may do what is by the grants that it has, custom
roles included, and what calls take is what they took there; its daemon may run meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from edge_agent import config, enrol
from edge_agent.agent import policy
from edge_agent.agent.tool import ToolSpec
from edge_agent.agent.toolrunner import load
from edge_agent.agent.transcript import Step as Entry
from edge_agent.agent.workflow import Broken, Marks, Problem, Workflow, read
from edge_agent.agent.workflow_check import check, runs_as
from edge_agent.agent.workflow_simulate import Told
from edge_agent.agent.workflow_simulate import simulate as simulated
from edge_agent.errors import Refused
from edge_agent.wire.errors import WireError
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, allowed, verify_grants

app = typer.Typer(no_args_is_help=True, help="Check workflows, and try them without a device.")
File = Annotated[Path, typer.Argument(help="A definition in YAML; see docs/workflows.md.")]
Pack = Annotated[str, typer.Option(help="Tool packs, MODULE[:attr], with commas between them (tools.sim.pack).")]
Role = Annotated[list[str] | None, typer.Option(help="Check for this role instead of the file's run_as.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
Config = Annotated[Path | None, typer.Option(help="The device's settings file: its packs, its roles.")]
State = Annotated[Path | None, typer.Option(help="The device's state folder, where the settings do not name it.")]
LATEST = 5000  # steps of transcripts that times are taken from
_GRANTS = Grants(1, 0.0, float("inf"), SHIPPED_ROLES, [])


def _shipped(subject: Subject, action: str, resource: str) -> bool:
    return allowed(_GRANTS, subject, action, resource, now=0.0)


class Place(msgspec.Struct, frozen=True):
    """Where a workflow is to run: its tools, who may do what, seconds that calls took, its policy file, and whether it
    has a site's broker."""

    specs: Sequence[ToolSpec]
    allowed: policy.Allowed = _shipped
    times: dict[str, float] = {}
    policy: Path | None = None
    site: bool = True


def place(pack: str, settings: config.Settings | None) -> Place:
    """A device by its settings; anywhere else the pack and the roles that ship. Raises Refused, Fatal."""
    packs = pack or (",".join(settings.packs) or settings.pack if settings else "tools.sim.pack")
    options = dict(each.partition("=")[::2] for each in settings.option) if settings and not pack else {}
    with tempfile.TemporaryDirectory(prefix="workflow-") as folder:
        for file in (settings.state / "tools").glob("*.toml") if settings else ():
            shutil.copy(file, folder)
        specs = [tool.spec for tool in load(packs, Path(folder), options)]
    if settings is None:
        return Place(specs)
    identity, times = enrol.load(settings.state), dict[str, list[float]]()
    if identity is None:
        raise Refused(f"{settings.state} is no device's state", "give --state, the folder of `outrider agent`")
    try:
        with closing(
            sqlite3.connect(f"{(settings.state / 'outrider.db').absolute().as_uri()}?mode=ro", uri=True)
        ) as db:
            text = db.execute("SELECT body FROM documents WHERE name = 'grants'").fetchone()
            grants = verify_grants(identity.hub_key, text[0].decode() if text else identity.enrolled.grants)
            for (body,) in db.execute("SELECT body FROM task_steps ORDER BY rowid DESC LIMIT ?", [LATEST]):
                step = msgspec.json.decode(body, type=Entry)
                if step.role == "tool" and step.call and step.ms:
                    times.setdefault(step.call.name, []).append(step.ms / 1e3)
    except (sqlite3.Error, WireError, ValueError) as error:
        raise Refused(
            f"the state in {settings.state} cannot be read: {error}", "was the daemon started once?"
        ) from error

    def by_grants(subject: Subject, action: str, resource: str) -> bool:
        return allowed(grants, subject, action, resource, now=time.time(), device=identity.enrolled.device)

    medians = {name: statistics.median(took) for name, took in times.items()}
    return Place(specs, by_grants, medians, settings.state / "policy.toml", settings.site is not None)


def examine(
    text: str, specs: Sequence[ToolSpec] | Place, roles: Sequence[str] = ()
) -> tuple[Workflow | None, Marks, list[Problem]]:
    """The definition if it can be read, and all that is wrong, by the place's grants or the roles that ship."""
    there = specs if isinstance(specs, Place) else Place(specs)
    try:
        flow, marks = read(text)
    except Broken as broken:
        return None, Marks(), broken.problems
    subject = Subject("check", list(roles), time.time()) if roles else runs_as(flow, time.time())
    found = check(flow, marks, there.specs, there.allowed, subject)
    for n, trigger in enumerate(flow.triggers):
        if trigger.mqtt and not there.site:
            told, hint = "this device has no site's broker to hear it from", "add [site] to its settings"
            found.append(marks.problem(f"$.triggers[{n}].mqtt", told, hint))
    return flow, marks, sorted(found)


def _open(
    file: Path, pack: str, roles: Sequence[str], settings: Path | None, state: Path | None
) -> tuple[Workflow | None, Place, list[Problem], str]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read: {error}", "a YAML file") from error
    if settings is not None:
        os.environ["OUTRIDER_CONFIG"] = str(settings.resolve())
    there = place(pack, config.load({"state": state}, settings) if settings or state else None)
    flow, _, found = examine(text, there, roles)
    return flow, there, found, text


def _tell(file: Path, found: Sequence[Problem], as_json: bool) -> None:
    if as_json:
        fields = ("line", "column", "message", "hint")
        typer.echo(json.dumps([{"file": str(file)} | {f: getattr(p, f) for f in fields} for p in found], indent=1))
    for problem in [] if as_json else found:
        hint = f" ({problem.hint})" if problem.hint else ""
        typer.echo(f"{file}:{problem.line}:{problem.column}: {problem.message}{hint}")


@app.command("check")
def check_(
    file: File, pack: Pack = "", role: Role = None, config: Config = None, state: State = None, as_json: Json = False
) -> None:
    """Schema, cycles, unknown tools, types between steps, permissions; exits 1 when something is wrong."""
    _, _, found, _ = _open(file, pack, role or [], config, state)
    _tell(file, found, as_json)
    raise typer.Exit(bool(found))


@app.command()
def simulate(
    file: File,
    given: Annotated[list[str] | None, typer.Option("--input", metavar="NAME=JSON", help="An input.")] = None,
    result: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP=JSON", help="What a step's tool gives, or TOOL= an interlock's; over the sample's."),
    ] = None,
    event: Annotated[list[str] | None, typer.Option(metavar="NAME=JSON", help="A field of what started it.")] = None,
    fail: Annotated[list[str] | None, typer.Option(metavar="STEP=TEXT", help="A step whose tool fails.")] = None,
    approve: Annotated[bool, typer.Option("--approve/--deny", help="What is said to each dangerous call.")] = True,
    policy: Annotated[Path | None, typer.Option(help="A policy.toml whose interlocks hold.")] = None,
    pack: Pack = "",
    role: Role = None,
    config: Config = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Run against simulated tools: the path, its calls, about how long and at most; exits 1 when the run fails."""
    flow, there, found, text = _open(file, pack, role or [], config, state)
    if flow is None or found:
        _tell(file, found, as_json)
        raise typer.Exit(1)
    subject = Subject("simulate", role or flow.run_as or ["admin"], time.time())
    inputs, results, began = ({n: json_of(v) for n, v in map(_pair, texts or [])} for texts in (given, result, event))
    if policy is not None and not policy.is_file():
        raise Refused(f"{policy} is no file", "give the policy.toml of the device or of a bundle")
    says = Told(inputs, results, dict(map(_pair, fail or [])), approve, policy or there.policy, there.times, began)
    told = asyncio.run(simulated(flow, text, there.specs, says, subject, there.allowed))
    if as_json:
        typer.echo(json.dumps(told, indent=1))
    else:
        for at in told["path"]:
            typer.echo(f"{at['step']:<16} {at['state']:<10} {at['call']} {at['text']}".rstrip())
        calls = ", ".join(f"{count} {risk}" for risk, count in told["calls"].items()) or "none"
        about = f"about {told['about_s']:.3g} s, " if told["about_s"] is not None else ""
        if about and told["unknown"]:
            about = about.replace(", ", f" and {told['unknown']} calls of unknown time, ")
        end = f"{told['state']}{told['error'] and ': '}{told['error']}"
        typer.echo(f"{end}; calls: {calls}; {about}at most {told['worst_s']:g} s")
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
