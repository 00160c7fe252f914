"""The update machine of one bundle: states, the transitions that exist, and the saved record.

Invariants: a state is saved before its action runs; a transition that is not in the table does not happen; after a
restart every state has one place to go on from (`AFTER_RESTART`), and an unknown one goes back to `idle`, where
nothing but the verified current version counts. A version that was refused is quarantined: the same manifest is not
tried again, and the reason is kept with its evidence. Trials are counted before they begin, so a model that takes the
worker or the device down cannot loop. `waiting` is for a better moment, which is nobody's failure.
"""

from __future__ import annotations

import contextlib
import time
from enum import StrEnum
from pathlib import Path

import msgspec

from edge_agent.errors import Fatal, Refused
from edge_agent.update.trial import Figures, Why
from edge_agent.wire import durable
from edge_agent.wire.bundle import Target


class State(StrEnum):
    IDLE = "idle"
    RESOLVING = "resolving"
    DOWNLOADING = "downloading"
    STAGED = "staged"
    VERIFYING = "verifying"
    TRIAL = "trial"
    COMMITTED = "committed"
    FAILED = "failed"
    QUARANTINED = "quarantined"
    WAITING = "waiting"
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> State:
        return cls.UNKNOWN


_S = State
ENDS = frozenset({_S.FAILED, _S.QUARANTINED, _S.WAITING})
TRANSITIONS: dict[State, frozenset[State]] = {
    _S.IDLE: frozenset({_S.RESOLVING, _S.COMMITTED}) | ENDS,
    _S.RESOLVING: frozenset({_S.DOWNLOADING, _S.VERIFYING, _S.RESOLVING}) | ENDS,
    _S.DOWNLOADING: frozenset({_S.STAGED, _S.RESOLVING}) | ENDS,
    _S.STAGED: frozenset({_S.VERIFYING, _S.RESOLVING}) | ENDS,
    _S.VERIFYING: frozenset({_S.TRIAL, _S.RESOLVING}) | ENDS,
    _S.TRIAL: frozenset({_S.COMMITTED, _S.RESOLVING}) | ENDS,
    _S.COMMITTED: frozenset({_S.RESOLVING, _S.COMMITTED}) | ENDS,
    _S.FAILED: frozenset({_S.RESOLVING, _S.COMMITTED}) | ENDS,
    _S.QUARANTINED: frozenset({_S.RESOLVING, _S.COMMITTED}) | ENDS,
    _S.WAITING: frozenset({_S.RESOLVING, _S.COMMITTED}) | ENDS,
    _S.UNKNOWN: frozenset({_S.IDLE}),
}
WORKING = (_S.RESOLVING, _S.DOWNLOADING, _S.STAGED, _S.VERIFYING, _S.TRIAL)
AFTER_RESTART: dict[State, State] = {
    **dict.fromkeys(WORKING, _S.IDLE),  # what was downloaded stays, and is checked again on the way
    _S.COMMITTED: _S.COMMITTED,  # the decision is made: point at it, if that was cut off
    _S.FAILED: _S.IDLE,
    _S.WAITING: _S.IDLE,
    _S.QUARANTINED: _S.QUARANTINED,
    _S.IDLE: _S.IDLE,
    _S.UNKNOWN: _S.IDLE,
}
MAX_TRIALS = 5
MAX_QUARANTINED = 32


class Update(msgspec.Struct):
    """The saved record of one bundle."""

    state: State = State.IDLE
    version: str = ""
    manifest_sha256: str = ""
    error: str = ""
    changed: float = 0.0
    trials: int = 0
    quarantine: dict[str, str] = {}
    trial: Figures | None = None
    why: Why | None = None

    @property
    def id(self) -> str:
        return self.manifest_sha256


class Machine:
    """One bundle's record, saved at every transition. Its methods block: call them in a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.update = Update()

    def load(self) -> State:
        """Read the record after a start; the state it was left in is returned, the one to go on from is set."""
        try:
            self.update = msgspec.json.decode(self._path.read_bytes(), type=Update)
        except FileNotFoundError:
            self.update = Update()
        except (OSError, msgspec.DecodeError):  # a bad block is the damage of one record, not the device's end
            self.update = Update(State.UNKNOWN)
        left = self.update.state
        self.update.state = AFTER_RESTART[left]
        if left not in (State.IDLE, State.COMMITTED, State.QUARANTINED):
            with contextlib.suppress(OSError):  # a full disk: the next start makes the same of it
                self._save()
        return left

    def aim(self, target: Target, state: State, error: str = "") -> None:
        """Enter a state for a target; the count of trials belongs to it alone."""
        if target.manifest_sha256 != self.update.id:
            self.update.trials, self.update.trial = 0, None
        self.update.version, self.update.manifest_sha256 = target.version, target.manifest_sha256
        self.to(state, error)

    def to(self, state: State, error: str = "") -> None:
        """Enter a state, saved before this returns.

        Raises Refused for one trial too many, Fatal when the table has no such transition.
        """
        if state not in TRANSITIONS[self.update.state]:
            raise Fatal(f"no transition from {self.update.state} to {state}")
        update = self.update
        if state is State.TRIAL:
            if update.trials >= MAX_TRIALS:
                raise Refused(f"version {update.version} was tried {update.trials} times and never answered")
            update.trials += 1
        if (update.state, state) == (State.TRIAL, State.COMMITTED):
            update.why = None  # a better one came; only to go back to what ran keeps it
        update.state, update.error, update.changed = state, error, time.time()
        if state is State.QUARANTINED and update.id:
            update.quarantine[update.id] = error
            for oldest in list(update.quarantine)[:-MAX_QUARANTINED]:
                del update.quarantine[oldest]
        if state is State.COMMITTED:
            update.trials = 0
        self._save()

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        durable.write(self._path, msgspec.json.encode(self.update))
