"""Chunks from the devices next door first: a site downloads about once.

    POST /v1/chunks   16-byte hashes -> msgpack {name, have: {hash: chunk}, coming: [hash]}

Invariants: a neighbour is never trusted: each chunk is checked against the signed index, and one that lies is named and
asked no more. Of several devices that want a chunk at the same time one, told by the hash of place and name, asks the
hub; who waits for it in vain goes there too. Whoever knows a chunk's hash may have it: the hash stands in the signed
index alone. What is asked, answered and kept is bounded.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import httpx
import msgspec

from edge_agent.errors import Retry
from edge_agent.update.assembly import Assembly, read
from edge_agent.update.slots import Slots
from edge_agent.wire.chunks import HASH, MAX_CHUNK, Chunk, chunk_hash

ASKED, FETCHED, ANSWER, SERVED = 64, 16, 4 << 20, 4
"""Chunks a request asks for, the hub is asked for before the neighbours are again; an answer's bytes, at one time."""
WAIT_S, WAITS = 0.25, 20
ANSWER_S, SILENT_S = 10.0, 60.0
"""What a whole answer may take; how long one that gave none in it, or is not there, is not asked again."""
PEERS = 32
"""Who is known; who lied is remembered for as many."""
AUTO, SERVICE = "auto", "_outrider._tcp.local."
log = logging.getLogger("outrider.neighbours")


class Answer(msgspec.Struct, frozen=True):
    """Whole chunks, unpacked; and those the neighbour is about to have."""

    name: str
    have: dict[bytes, bytes] = {}
    coming: list[bytes] = []


