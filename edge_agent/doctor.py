"""What a device needs to work, each thing tried rather than assumed.

Invariants: nothing is changed; every check ends within its timeout; a check that is not ok says what to do; a model is
good only when it was loaded and answered in a worker process.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edge_agent.errors import OutriderError, Retry

if TYPE_CHECKING:
    from edge_agent.enrol import Identity

FREE_MB = 1024
SKEW_S = 60.0
BROKER_S = 5.0
_EDGE = ("httpx", "numpy", "onnxruntime", "onnxruntime_genai", "paho", "starlette", "uvicorn")


class Check(msgspec.Struct, frozen=True):
    name: str
    state: Literal["ok", "warn", "fail"]
    detail: str
    hint: str = ""


def examine(state: Path | None, hub: str = "", broker: str = "", quick: bool = False) -> list[Check]:
    """All checks; `hub` and `broker` stand in for the identity's. `quick`: none that an agent would feel."""
    checks = [_python(), _extras()]
    if missing := checks[1].state == "fail":
        return checks
    checks += [*_state(state)] if state else [Check("state", "warn", "no state directory given", "--state DIR")]
    enrolled = None
    if state is not None and not missing:
        from edge_agent import enrol

        try:
            enrolled = enrol.load(state)
            detail = f"{enrolled.enrolled.device} of {enrolled.enrolled.fleet}" if enrolled else "not enrolled"
            checks.append(Check("identity", "ok" if enrolled else "warn", detail))
        except OutriderError as error:
            checks.append(Check("identity", "fail", error.message, error.hint))
    hub = hub or (enrolled.hub if enrolled else "")
    checks += _hub(hub, enrolled.ca if enrolled else "")
    if not quick:
        checks.append(_broker(broker, enrolled, state))
    if state is not None and not quick:
        checks += asyncio.run(_models(state))
    checks.append(_systemd())
    return checks


def as_json(checks: list[Check]) -> str:
    """`{ok, checks: [{name, state, detail, hint}]}`."""
    ok = all(check.state != "fail" for check in checks)
    return msgspec.json.encode({"ok": ok, "checks": checks}).decode()


def _python() -> Check:
    text = ".".join(str(part) for part in sys.version_info[:3])
    good = sys.version_info >= (3, 11)
    return Check("python", "ok" if good else "fail", text, "" if good else "Python 3.11 or newer is needed")


def _extras() -> Check:
    missing = [name for name in _EDGE if find_spec(name) is None]
    if missing:
        return Check("extras", "fail", f"missing: {', '.join(missing)}", "pip install 'outrider[edge]'")
    return Check("extras", "ok", "edge is complete")


def _state(state: Path) -> Iterator[Check]:
    folder = next(path for path in (state, *state.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"outrider")
        yield Check("state", "ok", f"{state} is writable")
    except OSError as error:
        yield Check("state", "fail", f"{folder} is not writable: {error}", "choose another, or change its owner")
    free = shutil.disk_usage(folder).free >> 20
    hint = "" if free >= FREE_MB else f"below {FREE_MB} MiB updates and the outbox have no room"
    yield Check("disk", "ok" if free >= FREE_MB else "warn" if free > 64 else "fail", f"{free} MiB free", hint)


def _hub(hub: str, ca: str) -> Iterator[Check]:
    if not hub:
        yield Check("hub", "warn", "no hub known", "--hub URL")
        return
    import httpx

    from edge_agent.sync.https import verify

    try:
        response = httpx.get(f"{hub.rstrip('/')}/healthz", timeout=5, verify=verify(ca))
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield Check("hub", "warn", f"{hub} does not answer: {error}", "the device works on without; see the network")
        return
    yield Check("hub", "ok", f"{hub} answers in {response.elapsed.total_seconds() * 1e3:.0f} ms")
    if date := response.headers.get("date"):
        asked = time.time() - response.elapsed.total_seconds() / 2
        skew = asked - parsedate_to_datetime(date).timestamp() - 0.5  # Date has whole seconds, cut off
        good = abs(skew) < SKEW_S
        said = "within 1 s of the hub's" if abs(skew) <= 1 else f"{skew:+.0f} s from the hub's"
        hint = "" if good else "tokens and grants are judged by the clock: set up NTP"
        yield Check("clock", "ok" if good else "fail", said, hint)


def _broker(given: str, identity: Identity | None, state: Path | None) -> Check:
    """Connects as the device does, but under another client id; a broker that goes by certificates takes no notice of
    that, and a running agent connects again."""
    enrolled = identity.enrolled if identity else None
    if not given and enrolled is None:
        return Check("broker", "warn", "no broker known", "enrol, or --broker URL")
    from edge_agent.sync.transport import MqttSession

    access: dict[str, Any] = {}
    if enrolled is not None and "@" not in given:
        access = {"username": enrolled.broker.username or None, "password": enrolled.broker.password or None}
    url = given or (enrolled.broker.url if enrolled else "")
    name = f"{enrolled.fleet}.{enrolled.device}" if enrolled else "outrider"

    async def connect(ca: Path | None) -> str:
        session = MqttSession(url, f"{name}.doctor-{os.getpid()}", ca=ca, session_expiry=0, **access)
        async with session:
            await session.wait_connected(BROKER_S)
        return str(session.address)

    from edge_agent.enrol import TLS

    try:
        trust = state / TLS if state and (state / TLS).is_dir() else None  # made by enrolment; nothing is written here
        return Check("broker", "ok", f"{asyncio.run(connect(trust))} takes this device's connection")
    except OSError as error:
        return Check(
            "broker", "fail", f"what the broker is met with cannot be read: {error}", "run as the agent's user"
        )
    except OutriderError as error:
        passing = isinstance(error, Retry) and enrolled is None
        hint = error.hint or "the outbox keeps what is to be sent"
        return Check("broker", "warn" if passing else "fail", error.message, hint)


async def _models(state: Path) -> list[Check]:
    from edge_agent.hosting import Hosting
    from edge_agent.update.slots import Slots

    slots, checks, hosting = Slots(state / "bundles"), [], Hosting({})
    hosting.running = {name: installed for name in slots.names() if (installed := slots.current(name))}
    for name in slots.names():
        installed, began = slots.current(name), time.monotonic()
        if installed is None:
            checks.append(Check("model", "fail", f"{name} cannot be read", "assign it again"))
            continue
        try:
            await hosting.probe(name, installed)
            took = time.monotonic() - began
            checks.append(Check("model", "ok", f"{name} {installed.manifest.version} ran an inference ({took:.1f} s)"))
        except OutriderError as error:
            checks.append(Check("model", "fail", f"{name}: {error.message}", error.hint or "assign another version"))
    return checks or [Check("model", "warn", "no model is installed", "publish a bundle and assign it to this device")]


def _systemd() -> Check:
    if Path("/run/systemd/system").is_dir():
        return Check("systemd", "ok", "runs this machine")
    return Check("systemd", "warn", "does not run this machine", "something else has to start the agent at boot")
