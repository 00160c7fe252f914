"""Updates that go wrong and one that goes right: `outrider demo rollout`.

A network with wrong weights and one that is slow, both of which pass their own golden probe, meet live traffic on one
device and go back by themselves; then the tool-caller adapter goes out in waves to a fleet that spoke with the base
model alone, and fifty requests before and after show what it gave. Invariants are those of the demo: what is printed
was measured in this run, promises are checked from outside, and how many requests come out right is no promise.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.demo import ADAPTER, BUNDLES, DEVICES, Demo, finished, fleet, packages, steps
from bench.demo_tasks import DemoTask
from bench.fleet import Device, Hub, until
from bench.rollout_tasks import TASKS
from bench.serving import oip
from edge_agent.agent.calls import Call, render
from edge_agent.wire.bundle import Manifest
from models.publish import publish

NETWORK = "ppocr-rec"
TRIAL = {"trial": {"mode": "shadow", "share": 1.0, "minimum": 8, "seconds": 60, "max_latency_ratio": 2.0}}
ENDED = ("succeeded", "aborted", "rolled_back")


def wrong(model: Any) -> None:
    """Its last layer names each character by its neighbour's number."""
    from onnx import numpy_helper

    weights = {w.name: w for w in model.graph.initializer}
    for name in ("linear_8.w_0", "linear_8.b_0"):
        turned = np.roll(numpy_helper.to_array(weights[name]), 1, axis=-1)
        weights[name].CopyFrom(numpy_helper.from_array(turned, name))


def slow(model: Any, size: int = 1024, times: int = 6) -> None:
    """The same answers, after `times` products of matrices that the answer does not need."""
    from onnx import helper, numpy_helper

    one = numpy_helper.from_array(np.eye(size, dtype=np.float32), "slow.one")
    nothing = numpy_helper.from_array(np.float32(1e-30), "slow.nothing")
    made = [helper.make_node("ReduceMean", ["x"], ["slow.mean"], keepdims=0)]
    made.append(helper.make_node("Mul", ["slow.one", "slow.mean"], ["slow.0"]))
    made += [helper.make_node("MatMul", [f"slow.{n}", "slow.one"], [f"slow.{n + 1}"]) for n in range(times)]
    made.append(helper.make_node("ReduceMean", [f"slow.{times}"], ["slow.left"], keepdims=0))
    made.append(helper.make_node("Mul", ["slow.left", "slow.nothing"], ["slow.least"]))
    made.append(helper.make_node("Add", ["x", "slow.least"], ["slow.x"]))
    for node in model.graph.node:
        node.input[:] = ["slow.x" if name == "x" else name for name in node.input]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(made + rest)
    model.graph.initializer.extend([one, nothing])


WORSE = {"wrong": (wrong, "wrong weights"), "slow": (slow, "a network that takes several times as long")}


def package_worse(name: str, cache: Path, folder: Path) -> tuple[Path, Manifest]:
    """A bundle of the label reader made worse; its golden probe is its own, so that it passes it."""
    import msgspec
    import onnx

    from edge_agent.wire.tensor import Tensor
    from models.fetch import sources
    from models.golden import answered
    from models.package import PROBE, build, manifest_of, write_bundle

    source, files = build(NETWORK, cache), folder / "worse" / name
    shutil.copytree(source, files)
    model = onnx.load(str(source / "model.onnx"))
    WORSE[name][0](model)
    onnx.save(model, str(files / "model.onnx"))
    inputs = msgspec.msgpack.decode((source / PROBE).read_bytes())["inputs"]
    (files / PROBE).write_bytes(answered(files / "model.onnx", msgspec.convert(inputs, dict[str, Tensor])))
    more = {"activation": TRIAL}
    manifest = manifest_of(NETWORK, f"+{name}.", files, sources()[NETWORK], {}, more)
    return write_bundle(folder / "worse" / f"{name}.bundle", files, manifest), manifest


