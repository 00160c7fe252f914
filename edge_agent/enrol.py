"""Becoming and staying a device of a fleet: a single-use token for an identity, and its certificate renewed in time.

Invariants: the private key is made here and never leaves; it is on disk before the hub hears of it, so that an
enrolment that was cut is made good with a new token and the same key; a clear no leaves nothing in the state directory
that was not there; `identity.json` is written last and whole, so a device either has an identity or has none. The
certificate is for that same key; a new one is asked for at two thirds of its life, over HTTP and with the device's own
token, so that one which ran out during an outage is no dead end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from edge_agent.errors import Fatal, Refused, Retry
from edge_agent.sync import https
from edge_agent.trouble import Trouble
from edge_agent.wire import durable
from edge_agent.wire.errors import WireError
from edge_agent.wire.grants import verify_grants
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.topics import check_name

IDENTITY, KEY, TLS = "identity.json", "device.key", "tls"
RENEW_AT = 2 / 3  # of a certificate's life
LOOK_S = 3600.0  # seconds between looks at the clock, which may have been set
_log = logging.getLogger("outrider")
_AGAIN = "try again, with a new token when this one is spent: the key is kept"


class Broker(msgspec.Struct, frozen=True):
    url: str
    username: str = ""
    password: str = ""
    ca: str | None = ""


class Enrolled(msgspec.Struct, frozen=True):
    """The hub's answer."""

    fleet: str
    device: str
    hub_key: str
    broker: Broker
    grants: str = ""
    clock: float = 0.0
    certificate: str = ""


class Identity(msgspec.Struct, frozen=True):
    """Who this device is and whom it trusts; kept in the state directory, mode 0600."""

    hub: str
    enrolled: Enrolled
    ca: str = ""  # of the hub's HTTPS, PEM; empty: those that the system trusts

    @property
    def hub_key(self) -> VerifyKey:
        return VerifyKey.from_text(self.enrolled.hub_key)


def load(state: Path) -> Identity | None:
    """The identity in a state directory. Raises Fatal when it is damaged."""
    try:
        return msgspec.json.decode((state / IDENTITY).read_bytes(), type=Identity)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.DecodeError) as error:
        hint = "restore it, or move the state directory away and enrol again"
        raise Fatal(f"{state / IDENTITY} cannot be read: {error}", hint) from error


def enrol(state: Path, hub: str, token: str, name: str, *, ca: str = "") -> Identity:
    """Trade the token for an identity. `ca` is a file or a fingerprint; a token may bring one along.

    Raises Retry (hub not there), Refused (token, name, address, another CA), Fatal (disk).
    """
    if not (hub and token and name):
        hint = "outrider agent --state DIR --hub URL --token TOKEN --name NAME"
        raise Refused("this device is not enrolled and hub, token or name is missing", hint)
    try:
        check_name(name, "device name")
        base = httpx.URL(hub)
    except (ValueError, httpx.InvalidURL) as error:
        raise Refused(str(error)) from error
    if base.scheme not in ("http", "https") or not base.host:
        raise Refused(f"{hub!r} is not the address of a hub", "for example https://hub.example:8443")
    token, _, shown = token.partition(https.MARK)
    pem = https.first_contact(hub, ca or shown)
    verify = https.verify(pem)
    made = _writable(state)
    fresh = not (state / KEY).exists()
    try:
        key = SigningKey.load_or_create(state / KEY)
        request = {"token": token, "name": name, "public_key": key.public.text, "csr": csr(key, name)}
        answer = _ask(hub, request, verify)
        identity = Identity(hub, msgspec.structs.replace(answer, certificate=""), pem)
        tls(state, identity, answer.certificate)
        durable.write(state / IDENTITY, msgspec.json.format(msgspec.json.encode(identity)), 0o600)
    except (Refused, Retry) as error:
        if fresh and not isinstance(error, Cut):
            (state / KEY).unlink(missing_ok=True)
        if made and not any(state.iterdir()):
            state.rmdir()
        raise
    except (OSError, ValueError) as error:
        hint = "make room or give the directory to this user; a damaged key is to be moved away"
        raise Fatal(f"the key or the identity in {state} cannot be kept: {error}", hint) from error
    return identity


