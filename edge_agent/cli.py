"""The command `outrider`. Its verbs are entry points of the group `outrider.verbs`, one per package and none imported
before it is called.

Invariants: an error is one line and a hint on stderr with an exit code that says what to do (75 try again, 78 change
something, 70 look at the machine, 69 install something), never a traceback; everything for people has a `--json` twin.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.exits import EX_MISSING, tell
from edge_agent.wire.errors import WireError

_VERBS = {
    "agent": ("Run the daemon of a device.", "edge"),
    "task": ("Give a device a task through its local API and watch it work.", "edge"),
    "replay": ("Ask a task's decisions again, of another model, and see where it differs.", "edge"),
    "update": ("How a device's updates fare and why one rolled back; hold them back for a while.", "edge"),
    "workflow": ("Check workflows, and try them without a device.", "edge"),
    "knowledge": ("The documents a device knows: add, list, search, forget.", "edge"),
    "mcp": ("Serve a device's tools to MCP clients.", "mcp"),
    "doctor": ("Check what a device needs: extras, state, hub, broker, models by a real inference.", "edge"),
    "hub": ("Run the hub: devices, jobs, models, dashboard.", "hub"),
    "rollout": ("Give a version to the fleet in waves, and try a plan on virtual devices first.", "hub"),
    "trust": ("The keys of TUF: the ceremony, signatures, rotation.", "hub"),
    "broker": ("The MQTT broker of a site: write its configuration.", "hub"),
    "models": ("Fetch, build and publish models.", "models"),
    "bench": ("Benchmarks.", "dev"),
    "eval": ("How often the tool caller is right: BFCL and the plant set.", "dev"),
    "demo": ("A fleet on this machine: a cut cable and the books, or `rollout`: updates that go back.", "dev"),
    "fleet": ("Thousands of virtual devices with sessions and signatures of their own.", "dev"),
    "soak": ("Random faults for minutes, then the books: what was promised is committed once.", "dev"),
}


def _verbs() -> dict[str, EntryPoint]:
    order = list(_VERBS)
    found = {point.name: point for point in entry_points(group="outrider.verbs")}
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


class _Verbs(TyperGroup):
    """Lists verbs by their names alone and imports only the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_verbs())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _verbs():
            return None
        stub = typer.Typer(add_completion=False)
        stub.command(cmd_name, help=_VERBS.get(cmd_name, ("",))[0])(lambda: None)
        return typer.main.get_command(stub)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _load(_verbs()[str(name)]), rest


def _load(point: EntryPoint) -> Any:
    try:
        found = point.load()
    except ModuleNotFoundError as error:
        raise _missing(point.name, error) from error
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    single = typer.Typer(add_completion=False)
    single.command(point.name)(found)
    return typer.main.get_command(single)


def _missing(verb: str, error: ModuleNotFoundError) -> Refused:
    extra = _VERBS.get(verb, ("", verb))[1]
    return _Missing(f"`outrider {verb}` needs {error.name}", f"pip install 'outrider[{extra}]'")


class _Missing(Refused):
    pass


