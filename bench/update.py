"""What an update costs on the wire: the device's own update service against a full download, casync and zstd.

Four changes of one real bundle (the int4 language model): 1 % of its weights in one place (`contiguous`), 4 KiB put in
at the head (`insert`), all weights quantised anew (`requantized`), and an adapter of which every weight changed
(`adapter`). Bytes are counted on a TCP link between the two, metadata, chunk index and HTTP headers included; the
device is a process of its own that starts from the first version on its disk.

Invariants: what is fetched is checked by the service that a daemon runs, with the hub's own repository and packs; a
peer gets the same files, casync its defaults and its index counted, zstd the level of our packs. Peers are Debian's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import onnx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from bench.link import Link
from edge_agent.errors import Refused
from edge_agent.update.download import Downloads
from edge_agent.update.service import BundleReport, UpdateService
from edge_agent.update.slots import Installed
from edge_agent.update.trial import Figures
from edge_agent.update.trust import Director, Repository
from edge_agent.wire.bundle import (
    BundleKind,
    Directive,
    Manifest,
    Target,
    decode_manifest,
    scan,
    seal_directive,
    seal_root,
    sha256,
    target_paths,
)
from edge_agent.wire.chunks import MAX_CHUNK, Chunk, decode_index
from edge_agent.wire.messages import encode
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.updates import Activation
from hub import packs
from hub import repository as tuf
from hub.errors import Refused as HubRefused

CUTS, FLEET, DEVICE = 20, "bench", "device"
GOALS = {"insert": "<= 0.02", "adapter.compressed": "<= 1.05", "casync": "<= 1.05", "cuts": "<= 1.0", "memory": "< 64"}


def run() -> Iterator[dict[str, Any]]:
    """The rows; a few minutes. Raises Refused when a peer is missing."""
    if missing := [tool for tool in ("casync", "zstd") if shutil.which(tool) is None]:
        raise Refused(f"{' and '.join(missing)} cannot be found", f"apt-get install {' '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="outrider-update-") as folder:
        yield from asyncio.run(_all(Path(folder)))


async def _all(folder: Path) -> list[dict[str, Any]]:
    base = await asyncio.to_thread(_model, folder / "base")
    plant, rows = Plant(folder / "hub"), []
    full = await asyncio.to_thread(plant.publish, "model", "base", base)
    cases: dict[str, Callable[[Path], None]] = {
        "contiguous": _contiguous,
        "insert": _insert,
        "requantized": _requantize,
    }
    async with plant.serving() as link:
        first = await _install(folder / "full", plant, link, {"model": full})
        whole = _row("full", first["bytes"], "bytes", None, None, seconds=first["seconds"])
        for name, change in cases.items():
            new = folder / name
            shutil.copytree(base, new)
            await asyncio.to_thread(change, new)
            target = await asyncio.to_thread(plant.publish, "model", name, new)
            rows += await _compare(name, folder, plant, link, ("model", full, target), (base, new), first)
        old, new = folder / "tools-1", folder / "tools-2"
        await asyncio.to_thread(_adapter, old, new)
        targets = [plant.publish("tools", path.name, path, BundleKind.ONNX) for path in (old, new)]
        bundle = ("tools", targets[0], targets[1])
        rows += await _compare("adapter", folder, plant, link, bundle, (old, new), first)
        rows.append(await _cuts(folder / "cuts", plant, link, full, first))
        peak = max(row["memory"] for row in rows if "memory" in row)
        memory = _row("memory", peak, "MiB beyond an idle device", None, None, goal=GOALS["memory"])
    return [whole, *rows, memory]


def _row(name: str, value: float, unit: str, peer: str | None, peer_value: float | None, **more: Any) -> dict[str, Any]:
    ratio = value / peer_value if peer_value else None
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "peer": peer,
        "peer_value": peer_value,
        "ratio": ratio,
        "n": 1,
    } | more


async def _compare(
    name: str, folder: Path, plant: Plant, link: Meter, bundle: tuple[str, Target, Target],
    versions: tuple[Path, Path], first: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Our update of a bundle, its share of the full download, and the peers'."""
    which, old, new = bundle
    state = folder / f"device-{name}"
    await _install(state, plant, link, {which: old})
    done = await _install(state, plant, link, {which: new})
    share = done["bytes"] / first["bytes"]
    times = {"seconds": done["seconds"], "full_seconds": first["seconds"], "memory": done["memory"]}
    goal = {"goal": GOALS[name]} if name in GOALS else {}
    rows = [_row(name, share, "of the full download", "bytes", done["bytes"], **times, **goal) | {"ratio": share}]
    casync, patch, alone = await asyncio.to_thread(_peers, folder / f"peers-{name}", *versions)
    if name == "adapter":
        compressed = {"goal": GOALS["adapter.compressed"]}
        rows.append(_row("adapter.compressed", done["bytes"], "bytes", f"zstd -{packs.LEVEL}", alone, **compressed))
    rows.append(_row(f"{name}.casync", done["bytes"], "bytes", "casync", casync, goal=GOALS["casync"]))
    rows.append(_row(f"{name}.zstd", done["bytes"], "bytes", "zstd --patch-from", patch))
    return rows


