"""Which devices are there, as a pure state machine over presence messages.

Invariants: a device counts as online only while it has lately answered a nonce that this hub process lately issued to
it in an ack, so neither a retained presence nor a replayed one makes it online; its will makes it offline, silence of
`offline_s` stale (the connection may be half-open) and of `STALE` times that offline. Memory is bounded by the number
of enrolled devices.
"""

import secrets
from enum import Enum, auto

import msgspec

from edge_agent.wire.messages import Presence, PresenceState

HEARTBEAT_S = 10.0  # a new nonce this often; a device answers each
OFFLINE_S = 35.0
STALE = 3  # times `offline_s` until what claims to be there and does not answer is offline
_WHY = {"lost": "connection lost", "shutdown": "shut down"}
CHALLENGES_PER_S = 50.0  # at most: past 500 devices each is challenged less often, and silence is waited for longer


class Heard(Enum):
    """What a presence message told."""

    FRESH = auto()  # it answers a nonce of ours
    BACK = auto()  # the same, for the first time since it came (again)
    STALE = auto()  # online, but it may be old: challenge it
    GONE = auto()


class _Device(msgspec.Struct):
    nonces: list[tuple[str, float]] = []  # newest last, at most two
    answered: float = float("-inf")
    claims: bool = False  # it said online, proven or not
    claimed: float = float("-inf")  # since when
    why: str = ""  # it is offline
    challenged: bool = True  # it has come (again) and not answered since


class Liveness:
    def __init__(self) -> None:
        self._devices: dict[str, _Device] = {}

    @property
    def beat_s(self) -> float:
        """Seconds between two challenges of a device."""
        return max(HEARTBEAT_S, len(self._devices) / CHALLENGES_PER_S)

    @property
    def offline_s(self) -> float:
        """Seconds of silence that make a device offline."""
        return self.beat_s * OFFLINE_S / HEARTBEAT_S

    def nonce(self, device: str, now: float) -> str:
        """The nonce to put into an ack; a new one every `beat_s`."""
        state = self._devices.setdefault(device, _Device())
        if not state.nonces or now - state.nonces[-1][1] >= self.beat_s:
            state.nonces = [*state.nonces[-1:], (secrets.token_urlsafe(9), now)]
        return state.nonces[-1][0]

    def heard(self, device: str, presence: Presence, now: float) -> Heard:
        state = self._devices.setdefault(device, _Device())
        if presence.state is not PresenceState.ONLINE:
            state.answered, state.claims, state.nonces, state.challenged = float("-inf"), False, [], True
            state.why = _WHY.get(presence.reason or "", "it said so")
            return Heard.GONE
        if not state.claims:
            state.claims, state.claimed = True, now
        fresh = any(nonce == presence.nonce and now - issued < self.offline_s for nonce, issued in state.nonces)
        if not fresh:
            state.challenged = True
            return Heard.STALE
        back = state.challenged or now - state.answered >= self.offline_s
        state.answered, state.challenged = now, False
        return Heard.BACK if back else Heard.FRESH

    def online(self, device: str, now: float) -> bool:
        state = self._devices.get(device)
        return state is not None and now - state.answered < self.offline_s

    def state(self, device: str, now: float) -> tuple[str, str]:
        """`online`, `stale` or `offline`, and why it is not online."""
        state = self._devices.get(device)
        if state is None or not (state.claims or state.why):
            return "offline", "not heard since the hub started"
        if self.online(device, now):
            return "online", ""
        if not state.claims:
            return "offline", state.why
        if now - max(state.answered, state.claimed) >= STALE * self.offline_s:
            return "offline", "no answer"
        return "stale", "no answer" if state.answered > state.claimed else "not proven yet"

    def claiming(self) -> list[str]:
        """Devices to challenge with a new nonce."""
        return [name for name, state in self._devices.items() if state.claims]
