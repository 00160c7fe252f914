"""The API of a device on a real socket: the app under uvicorn, real workers, the bundles a test names."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from edge_agent.api.app import LocalApi
from edge_agent.hosting import ROLES, Hosting
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.update.slots import Installed
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, public_jwk
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.tokens import issue_access_token
from models.package import open_bundle

KEY = SigningKey.generate()


class Served:
    """A device of the API's Protocol that has models and no work."""

    def __init__(self, models: Hosting) -> None:
        self.models, self.work, self.url = models, self, ""
        self.counts: dict[str, int] = {}
        self.roles = dict(SHIPPED_ROLES)

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    def grants(self) -> Grants:
        return Grants(1, 0.0, 1e12, self.roles, [public_jwk(KEY.public)])

    def healthy(self) -> bool:
        return True

    async def status(self) -> dict[str, Any]:
        return {}

    async def submit(self, text: str, subject: Subject, conversation: str = "") -> str:
        raise NotImplementedError

    async def task(self, id: str) -> Any | None:
        return None

    async def tasks(self) -> list[Any]:
        return []

    async def call(self, name: str, args: dict[str, Any], subject: Subject) -> Any:
        raise NotImplementedError


def token(*roles: str) -> str:
    return issue_access_token(KEY, "ada", list(roles) or ["operator"], now=time.time(), lifetime_s=600)


def bearer(*roles: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(*roles)}"}


def installed(bundle: Path) -> Installed:
    return Installed(bundle.name.ljust(64, "0"), bundle / "files", open_bundle(bundle))


@asynccontextmanager
async def serving(
    *bundles: Installed, workers: dict[str, WorkerProcess] | None = None, max_body: int = 64 << 20
) -> AsyncIterator[Served]:
    """A device with these bundles, on a free port."""
    workers = workers or {role: WorkerProcess.engine(role) for role in ROLES.values()}
    host = Hosting(workers)
    device = Served(host)
    api = LocalApi(device, "127.0.0.1:0", max_body=max_body)
    device.url = api.url
    running = [asyncio.create_task(worker.run()) for worker in workers.values()]
    try:
        for bundle in bundles:
            await host.switch(bundle.manifest.name, bundle)
        running.append(asyncio.create_task(api.run()))
        yield device
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
