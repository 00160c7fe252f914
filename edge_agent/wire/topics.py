"""The topics of the contract. One type builds and parses them, so both sides agree.

Invariant: `Topic.parse(str(t)) == t` for every topic, and nothing else parses.
"""

from __future__ import annotations

import re
from enum import StrEnum

import msgspec

from edge_agent.wire.errors import Undecodable, VersionRefused

ROOT = "outrider"
VERSION = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


class TopicKind(StrEnum):
    """What flows on a topic; `GRANTS` is the fleet's, the others are a device's."""

    UP = "up"
    PRESENCE = "presence"
    DESIRED = "desired"
    JOBS = "jobs"
    ACK = "ack"
    GRANTS = "grants"


def check_name(name: str, what: str = "name") -> str:
    """A fleet's or device's name as it may stand in a topic. Raises ValueError saying the rule."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r}: use 1 to 63 of a-z, 0-9, '-' and '_', starting with a letter or digit")
    return name


class Topic(msgspec.Struct, frozen=True):
    """One topic: `outrider/1/{fleet}/{device}/{kind}`, or `outrider/1/{fleet}/grants`."""

    fleet: str
    kind: TopicKind
    device: str | None = None

    def __post_init__(self) -> None:
        check_name(self.fleet, "fleet")
        if (self.device is None) != (self.kind is TopicKind.GRANTS):
            raise ValueError(f"{self.kind} {'takes no' if self.device else 'needs a'} device")
        if self.device is not None:
            check_name(self.device, "device")

    def __str__(self) -> str:
        middle = f"{self.fleet}/{self.device}" if self.device else self.fleet
        return f"{ROOT}/{VERSION}/{middle}/{self.kind}"

    @staticmethod
    def parse(text: str) -> Topic:
        """Raises Undecodable when it is none of ours, VersionRefused when it is another version's."""
        root, _, rest = text.partition("/")
        version, _, rest = rest.partition("/")
        if root != ROOT:
            raise Undecodable(f"topic {text!r} is not Outrider's")
        if version != str(VERSION):
            raise VersionRefused(f"topic {text!r} speaks protocol version {version}; this side speaks {VERSION}")
        try:
            match rest.split("/"):
                case [fleet, kind]:
                    return Topic(fleet, TopicKind(kind))
                case [fleet, device, kind]:
                    return Topic(fleet, TopicKind(kind), device)
        except ValueError as error:
            raise Undecodable(f"topic {text!r}: {error}") from None
        raise Undecodable(f"topic {text!r} has the wrong number of levels")

    @staticmethod
    def filter(kind: TopicKind, fleet: str = "+", device: str = "+") -> str:
        """A subscription to a kind, over all devices of a fleet or all fleets unless named."""
        middle = fleet if kind is TopicKind.GRANTS else f"{fleet}/{device}"
        return f"{ROOT}/{VERSION}/{middle}/{kind}"
