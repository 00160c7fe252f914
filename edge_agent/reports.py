"""What the hub is shown of a device in the reported document: bundles, what waits and is held, the agent's profile.

Invariants: an installation, a removal and a refusal are audited once, also when the document has no room for more; a
report that cannot be made now stops nothing, the next one tells it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import Any

import msgspec

from edge_agent.agent.interlock import Interlocked
from edge_agent.audit import Audit
from edge_agent.errors import OutriderError
from edge_agent.rhythm import tick
from edge_agent.sync.twin import Twin
from edge_agent.update.service import BundleReport, UpdateService

MAX_ASKS = 8  # that the hub is shown: the reported document has a bound
PROFILE_S = 60.0
_log = logging.getLogger("outrider")


class Reports:
    """`event` starts the workflows that wait for it: its kind, its name, what it is about."""

    def __init__(
        self, twin: Twin, audit: Audit, event: Callable[[str, str, dict[str, Any]], Awaitable[object]]
    ) -> None:
        self._twin, self._audit, self._event = twin, audit, event

    async def bundle(self, name: str, report: BundleReport) -> None:
        """The update service's Report."""
        before = self._twin.reported.get("bundles", {}).get(name, {})
        was, now = before.get("version", ""), report.version
        told = {"bundle": name, "version": now, "digest": report.digest[:16], "was": was}
        with contextlib.suppress(OutriderError):
            if (was, before.get("digest", "")) != (now, report.digest):
                await self._audit.append("install" if now else "remove", "hub", **told)
            elif report.state in ("failed", "quarantined") and report.state != before.get("state"):
                told |= {"target": report.target, "state": report.state, "error": report.error[:300]}
                await self._audit.append("refuse:install", "hub", **told)
        kind = {"committed": "committed", "quarantined": "rolled_back"}.get(report.state)
        if kind and (before.get("state"), before.get("target")) != (report.state, report.target):
            about = {"id": f"{name}-{time.time():.0f}", "version": report.target, "error": report.error, "depth": 1}
            await self._event(f"update.{kind}", name, about)
        for shown in (report, msgspec.structs.replace(report, why=None)):  # the document may have no room for it
            try:
                await self._twin.report({"bundles": {name: msgspec.to_builtins(shown)}})
                return
            except OutriderError as error:
                _log.error("the state of %s is not reported: %s", name, error)

    async def waiting(self, updates: UpdateService, asks: Mapping[str, Any]) -> None:
        """For ever: which calls wait for an approval, what holds updates back, which neighbours were refused."""
        while True:
            hold, near = updates.holding, updates.neighbours
            shown = msgspec.to_builtins(hold) if hold and time.time() < hold.until else None
            lied = near.dropped if near else {}
            before = (self._twin.reported.get("updates") or {}).get("poisoned") or {}
            told = {"hold": shown, "poisoned": dict.fromkeys(before) | lied if lied else None}
            first = dict(list(asks.items())[:MAX_ASKS])
            gone = (self._twin.reported.get("waiting") or {}).keys() - first.keys()
            with contextlib.suppress(OutriderError):
                await self._twin.report({"updates": told, "waiting": first | dict.fromkeys(gone)})
            await tick(1.0)

    async def profile(self, tools: Interlocked, speaks: Callable[[], dict[str, str]]) -> None:
        """For ever: what this agent is, and which tools it has."""
        while True:
            with contextlib.suppress(OutriderError):
                names = [spec.name for spec in await tools.specs()]
                about = {"version": version("outrider"), "python": platform.python_version(), "tools": names}
                await self._twin.report({"agent": about | speaks() | {"machine": platform.machine()}})
            await asyncio.sleep(PROFILE_S)

    async def directives(self, updates: UpdateService) -> None:
        """For ever: give the update service what the hub wants of it; what it refuses is reported."""
        seen, error = 0, ""
        while True:
            desired = await self._twin.newer_than(seen)
            seen, error, told = desired.version, "", error
            try:
                updates.configure(desired.doc)
            except OutriderError as problem:
                error = str(problem)
            try:
                if document := desired.doc.get("director"):
                    await updates.direct(document)
            except (OutriderError, OSError) as problem:
                error = str(problem)
            if error:
                _log.error("the directive is refused: %s", error)
            if error != told:
                with contextlib.suppress(OutriderError):
                    await self._twin.report({"director": {"error": error}})
