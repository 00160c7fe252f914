"""The daemon's settings: command line over environment over TOML file over these defaults.

Invariants: an unknown key is refused with the nearest name there is; what cannot be a setting's value is refused with
its name; there is a key only for what two devices may want differently.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from edge_agent.errors import Refused

HUB = "hub"


class Endpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A language model behind an OpenAI-compatible server: `url` up to and with `/v1`, `model` as that server names it.

    The key is read from `key_file`, again for each request, or from the variable `key_env`; it stands nowhere else.
    With `url = "hub"` it is the fleet's own model (`outrider hub run --models`), by the device's own token, where and
    as the hub is reached: `by_proxy`, if there is one.
    """

    url: str
    model: str
    key_file: str = ""
    key_env: str = ""
    ca_file: str = ""
    timeout_s: float = 60.0
    by_proxy: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if self.url == HUB:
            if self.key_file or self.key_env or self.ca_file:
                raise ValueError("url 'hub' goes with the device's own token: leave key_file, key_env and ca_file out")
        elif parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ValueError(
                f"url {self.url!r} is not like http://127.0.0.1:8080/v1, with no user and no query, or hub"
            )
        if not self.model or (self.key_file and self.key_env) or not 0 < self.timeout_s <= 3600:
            raise ValueError("give a model, at most one of key_file and key_env, a timeout_s of up to 3600")


class Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The site's own broker, which workflows listen to: `mqtt[s]://HOST[:PORT]`, a user, files with password and CA."""

    broker: str
    user: str = ""
    password_file: str = ""
    ca_file: str = ""

    def __post_init__(self) -> None:
        if "@" in self.broker or (self.password_file and not self.user):
            raise ValueError("give broker = 'mqtts://HOST:PORT', user, and password_file beside them")


class Otel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where traces go: `endpoint` of OTLP/HTTP, such as https://collector:4318/v1/traces; what was said with `content`.

    `headers_file` has a header on each line, NAME=VALUE.
    """

    endpoint: str
    headers_file: str = ""
    ca_file: str = ""
    content: bool = False
    every_s: float = 5.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or self.every_s <= 0:
            raise ValueError(f"endpoint {self.endpoint!r} is not like http://127.0.0.1:4318/v1/traces, with no user")


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A language model in the agent's order, a bundle or an endpoint: what 1,000 tokens cost, how long it may take.

    One that is only to be asked while the hub is there says `connected`.
    """

    model: str
    cost: float = 0.0
    latency_s: float = 0.0
    connected: bool = False

    def __post_init__(self) -> None:
        if not self.model or min(self.cost, self.latency_s) < 0:
            raise ValueError("a model has a name, and no cost or latency_s below 0")


class Settings(msgspec.Struct, frozen=True):
    """What `outrider agent` runs with; enrolment needs `hub`, `token` and `name`, later `hub` and `broker` override."""

    state: Path
    hub: str = ""
    token: str = ""
    ca: str = ""  # of the hub's HTTPS: a PEM file or a fingerprint
    name: str = ""
    broker: str = ""
    proxy: str = ""  # for hub and broker, instead of the environment's
    api: str = "127.0.0.1:8471"
    pack: str = "tools.sim.pack"
    packs: list[str] = []  # instead of it: short names and modules
    option: list[str] = []
    model: str = ""
    models: list[str | Route] = []  # instead of it: the order in which they are asked
    adapter: str = ""
    endpoints: dict[str, Endpoint] = {}
    site: Site | None = None
    otel: Otel | None = None
    accelerator: list[Literal["tensorrt", "cpu", "cuda", "tensorrt-ep", "tensorrt-rtx-ep"]] = []
    sample: list[str] = []
    telemetry_s: float = 10.0
    telemetry_ttl_s: float = 7 * 86400.0
    outbox_mb: int = 256
    blobs_mb: int = 256
    jobs: int = 1000  # that may wait here
    request_mb: int = 64
    task_s: float = 120.0
    bundles_mb: int = 0
    updates: dict[str, Any] = {}
    neighbours: list[str] = []
    log: str = "info"

    def order(self) -> list[Route]:
        """The agent's language models in their order; empty for the first there is."""
        given = self.models or ([self.model] if self.model else [])
        return [Route(each) if isinstance(each, str) else each for each in given]


FIELDS = frozenset(Settings.__struct_fields__)


def as_path(kind: type, value: Any) -> Any:
    """msgspec's `dec_hook` for the one type it does not know here."""
    if kind is not Path:
        raise NotImplementedError(kind)
    return Path(value)


def nearest(name: str, known: frozenset[str]) -> str:
    """A hint that names the closest known name, or all of them."""
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def load(given: dict[str, Any], file: Path | None) -> Settings:
    """Settings from what the caller gave (None: not given) over a TOML file. Raises Refused."""
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise Refused(f"{file} cannot be read: {error}", "a TOML file with settings as top-level keys") from error
    for key in values:
        if key not in FIELDS:
            raise Refused(f"{file}: unknown setting {key!r}", nearest(key, FIELDS))
    values |= {key: value for key, value in given.items() if value is not None}
    if "state" not in values:
        raise Refused("no state directory", "give --state DIR, OUTRIDER_STATE or `state` in the file")
    try:
        values["state"] = str(values["state"])
        settings = msgspec.convert(values, Settings, dec_hook=as_path)
    except msgspec.ValidationError as error:
        raise Refused(f"a setting is wrong: {error}", "see `outrider agent --help`") from error
    positive = ("telemetry_s", "outbox_mb", "blobs_mb", "jobs", "request_mb", "task_s")
    if min(getattr(settings, name) for name in positive) <= 0:
        raise Refused(f"{', '.join(positive)} are more than 0", "leave them out for the defaults")
    if settings.bundles_mb < 0:
        raise Refused("bundles_mb is not negative", "0 for all but the reserve of the disk")
    if settings.log not in ("debug", "info", "warning", "error"):
        raise Refused(f"log level {settings.log!r}", "debug, info, warning or error")
    address(settings.api)
    return settings


def address(text: str) -> tuple[str, int]:
    """`HOST:PORT` in parts. Raises Refused."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise Refused(f"{text!r} is not HOST:PORT", "for example 127.0.0.1:8471; port 0 takes a free one")
    return host.strip("[]"), int(port)
