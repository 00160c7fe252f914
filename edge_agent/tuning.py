"""What the hub changes on a running device: the table `config` of the desired document, over the settings.

Invariants: a table is taken whole or not at all; why one was refused stands in `reported.config.error`, and the last
good one, which is kept in `reported.config.asked`, goes on to hold, after a restart too. A key that is taken out of
the table gives the setting back.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec

from edge_agent.config import Settings, nearest
from edge_agent.errors import OutriderError, Refused
from edge_agent.sync.twin import Twin

_log = logging.getLogger("outrider")
_Seconds = Annotated[float, msgspec.Meta(ge=0.1, le=86400)]
_Ttl = Annotated[float, msgspec.Meta(ge=1, le=10 * 366 * 86400)]
_MiB = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class Tuning(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The settings of the same names; None is what the settings say."""

    telemetry_s: _Seconds | None = None
    telemetry_ttl_s: _Ttl | None = None
    sample: list[str] | None = None
    outbox_mb: _MiB | None = None
    blobs_mb: _MiB | None = None
    jobs: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    log: Literal["debug", "info", "warning", "error"] | None = None


def tune(settings: Settings, asked: Any) -> Settings:
    """The settings with the table over them. Raises Refused, naming the key."""
    known = frozenset(Tuning.__struct_fields__)
    if isinstance(asked, dict) and (strange := sorted(asked.keys() - known)):
        raise Refused(f"config has no key {strange[0]!r}", nearest(strange[0], known))
    try:
        tuning = msgspec.convert(asked, Tuning)
    except msgspec.ValidationError as error:
        raise Refused(f"config is refused: {error}", "see docs/operations.md") from error
    return msgspec.structs.replace(settings, **msgspec.to_builtins(tuning))


class Tuner:
    """`apply` puts settings into force, all of them or, raising Refused, none."""

    def __init__(self, settings: Settings, twin: Twin, apply: Callable[[Settings], None]) -> None:
        self._settings, self._twin, self._apply = settings, twin, apply
        told = twin.reported.get("config", {})
        self._good: dict[str, Any] = told.get("asked", {})
        self._told = bool(told)

    async def run(self) -> None:
        if self._good:
            with contextlib.suppress(Refused):  # of a version that took other keys
                self._apply(tune(self._settings, self._good))
        seen = 0
        while True:
            desired = await self._twin.newer_than(seen)
            seen = desired.version
            asked = desired.doc.get("config", {})
            if asked or self._told:
                await self._take(asked, seen)

    async def _take(self, asked: Any, version: int) -> None:
        before, error = self._good, None
        try:
            self._apply(tune(self._settings, asked))
            self._good = asked
            _log.debug("config of version %d is in force: %s", version, asked)
        except Refused as problem:
            error = str(problem)
            _log.error("%s", error)
        self._told = True
        kept = dict.fromkeys(before) | self._good  # null takes a key out
        with contextlib.suppress(OutriderError):  # the document may have no room for it
            await self._twin.report({"config": {"version": version, "error": error, "asked": kept}})