async def _cuts(state: Path, plant: Plant, link: Meter, target: Target, first: dict[str, Any]) -> dict[str, Any]:
    """A first install whose cable is cut at random bytes: what it costs beyond an uncut one, in chunks a cut."""
    places = sorted(random.Random(7).sample(range(100_000, first["bytes"] - 100_000), CUTS))
    link.cuts = [b - a for a, b in zip([0, *places], places, strict=False)]
    done = await _install(state, plant, link, {"model": target})
    extra = (done["bytes"] - first["bytes"]) / CUTS / MAX_CHUNK
    more = {"cuts": CUTS - len(link.cuts), "extra_bytes": done["bytes"] - first["bytes"], "goal": GOALS["cuts"]}
    return _row("cuts", extra, "largest chunks a cut", None, None, memory=done["memory"], **more)


class Meter(Link):
    """A link that counts what comes from the hub, and that breaks after so many bytes."""

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port)
        self.hub_port, self.count, self.since = port, 0, 0
        self.cuts: list[int] = []

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # type: ignore[override]
        down = writer.get_extra_info("peername")[1] != self.hub_port
        with contextlib.suppress(OSError):
            while data := await reader.read(65536 if down else 4096):
                if down:
                    cut = bool(self.cuts) and self.since + len(data) >= self.cuts[0]
                    data = data[: self.cuts[0] - self.since] if cut else data
                    self.count, self.since = self.count + len(data), self.since + len(data)
                    if cut:
                        self.cuts, self.since = self.cuts[1:], 0
                        writer.write(data)
                        await writer.drain()
                        break
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()


class Plant:
    """The hub's repository, packs and directives behind HTTP."""

    def __init__(self, folder: Path) -> None:
        self._blobs, self.key, self._counter = folder / "blobs", SigningKey.generate(), 0
        self._blobs.mkdir(parents=True)
        self._repository = tuf.Repository(folder / "trust")
        self._repository.create([tuf.make_key(folder / "root.key")], 1, {"bundles": ["bundles/*/*/*"]})
        self._known: dict[str, dict[bytes, Chunk]] = {}

    def publish(self, name: str, version: str, folder: Path, kind: BundleKind = BundleKind.LLM) -> Target:
        manifest = encode(Manifest(name, version, kind, scan(folder)))
        files = decode_manifest(manifest).files
        known = self._known.setdefault(name, {})
        index, pack = packs.build([(entry, folder / entry.path) for entry in files], known, self._blobs / "new")
        (self._blobs / "new").replace(self._blobs / (pack or "empty"))
        known |= {chunk.hash: chunk for chunk in decode_index(index, files).chunks()}
        both = dict(zip(target_paths(name, version), (manifest, index), strict=True))
        for data in both.values():
            (self._blobs / sha256(data)).write_bytes(data)
        self._repository.publish({path: (len(data), sha256(data)) for path, data in both.items()})
        return Target(version, sha256(manifest))

    def direct(self, bundles: dict[str, Target]) -> Any:
        self._counter += 1
        directive = Directive(FLEET, DEVICE, "", self._counter, time.time(), bundles)
        return msgspec.to_builtins(seal_directive(self.key, directive))

    @contextlib.asynccontextmanager
    async def serving(self) -> Any:
        async def root(_: Request) -> Response:
            return Response(msgspec.json.encode(seal_root(self.key, self._repository.root())))

        async def metadata(request: Request) -> Response:
            try:
                return Response(self._repository.file(request.path_params["file"]))
            except HubRefused:
                return Response(status_code=404)

        async def blob(request: Request) -> Response:
            return FileResponse(self._blobs / request.path_params["sha256"])

        routes = [Route("/v1/trust", root), Route("/v1/trust/{file}", metadata), Route("/v1/blobs/{sha256}", blob)]
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="critical", lifespan="off"))
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        try:
            async with Meter(server.servers[0].sockets[0].getsockname()[1]) as link:
                yield link
        finally:
            server.should_exit = True
            await task


