"""When a device may update and what a new version must show: `updates` and `activation` of the desired document.

Invariant: what decodes here is taken by a device; a key that is not known is refused, as a rule that is misspelt would
be one that is missing. The device's settings and a manifest's `meta.activation` have the same tables.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_agent.wire import windows


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `updates` of the settings; the desired document's `updates` goes before it, key by key.

    Windows as in wire/windows.py, none: any time. `min_battery` percent while it discharges, `max_celsius` of the
    hottest zone (0: not asked); a hold lasts `max_hold_minutes` at most.
    """

    time_zone: str = "UTC"
    download: list[str] = []
    activate: list[str] = []
    min_battery: float = 0.0
    max_celsius: float = 0.0
    max_hold_minutes: float = 480.0

    def __post_init__(self) -> None:
        windows.zone(self.time_zone)
        for text in (*self.download, *self.activate):
            windows.parse(text)


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A budget over `seconds` of live traffic, of which `share` goes to both versions.

    `shadow`: callers get the old answer; `canary`: the new one. Once `minimum` requests were compared the first budget
    that is broken ends it. Without `min_agreement` networks must agree to 0.9 and language models need not.
    """

    mode: Literal["shadow", "canary"] = "shadow"
    share: float = 0.2
    minimum: int = 20
    seconds: float = 60.0
    max_error_rate: float = 0.02
    max_latency_ratio: float = 2.0
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        rates = (self.share, self.max_error_rate, self.min_agreement or 0.0)
        if not all(0 <= rate <= 1 for rate in rates) or not 0 <= self.seconds <= 3600:
            raise ValueError("share, max_error_rate and min_agreement are from 0 to 1, seconds up to 3600")
        if self.minimum < 1 or self.max_latency_ratio <= 0:
            raise ValueError("minimum is at least 1, max_latency_ratio more than 0")


class Activation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a version takes over: beside the old one, or (where memory cannot hold two) in its place."""

    policy: Literal["hand-over", "kill-then-load"] = "hand-over"
    trial: Trial | None = None


class Updates(msgspec.Struct, frozen=True):
    """The two tables; activation by bundle."""

    updates: Rules = Rules()
    activation: dict[str, Activation] = {}
