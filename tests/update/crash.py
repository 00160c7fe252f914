"""Kills an update at every durable step. Run as a process: `python -m tests.update.crash SETUP-JSON`.

The parent forks one child per crash point; the child dies by SIGKILL there. Then the disk is judged, and a second
child runs to the end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_agent.update import download, trust
from edge_agent.update.download import Downloads, hub_client
from edge_agent.update.machine import Machine
from edge_agent.update.service import BundleReport, UpdateService
from edge_agent.update.slots import Installed, Slots
from edge_agent.update.trial import Activation, Figures
from edge_agent.update.trust import Director, Repository
from edge_agent.wire import durable
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.tokens import issue_device_token
from tests.update.plant_hub import DEVICE, FLEET, ReadsGood


class Points:
    """Counts the durable steps and dies at one."""

    def __init__(self, die_at: int) -> None:
        self.seen, self.die_at, self.inside = 0, die_at, False

    def reached(self) -> None:
        if self.inside:
            return
        self.seen += 1
        if self.seen == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def once(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` as one point: the same steps inside it are swept elsewhere."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.reached()
            self.inside = True
            try:
                return call(*args, **kwargs)
            finally:
                self.inside = False

        return wrapped

    def around(self, call: Callable[..., Any], times: float = math.inf) -> Callable[..., Any]:
        """`call`, of which the first `times` calls count: how many chunks the network makes is its own affair."""
        calls = itertools.count(1)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) <= times:
                self.reached()
            return call(*args, **kwargs)

        return wrapped


def run(setup: dict[str, Any], state: Path, wanted: dict[str, Any], die_at: int) -> None:
    """One life of the service: ends when the target runs, has failed, or by its own kill."""
    points = Points(die_at)
    if die_at:
        durable.sync = points.around(durable.sync)
        download._keep = points.around(download._keep, times=4)
        trust.DurableUpdater._persist_file = points.once(trust.DurableUpdater._persist_file)  # type: ignore[method-assign]
        Path.replace = points.around(Path.replace)  # type: ignore[method-assign]
        shutil.rmtree = points.around(shutil.rmtree)  # type: ignore[assignment]
        Path.unlink = points.around(Path.unlink)  # type: ignore[method-assign]
    key = SigningKey.load(Path(setup["device_key"]))
    told: list[BundleReport] = []

    class Prober(ReadsGood):
        async def probe(self, name: str, candidate: Installed, activation: Activation) -> Figures:
            points.reached()
            return await super().probe(name, candidate, activation)

    async def report(name: str, report: BundleReport) -> None:
        told.append(report)

    async def switch(name: str, installed: Installed) -> None:
        points.reached()

    async def live() -> None:
        async with hub_client(setup["url"], verify=False) as client:
            downloads = Downloads(client, lambda: issue_device_token(key, FLEET, DEVICE, now=time.time()), 0.01)
            folder, hub_key = state.with_name(f"{state.name}-trust"), VerifyKey.from_text(setup["hub_key"])
            director = Director(folder, hub_key, FLEET, DEVICE)
            known = Repository(folder, downloads, director, hub_key)
            service = UpdateService(state, director, known, downloads, Prober(), switch, report, reserve=0)
            await service.direct(wanted["director"])
            task = asyncio.create_task(service.run())
            while not (told and (told[-1].state == "failed" or told[-1].version == wanted["version"])):
                await asyncio.sleep(0.002)
                if task.done():
                    task.result()
            await asyncio.sleep(0.02)
            task.cancel()

    asyncio.run(live())
    if told[-1].state == "failed":
        parts = [str(part) for part in state.glob("net/incoming/*/parts/*")]
        print(json.dumps({"state": "failed", "error": told[-1].error, "parts": parts}), flush=True)


def forked(*args: Any) -> bool:
    """Run in a child; true when it was killed, false when it came to the end."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(*args)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, status
    return False


def sweep(setup: dict[str, Any]) -> None:
    base, state = Path(setup["state"]) / "base", Path(setup["state"]) / "state"
    assert not forked(setup, base, setup["old"], 0)
    kills: list[dict[str, Any]] = []
    for die_at in range(1, 400):
        for end in ("", "-trust"):
            shutil.rmtree(f"{state}{end}", ignore_errors=True)
            shutil.copytree(f"{base}{end}", f"{state}{end}", symlinks=True)
        if not forked(setup, state, setup["new"], die_at):
            break
        slots = Slots(state)
        current = slots.current("net")
        found = slots.check("net", current.id).manifest.version if current else ""
        left = Machine(state / "net" / "update.json").load()
        assert not forked(setup, state, setup["new"], 0)
        after = slots.current("net")
        version = slots.check("net", after.id).manifest.version if after else ""
        kills.append({"at": die_at, "state": left, "current": found, "after": version})
    print(json.dumps({"kills": kills}))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given["mode"] == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
        run(given, Path(given["state"]), given["new"], 0)
    else:
        sweep(given)
