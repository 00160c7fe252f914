"""HTTPS to a hub whose certificate is signed by its own CA: that CA is pinned, at first contact by its fingerprint.

Invariants: what a stranger could answer is only a certificate, and it counts only when its SHA-256 is the one that came
by another way (with the enrolment token); everything else goes over a connection that this CA vouches for. How long a
pinned CA's certificates are valid is not asked for, as with the broker: a wrong clock must not part device and hub.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import time
from pathlib import Path

import httpx

from edge_agent.errors import Refused, Retry
from edge_agent.sync.broker import NO_CHECK_TIME

MARK = "~"  # stands between an enrolment token and the fingerprint of the hub's CA
MAX_PEM = 64 * 1024
TIMEOUT_S = 20.0
_END = "-----END CERTIFICATE-----"


def first(pem: str) -> str:
    """The first certificate alone: one more behind it would be trusted too. Raises ValueError."""
    return ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(pem[: pem.index(_END) + len(_END)].strip()))


def fingerprint(pem: str) -> str:
    """SHA-256 of the first certificate, hexadecimal. Raises ValueError."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first(pem))).hexdigest()


def verify(pem: str) -> ssl.SSLContext | bool:
    """For httpx: trust this CA alone, or, when there is none, those of the system. Raises Refused."""
    if not pem:
        return True
    try:
        context = ssl.create_default_context(cadata=pem)
    except (ssl.SSLError, ValueError) as error:
        raise Refused(f"the hub's CA cannot be read: {error}", "give a PEM file as --ca") from None
    context.verify_flags |= NO_CHECK_TIME
    return context


def given(text: str) -> tuple[str, str]:
    """A CA's PEM text of a file, or the fingerprint that was given in its place. Raises Refused."""
    digits = text.removeprefix("sha256:").replace(":", "").lower()
    if not text or re.fullmatch("[0-9a-f]{64}", digits):
        return "", digits
    try:
        return Path(text).read_text(), ""
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"the CA cannot be read: {error}", "a PEM file, or the fingerprint that the hub shows") from None


def first_contact(url: str, text: str, timeout_s: float = TIMEOUT_S) -> str:
    """The PEM text of a CA, given as a file or as the fingerprint by which it is asked for at the hub.

    Raises Refused (another CA, no such file), Retry (the hub is not there).
    """
    pem, wanted = given(text)
    if not wanted:
        return pem
    if not url.startswith("https://"):
        raise Refused(f"{url} is not HTTPS, and the hub's CA is expected there", "write https://")
    try:
        shown, until = b"", time.monotonic() + timeout_s
        with (
            httpx.Client(verify=False, timeout=timeout_s) as stranger,
            stranger.stream("GET", f"{url.rstrip('/')}/v1/ca") as answer,
        ):
            for piece in answer.iter_raw(4096):  # of somebody not known yet: not more than is wanted, nor for ever
                shown += piece
                if len(shown) > MAX_PEM or time.monotonic() > until:
                    break
    except httpx.HTTPError as error:
        raise Retry(f"the hub at {url} does not answer: {error}", "is the address right, is it running?") from error
    try:
        pem = first(shown[:MAX_PEM].decode(errors="replace"))
        found = fingerprint(pem)
    except ValueError:
        found = "none"
    if found != wanted:
        hint = "somebody may stand between; or the hub has a new CA: make a new token there"
        raise Refused(f"the hub at {url} shows another CA: {found[:16]}…, not {wanted[:16]}…", hint)
    return pem


def untrusted(error: Exception) -> bool:
    """Whether a connection failed because nobody vouches for the other side."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def problem(response: httpx.Response) -> tuple[str, str]:
    """What an error says is wrong, and what to do (RFC 9457, with our `hint`)."""
    try:
        found = response.json()
        return str(found["detail"]), str(found.get("hint") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"the answer was {response.status_code} {response.reason_phrase}", ""