app = typer.Typer(cls=_Verbs, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def _root(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Outrider: devices that keep thinking when the network is gone, and a hub that can trust what comes back."""
    if show_version:
        typer.echo(version("outrider"))
        raise typer.Exit


def main() -> None:
    """The console script."""
    try:
        app()
    except _Missing as error:
        tell(error)
        sys.exit(EX_MISSING)
    except (OutriderError, WireError) as error:
        sys.exit(tell(error))
    except ModuleNotFoundError as error:
        tell(_missing(next((arg for arg in sys.argv[1:] if not arg.startswith("-")), ""), error))
        sys.exit(EX_MISSING)
    except KeyboardInterrupt:
        sys.exit(130)


def _option(text: str, env: str, **more: Any) -> Any:
    return typer.Option(envvar=f"OUTRIDER_{env}", help=text, show_default=False, **more)


State = Annotated[Path | None, _option("State directory: key, identity, outbox, models.", "STATE")]


def agent(
    state: State = None,
    config: Annotated[Path | None, _option("TOML file with any of these as keys.", "CONFIG")] = None,
    hub: Annotated[str | None, _option("The hub's address, to enrol; later it overrides the known one.", "HUB")] = None,
    token: Annotated[str | None, _option("Single-use enrolment token.", "TOKEN")] = None,
    name: Annotated[str | None, _option("This device's name in the fleet, to enrol.", "NAME")] = None,
    ca: Annotated[str | None, _option("CA of the hub's HTTPS: a PEM file or sha256:FINGERPRINT.", "CA")] = None,
    broker: Annotated[str | None, _option("mqtt[s]://HOST:PORT instead of what the hub said.", "BROKER")] = None,
    api: Annotated[str | None, _option("HOST:PORT of the local API (127.0.0.1:8471).", "API")] = None,
    pack: Annotated[str | None, _option("Tool pack MODULE[:attr] (tools.sim.pack).", "PACK")] = None,
    option: Annotated[list[str] | None, _option("KEY=VALUE for the tool pack.", "OPTION")] = None,
    model: Annotated[str | None, _option("The agent's language model, a bundle (the first llm).", "MODEL")] = None,
    adapter: Annotated[str | None, _option("The adapter tasks use, or none (the first for tools).", "ADAPTER")] = None,
    sample: Annotated[list[str] | None, _option("A call to sample (all of read_sensor).", "SAMPLE")] = None,
    telemetry_s: Annotated[float | None, _option("Seconds between samples (10).", "TELEMETRY_S")] = None,
    telemetry_ttl_s: Annotated[float | None, _option("Seconds a sample is kept (7 days).", "TELEMETRY_TTL_S")] = None,
    outbox_mb: Annotated[int | None, _option("Quota of what waits for the hub, MiB (256).", "OUTBOX_MB")] = None,
    request_mb: Annotated[int | None, _option("Largest inference request, MiB (64).", "REQUEST_MB")] = None,
    task_s: Annotated[float | None, _option("Seconds a task may take (120).", "TASK_S")] = None,
    bundles_mb: Annotated[
        int | None, _option("Disk that installed models may take, MiB (no limit).", "BUNDLES_MB")
    ] = None,
    neighbours: Annotated[list[str] | None, _option("A device next door: URL, or auto.", "NEIGHBOURS")] = None,
    log: Annotated[str | None, _option("debug, info, warning or error (info).", "LOG")] = None,
) -> None:
    """Run the daemon of a device; the first start enrols it."""
    given = {key: value for key, value in locals().items() if key != "config" and value != []}
    import msgspec

    from edge_agent.config import load

    settings = load(given, config)
    if config is not None:
        os.environ["OUTRIDER_CONFIG"] = str(config.resolve())  # tool packs find their files beside it
    passed, given_to = os.pipe()
    os.write(given_to, msgspec.json.encode(settings, enc_hook=str))
    os.close(given_to)
    os.set_inheritable(passed, True)
    os.execv(sys.executable, [sys.executable, "-m", "edge_agent", str(passed)])


def doctor(
    state: State = None,
    hub: Annotated[str | None, _option("The hub to reach, when not enrolled.", "HUB")] = None,
    broker: Annotated[str | None, _option("The broker to reach instead of what the hub said.", "BROKER")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out broker and models, for a running agent.")] = False,
    bundle: Annotated[Path | None, typer.Option(help="Write a ZIP file for who helps, with no secret in it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Check what a device needs; exits 1 when something is wrong."""
    from edge_agent import doctor as checks

    found = checks.examine(state, hub or "", broker or "", quick)
    if bundle is not None:
        from edge_agent import support

        told = {"checks": checks.as_json(found), "versions": support.versions(), "log": support.journal()}
        try:
            bundle.write_bytes(support.bundle(**told))
        except OSError as error:
            raise Refused(f"{bundle} cannot be written: {error}", "name another file") from error
    if json:
        typer.echo(checks.as_json(found))
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for check in found:
            typer.secho(f"{check.state:<4} ", fg=colours[check.state], nl=False)
            typer.echo(f"{check.name:<10} {check.detail}" + (f"\n     → {check.hint}" if check.hint else ""))
    raise typer.Exit(any(check.state == "fail" for check in found))


class _Tasks(TyperGroup):
    """`outrider task TEXT` is `outrider task run TEXT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = not args or args[0] == "--help" or args[0] in self.commands
        return super().parse_args(ctx, args if known else ["run", *args])


task = typer.Typer(cls=_Tasks, no_args_is_help=True, help="Give a device a task, and approve its dangerous calls.")
Api = Annotated[str, _option("The device's local API.", "API")]
Token = Annotated[str, _option("Access token from the hub's /v1/login.", "TOKEN")]


@task.command()
def approve(
    id: Annotated[str, typer.Argument(help="The task that waits.")],
    deny: Annotated[bool, typer.Option("--deny", help="Say no.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask again.")] = False,
    api: Api = "http://127.0.0.1:8471",
    token: Token = "",
    json: Annotated[bool, typer.Option("--json", help="Print the call that was approved or denied.")] = False,
) -> None:
    """Show the call that a task waits with, and approve or deny it, once."""
    import msgspec

    with _client(api, token) as client:
        seen = _answer(client, "GET", f"/v1/tasks/{id}")
        ask = seen["steps"][-1] if seen["steps"] else {}
        if ask.get("role") != "ask":
            raise Refused(f"{id} waits for no approval: it is {seen['state']}", "GET /v1/tasks shows which do")
        if not json:
            typer.echo(f"{seen['subject']['name']} asked: {seen['text']}")
            plan = (n for n, each in enumerate(seen["steps"]) if each["role"] == "plan" and each.get("at"))
            _show_steps(seen, next(plan, len(seen["steps"]) - 1))
        if not yes:
            typer.confirm("deny it?" if deny else "approve it?", abort=True)
        args = {"id": id, "call": ask["text"], "approve": not deny}
        _answer(client, "POST", "/v1/tools/approve_call", json={"args": args})
    if json:
        typer.echo(msgspec.json.encode(args | {"expires": ask["expires"], "made": ask["call"]}))


@task.command("list")
def list_(
    state: Annotated[str, typer.Option(help="Only those: running, waiting, succeeded or failed.")] = "",
    api: Api = "http://127.0.0.1:8471",
    token: Token = "",
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """The newest tasks of a device, and how each ended."""
    import msgspec

    from edge_agent.agent import shown
    from edge_agent.agent.transcript import Task

    seen = [one for one in _ask(api, token, "GET", "/v1/tasks") if state in ("", one["state"])]
    if json:
        typer.echo(msgspec.json.encode(seen))
    for one in [] if json else seen:
        typer.echo(shown.title(msgspec.convert(one, Task)))


@task.command()
def show(
    id: Annotated[str, typer.Argument(help="The task.")],
    api: Api = "http://127.0.0.1:8471",
    token: Token = "",
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """A task's whole transcript: what was said, called, asked and approved, by what model, and how long it took."""
    import msgspec

    from edge_agent.agent import shown
    from edge_agent.agent.transcript import Task

    seen = _ask(api, token, "GET", f"/v1/tasks/{id}")
    if json:
        typer.echo(msgspec.json.encode(seen))
        return
    typer.echo(shown.title(msgspec.convert(seen, Task)))
    _show_steps(seen, 0)
    _show_end(seen)


def _client(api: str, token: str, timeout: float = 10) -> Any:
    import httpx

    base = api if "://" in api else f"http://{api}"
    return httpx.Client(base_url=base, headers={"Authorization": f"Bearer {token}"}, timeout=timeout)


@task.command()
def run(
    text: Annotated[str, typer.Argument(help="What to do, in plain words.")],
    conversation: Annotated[str, typer.Option(help="Go on with what was said under this name.")] = "",
    api: Api = "http://127.0.0.1:8471",
    token: Token = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the end.")] = 180.0,
    json: Annotated[bool, typer.Option("--json", help="Print the task with its transcript at the end.")] = False,
) -> None:
    """Give a device a task and show its calls as they are made; exits 1 when it failed."""
    import msgspec

    with _client(api, token) as client:
        id = _answer(client, "POST", "/v1/tasks", json={"text": text, "conversation": conversation})["id"]
        shown, deadline = 0, time.monotonic() + timeout
        while True:
            seen = _answer(client, "GET", f"/v1/tasks/{id}")
            if not json:
                shown = _show_steps(seen, shown)
            if seen["state"] not in ("running", "waiting"):
                break
            if time.monotonic() > deadline:
                raise Retry(f"task {id} is not done after {timeout:g} s", "it goes on; ask for it with GET /v1/tasks")
            time.sleep(0.1)
    if json:
        typer.echo(msgspec.json.encode(seen))
    else:
        _show_end(seen)
    raise typer.Exit(seen["state"] != "succeeded")


Json = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


def replay(
    id: Annotated[str, typer.Argument(help="A task that has ended.")],
    model: Annotated[str, typer.Option(help="MODEL or MODEL:ADAPTER; without it, what speaks now.")] = "",
    api: Api = "http://127.0.0.1:8471",
    token: Token = "",
    json: Json = False,
) -> None:
    """Ask a task's decisions again, of another model: nothing is done, results are the transcript's; exits 1 if one
    differs."""
    import msgspec

    with _client(api, token, 600) as client:
        seen = _answer(client, "POST", f"/v1/tasks/{id}/replay", json={"model": model})
    made = seen["decisions"]
    if json:
        typer.echo(msgspec.json.encode(seen))
    for each in [] if json else made:
        typer.secho(f"{each['n']:>3} {each['role']:<6} {each['said']}  {each['ms']:.0f} ms")
        if not each["same"]:
            typer.secho(f"    differs: {each['says']}", fg="yellow", nl=False)
            typer.echo(f"  {each['ms_now']:.0f} ms")
    if not json:
        typer.echo(f"{seen['model'] or seen['digest'][:12]} {seen['adapter']}: {seen['same']} of {len(made)} the same")
    raise typer.Exit(seen["same"] < len(made))


update = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
_API = "http://127.0.0.1:8471"


@update.command("show")
def update_show(api: Api = _API, token: Token = "", json: Json = False) -> None:
    """Each bundle's state, what its trial saw, and the evidence against one that rolled back."""
    _tell_updates(_ask(api, token, "GET", "/v1/updates"), json)


@update.command("hold")
def update_hold(
    minutes: Annotated[float, typer.Option(help="How long at most; the device's limit goes before it.")],
    reason: Annotated[str, typer.Option(help="Why not now; the hub sees it.")],
    api: Api = _API,
    token: Token = "",
    json: Json = False,
) -> None:
    """Nothing is downloaded or activated for some minutes; what runs goes on."""
    _tell_updates({"hold": _ask(api, token, "POST", "/v1/updates/hold", {"minutes": minutes, "reason": reason})}, json)


@update.command("release")
def update_release(api: Api = _API, token: Token = "", json: Json = False) -> None:
    """End a hold."""
    _tell_updates(_ask(api, token, "DELETE", "/v1/updates/hold"), json)


def _ask(api: str, token: str, method: str, path: str, body: Any = None) -> Any:
    with _client(api, token) as client:
        return _answer(client, method, path, json=body)


def _tell_updates(seen: dict[str, Any], json: bool) -> None:
    import msgspec

    if json:
        typer.echo(msgspec.json.encode(seen))
        return
    if (hold := seen.get("hold")) and hold["until"] > time.time():
        typer.echo(f"held until {time.strftime('%H:%M', time.localtime(hold['until']))}: {hold['reason']}")
    for name, one in seen.get("bundles", {}).items():
        typer.echo(f"{name} {one['version']}: {one['state']}" + (f": {one['error']}" if one["error"] else ""))
        if one["trial"]:
            typer.echo("  trial: " + _figures(one["trial"]))
        if why := one["why"]:
            typer.echo(f"  {why['version']} rolled back: " + _figures(why["figures"]))
            for line in [*why["samples"], *why["log"][-10:]]:
                typer.echo(f"    {line}")


def _figures(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in figures.items() if value not in (None, ""))


def _show_steps(seen: dict[str, Any], first: int) -> int:
    import msgspec

    from edge_agent.agent import shown
    from edge_agent.agent.transcript import Task

    task = msgspec.convert(seen, Task)
    for step in task.steps[first:]:
        text, tone = shown.line(step, task)
        typer.secho(text, fg={"bad": "red", "wait": "yellow"}.get(tone, "cyan" if step.role == "model" else None))
    return len(task.steps)


def _show_end(seen: dict[str, Any]) -> None:
    if seen["state"] == "succeeded":
        typer.secho(seen["answer"], fg="green")
        typer.echo(f"from {'; '.join(seen['sources'])}" if seen.get("sources") else "", nl=bool(seen.get("sources")))
    elif seen["state"] == "waiting":
        typer.secho(f"it waits: outrider task approve {seen['id']}", fg="yellow")
    elif seen["state"] == "failed":
        typer.secho(f"failed: {seen['error']}", fg="red")


def _answer(client: Any, method: str, path: str, **more: Any) -> Any:
    import httpx

    try:
        response = client.request(method, path, **more)
    except httpx.HTTPError as error:
        raise Retry(f"no answer from {client.base_url}: {error}", "is `outrider agent` running there?") from error
    if response.is_error:
        problem = {}
        with contextlib.suppress(ValueError):
            problem = response.json()
        kind = Retry if response.status_code in (429, 503) else Refused
        raise kind(str(problem.get("detail", response.reason_phrase)), str(problem.get("hint", "")))
    return response.json()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
