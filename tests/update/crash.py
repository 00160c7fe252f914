"""Kills an update at every durable step. Run as a process: `python -m tests.update.crash SETUP-JSON`.

The parent forks one child per crash point; the child dies by SIGKILL there. Then the disk is judged, and a second
child runs to the end. Mode `sweep` counts the steps; mode `states` names those where a state or a pointer changes, and
with `disk` the power fails there: the file system is shut down with no flush, then mounted again.
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
from edge_agent.update.machine import Machine, State
from edge_agent.update.service import BundleReport, UpdateService
from edge_agent.update.slots import Installed, Slots
from edge_agent.update.trial import Activation, Figures
from edge_agent.update.trust import Director, Repository
from edge_agent.wire import durable
from edge_agent.wire.bundle import Target
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.tokens import issue_device_token
from tests.faults.disk import Disk
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


class Named(Points):
    """Points by name: before and after a state is saved, after its action, around a pointer's move."""

    def __init__(self, die_at: str, lose_power: Callable[[], None] | None, told: Path) -> None:
        super().__init__(0)
        self._name, self._lose_power, self._told = die_at, lose_power, told
        self._names: list[str] = []

    def named(self, name: str) -> None:
        if name not in self._names:
            self._names.append(name)
            self._told.write_text(json.dumps(self._names))
        if name == self._name:
            if self._lose_power is not None:
                self._lose_power()
            os.kill(os.getpid(), signal.SIGKILL)

    def patch(self) -> None:
        save, step, point = Machine._save, UpdateService._step, Slots._point

        def saved(machine: Machine) -> None:
            self.named(f"enter {machine.update.state}")
            save(machine)
            self.named(f"in {machine.update.state}")

        async def stepped(service: UpdateService, name: str, state: State, target: Target) -> State:
            after = await step(service, name, state, target)
            self.named(f"leave {state}")
            return after

        def pointed(slots: Slots, name: str, pointer: str, id: str) -> None:
            self.named(f"before {pointer} moves")
            point(slots, name, pointer, id)
            self.named(f"after {pointer} moved")

        Machine._save, UpdateService._step, Slots._point = saved, stepped, pointed  # type: ignore[method-assign]


def run(setup: dict[str, Any], state: Path, wanted: dict[str, Any], points: Points) -> None:
    """One life of the service: ends when the target runs, has failed, or by its own kill."""
    if isinstance(points, Named):
        points.patch()
    elif points.die_at:
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
    assert not forked(setup, base, setup["old"], Points(0))
    kills: list[dict[str, Any]] = []
    for die_at in range(1, 400):
        for end in ("", "-trust"):
            shutil.rmtree(f"{state}{end}", ignore_errors=True)
            shutil.copytree(f"{base}{end}", f"{state}{end}", symlinks=True)
        if not forked(setup, state, setup["new"], Points(die_at)):
            break
        kills.append({"at": die_at} | judged(setup, state))
    print(json.dumps({"kills": kills}))


def judged(setup: dict[str, Any], state: Path) -> dict[str, Any]:
    """What a kill left, and what the next life made of it. Raises Refused where a current version is not whole."""
    slots = Slots(state)
    current = slots.current("net")
    found = slots.check("net", current.id).manifest.version if current else ""
    left = Machine(state / "net" / "update.json").load()
    assert not forked(setup, state, setup["new"], Points(0))
    after = slots.current("net")
    version = slots.check("net", after.id).manifest.version if after else ""
    return {"state": left, "current": found, "after": version}


def states(setup: dict[str, Any]) -> None:
    where, told = Path(setup["state"]), Path(setup["state"]).with_name("points.json")
    disk = Disk(where) if setup["disk"] else None
    base, state = Path(setup["state"]).with_name("base"), where / "state"
    assert not forked(setup, base, setup["old"], Points(0))
    names, kills = [""], list[dict[str, Any]]()
    for name in names:
        for end in ("", "-trust"):
            shutil.rmtree(f"{state}{end}", ignore_errors=True)
            shutil.copytree(f"{base}{end}", f"{state}{end}", symlinks=True)
        os.sync()
        killed = forked(setup, state, setup["new"], Named(name, disk and disk.lose_power, told))
        if not name:
            names += json.loads(told.read_text())
            continue
        assert killed, name
        if disk is not None:
            disk.unmount()
            disk.mount()
        kills.append({"at": name} | judged(setup, state))
    if disk is not None:
        disk.unmount()
    print(json.dumps({"kills": kills}))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given["mode"] == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
        run(given, Path(given["state"]), given["new"], Points(0))
    else:
        {"sweep": sweep, "states": states}[given["mode"]](given)
