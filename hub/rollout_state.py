"""What a rollout is made of: where it and its devices can stand, the tables they move along, and its decisions.

Invariant: a state is left only along `STATUSES` and `STEPS`; a person's commands are taken only in those of `COMMANDS`.
"""

from enum import StrEnum
from typing import Any

import msgspec

from hub.rollout_plan import Plan


class Status(StrEnum):
    DRAFT = "draft"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    ABORTED = "aborted"
    ROLLED_BACK = "rolled_back"


class Step(StrEnum):
    """Where a device stands."""

    PENDING = "pending"
    ASSIGNED = "assigned"
    DOWNLOADING = "downloading"
    TRYING = "trying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    MISSED = "missed"  # offline, or silent, for too long
    SKIPPED = "skipped"
    SUPERSEDED = "superseded"
    REVERTING = "reverting"
    REVERTED = "reverted"

    __hash__ = str.__hash__  # Enum's is slow, and each tick hashes one a device


_R, _S = Status, Step
STATUSES: dict[Status, frozenset[Status]] = {
    _R.DRAFT: frozenset({_R.SCHEDULED, _R.ABORTED}),
    _R.SCHEDULED: frozenset({_R.RUNNING, _R.PAUSED, _R.ABORTED}),
    _R.RUNNING: frozenset({_R.PAUSED, _R.SUCCEEDED, _R.ABORTED, _R.ROLLED_BACK}),
    _R.PAUSED: frozenset({_R.SCHEDULED, _R.RUNNING, _R.ABORTED, _R.ROLLED_BACK}),
    _R.SUCCEEDED: frozenset({_R.ROLLED_BACK}),
    _R.ABORTED: frozenset({_R.ROLLED_BACK}),
    _R.ROLLED_BACK: frozenset(),
}
ENDED = frozenset({_R.SUCCEEDED, _R.ABORTED, _R.ROLLED_BACK})
ACTIVE = frozenset({_S.ASSIGNED, _S.DOWNLOADING, _S.TRYING})
MOVING = ACTIVE | {_S.REVERTING}
LEFT = frozenset({_S.SKIPPED, _S.SUPERSEDED})  # not counted
_ENDS = frozenset({_S.SUCCEEDED, _S.FAILED, _S.MISSED}) | LEFT
STEPS: dict[Step, frozenset[Step]] = {
    _S.PENDING: frozenset({_S.ASSIGNED, _S.MISSED}) | LEFT,
    _S.ASSIGNED: ACTIVE | _ENDS | {_S.REVERTING},
    _S.DOWNLOADING: ACTIVE | _ENDS | {_S.REVERTING},
    _S.TRYING: ACTIVE | _ENDS | {_S.REVERTING},
    _S.SUCCEEDED: frozenset({_S.FAILED, _S.REVERTING}) | LEFT,
    _S.FAILED: frozenset({_S.SUCCEEDED, _S.REVERTING}) | LEFT,
    _S.MISSED: frozenset({_S.PENDING, _S.SUCCEEDED, _S.FAILED, _S.REVERTING}) | LEFT,
    _S.SKIPPED: frozenset(),
    _S.SUPERSEDED: frozenset(),
    _S.REVERTING: frozenset({_S.REVERTED, _S.FAILED, _S.MISSED}) | LEFT,
    _S.REVERTED: frozenset(),
}
REPORTED = {
    "resolving": _S.DOWNLOADING,
    "downloading": _S.DOWNLOADING,
    "committed": _S.SUCCEEDED,
    "quarantined": _S.FAILED,
}
"""A device's own states; others are on the way between download and end, and `failed` is tried again by the device."""
COMMANDS: dict[str, tuple[frozenset[Status], Status]] = {
    "pause": (frozenset({_R.SCHEDULED, _R.RUNNING}), _R.PAUSED),
    "resume": (frozenset({_R.DRAFT, _R.PAUSED}), _R.RUNNING),
    "abort": (frozenset({_R.DRAFT, _R.SCHEDULED, _R.RUNNING, _R.PAUSED}), _R.ABORTED),
    "rollback": (frozenset({_R.RUNNING, _R.PAUSED, _R.SUCCEEDED, _R.ABORTED}), _R.ROLLED_BACK),
    "approve": (frozenset({_R.SCHEDULED, _R.RUNNING, _R.PAUSED}), _R.RUNNING),
}


class Seen(msgspec.Struct, gc=False):
    """What is known of a device: the hub's part, and what it reported of the bundle."""

    name: str
    selected: bool = True
    online: bool = True
    zone: str = ""
    wanted: str = ""  # the version it is directed to have
    version: str = ""  # the one that runs
    target: str = ""  # the one `state` and `error` are of
    state: str = ""
    error: str = ""
    figures: dict[str, Any] = {}


class Place(msgspec.Struct, gc=False):
    """A device in a rollout; `before` is the version it goes back to, `history` has (when, step, reason)."""

    device: str
    wave: int
    step: Step = Step.PENDING
    reason: str = ""
    before: str = ""
    assigned: float = 0.0
    changed: float = 0.0
    figures: dict[str, Any] = {}
    history: list[tuple[float, str, str]] = []

    @property
    def goes_back(self) -> bool:
        """Whether it has something to undo."""
        return bool(self.assigned) and Step.REVERTING in STEPS[self.step]


class Run(msgspec.Struct):
    """A rollout under way. `size`: of the bundle in bytes; `wave`: -1 before it began; `complete`: when that one ended.

    `forgiven` has, by wave, what a person saw when `resumed` and moved not since: failed, missed, and who had a result.
    """

    id: str
    plan: Plan
    size: int = 0
    status: Status = Status.SCHEDULED
    reason: str = ""
    wave: int = -1
    opened: float = 0.0
    complete: float = 0.0
    next_at: float = 0.0
    joined: bool = False
    approved: list[int] = []
    forgiven: dict[int, tuple[int, int, int]] = {}
    resumed: float = 0.0
    places: dict[str, Place] = {}

    @property
    def live(self) -> bool:
        """Whether a tick may still change something."""
        if self.status not in ENDED:
            return self.status is not Status.DRAFT
        moving, back = MOVING | {Step.PENDING}, self.status is Status.ROLLED_BACK
        return any(p.step in moving or (back and p.goes_back) for p in self.places.values())


class Decision(msgspec.Struct, frozen=True, gc=False):
    """A change of the rollout, or of a device, directed to `version` with it (empty: to none; None: as it is)."""

    device: str
    to: str
    reason: str
    version: str | None = None
