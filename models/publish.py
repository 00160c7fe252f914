"""Uploads a bundle to a hub: the blobs that are not there, then the manifest; the hub cuts and signs.

Invariants: files are checked against the manifest before the first byte leaves; a file the hub has is not sent
again, so a publication that was cut off goes on by being run again; a file the hub finds damaged when it signs is
sent again; memory stays at one chunk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from edge_agent.wire.bundle import Manifest
from models.errors import ModelError
from models.fetch import CHUNK, Progress, quiet
from models.package import open_bundle

SIGNING_S = 1800.0
"""The hub cuts and packs a bundle before it answers: some seconds for each 100 MB."""


def login(hub: str, user: str, password: str) -> str:
    """An access token. Raises ModelError."""
    with _client(hub, "") as client:
        answer = _ask(client, "POST", "/v1/login", json={"user": user, "password": password})
        return str(answer["access_token"])


def kept_token(hub: str) -> str:
    """The token `outrider hub login` keeps for this hub in the user's configuration folder, or nothing."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    try:
        kept = msgspec.json.decode((Path(base) / "outrider" / "hub.json").read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return ""
    return kept.get("token", "") if kept.get("url") == hub else ""


def publish(hub: str, token: str, bundle: Path, progress: Progress = quiet) -> dict[str, Any]:
    """Upload and publish a bundle folder; the hub's signed manifest. Raises ModelError."""
    manifest = open_bundle(bundle)
    with _client(hub, token) as client:
        body = {"manifest": msgspec.to_builtins(manifest)}
        _upload(client, bundle, manifest, progress)
        try:
            return _ask(client, "POST", "/v1/bundles", json=body, timeout=SIGNING_S)
        except ModelError:
            if not _upload(client, bundle, manifest, progress):
                raise
            return _ask(client, "POST", "/v1/bundles", json=body, timeout=SIGNING_S)


def _upload(client: httpx.Client, bundle: Path, manifest: Manifest, progress: Progress) -> int:
    """Send what the hub does not have whole; how many files that were."""
    sent = 0
    for entry in manifest.files:
        what = f"uploading {entry.path}"
        if not _has(client, entry.sha256):
            content = _chunks(bundle / "files" / entry.path, what, entry.size, progress)
            headers = {"Content-Length": str(entry.size)}
            _ask(client, "PUT", f"/v1/blobs/{entry.sha256}", content=content, headers=headers)
            sent += 1
        progress(what, entry.size, entry.size)
    return sent


def _client(hub: str, token: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=hub, headers=headers, timeout=httpx.Timeout(60.0, connect=10.0))


def _has(client: httpx.Client, sha256: str) -> bool:
    try:
        status = client.head(f"/v1/blobs/{sha256}").status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _unreachable(client, error) from error
    if status in (401, 403):
        raise ModelError(f"the hub does not let you publish ({status})", "log in as a user who may publish:bundle")
    return status == 200


def _ask(client: httpx.Client, method: str, path: str, **more: Any) -> dict[str, Any]:
    try:
        response = client.request(method, path, **more)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _unreachable(client, error) from error
    try:
        answer = response.json()
    except ValueError:
        answer = {}
    if response.is_success and isinstance(answer, dict):
        return answer
    detail = answer.get("detail", response.text[:200]) if isinstance(answer, dict) else response.text[:200]
    hint = str(answer.get("hint", "")) if isinstance(answer, dict) else ""
    raise ModelError(f"the hub refused ({response.status_code}): {detail}", hint)


def _unreachable(client: httpx.Client, error: Exception) -> ModelError:
    reason = str(error) or type(error).__name__
    return ModelError(f"the hub at {client.base_url} cannot be reached: {reason}", "is `outrider hub` running there?")


def _chunks(path: Path, what: str, size: int, progress: Progress) -> Iterator[bytes]:
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
            done += len(chunk)
            progress(what, done, size)
