"""The hub's HTTP API from a shell: one function a call, errors as `HubError` with the hub's own words.

Invariant: the access token is kept 0600 in the user's configuration folder, or comes from OUTRIDER_TOKEN.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from edge_agent.errors import OutriderError
from edge_agent.sync.https import first_contact, given, problem, untrusted, verify
from edge_agent.wire import durable
from edge_agent.wire.bundle import BundleKind, FileEntry, Manifest, scan
from hub.errors import HubError

PIECE = 1 << 20
SIGNING_S = 1800.0  # the hub cuts and packs a bundle before it answers


def config_path() -> Path:
    """Where the token is kept."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "outrider" / "hub.json"


def login(url: str, user: str, password: str, ca: str = "") -> dict[str, Any]:
    """Get a token and keep it; `ca` is a file or a fingerprint of the hub's CA, and kept too."""
    try:
        pem = first_contact(url, ca) if ca else _kept().get("ca", "") if url == _kept().get("url") else ""
        trusted = verify(pem)
    except OutriderError as error:
        raise HubError(error.message, error.hint) from None
    with httpx.Client(base_url=url, timeout=30, verify=trusted) as http:
        answer = _answer(http, "POST", "/v1/login", json={"user": user, "password": password})
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    durable.write(path, msgspec.json.encode({"url": url, "token": answer["access_token"], "ca": pem}), 0o600)
    return {"user": user, "hub": url, "expires_in": answer["expires_in"]}


def _kept() -> dict[str, str]:
    path = config_path()
    known: dict[str, str] = msgspec.json.decode(path.read_bytes()) if path.exists() else {}
    return known


class HubClient:
    """A logged-in client. Raises HubError when nobody is logged in."""

    def __init__(self, url: str | None = None) -> None:
        known = _kept()
        url = url or os.environ.get("OUTRIDER_HUB") or known.get("url") or "http://127.0.0.1:8080"
        token = os.environ.get("OUTRIDER_TOKEN") or (known.get("token") if url == known.get("url") else None)
        if not token:
            raise HubError(f"not logged in at {url}", "outrider hub login, or set OUTRIDER_TOKEN")
        try:
            given_ca = given(os.environ.get("OUTRIDER_CA", ""))[0]
            trusted = verify(given_ca or (known.get("ca", "") if url == known.get("url") else ""))
        except OutriderError as error:
            raise HubError(error.message, error.hint) from None
        self.token = token
        shown = {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(base_url=url, timeout=60, headers=shown, verify=trusted)

    def __enter__(self) -> "HubClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, timeout: float = 60.0, **query: Any) -> Any:
        params = {k: v for k, v in query.items() if v is not None}
        return _answer(self._http, "GET", path, params=params, timeout=timeout)

    def post(self, path: str, body: dict[str, Any], **more: Any) -> Any:
        return _answer(self._http, "POST", path, json=body, **more)

    def put(self, path: str, body: dict[str, Any]) -> Any:
        return _answer(self._http, "PUT", path, json=body)

    def patch(self, path: str, body: dict[str, Any], **more: Any) -> Any:
        return _answer(self._http, "PATCH", path, json=body, **more)

    def delete(self, path: str) -> Any:
        return _answer(self._http, "DELETE", path)

    def download(self, path: str, file: Path) -> None:
        """Raises HubError; 404 as long as it is not there."""
        response = self._http.get(path)
        if response.is_error:
            raise HubError(f"{response.status_code}: {path} is not there", "it may be on its way")
        durable.write(file, response.content, 0o600)

    def publish(
        self, folder: Path, name: str, version: str, kind: str, license: str, meta: dict[str, Any]
    ) -> dict[str, Any]:
        """Upload what is missing of a folder and publish it; a `bundle.json` in it may give other fields."""
        given: dict[str, Any] = {}
        described = folder / "bundle.json"
        try:
            if described.exists():
                given = msgspec.json.decode(described.read_bytes(), type=dict[str, Any])
            files = [entry for entry in scan(folder) if entry.path != "bundle.json"]
            fields = {"name": name, "version": version, "kind": kind, "license": license, "meta": meta}
            fields = given | {key: value for key, value in fields.items() if value}
            manifest = msgspec.convert(fields | {"files": msgspec.to_builtins(files)}, Manifest)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise HubError(f"{folder} is not a bundle: {error}", "give --name, --version and --kind") from error
        if manifest.kind is BundleKind.UNKNOWN:
            raise HubError(f"kind {fields.get('kind')!r} is not known", f"one of {', '.join(BundleKind)}")
        body = {"manifest": msgspec.to_builtins(manifest)}
        self._upload(folder, files)
        try:
            answer: dict[str, Any] = self.post("/v1/bundles", body, timeout=SIGNING_S)
        except HubError:
            if not self._upload(folder, files):
                raise
            answer = self.post("/v1/bundles", body, timeout=SIGNING_S)  # a file was damaged there, and is whole now
        return {"name": manifest.name, "version": manifest.version, "manifest_sha256": answer["manifest_sha256"]}

    def _upload(self, folder: Path, files: list[FileEntry]) -> int:
        """Send what the hub does not have whole; how many files that were."""
        sent = 0
        for entry in files:
            path = f"/v1/blobs/{entry.sha256}"
            if self._http.head(path).status_code != 200:
                _answer(self._http, "PUT", path, content=_pieces(folder / entry.path))
                sent += 1
        return sent


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def _answer(http: httpx.Client, method: str, path: str, **more: Any) -> Any:
    try:
        response = http.request(method, path, **more)
    except httpx.TransportError as error:
        if untrusted(error):
            hint = "outrider hub login --ca sha256:… as the hub showed at its start, or OUTRIDER_CA=FILE"
            raise HubError(f"nobody known here vouches for {http.base_url}: {error}", hint) from error
        raise HubError(f"no answer from {http.base_url}: {error}", "is the hub running there?") from error
    if response.is_error:
        detail, hint = problem(response)
        raise HubError(f"{response.status_code}: {detail}", hint)
    return response.json() if response.content else None
