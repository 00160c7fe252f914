"""The command `outrider`. Its verbs are entry points of the group `outrider.verbs`, one per package and none imported
before it is called.

Invariants: an error is one line and a hint on stderr with an exit code that says what to do (75 try again, 78 change
something, 70 look at the machine, 69 install something), never a traceback; everything for people has a `--json` twin.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edge_agent.errors import OutriderError, Refused
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


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
