"""`outrider bench` and `outrider demo`: verbs for developers, never installed on a device.

Invariant: a benchmark races its peer in the same run and prints one JSON object a line with `--json`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import shutil
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_agent.errors import Refused


class Name(StrEnum):
    """The benchmarks there are, each a module of `bench` with `run`."""

    AGENT = "agent"
    FOOTPRINT = "footprint"
    LLM = "llm"
    OFFLINE = "offline"
    ROLLOUT = "rollout"
    SERVING = "serving"
    SWAP = "swap"
    TOOLCALL = "toolcall"
    UPDATE = "update"
    UPLINK = "uplink"


def bench(
    name: Annotated[Name, typer.Argument(help="Which benchmark.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a row.")] = False,
    minutes: Annotated[float | None, typer.Option(help="How long, for `footprint` (10).")] = None,
    devices: Annotated[int | None, typer.Option(help="How many, for `rollout` (10000).")] = None,
) -> None:
    """Run a benchmark against its peers.

    `agent`: a step of the loop, utterance to effect, memory search. `footprint`: memory and processor time of a daemon
    without a model. `llm`: prefill, decode, call. `offline`: a million records while cut off. `rollout`: a wave that
    fails among ten thousand devices, each with its MQTT session. `serving`: requests/s of networks, in process and over
    HTTP. `swap`: requests while versions change. `toolcall`: from an utterance to its call. `update`: what new versions
    cost on the wire. `uplink`: records/s, lost, doubled, against plain MQTT and JetStream.
    """
    from bench.rows import show

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or what it started outlives it
    module: Any = importlib.import_module(f"bench.{name}")
    given = {"minutes": minutes, "devices": devices}
    show(module.run(**{name: value for name, value in given.items() if value is not None}), as_json)


class Demo(StrEnum):
    """The demos there are."""

    MAIN = "main"
    ROLLOUT = "rollout"


def demo(
    which: Annotated[Demo, typer.Argument(help="`main`, or `rollout`: updates that go back, and one that helps.")] = (
        Demo.MAIN
    ),
    keep: Annotated[bool, typer.Option(help="Leave hub, devices and dashboard running at the end.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the fleet lives while it runs; emptied first.")] = Path(".demo"),
    report: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("demo-report.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report too, the account on stderr.")] = False,
) -> None:
    """A fleet on this machine: enrol, install, ten tasks, a cut cable, a killed daemon, and the books."""
    from rich.console import Console

    from models.fetch import default_cache

    if folder.exists() and not (folder / "hub").exists() and any(folder.iterdir()):
        raise Refused(f"{folder} holds something that is not a demo's", "name another with --folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    console = Console(stderr=as_json)
    try:
        module = importlib.import_module("bench.demo_rollout" if which is Demo.ROLLOUT else "bench.demo")
        found = asyncio.run(module.run(folder, default_cache(), console, report, keep))
    except asyncio.CancelledError:
        raise typer.Exit(130) from None
    if as_json:
        json.dump(found, sys.stdout, indent=1)
    broken = [promise["promise"] for promise in found["promises"] if not promise["held"]]
    if broken:
        console.print(f"[bold red]broken:[/bold red] {'; '.join(broken)}")
        raise typer.Exit(1)


def soak(
    minutes: Annotated[float, typer.Option(help="How long faults come.")] = 10.0,
    devices: Annotated[int, typer.Option(min=2, help="How many devices, a process each.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the faults' choice.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, the account on stderr.")] = False,
) -> None:
    """Cut links, kill devices, broker and hub at random, and then compare what was promised with what is committed."""
    from bench.soak import run

    _play(lambda folder, say: run(folder, minutes, devices, seed, say), "soak", as_json)


fleet = typer.Typer(help="Fleets of virtual devices.", no_args_is_help=True)


@fleet.callback()
def _fleet() -> None:
    """A group, though it has one verb."""


@fleet.command()
def simulate(
    devices: Annotated[int, typer.Option(min=1, help="How many, each its own MQTT session.")] = 1000,
    minutes: Annotated[float, typer.Option(min=0.05, help="How long they send.")] = 1.0,
    script: Annotated[Path | None, typer.Option(help="Behaviours and faults (TOML); steady devices if not.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, the account on stderr.")] = False,
) -> None:
    """Thousands of virtual devices against a real hub and broker, and then the books."""
    from bench.simulate import load, run

    plan = load(script)
    _play(lambda folder, say: run(folder, devices, minutes, plan, say), "fleet", as_json)


def _play(run: Callable[[Path, Callable[[str], None]], dict[str, Any]], name: str, as_json: bool) -> None:
    import tempfile
    import time

    from rich.console import Console

    console, began = Console(stderr=as_json), time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - began:7.1f} s  {text}", highlight=False)

    with tempfile.TemporaryDirectory(prefix=f"outrider-{name}-") as folder:
        report = run(Path(folder), say)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        for key, value in report.items():
            console.print(f"{key:17} {value}", highlight=False)
    if not report["held"]:
        raise typer.Exit(1)