def csr(key: SigningKey, name: str) -> str:
    """A PKCS#10 request (RFC 2986) for the device's key, PEM."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder(subject).sign(key.key, None)
    return request.public_bytes(Encoding.PEM).decode()


def tls(state: Path, identity: Identity, certificate: str = "") -> Path:
    """The folder with what the broker is met with: its CA's `ca.pem`, our `cert.pem` and `key.pem`."""
    folder = state / TLS
    folder.mkdir(mode=0o700, exist_ok=True)
    if not (folder / "key.pem").is_symlink():
        (folder / "key.pem").symlink_to(Path("..") / KEY)
    for name, text in (("ca.pem", identity.enrolled.broker.ca), ("cert.pem", certificate)):
        file = folder / name
        if text and not (file.exists() and file.read_text() == text):  # a full disk keeps nobody from starting
            durable.write(file, text.encode())
    return folder


class Renewal:
    """`run()` keeps the certificate good; `client` knows the hub's address, `token` makes a device token."""

    def __init__(self, state: Path, device: str, client: httpx.AsyncClient, token: Callable[[], str]) -> None:
        self._state, self._device, self._client, self._token = state, device, client, token
        self._trouble = Trouble(_log, "the certificate is not renewed", every_s=3600)

    def due_s(self) -> float:
        """Seconds until it should be renewed; there is none yet, or it cannot be read: now."""
        try:
            known = x509.load_pem_x509_certificate((self._state / TLS / "cert.pem").read_bytes())
        except (OSError, ValueError):
            return 0.0
        begin, end = known.not_valid_before_utc.timestamp(), known.not_valid_after_utc.timestamp()
        return max(0.0, begin + (end - begin) * RENEW_AT - time.time())

    async def run(self) -> None:
        pause = 1.0
        while True:
            if due_s := self.due_s():
                await asyncio.sleep(min(due_s, LOOK_S))
                continue
            try:
                await self._renew()
                self._trouble.over()
                pause = 1.0
            except (httpx.HTTPError, Refused, OSError, ValueError, KeyError, TypeError) as error:
                self._trouble.tell(error)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LOOK_S)

    async def _renew(self) -> None:
        request = {"csr": csr(SigningKey.load(self._state / KEY), self._device)}
        bearer = {"Authorization": f"Bearer {self._token()}"}
        response = await self._client.post(f"/v1/devices/{self._device}/certificate", json=request, headers=bearer)
        if response.is_error:
            raise Refused(*_problem(response))
        made = str(response.json()["certificate"])
        x509.load_pem_x509_certificate(made.encode())
        await asyncio.to_thread(durable.write, self._state / TLS / "cert.pem", made.encode())
        _log.info("the certificate was renewed")


class Cut(Retry):
    """Whether the hub enrolled this device is not known."""


def _ask(hub: str, request: dict[str, Any], verify: ssl.SSLContext | bool) -> Enrolled:
    try:
        response = httpx.post(f"{hub.rstrip('/')}/v1/enrol", json=request, timeout=https.TIMEOUT_S, verify=verify)
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
        if https.untrusted(error):
            hint = "make the token at the hub again, which then names its CA, or give the CA as --ca"
            raise Refused(f"nobody known here vouches for the hub at {hub}: {error}", hint) from error
        hint = "is the address right, is the hub running, does a firewall stand between?"
        raise Retry(f"the hub at {hub} does not answer: {error}", hint) from error
    except httpx.HTTPError as error:
        raise Cut(f"the hub at {hub} took the request and gave no answer: {error}", _AGAIN) from error
    if response.status_code >= 500:
        raise Cut(f"the hub at {hub} has a problem: {_problem(response)[0]}", f"read the hub's log; {_AGAIN}")
    if response.is_error or response.is_redirect:
        raise Refused(*_problem(response))
    try:
        answer = msgspec.json.decode(response.content, type=Enrolled)
        verify_grants(VerifyKey.from_text(answer.hub_key), answer.grants)
    except (msgspec.DecodeError, WireError, ValueError) as error:
        raise Refused(f"{hub} did not answer as a hub: {error}", "is this the hub's own address?") from error
    return answer


def _problem(response: httpx.Response) -> tuple[str, str]:
    hints = {
        403: "ask for a new token: POST /v1/enrolments, or the dashboard",
        404: "is this the hub's own address?",
        409: "a token works once, a name belongs to one device",
    }
    detail, hint = https.problem(response)
    return f"the hub refuses: {detail}", hint or hints.get(response.status_code, "")


def _writable(state: Path) -> bool:
    """Make sure of the state directory before the token is spent; True when it was made. Raises Fatal."""
    made = not state.exists()
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=state) as probe:
            probe.write(bytes(65536))
            probe.flush()
    except OSError as error:
        if made:
            with contextlib.suppress(OSError):
                state.rmdir()
        raise Fatal(f"the state directory {state} is not writable: {error}", "free space or choose another") from error
    return made
