"""Kills a process at every durable step it takes, each once: `python -m tests.faults.crash (device | hub) SETUP-JSON`.

A life is a forked child that dies by SIGKILL at the first step whose name is new. The next one starts on what is left,
until a life comes to its end and meets no new name; that is the last. Prints the names as JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import virtual
from edge_agent.store import Store
from edge_agent.sync.broker import Message
from edge_agent.wire.messages import JobState
from hub import committer
from hub.app import Settings, create_app
from hub.db import Database
from hub.ingest import Ingest

MOST = 120  # names; more tells of names that are not fixed
QUIET_S = 6.0  # of a hub that meets no new step


class Points:
    """The steps met until now, in a file that outlives a kill."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.known = file.read_text().splitlines() if file.exists() else []

    def reached(self, name: str) -> None:
        if name not in self.known:
            with self._file.open("a") as file:
                file.write(name + "\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def transaction(self, run: Callable[..., Any], work_at: int, only: str = "") -> Callable[..., Any]:
        """`run`, whose argument `work_at` is the work of a transaction: before it, before its commit, after that."""

        @functools.wraps(run)
        def wrapped(*args: Any) -> Any:
            work = args[work_at]
            name = work.__qualname__.split(".<locals>")[0]
            if not name.startswith(only):
                return run(*args)

            def uncommitted(connection: Any) -> Any:
                result = work(connection)
                self.reached(f"{name}: before its commit")
                return result

            self.reached(f"{name}: before it")
            result = run(*args[:work_at], uncommitted, *args[work_at + 1 :])
            self.reached(f"{name}: after its commit")
            return result

        return wrapped

    def around(self, call: Callable[..., Any], name: str, argument: int | None = None) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*args: Any) -> Any:
            what = name if argument is None else f"{name} {getattr(args[argument], 'kind', '')}"
            self.reached(f"before {what}")
            result = call(*args)
            self.reached(f"after {what}")
            return result

        return wrapped


def device(points: Points, setup: dict[str, Any]) -> None:
    """A life of a device: records, one that outlives its TTL, a reported state, a job with an effect, all acked."""
    Store._transact = points.transaction(Store._transact, 1)  # type: ignore[method-assign]
    asyncio.run(_device(points, Path(setup["state"]), setup["broker"], setup["job"]))


async def _device(points: Points, state: Path, broker: str, awaited: str) -> None:
    with (state / "ledger").open("a", buffering=1) as ledger, (state / "effects").open("a", buffering=1) as effects:
        async with virtual.attached(state, broker) as (outbox, session):
            inbox, twin = session._inbox, session._twin
            for job in await inbox.interrupted():
                await inbox.report(job.id, JobState.FAILED, error="interrupted")
            await outbox.append("audit", {"action": "outlived"}, ttl=0.0)
            for _ in range(3):
                content = virtual.body(outbox.last_seq + 1)
                ledger.write(virtual.line(await outbox.append("telemetry", content), content))
            await twin.report({"last_seq": outbox.last_seq})
            while await inbox.state(awaited) not in (JobState.SUCCEEDED, JobState.FAILED):
                job = await inbox.next()
                points.reached("before a job's effect")
                effects.write(job.id + "\n")
                points.reached("after a job's effect")
                await inbox.report(job.id, JobState.SUCCEEDED)
            await virtual.until(lambda: outbox.depth == 0)


def hub(points: Points, setup: dict[str, Any]) -> None:
    """A life of a hub with no HTTP; ends when nothing new was met for QUIET_S."""
    Database._call = staticmethod(points.transaction(Database._call, 1, "Ingest"))  # type: ignore[method-assign]
    for name, argument in (("_insert", None), ("_gap", None), ("_apply", 2)):
        setattr(committer, name, points.around(getattr(committer, name), name.strip("_"), argument))
    take, answer = Ingest.take, Ingest._ack

    async def taken(self: Ingest, group: list[Message]) -> None:
        await take(self, [dataclasses.replace(m, ack=points.around(m.ack, "PUBACK")) for m in group])

    async def answered(self: Ingest, *args: Any) -> None:
        points.reached("before the ack to a device")
        await answer(self, *args)
        points.reached("after the ack to a device")

    Ingest.take, Ingest._ack = taken, answered  # type: ignore[method-assign]
    where = {"broker": setup["broker"], "broker_config": Path(setup["config"]), "dashboard": False}

    async def live() -> None:
        app = create_app(Settings(data=Path(setup["data"]), **where))
        async with app.router.lifespan_context(app):
            await asyncio.sleep(QUIET_S)

    asyncio.run(live())


def sweep(live: Callable[[Points, dict[str, Any]], None], setup: dict[str, Any]) -> list[str]:
    """Every name met, in order. Raises AssertionError when a life fails by itself."""
    file = Path(setup["points"])
    for _ in range(MOST):
        if "give" in setup:
            setup["job"] = _give(setup)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                live(Points(file), setup)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, status
            return Points(file).known
    raise AssertionError(f"no end after {MOST} kills")


def _give(setup: dict[str, Any]) -> str:
    """A job of the hub for the device."""
    import httpx

    answer = httpx.post(setup["give"], json=setup["body"], headers={"Authorization": setup["bearer"]}, timeout=30)
    answer.raise_for_status()
    job: str = answer.json()["id"]
    return job


if __name__ == "__main__":
    print(json.dumps(sweep({"device": device, "hub": hub}[sys.argv[1]], json.loads(sys.argv[2]))))