class Neighbours:
    """`known`: addresses by name (of the settings and of `find`); `dropped`: who lied, and how."""

    def __init__(self, name: str, fleet: str, slots: Slots, given: Sequence[str]) -> None:
        self._name, self._fleet, self._slots, self._auto = name, fleet, slots, AUTO in given
        self.known: dict[str, str] = {url: url for url in given if url != AUTO}
        self.dropped: dict[str, str] = {}
        self.filling: set[Assembly] = set()
        self._places: tuple[frozenset[Path], dict[bytes, tuple[Path, int, int]]] = frozenset(), {}
        self._lock, self._serving = threading.Lock(), 0
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(10.0, connect=1.0))

    async def answer(self, asked: bytes) -> bytes:
        """What this device has of the chunks a neighbour wants. Raises Retry when too many ask."""
        if self._serving >= SERVED:
            raise Retry("too many neighbours ask", "ask the next, or the hub")
        self._serving += 1
        try:
            hashes = [asked[at : at + HASH] for at in range(0, min(len(asked), ASKED * HASH), HASH)]
            return await asyncio.to_thread(self._look_up, hashes)
        finally:
            self._serving -= 1

    async def fill(
        self, assembly: Assembly, fetch: Callable[[Sequence[Chunk]], Awaitable[None]], tick: Callable[[int], None]
    ) -> None:
        """Bring chunks from neighbours, and from the hub by `fetch` those that fall to this device."""
        waits, silent = 0, dict[str, float]()
        self.filling.add(assembly)
        try:
            while self.known and (wanted := assembly.wanted()[:ASKED]):
                coming = await self._ask(assembly, wanted, silent)
                tick(assembly.left)
                here = [chunk for chunk in wanted if chunk.hash in assembly]
                waits -= min(waits, len(wanted) - len(here))
                mine = [
                    c for c in here if all(_rank(self._name, c) > _rank(other, c) for other in coming.get(c.hash, ()))
                ]
                if mine or (here and waits >= WAITS):
                    await fetch((mine or here)[:FETCHED])
                elif here == wanted:
                    waits += 1
                    await asyncio.sleep(WAIT_S)
        finally:
            self.filling.discard(assembly)

    async def find(self, host: str, port: int) -> None:
        """Show this device and keep `known` by zeroconf, until cancelled; with no `auto` only wait."""
        if not self._auto:
            await asyncio.Event().wait()
        from zeroconf import ServiceStateChange
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

        own = f"{hashlib.sha256(f'{self._fleet}/{self._name}'.encode()).hexdigest()[:16]}.{SERVICE}"
        every, tasks = host in ("0.0.0.0", "::", ""), set[asyncio.Task[None]]()
        zero = AsyncZeroconf() if every else AsyncZeroconf(interfaces=[host])
        addresses = _addresses() if every else [host]
        properties = {"fleet": self._fleet, "name": self._name}
        shown = AsyncServiceInfo(SERVICE, own, port, parsed_addresses=addresses, properties=properties)

        async def ask(name: str) -> None:
            info = AsyncServiceInfo(SERVICE, name)
            told = await info.async_request(zero.zeroconf, 3000) and info.decoded_properties.get("fleet") == self._fleet
            if told and name != own and info.parsed_addresses() and len(self.known) < PEERS:
                self.known[name] = f"http://{info.parsed_addresses()[0]}:{info.port}"

        def changed(zeroconf: object, service_type: str, name: str, state_change: ServiceStateChange) -> None:
            self.known.pop(name, None)
            if state_change is not ServiceStateChange.Removed:
                task = asyncio.ensure_future(ask(name))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        browser = None
        try:
            await zero.async_register_service(shown)
            browser = AsyncServiceBrowser(zero.zeroconf, SERVICE, handlers=[changed])
            await asyncio.Event().wait()
        finally:
            if browser is not None:
                await browser.async_cancel()
            await zero.async_unregister_all_services()
            await zero.async_close()

    async def _ask(
        self, assembly: Assembly, wanted: Sequence[Chunk], silent: dict[str, float]
    ) -> dict[bytes, list[str]]:
        """Take what the neighbours have; who has what coming. `silent`: who is not asked until when (monotonic)."""
        by_hash, coming = {chunk.hash: chunk for chunk in wanted}, dict[bytes, list[str]]()
        for peer, url in list(self.known.items())[:PEERS]:
            if not by_hash or peer in self.dropped or time.monotonic() < silent.get(peer, 0.0):
                continue
            try:
                async with asyncio.timeout(ANSWER_S):
                    answer = await self._post(url, b"".join(by_hash))
            except (httpx.HTTPError, msgspec.DecodeError, Retry, TimeoutError) as error:
                log.debug("%s does not answer: %s", peer, error)
                if isinstance(error, (httpx.TransportError, TimeoutError)):
                    silent[peer] = time.monotonic() + SILENT_S
                continue
            for hash, data in answer.have.items():
                chunk = by_hash.get(hash)
                if chunk is None or len(data) != chunk.size or chunk_hash(data) != hash:
                    self._drop(peer, why := f"sent another chunk than {hash.hex()}")
                    log.error("poisoned neighbour %.64s (%s): %s; it is asked no more", answer.name, url, why)
                    break
                await asyncio.to_thread(assembly.put, hash, data)
                del by_hash[hash]
            for hash in answer.coming:
                coming.setdefault(hash, []).append(answer.name)
        return coming

    def _drop(self, peer: str, why: str) -> None:
        """Ask it no more; past PEERS the oldest is forgotten, those that are not known here first."""
        self.dropped[peer] = why
        while len(self.dropped) > PEERS:
            del self.dropped[next((each for each in self.dropped if each not in self.known), next(iter(self.dropped)))]

    async def _post(self, url: str, body: bytes) -> Answer:
        whole = bytearray()
        async with self._client.stream("POST", f"{url}/v1/chunks", content=body) as response:
            response.raise_for_status()
            async for piece in response.aiter_raw(1 << 16):
                whole += piece
                if len(whole) > ANSWER + 2 * MAX_CHUNK:
                    raise Retry("endless data")
        return msgspec.msgpack.decode(whole, type=Answer)

    def _look_up(self, hashes: Sequence[bytes]) -> bytes:
        places, have, coming, size = self._catalogue(), dict[bytes, bytes](), list[bytes](), 0
        for hash in hashes:
            data = read(*places[hash]) if hash in places else b""
            for assembly in list(self.filling) if not data else ():
                data = assembly.get(hash)
                if not data and hash in assembly:
                    coming.append(hash)
            if data and size < ANSWER and chunk_hash(data) == hash:
                have[hash] = data
                size += len(data)
        return msgspec.msgpack.encode(Answer(self._name, have, coming))

    def _catalogue(self) -> Mapping[bytes, tuple[Path, int, int]]:
        """Where each chunk of the whole versions lies."""
        with self._lock:
            folders = self._slots.whole()
            if self._places[0] != folders:
                found = {}
                for seed in self._slots.seeds(folders):
                    for chunk in seed.index.chunks():
                        found[chunk.hash] = seed.folder / seed.files[chunk.file].path, chunk.at, chunk.size
                self._places = folders, found
            return self._places[1]


def _addresses() -> list[str]:
    """This machine's own IPv4 addresses."""
    import ifaddr

    found = [str(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4]
    return [ip for ip in found if not ip.startswith("127.")]


def _rank(name: str, chunk: Chunk) -> bytes:
    """The same for chunks that lie together, so that they are fetched together."""
    place = f"{chunk.pack}/{chunk.offset >> 18}"
    return hashlib.blake2b(place.encode(), key=name.encode()[:64], digest_size=8).digest()
