"""What a rollout is to do: a bundle's version, for which devices, in which waves, by which rules and at which times.

Invariant: a plan that decodes can be carried out (its waves hold every device, its zones exist, its query is known).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import msgspec

from edge_agent.wire import windows
from edge_agent.wire.errors import WireError
from edge_agent.wire.messages import check_depth
from hub.errors import Refused

MAX_WAVES = 50
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "exists": lambda value, wanted: (value is not None) is bool(wanted),
    "gt": lambda value, limit: value > limit,
    "gte": lambda value, limit: value >= limit,
    "lt": lambda value, limit: value < limit,
    "lte": lambda value, limit: value <= limit,
    "like": lambda value, pattern: isinstance(value, str) and fnmatchcase(value, str(pattern)),
}


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A misspelt rule must not be a rule that is missing."""


class Selection(_Strict, frozen=True):
    """Devices in any of the groups, with all of the tags, with these facts; nothing given: all. See `matches`.

    Frozen, it holds the devices that match when the rollout is made; else others join while it runs, in the last wave.
    """

    groups: list[str] = []
    tags: list[str] = []
    facts: dict[str, Any] = {}
    devices: list[str] = []
    frozen: bool = False


class Wave(_Strict, frozen=True):
    """So many devices, or percent of all; neither: the rest. A rule that is not given is the plan's."""

    count: int = 0
    percent: float = 0.0
    approval: bool = False
    soak_s: float | None = None
    success: float | None = None
    failure: float | None = None
    min_sample: int | None = None


class Plan(_Strict, frozen=True):
    """`canary`: percent of all that go first, where the first failure pauses. Shares are 0 to 1, times in seconds.

    A device that is offline, or says nothing of the version, for `timeout_s` is missed: no failure, and no success.
    `max_active` devices install at once, `bytes_per_s` bounds what the assigned ones may fetch; 0: no bound.
    """

    bundle: str
    version: str
    waves: list[Wave] = msgspec.field(default_factory=lambda: [Wave()])
    select: Selection = Selection()
    canary: float = 0.0
    success: float = 0.95
    failure: float = 0.05
    min_sample: int = 20
    soak_s: float = 0.0
    timeout_s: float = 86400.0
    max_active: int = 0
    bytes_per_s: float = 0.0
    not_before: str = ""
    windows: list[str] = []
    zone: str = "UTC"
    note: str = ""

    def __post_init__(self) -> None:
        values = (value for part in (self, *self.waves) for value in msgspec.structs.astuple(part))
        if not all(math.isfinite(value) for value in values if isinstance(value, float)):
            raise ValueError("a number is infinite or NaN, which cannot be kept")
        if not 1 <= len(self.waves) <= MAX_WAVES:
            raise ValueError(f"{len(self.waves)} waves; 1 to {MAX_WAVES}")
        for wave in self.stages:
            success, failure = self.rule(wave, "success"), self.rule(wave, "failure")
            if not (0 <= success <= 1 and 0 <= failure <= 1 and wave.count >= 0 and 0 <= wave.percent <= 100):
                raise ValueError("a share is 0 to 1, a percentage 0 to 100, a count not below 0")
            if wave.count and wave.percent:
                raise ValueError("a wave has a count or a percentage, not both")
            if self.rule(wave, "min_sample") < 1 or self.rule(wave, "soak_s") < 0:
                raise ValueError("min_sample is at least 1, soak_s not below 0")
        percent = [wave.percent for wave in self.waves]
        whole = all(percent) and math.isclose(sum(percent) + self.canary, 100, abs_tol=0.01)
        if (self.waves[-1].count or self.waves[-1].percent) and not whole:
            raise ValueError("the waves leave devices out: the last one has no count and no percentage (the rest), "
                             "or all have percentages that make 100")  # fmt: skip
        if self.timeout_s <= 0 or self.max_active < 0 or self.bytes_per_s < 0:
            raise ValueError("timeout_s is above 0, max_active and bytes_per_s not below 0")
        zone_of(self.zone)
        list(map(window_of, self.windows))
        self.begins()
        _check(self.select.facts)

    @property
    def stages(self) -> list[Wave]:
        """The waves in their order, the canaries first."""
        front = [Wave(percent=self.canary, failure=0.0, min_sample=1)] if self.canary else []
        return front + self.waves

    def rule(self, wave: Wave, name: str) -> Any:
        own = getattr(wave, name)
        return getattr(self, name) if own is None else own

    def begins(self) -> float:
        """Seconds since the Unix epoch before which nothing is given; a time with no offset is in the plan's zone."""
        if not self.not_before:
            return 0.0
        when = datetime.fromisoformat(self.not_before)
        return (when if when.tzinfo else when.replace(tzinfo=zone_of(self.zone))).timestamp()

    def open(self, now: float, zone: str = "") -> bool:
        """Whether a device in this zone (none: the plan's) may be given the version now."""
        return windows.moment(map(window_of, self.windows), zone_of(zone or self.zone), now).open


