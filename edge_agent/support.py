"""What somebody who helps needs from a device, in one file: checks, settings, state, versions, the last log lines.

Invariant: no secret leaves: private keys, tokens, and passwords in addresses are taken out of every text, and the
settings that hold one are left out; sizes are bounded.
"""

from __future__ import annotations

import asyncio
import io
import logging
import re
import subprocess
import sys
import zipfile
from collections import deque
from importlib.metadata import distributions
from typing import Any

import msgspec

from edge_agent.config import Settings
from edge_agent.sync.proxy import Proxy

LINES, WIDTH = 3000, 500
_SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|eyJ[\w-]+\.[\w-]+\.[\w-]*"
    r"|(?<=://)[^/\s@]+(?=@)"
    r"|(?i:(?<=bearer )\S+|(?<=password=)\S+|(?<=token=)\S+|(?<=secret=)\S+|(?<=key=)\S+)",
    re.DOTALL,
)


class Recent(logging.Handler):
    """Keeps the last lines that were logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[str] = deque(maxlen=LINES)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record)[:WIDTH])


RECENT = Recent()
"""The daemon's own."""


async def collect(settings: Settings, status: dict[str, Any]) -> bytes:
    """The file of a daemon that runs; the checks that need it stopped are left out."""
    command = [sys.executable, "-m", "edge_agent.cli", "doctor", "--quick", "--json", "--state", str(settings.state)]
    doctor = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(60):
        checks, _ = await doctor.communicate()
    told: dict[str, Any] = {"checks": checks.decode(), "status": status, "log": "\n".join(RECENT.lines)}
    return await asyncio.to_thread(bundle, **told, settings=settings_shown(settings), versions=versions())


def hide(text: str) -> str:
    """The text with its secrets as ***."""
    return _SECRET.sub("***", text)


def settings_shown(settings: Settings) -> dict[str, Any]:
    """The settings but the enrolment token."""
    shown: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(settings, token=""), enc_hook=str)
    if settings.proxy:  # with no user and password
        shown["proxy"] = str(Proxy.parse(settings.proxy))
    return shown


def versions() -> str:
    return "\n".join(sorted({f"{each.name}=={each.version}" for each in distributions()}))


def journal() -> str:
    """What systemd kept of the daemon, if it did."""
    command = ["journalctl", "-u", "outrider-agent", "-n", str(LINES), "--no-pager", "-o", "short-iso"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def bundle(**files: str | dict[str, Any]) -> bytes:
    """A ZIP file: `name=text` is name.txt, `name={…}` is name.json."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            text = content if isinstance(content, str) else msgspec.json.format(msgspec.json.encode(content)).decode()
            archive.writestr(f"{name}.{'txt' if isinstance(content, str) else 'json'}", hide(text))
    return made.getvalue()
