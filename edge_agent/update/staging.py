"""How a version comes onto the disk: the manifest from the repository, then its chunks, then both read again.

Invariants: a manifest counts only when it is the very one that the director assigned, and is for this hardware and this
agent; what the disk has no room for is not begun, and what filled it gives its space back; what the disk has changed is
fetched again, never run.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from importlib.metadata import version

from edge_agent.errors import Refused, Retry
from edge_agent.update import disk
from edge_agent.update.assembly import Assembly
from edge_agent.update.download import Downloads
from edge_agent.update.neighbours import Neighbours
from edge_agent.update.slots import Slots
from edge_agent.update.trust import Director, Trust
from edge_agent.wire.bundle import Manifest, Target, decode_manifest, sha256
from edge_agent.wire.errors import WireError


class Staging:
    """`needs` raises what a manifest lacks here; at least `reserve` bytes stay free, `budget` bounds all bundles."""

    def __init__(
        self,
        slots: Slots,
        director: Director,
        trust: Trust,
        downloads: Downloads,
        needs: Callable[[Manifest], None],
        *,
        reserve: int,
        budget: int | None,
        agent_version: str,
    ) -> None:
        self._slots, self._director, self._trust, self._downloads, self._needs = (
            slots,
            director,
            trust,
            downloads,
            needs,
        )
        self.reserve, self._budget, self._agent = reserve, budget, agent_version or version("outrider")

    async def resolve(self, name: str, target: Target) -> bool:
        """Have the manifest, or (True) the whole version. Raises Retry: not there, or not the assigned one."""
        id = target.manifest_sha256
        if await asyncio.to_thread(self._slots.has, name, id):
            return True
        if await asyncio.to_thread(self._slots.manifest, name, id) is None:
            offer = await self._trust.resolve(name, target.version)
            if (found := sha256(offer.manifest)) != id:
                what = f"the director assigned {id}, the repository has {found}"
                raise Retry(f"arbitrary software: {name} {target.version} is not the assigned one: {what}")
            await asyncio.to_thread(self._slots.receive, name, offer)
        return False

    async def download(self, name: str, target: Target, near: Neighbours | None, tick: Callable[[int], None]) -> None:
        """Bring what is missing, from next door where that has it; `tick` hears of each piece and may end it."""
        manifest = await asyncio.to_thread(self._manifest, name, target)
        try:
            assembly = await asyncio.to_thread(self._open, name, target, manifest)
            if near is not None:
                await near.fill(assembly, lambda some: self._downloads.fill(assembly, tick, some), tick)
            await self._downloads.fill(assembly, tick)
            await asyncio.to_thread(self._slots.complete, name, target.manifest_sha256, manifest, assembly)
        except OSError:
            await asyncio.to_thread(self._slots.discard, name, target.manifest_sha256)  # make room for what matters
            raise

    def read_again(self, name: str, target: Target) -> None:
        """Manifest and bytes once more, from the disk. Raises Refused; Retry when the disk has changed them."""
        self._manifest(name, target)
        try:
            self._slots.check(name, target.manifest_sha256)
        except Refused as error:
            self._slots.discard(name, target.manifest_sha256)
            raise Retry(error.message, error.hint) from error

    def _manifest(self, name: str, target: Target) -> Manifest:
        raw = self._slots.manifest(name, target.manifest_sha256)
        if raw is None:
            self._slots.discard(name, target.manifest_sha256)  # it would be taken for whole
            raise Retry(f"the manifest of {name} {target.version} is gone")
        try:
            manifest = decode_manifest(raw)
        except WireError as error:
            raise Refused(f"the manifest of {name} {target.version}: {error}") from error
        self._director.fits(manifest.hardware)
        if (manifest.name, manifest.version) != (name, target.version):
            raise Refused(f"the manifest is of {manifest.name} {manifest.version}, not of {name} {target.version}")
        if _numbers(manifest.min_agent_version) > _numbers(self._agent):
            need = f"{name} {target.version} needs agent {manifest.min_agent_version}, this is {self._agent}"
            raise Retry(need, "update the agent")
        self._needs(manifest)
        return manifest

    def _open(self, name: str, target: Target, manifest: Manifest) -> Assembly:
        assembly = self._slots.assembly(name, target.manifest_sha256, manifest)
        left = None if self._budget is None else self._budget - self._slots.size()
        disk.require(self._slots.root, assembly.size, self.reserve, left)
        assembly.open(self._slots.seeds())
        return assembly


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d{1,999}", version)]