class Readers:
    """Live traffic: printed lines to the label reader of every device, over its own API, and what came of it."""

    def __init__(self, devices: list[Device]) -> None:
        from models.tasks import label

        lines = [np.ascontiguousarray(label("evaluation", index)[0][None]) for index in range(8)]
        self._requests = [oip(line, devices[0].hub.token) for line in lines]
        self._devices, self.asked, self.failed = devices, 0, 0

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Ask until the block ends."""
        tasks = [asyncio.create_task(self._ask(device)) for device in self._devices]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, device: Device) -> None:
        while True:
            body, headers = self._requests[self.asked % len(self._requests)]
            self.asked += 1
            try:
                answer = await device.client.post(f"/v2/models/{NETWORK}/infer", content=body, headers=headers)
                self.failed += answer.is_error
            except httpx.TransportError:
                self.failed += 1
            await asyncio.sleep(0.25)


async def begin(hub: Hub, manifest: Manifest, **rules: Any) -> str:
    """Make a rollout: one device, then the rest, the first failure pauses."""
    plan = {
        "bundle": manifest.name, "version": manifest.version, "waves": [{"count": 1}, {}], "min_sample": 1,
        "success": 1.0, "failure": 0.0, "timeout_s": 240, **rules,
    }  # fmt: skip
    return str((await hub.post("/v1/rollouts", {"plan": plan}))["id"])


async def _stopped(hub: Hub, id: str, wanted: tuple[str, ...]) -> dict[str, Any] | None:
    found: dict[str, Any] = await hub.get(f"/v1/rollouts/{id}")
    return found if found["status"] in wanted else None


async def spoil(demo: Demo, hub: Hub, name: str, manifest: Manifest) -> None:
    """Roll out a worse version, and see it go back by itself."""
    _, what = WORSE[name]
    good = (await demo.devices[DEVICES[0]].status())["models"][NETWORK]["digest"]
    readers, began = Readers(list(demo.devices.values())), time.monotonic()
    async with readers.reading():
        id = await begin(hub, manifest)
        demo.say(f"rollout {id} of {NETWORK} {manifest.version}: one device, then the other two")
        found = await until("the rollout's pause", 240, _stopped, hub, id, ("paused", *ENDED))
    places = await hub.get(f"/v1/rollouts/{id}/devices")
    failed = [place for place in places if place["step"] == "failed"]
    demo.say(f"{found['status']} after {time.monotonic() - began:.0f} s: {escape(found['reason'])}")
    for place in failed:
        demo.say(f"{place['device']}: {escape(place['reason'])}")
    digests = {(await device.status())["models"][NETWORK]["digest"] for device in demo.devices.values()}
    alone = found["status"] == "paused" and len(failed) == 1 and digests == {good}
    demo.promise(
        f"{what} go back by themselves" if name == "wrong" else f"{what} goes back by itself",
        alone,
        f"{len(failed)} of {len(DEVICES)} devices tried it, {len(digests & {good})} digest runs, the hub says why",
    )
    demo.promise("callers notice nothing", readers.failed == 0, f"{readers.asked} requests, {readers.failed} failed")
    demo.report["rollouts"].append({"version": manifest.version, "rollout": found, "devices": places})
    await hub.post(f"/v1/rollouts/{id}/abort", {})


async def improve(demo: Demo, hub: Hub, manifest: Manifest) -> None:
    """Fifty requests, the adapter in waves, the same fifty."""
    before = await ask(demo, hub, "base model")
    demo.title(f"{ADAPTER}, {manifest.size / 2**20:.1f} MiB, in waves")
    began, id = time.monotonic(), await begin(hub, manifest, soak_s=1.0)
    found = await until("the rollout's end", 240, _stopped, hub, id, ("paused", *ENDED))
    for wave in found["waves"]:
        demo.say(f"wave {wave['wave']}: {', '.join(f'{n} {step}' for step, n in wave['steps'].items())}")
    held = found["status"] == "succeeded"
    demo.promise("a good update reaches all", held, f"{found['status']} after {time.monotonic() - began:.0f} s")
    demo.report["rollouts"].append({"version": manifest.version, "rollout": found})
    after = await ask(demo, hub, "with the adapter")
    table = Table("tool", "base model", "with the adapter", title="Calls that were asked for", title_justify="left")
    for tool in dict.fromkeys(task.tool for task in TASKS):
        one, other = (_share(rights, tool) for rights in (before, after))
        table.add_row(tool, one, other)
    table.add_row("all", _share(before), _share(after))
    demo.console.print(table)
    demo.report["tasks"] = {"before": sum(before), "after": sum(after), "of": len(TASKS)}


def _share(rights: list[bool], tool: str = "") -> str:
    some = [right for task, right in zip(TASKS, rights, strict=True) if tool in ("", task.tool)]
    return f"{sum(some)} of {len(some)}"


async def ask(demo: Demo, hub: Hub, title: str) -> list[bool]:
    """Which of the fifty requests led to the call they ask for; each device works on its share."""
    demo.title(f"fifty requests, {title}")
    began = time.monotonic()

    async def work(share: int) -> Iterator[bool]:
        device, rights = demo.devices[DEVICES[share]], list[bool]()
        for task in TASKS[share :: len(DEVICES)]:
            job = await hub.post(f"/v1/devices/{device.name}/tasks", {"text": task.text})
            rights.append(_right(task, await until(repr(task.text), 120, finished, hub, job["id"])))
        return iter(rights)

    shares = await asyncio.gather(*(work(number) for number in range(len(DEVICES))))
    rights = [next(shares[number % len(DEVICES)]) for number in range(len(TASKS))]
    demo.say(f"{sum(rights)} of {len(TASKS)} right, {time.monotonic() - began:.0f} s")
    return rights


def _right(task: DemoTask, job: dict[str, Any]) -> bool:
    calls = steps(job, "tool")
    return bool(calls) and all(call["call"] == render(Call(task.tool, task.args)) for call in calls)


async def run(folder: Path, cache: Path, console: Console, report: Path, keep: bool = False) -> dict[str, Any]:
    """The whole demo; the report. Raises OutriderError when something did not happen at all."""
    demo = Demo(folder, console)
    demo.report |= {"rollouts": []}
    bundles = await packages(demo, (*BUNDLES, ADAPTER), cache)
    worse = {name: await asyncio.to_thread(package_worse, name, cache, folder) for name in WORSE}
    demo.began = time.monotonic()
    async with fleet(demo) as hub:
        demo.title("publish; the base model and the label reader on every device")
        for bundle, _ in (*bundles.values(), *worse.values()):
            await asyncio.to_thread(publish, hub.url, hub.token, bundle)
        await demo.install(hub, {name: manifest for name, (_, manifest) in bundles.items() if name != ADAPTER})
        for name, (_, manifest) in worse.items():
            demo.title(WORSE[name][1])
            await spoil(demo, hub, name, manifest)
        await improve(demo, hub, bundles[ADAPTER][1])
        held = sum(promise["held"] for promise in demo.report["promises"])
        demo.say(f"{held} of {len(demo.report['promises'])} promises held, {time.monotonic() - demo.began:.0f} s")
        await demo.end(hub, report, keep)
    return demo.report