zone_of, window_of = lru_cache(1024)(windows.zone), lru_cache(1024)(windows.parse)


def parse(document: Any) -> Plan:
    """A plan from JSON or YAML data. Raises Refused 422 with what is wrong with it."""
    try:
        check_depth(document)
        return msgspec.convert(document, Plan)
    except (msgspec.ValidationError, WireError, RecursionError) as error:
        raise Refused(422, f"the plan is refused: {error}", "see docs/rollouts.md for its fields") from None


def split(waves: Sequence[Wave], total: int) -> list[int]:
    """How many devices each wave has."""
    sizes, left = list[int](), total
    for wave in waves:
        share = math.ceil(round(total * wave.percent / 100, 6))
        sizes.append(min(left, wave.count or (share if wave.percent else left)))
        left -= sizes[-1]
    return sizes


def selects(selection: Selection, name: str, labels: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether it takes this device; `labels` has its groups and tags, `facts` is its reported document."""
    groups, tags = set(labels.get("groups", ())), set(labels.get("tags", ()))
    return (
        (not selection.devices or name in selection.devices)
        and (not selection.groups or not groups.isdisjoint(selection.groups))
        and tags.issuperset(selection.tags)
        and matches(selection.facts, facts)
    )


def matches(query: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether facts satisfy every entry of a query.

    `{"agent.machine": "aarch64"}` by dotted path; a list: one of these; `{"gte": 8}` and the other OPERATORS;
    `{"any": [query, …]}` and `{"not": query}` combine. Of a fact that is a list, one fits.
    """
    return all(_entry(path, want, facts) for path, want in query.items())


def _entry(path: str, want: Any, facts: Mapping[str, Any]) -> bool:
    if path == "any":
        return any(matches(each, facts) for each in want)
    if path == "not":
        return not matches(want, facts)
    value: Any = facts
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, list):
        return any(_holds(each, want) for each in value)
    return _holds(value, want)


def _holds(value: Any, want: Any) -> bool:
    if isinstance(want, list):
        return value in want
    if not isinstance(want, Mapping):
        return bool(value == want)
    try:
        return all(OPERATORS[name](value, limit) for name, limit in want.items())
    except TypeError:  # text against a number
        return False


def _check(query: Any) -> None:
    """Raises ValueError for what `matches` does not know."""
    if not isinstance(query, Mapping):
        raise ValueError(f"a query is an object of path and value, not {query!r}")
    for path, want in query.items():
        if path == "any":
            if not isinstance(want, list):
                raise ValueError(f"facts: any: a list of queries, not {want!r}")
            for each in want:
                _check(each)
        elif path == "not":
            _check(want)
        elif isinstance(want, Mapping) and (unknown := want.keys() - OPERATORS.keys()):
            raise ValueError(f"facts: {path}: {', '.join(map(str, unknown))} is not one of {', '.join(OPERATORS)}")