async def _install(state: Path, plant: Plant, link: Meter, bundles: dict[str, Target]) -> dict[str, Any]:
    """Let a device process install bundles: bytes on the link, seconds, MiB beyond its idle state."""
    before, link.since = link.count, 0
    given = {"url": f"http://127.0.0.1:{link.port}", "hub_key": plant.key.public.text, "state": str(state)}
    given |= {"director": plant.direct(bundles), "version": next(iter(bundles.values())).version}
    command = [sys.executable, "-m", "bench.update", json.dumps(given)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    out, _ = await process.communicate()
    if process.returncode:
        raise Refused(f"the device failed ({process.returncode})", "see its words above")
    said: dict[str, Any] = json.loads(out)
    return said | {"bytes": link.count - before}


class _Loads:
    """Takes every candidate: what runs it is another benchmark's affair."""

    async def probe(self, name: str, candidate: Installed, activation: Activation) -> Figures:
        return Figures("load")


async def _device(given: dict[str, Any]) -> dict[str, Any]:
    state, key, ends = Path(given["state"]), VerifyKey.from_text(given["hub_key"]), asyncio.Queue[BundleReport]()

    async def switch(name: str, installed: Installed) -> None:
        return None

    async def report(name: str, report: BundleReport) -> None:
        if report.state in ("committed", "failed", "quarantined"):
            ends.put_nowait(report)

    async with httpx.AsyncClient(base_url=given["url"], timeout=30) as client:
        downloads, director = Downloads(client, str, 0.02), Director(state / "trust", key, FLEET, DEVICE)
        trust = Repository(state / "trust", downloads, director, key)
        service = UpdateService(state / "bundles", director, trust, downloads, _Loads(), switch, report, reserve=0)
        _forget_peak()
        idle, began = _peak("VmRSS"), time.monotonic()
        await service.direct(given["director"])
        task = asyncio.create_task(service.run())
        while (end := await ends.get()).version != given["version"]:
            if end.state != "committed":
                raise Refused(end.error)
        seconds = time.monotonic() - began
        task.cancel()
    return {"seconds": seconds, "memory": _peak("VmHWM") - idle}


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak(field: str) -> float:
    """MiB of a field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _model(folder: Path) -> Path:
    """The language model's bundle as it is published; built at the first time."""
    from models.fetch import default_cache
    from models.package import package

    bundle, _ = package("smollm2", default_cache())
    shutil.copytree(bundle / "files", folder)
    return folder


def _weights(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def _contiguous(folder: Path) -> None:
    size = _weights(folder).stat().st_size
    with _weights(folder).open("r+b") as file:
        file.seek(size // 3)
        file.write(random.Random(1).randbytes(size // 100))


def _insert(folder: Path) -> None:
    path = _weights(folder)
    path.write_bytes(random.Random(2).randbytes(4096) + path.read_bytes())


def _requantize(folder: Path) -> None:
    """Every block of four-bit weights on a scale 7 % finer, as another calibration would choose."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    data = bytearray((folder / "model.onnx.data").read_bytes())

    def span(name: str) -> slice:
        where = {entry.key: entry.value for entry in tensors[name].external_data}
        return slice(int(where["offset"]), int(where["offset"]) + int(where["length"]))

    for node in (node for node in model.graph.node if node.op_type == "MatMulNBits"):
        if {a.name: a.i for a in node.attribute}["bits"] != 4 or not tensors[node.input[2]].external_data:
            continue
        packed, kind = np.frombuffer(data[span(node.input[1])], np.uint8), tensors[node.input[2]].data_type
        low, high = (np.round(((part.astype(np.float32)) - 8) / 0.93) + 8 for part in (packed & 15, packed >> 4))
        data[span(node.input[1])] = (
            np.clip(low, 0, 15).astype(np.uint8) | np.clip(high, 0, 15).astype(np.uint8) << 4
        ).tobytes()
        scales = np.frombuffer(data[span(node.input[2])], onnx.helper.tensor_dtype_to_np_dtype(kind))
        data[span(node.input[2])] = (scales * np.asarray(0.93, scales.dtype)).tobytes()
    (folder / "model.onnx.data").write_bytes(data)


def _adapter(old: Path, new: Path) -> None:
    """The shipped adapter, and one that more training moved in every weight."""
    import models

    shipped = Path(models.__file__).parent / "adapters" / "toolcaller"
    for folder in (old, new):
        shutil.copytree(shipped, folder)
    rng, arrays = np.random.default_rng(3), dict(np.load(shipped / "adapter.npz"))
    np.savez(new / "adapter.npz", **{k: _moved(v, rng) for k, v in arrays.items()})


def _moved(weights: np.ndarray[Any, Any], rng: np.random.Generator) -> Any:
    if weights.dtype.kind == "i":
        return np.clip(weights + rng.integers(-2, 3, weights.shape), -127, 127).astype(weights.dtype)
    return (weights * rng.normal(1, 0.01, weights.shape)).astype(weights.dtype)


def _peers(folder: Path, old: Path, new: Path) -> tuple[int, int, int]:
    """Bytes of casync (new chunks and the index), of zstd --patch-from, and of the new version packed alone."""
    folder.mkdir()
    for name, source in (("old", old), ("new", new)):
        with (folder / name).open("wb") as whole:
            for path in sorted(source.iterdir()):
                whole.write(path.read_bytes())
    store, level = folder / "store.castr", f"-{packs.LEVEL}"
    _call("casync", "make", f"--store={store}", folder / "old.caibx", folder / "old")
    before = _size(store)
    _call("casync", "make", f"--store={store}", folder / "new.caibx", folder / "new")
    _call("zstd", "-q", level, "--long=27", f"--patch-from={folder / 'old'}", folder / "new", "-o", folder / "patch")
    _call("zstd", "-q", level, folder / "new", "-o", folder / "alone")
    sizes = [(folder / name).stat().st_size for name in ("new.caibx", "patch", "alone")]
    found = _size(store) - before + sizes[0], sizes[1], sizes[2]
    shutil.rmtree(folder)
    return found


def _size(store: Path) -> int:
    return sum(path.stat().st_size for path in store.rglob("*.cacnk"))


def _call(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_device(json.loads(sys.argv[1])))))
