"""What stands around an MQTT client: where the broker is, what comes and goes, and what a failure to connect means.

Invariant: every failure comes out as `Retry` or `Refused` with a hint, and no text shows a password.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.sync.proxy import Proxy, ProxyError


@dataclass(frozen=True)
class Address:
    """Where a broker is. `password` never shows in a text."""

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"

    @staticmethod
    def parse(url: str, username: str | None = None, password: str | None = None) -> Address:
        """`mqtt[s]://[user:password@]host[:port]`; raises Refused for anything else."""
        hint = "write mqtt://host:1883 or mqtts://user:password@host:8883"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise Refused(f"not a broker address: {error}", hint) from None
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.path not in ("", "/"):
            raise Refused(f"not a broker address: scheme {parts.scheme!r}, host {parts.hostname!r}", hint)
        tls = parts.scheme == "mqtts"
        user = username if username is not None else (unquote(parts.username) if parts.username else None)
        secret = password if password is not None else (unquote(parts.password) if parts.password else None)
        return Address(parts.hostname, port or (8883 if tls else 1883), tls, user, secret)


@dataclass(frozen=True)
class Publication:
    """A will, or anything else ready to go; a broker keeps a will back for `delay_s`, or for good if we come again."""

    topic: str
    payload: bytes
    properties: Mapping[str, str] = field(default_factory=dict)
    qos: int = 1
    retain: bool = False
    delay_s: int = 0


@dataclass(frozen=True)
class Message:
    """What came. Call `ack` once it is dealt with for good: one that is never acked holds back all later acks."""

    topic: str
    payload: bytes
    properties: dict[str, str]
    retain: bool
    qos: int
    ack: Callable[[], None] = field(repr=False)


NO_CHECK_TIME = 0x200000  # X509_V_FLAGNO_CHECK_TIME


def tls_context(trust: Path | None) -> ssl.SSLContext:
    """TLS 1.3. Trust one CA (a PEM file), or the system's, or what a folder holds: `ca.pem`, `cert.pem`, `key.pem`.

    A folder is our own PKI with a pinned root. How long the broker's certificate is valid is then not asked for: a
    device whose clock is wrong still knows its broker. Raises Refused when something cannot be read.
    """
    ours = trust is not None and trust.is_dir()
    file = trust / "ca.pem" if ours and trust else trust
    try:
        known = file is not None and not (ours and not file.exists())
        context = ssl.create_default_context(cafile=str(file) if known else None)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if ours and trust:
            if known:
                context.verify_flags |= NO_CHECK_TIME
            if (trust / "cert.pem").exists():
                key = trust / "key.pem"
                context.load_cert_chain(trust / "cert.pem", key if key.exists() else None)
        return context
    except (OSError, ssl.SSLError) as error:
        hint = "give the PEM file of the CA, or the folder that enrolment made"
        raise Refused(f"cannot read the broker's CA file or our certificate in {trust}: {error}", hint) from None


def dial(address: Address, tls: Callable[[], ssl.SSLContext] | None, timeout: float, proxy: str = "") -> socket.socket:
    """A connected socket, after the TLS handshake where there is one; blocks. Raises OSError, Refused."""
    context, through = tls() if tls else None, Proxy.of(address.host, proxy)
    if through:
        plain = through.dial(address.host, address.port, timeout)
    else:
        plain = socket.create_connection((address.host, address.port), timeout)
    return context.wrap_socket(plain, server_hostname=address.host) if context else plain


def refusal(code: int, reason: str, address: Address) -> OutriderError:
    """What a CONNACK reason code (MQTT 5, 3.2.2.2) means for us."""
    text = f"{address} refuses the connection: {reason}"
    if code in (0x86, 0x87, 0x8C):
        return Refused(text, "check user and password of the broker")
    if code in (0x81, 0x82, 0x84, 0x85, 0x9D):
        return Refused(text, "the broker must speak MQTT 5 there")
    return Retry(text)


def explain(error: OSError | ValueError, address: Address) -> OutriderError:
    """What a failed connect means for us."""
    text = f"cannot connect to {address}: {error}"
    match error:
        case ProxyError():
            return Retry(text, "check HTTPS_PROXY or the setting `proxy`, and what the proxy lets through")
        case ssl.SSLCertVerificationError():
            return Refused(text, "give the CA that signed the broker's certificate, and the name it was made for")
        case ssl.SSLError():
            return Refused(text, "the broker does not speak TLS there, or not a version this side accepts")
        case socket.gaierror():
            return Retry(text, "the name does not resolve: check the address and the network")
        case ConnectionRefusedError():
            return Retry(text, "nothing listens there: is the broker running, and is the port right?")
        case TimeoutError():
            return Retry(text, "no answer: check address, port and firewall")
        case ValueError():
            return Refused(text, "write mqtt://host:1883 or mqtts://host:8883")
    return Retry(text, "check the network")
