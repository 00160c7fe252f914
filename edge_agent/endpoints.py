"""The endpoints of the settings: language models behind servers, switched in as bundles are.

Invariants: an endpoint that cannot be set up holds up no other and is tried again, as its key may come later; the one
at the hub is asked with a token of this device, made anew at half of its life and whenever the clock was set.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec

from edge_agent.config import HUB, Endpoint
from edge_agent.errors import OutriderError
from edge_agent.hosting import ENDPOINT
from edge_agent.update.slots import Installed
from edge_agent.wire import durable
from edge_agent.wire.bundle import BundleKind, Manifest, scan

TOKEN_S = 3600.0  # of the endpoint at the hub; a new one each half of it
AGAIN_S = 60.0  # until an endpoint that is not set up is tried again
_log = logging.getLogger("outrider")


def environment(endpoints: Mapping[str, Endpoint]) -> dict[str, str]:
    """What of this process's environment their worker needs: keys and proxies."""
    proxies = {name: url for name, url in os.environ.items() if name.lower().endswith("_proxy")}
    return proxies | {e.key_env: os.environ[e.key_env] for e in endpoints.values() if e.key_env in os.environ}


class Endpoints:
    """`run()` switches them in; `hub` is its URL, `ca` PEM text or empty, `token` makes one that lives so long."""

    def __init__(
        self,
        endpoints: Mapping[str, Endpoint],
        state: Path,
        hub: str,
        ca: str,
        token: Callable[[float], str],
        switch: Callable[[str, Installed], Awaitable[None]],
    ) -> None:
        self._endpoints, self._folder = endpoints, state / "endpoints"
        self._hub, self._ca, self._token, self._switch = hub, ca, token, switch

    async def run(self) -> None:
        left, made_at = dict(self._endpoints), dict[str, float]()
        at_hub = [name for name, settings in left.items() if settings.url == HUB]
        while True:
            for name in at_hub:
                now = time.time()
                if 0 <= now - made_at.get(name, math.inf) < TOKEN_S / 2:
                    continue  # else it is old, or the clock was set since
                try:
                    await asyncio.to_thread(self._keep_key, name)
                    made_at[name] = now
                except OSError as error:
                    _log.error("the endpoint %s gets no token: %s", name, error)
            for name, settings in list(left.items()):
                try:
                    await self._switch(name, await asyncio.to_thread(self._installed, name, settings))
                    del left[name]
                except (OutriderError, OSError, ValueError) as error:
                    _log.error("the endpoint %s is not set up: %s", name, error)
            await asyncio.sleep(AGAIN_S)

    def _keep_key(self, name: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        durable.write(self._folder / f"{name}.key", self._token(TOKEN_S).encode(), 0o600)

    def _installed(self, name: str, settings: Endpoint) -> Installed:
        """As a model in a folder."""
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        if settings.url == HUB:
            pem, key = self._folder / f"{name}.pem", str(self._folder / f"{name}.key")
            durable.write(pem, self._ca.encode())
            url, ca = f"{self._hub.rstrip('/')}/v1", str(pem) if self._ca else ""
            settings = msgspec.structs.replace(settings, url=url, key_file=key, ca_file=ca, by_proxy=True)
        durable.write(folder / "endpoint.json", msgspec.json.encode(settings))
        return Installed(ENDPOINT, folder, Manifest(name, "1", BundleKind.LLM, scan(folder)))
