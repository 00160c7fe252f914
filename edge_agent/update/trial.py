"""What a candidate must show beside the version that runs, and what is kept when it does not.

    activation: {policy: hand-over|kill-then-load, trial: {mode: shadow|canary, share, minimum, seconds, …}}

in a manifest's `meta.activation` or the desired document's `activation.<bundle>`, which goes before it. Invariants:
pure; the two versions are compared on the same requests, never on different ones; evidence is bounded (SAMPLES of
SAMPLE characters, LOG lines), so that it fits the update's record whole and the reported document cut shorter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

import msgspec

from edge_agent.errors import Refused, Retry
from edge_agent.wire.updates import Activation, Trial

SAMPLES, SAMPLE, LOG = 3, 4096, 40
REPORTED_SAMPLE, REPORTED_LOG = 1024, 1536
FLOOR_S = 0.005
"""Seconds by which a median must be worse at least: below, it is the machine's noise."""


def activation(*given: Mapping[str, Any]) -> Activation:
    """Later ones go before earlier ones, key by key. Raises Refused, naming the key."""
    merged: dict[str, Any] = {}
    for each in given:
        if not isinstance(each, dict):
            raise Refused(f"activation is a table, not {str(each)[:80]!r}", "see docs/updates.md")
        trial = {**(merged.get("trial") or {}), **each["trial"]} if isinstance(each.get("trial"), dict) else None
        merged |= dict(each) | ({"trial": trial} if trial is not None else {})
    try:
        return msgspec.convert(merged, Activation)
    except msgspec.ValidationError as error:
        raise Refused(f"activation says wrongly how a version takes over: {error}", "see docs/updates.md") from error


class Figures(msgspec.Struct, frozen=True):
    """What a trial saw: `decided` by `traffic`, `probe` or `load`; times are medians in milliseconds."""

    decided: str
    mode: str = ""
    seconds: float = 0.0
    asked: int = 0
    failed: int = 0
    agreement: float | None = None
    old_ms: float | None = None
    new_ms: float | None = None
    note: str = ""


class Why(msgspec.Struct, frozen=True):
    """Why a version rolled back, beside the sentence: figures, requests it failed at, the end of its log."""

    figures: Figures
    samples: list[str] = []
    log: list[str] = []
    version: str = ""

    def short(self) -> Why:
        """As it is reported: a document has 32 KiB for everything."""
        log = "\n".join(self.log)[-REPORTED_LOG:]
        return Why(self.figures, [sample[:REPORTED_SAMPLE] for sample in self.samples], log.splitlines(), self.version)


class Worse(Refused):
    """The candidate is not as good as it must be."""

    def __init__(self, message: str, hint: str, why: Why) -> None:
        super().__init__(message, hint)
        self.why = why


class Untried(Retry):
    """The candidate could not be tried now, which says nothing of it: no trial is used up."""


class Tally:
    """What was compared so far."""

    def __init__(self) -> None:
        self.asked = self.failed = self._judged = 0
        self._agreed = 0.0
        self._old, self._new = deque[float](maxlen=500), deque[float](maxlen=500)
        self.samples: list[str] = []

    def compared(self, old_s: float | None, new_s: float, agreement: float | None) -> None:
        """Both answered; None where there is nothing to compare."""
        self.asked += 1
        self._new.append(new_s)
        if old_s is not None:
            self._old.append(old_s)
        if agreement is not None:
            self._judged += 1
            self._agreed += agreement

    def erred(self) -> None:
        """The candidate alone did not answer."""
        self.asked += 1
        self.failed += 1

    def keep(self, sample: str) -> None:
        """A request that it did badly at."""
        if len(self.samples) < SAMPLES:
            self.samples.append(sample[:SAMPLE])

    @property
    def agreement(self) -> float | None:
        return self._agreed / self._judged if self._judged else None

    @property
    def old_s(self) -> float | None:
        return median(self._old) if self._old else None

    @property
    def new_s(self) -> float | None:
        return median(self._new) if self._new else None


def slower(plan: Trial, old_s: float | None, new_s: float | None) -> float:
    """How many times as long it takes, when that is beyond the budget; else 0."""
    if not old_s or new_s is None or new_s - old_s <= FLOOR_S or new_s <= plan.max_latency_ratio * old_s:
        return 0.0
    return new_s / old_s


def judge(plan: Trial, tally: Tally, minimum: int) -> str:
    """Which budget is broken, after at least `minimum` requests; empty when none is."""
    if tally.failed > plan.max_error_rate * max(tally.asked, minimum):
        return f"errors: {tally.failed} of {tally.asked} requests failed, at most {plan.max_error_rate:.1%} may"
    if tally.asked < minimum:
        return ""
    if times := slower(plan, tally.old_s, tally.new_s):
        medians = f"{(tally.new_s or 0) * 1e3:.1f} ms against {(tally.old_s or 0) * 1e3:.1f} ms"
        return f"latency: {medians}, {times:.1f} times, at most {plan.max_latency_ratio:g} may be"
    if tally.agreement is not None and tally.agreement < (plan.min_agreement or 0.0):
        return f"agreement: {tally.agreement:.3f} with the version that runs, at least {plan.min_agreement:g} is asked"
    return ""


def figures(decided: str, plan: Trial, tally: Tally, seconds: float, note: str = "") -> Figures:
    """A tally in numbers."""
    old, new = (None if s is None else round(s * 1e3, 2) for s in (tally.old_s, tally.new_s))
    agreement = None if tally.agreement is None else round(tally.agreement, 4)
    return Figures(decided, plan.mode, round(seconds, 1), tally.asked, tally.failed, agreement, old, new, note)
