"""The main job in four minutes: a hub, three devices, real work, a cut cable, a killed daemon.

Invariants: what is printed was measured in this run; every promise is checked from outside (the hub's API, the plants'
own journals, the device's sequence numbers) and a broken one makes the exit status 1; the success of the language
model is reported as it is and is no promise.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import statistics
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.demo_tasks import CUT_TASKS, LONG_TASK, TASKS, DemoTask
from bench.fleet import Device, Hub, running, until
from bench.link import Link
from edge_agent.agent.calls import Call, render
from edge_agent.wire.bundle import Manifest
from edge_agent.wire.messages import TERMINAL
from models.adapter import shipped
from models.package import package
from models.publish import publish

DEVICES = ("press-1", "press-2", "press-3")
MODEL, ADAPTER = "smollm2", "toolcaller"
BUNDLES = (MODEL, "ppocr-det", "ppocr-rec")
CUT_S = 30.0


class Demo:
    """One run. `report` is what demo-report.json will hold."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.began = time.monotonic()
        self.report: dict[str, Any] = {"promises": [], "tasks": []}
        self.links: dict[str, Link] = {}
        self.devices: dict[str, Device] = {}

    def say(self, text: str) -> None:
        self.console.print(
            f"[dim]{time.monotonic() - self.began:6.1f} s[/dim]  {text}", highlight=False, soft_wrap=True
        )

    def title(self, text: str) -> None:
        self.console.rule(f"[bold]{text}", align="left")

    def promise(self, text: str, held: bool, evidence: str) -> None:
        """Write down a promise and whether it held."""
        self.report["promises"].append({"promise": text, "held": held, "evidence": evidence})
        self.say(f"{'[green]held  [/green]' if held else '[bold red]BROKEN[/bold red]'} {text}: {evidence}")

    # -- the fleet ----------------------------------------------------------------------------------------------

    async def enrol(self, hub: Hub, stack: AsyncExitStack) -> None:
        """Start the devices behind a link each and wait until the hub sees them."""
        broker_port = int((await hub.get("/v1/broker"))["url"].rsplit(":", 1)[1])
        for name in DEVICES:
            link = self.links[name] = await stack.enter_async_context(Link("127.0.0.1", broker_port))
            device = self.devices[name] = Device(name, self.folder, hub)
            stack.push_async_callback(device.stop)
            token = (await hub.post("/v1/enrolments", {"name": name, "ttl_s": 600}))["token"]
            await device.start(
                "--hub", hub.url, "--token", token, "--broker", f"mqtt://127.0.0.1:{link.port}",
                "--pack", "tools.sim.pack", "--option", f"seed={DEVICES.index(name) + 1}",
                "--telemetry-s", "1",
            )  # fmt: skip
        for device in self.devices.values():
            await until(f"{device.name} going online", 60, self._online, hub, device, True)
            self.say(f"{device.name} enrolled with a single-use token and online")

    async def _online(self, hub: Hub, device: Device, wanted: bool) -> bool | None:
        device.process.check()
        seen = {known["name"]: known["presence"]["online"] for known in await hub.get("/v1/devices")}
        return True if seen.get(device.name) is wanted else None

    async def install(self, hub: Hub, bundles: dict[str, Manifest]) -> None:
        """Assign the published bundles to every device and wait until each has them, the adapter after the others."""
        await self._assign(hub, {name: manifest for name, manifest in bundles.items() if name != ADAPTER})
        if ADAPTER in bundles:
            size, base = (bundles[name].size / 2**20 for name in (ADAPTER, MODEL))
            began = time.monotonic()
            await self._assign(hub, {ADAPTER: bundles[ADAPTER]})
            took = time.monotonic() - began
            self.report["adapter"] = {"bytes": bundles[ADAPTER].size, "seconds": took}
            self.say(f"the adapter is {size:.1f} MiB and runs on {len(DEVICES)} devices after {took:.1f} s; "
                     f"the {base:.0f} MiB of its base model were not loaded again")  # fmt: skip
        for device in self.devices.values():
            models = (await device.status())["models"]
            for name, manifest in bundles.items():
                if models[name]["digest"] != manifest.meta["content_digest"]:
                    self.promise("a device runs what was published", False, f"{device.name}: {name} differs")
                    return
        self.promise(
            "a device runs what was published", True, f"{len(bundles)} digests equal on {len(DEVICES)} devices"
        )

    async def _assign(self, hub: Hub, bundles: dict[str, Manifest]) -> None:
        for name, manifest in bundles.items():
            for where in DEVICES:
                await hub.post(f"/v1/devices/{where}/bundles", {"name": name, "version": manifest.version})
        for device in self.devices.values():
            began = time.monotonic()
            await until(f"{device.name} installing", 150, self._installed, device, list(bundles))
            self.say(f"{device.name} has {', '.join(sorted(bundles))} (waited {time.monotonic() - began:.1f} s)")

    async def _installed(self, device: Device, names: list[str]) -> bool | None:
        device.process.check()
        models: dict[str, Any] = (await device.status())["models"]
        return True if all(models.get(name, {}).get("state") == "committed" for name in names) else None

    # -- the work -----------------------------------------------------------------------------------------------

    async def work(self, hub: Hub) -> None:
        """The ten requests, one after another, each to the next device."""
        for number, task in enumerate(TASKS):
            device = self.devices[DEVICES[number % len(DEVICES)]]
            began = time.monotonic()
            job = await hub.post(f"/v1/devices/{device.name}/tasks", {"text": task.text})
            done = await until(f"task {number + 1}", 90, finished, hub, job["id"])
            self._judge(number, task, device, done, time.monotonic() - began)

    def _judge(self, number: int, task: DemoTask, device: Device, job: dict[str, Any], seconds: float) -> None:
        result = job.get("result") or {}
        calls, decisions = steps(job, "tool"), steps(job, "model")
        wanted = render(Call(task.tool, task.args))
        right = bool(calls) and all(call["ok"] and call["call"] == wanted for call in calls)
        row = {
            "text": task.text, "wanted": wanted, "device": device.name, "right": right, "state": job["state"],
            "seconds": seconds, "calls": calls, "decisions": decisions,
            "answer": result.get("answer", ""), "error": job.get("error", ""),
        }  # fmt: skip
        self.report["tasks"].append(row)
        self.say(f"{device.name}  [bold]{task.text}[/bold]")
        for call in row["calls"]:
            self.say(
                f"         {escape(call['call'])} → {escape(_brief(call['text']))}  [dim]{call['ms']:.0f} ms[/dim]"
            )
        verdict = "[green]right[/green]" if right else "[yellow]wrong[/yellow]"
        if not right:
            verdict += f" (wanted {escape(wanted)})"
        detail = f": {escape(row['error'])}" if row["error"] else ""
        spent = sum(decision["ms"] for decision in decisions)
        self.say(f"         {verdict}, {job['state']}, {len(decisions)} decisions in {spent:.0f} ms{detail}")

    # -- the cut ------------------------------------------------------------------------------------------------

    async def cut(self, hub: Hub) -> None:
        """Cut one device off for 30 s, keep it working, mend the cable, compare the books."""
        device, link = self.devices["press-2"], self.links["press-2"]
        before = await device.status()
        link.cut()
        self.say(f"{device.name} is cut from the broker for {CUT_S:.0f} s; its work goes on")
        began = time.monotonic()
        await until("the hub seeing it gone", 45, self._online, hub, device, False)
        self.say(f"the hub shows it offline after {time.monotonic() - began:.1f} s")
        ids = [await self._local_task(device, text) for text in CUT_TASKS]
        await asyncio.sleep(max(0.0, CUT_S - (time.monotonic() - began)))
        offline = await device.status()
        link.mend()
        mended = time.monotonic()
        self.say(f"mended; {offline['outbox']['depth']} records wait on the device")
        target = (await device.status())["last_seq"]
        await until("catching up", 60, self._acked, device, target)
        catch_up = time.monotonic() - mended
        self.report["catch_up_s"] = catch_up
        self.promise("work goes on while cut", len(ids) == len(CUT_TASKS), f"{len(ids)} tasks ended with no network")
        made = offline["last_seq"] - before["last_seq"]
        self.promise(
            "it catches up", True, f"{made} records made while cut were committed {catch_up:.1f} s after mending"
        )
        bodies = [r["body"] for r in await self._records(hub, device.name, "job")]
        known = {str(body.get("id")) for body in bodies}
        self.promise(
            "what was done while cut is known at the hub",
            set(ids) <= known,
            f"{len(set(ids) & known)} of {len(ids)} local tasks reported",
        )

    async def _local_task(self, device: Device, text: str) -> str:
        began = time.monotonic()
        response = await device.client.post("/v1/tasks", json={"text": text})
        response.raise_for_status()
        id = str(response.json()["id"])
        task = await until(f"local task {text!r}", 60, self._local_end, device, id)
        self.say(f"         [bold]{text}[/bold] → {_brief(task.get('answer') or task.get('error'))}  "
                 f"[dim]{time.monotonic() - began:.1f} s, offline[/dim]")  # fmt: skip
        return id

    async def _local_end(self, device: Device, id: str) -> dict[str, Any] | None:
        task: dict[str, Any] = (await device.client.get(f"/v1/tasks/{id}")).json()
        return task if task["state"] in ("succeeded", "failed") else None

    async def _acked(self, device: Device, seq: int) -> bool | None:
        return True if (await device.status())["acked"] >= seq else None

    async def _records(self, hub: Hub, device: str, kind: str = "") -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        while True:
            after = records[-1]["seq"] if records else 0
            query = {"device": device, "after_seq": after, "limit": 1000} | ({"kind": kind} if kind else {})
            page = (await hub.get("/v1/telemetry", **query))["records"]
            if not page:
                return records
            records += page

    # -- the crash ----------------------------------------------------------------------------------------------

    async def crash(self, hub: Hub) -> None:
        """kill -9 a daemon in the middle of a task and start it again."""
        device = self.devices["press-3"]
        job = await hub.post(f"/v1/devices/{device.name}/tasks", {"text": LONG_TASK})
        await until("the task running", 30, self._midway, device, job["id"])
        await device.process.kill()
        self.say(f"{device.name} killed with -9 in the middle of {LONG_TASK!r}")
        began = time.monotonic()
        await device.start()
        done = await until("the task ending after the crash", 120, finished, hub, job["id"])
        runs = (done.get("result") or {}).get("runs", 0)
        self.promise(
            "a killed daemon resumes its task",
            runs >= 2,
            f"run {runs} ended {done['state']} {time.monotonic() - began:.1f} s after the restart",
        )

    async def _midway(self, device: Device, id: str) -> bool | None:
        response = await device.client.get(f"/v1/tasks/{id}")
        return True if response.status_code == 200 and response.json()["state"] == "running" else None

    # -- the books ----------------------------------------------------------------------------------------------

    async def books(self, hub: Hub) -> None:
        """Every record of every device is at the hub once and in order, or a loss record says why not."""
        totals = {"sent": 0, "committed": 0, "lost": 0, "doubled": 0, "out_of_order": 0}
        for device in self.devices.values():
            target = (await device.status())["last_seq"]
            await until(f"{device.name}'s last record", 60, self._acked, device, target)
            seqs = [r["seq"] for r in await self._records(hub, device.name) if r["seq"] <= target]
            totals["sent"] += target
            totals["committed"] += len(set(seqs))
            totals["lost"] += target - len(set(seqs))
            totals["doubled"] += len(seqs) - len(set(seqs))
            totals["out_of_order"] += sum(a >= b for a, b in itertools.pairwise(seqs))
        self.report["records"] = totals
        whole = totals["lost"] == totals["doubled"] == totals["out_of_order"] == 0 and totals["sent"] > 0
        self.promise("every record once and in order", whole, ", ".join(f"{v} {k}" for k, v in totals.items()))

    def table(self) -> None:
        """The final account."""
        tasks, records = self.report["tasks"], self.report["records"]
        decisions = [decision for task in tasks for decision in task["decisions"]]
        first = [decision["first_token_ms"] for decision in decisions]
        decided = [decision["ms"] for decision in decisions]
        self.report["summary"] = {
            "tasks_right": sum(t["right"] for t in tasks), "tasks": len(tasks),
            "first_token_ms_p50": statistics.median(first) if first else None,
            "call_ms_p50": statistics.median(decided) if decided else None,
            "seconds": time.monotonic() - self.began,
        }  # fmt: skip
        summary = self.report["summary"]
        table = Table("", "", title="What happened", title_justify="left", show_header=False)
        table.add_row("tasks right", f"{summary['tasks_right']} of {summary['tasks']}")
        table.add_row("first token, p50", _ms(summary["first_token_ms_p50"]))
        table.add_row("complete call, p50", _ms(summary["call_ms_p50"]))
        for key, value in records.items():
            table.add_row(f"records {key.replace('_', ' ')}", f"{value:,}")
        table.add_row("time to catch up", f"{self.report['catch_up_s']:.1f} s")
        table.add_row("language model", self.report["digests"][MODEL])
        table.add_row(
            "adapter", ", ".join({decision["adapter"] for decision in decisions if decision["adapter"]}) or "-"
        )
        held = sum(p["held"] for p in self.report["promises"])
        table.add_row("promises held", f"{held} of {len(self.report['promises'])}")
        table.add_row("took", f"{summary['seconds']:.0f} s")
        self.console.print(table)

    async def end(self, hub: Hub, report: Path, keep: bool) -> None:
        """Write the report, and stay until a signal comes, if asked to."""
        text = json.dumps(self.report, indent=1, ensure_ascii=False) + "\n"
        await asyncio.to_thread(report.write_text, text)
        self.say(f"the whole account: {report}")
        if keep:
            self.console.print(f"dashboard: {hub.url}   user admin, password {hub.password}   Ctrl-C ends it")
            await asyncio.Event().wait()


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 110 else text[:109] + "…"


def steps(job: dict[str, Any], role: str) -> list[dict[str, Any]]:
    """The calls that were made (`tool`) or the decisions (`model`) in the transcript that a device told of a job."""
    told = (job.get("result") or {}).get("steps", [])
    unsaid = {"call": "", "ok": True, "ms": 0.0, "first_token_ms": 0.0, "adapter": ""}
    return [unsaid | step for step in told if step["role"] == role and (role == "model" or "call" in step)]


async def finished(hub: Hub, id: str) -> dict[str, Any] | None:
    """A job when it has ended, for `until`."""
    job: dict[str, Any] = await hub.get(f"/v1/jobs/{id}")
    return job if job["state"] in TERMINAL else None


async def run(folder: Path, cache: Path, console: Console, report: Path, keep: bool = False) -> dict[str, Any]:
    """The whole demo; the report. Raises OutriderError when something did not happen at all."""
    demo = Demo(folder, console)
    bundles = await packages(demo, (*BUNDLES, *({ADAPTER} & shipped().keys())), cache)
    manifests = {name: manifest for name, (_, manifest) in bundles.items()}
    demo.began = time.monotonic()
    async with fleet(demo) as hub:
        demo.title("publish, assign, install over the wire")
        for bundle, _ in bundles.values():
            await asyncio.to_thread(publish, hub.url, hub.token, bundle)
        await demo.install(hub, manifests)
        demo.title("ten requests in plain words")
        await demo.work(hub)
        demo.title("cut the cable")
        await demo.cut(hub)
        demo.title("kill -9 in the middle of a task")
        await demo.crash(hub)
        demo.title("the books")
        await demo.books(hub)
        demo.table()
        await demo.end(hub, report, keep)
    return demo.report


async def packages(demo: Demo, names: Iterable[str], cache: Path) -> dict[str, tuple[Path, Manifest]]:
    """Bundles of these models by name; a signal from here on ends the demo with its fleet."""
    me = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, lambda: me and me.cancel())
    demo.title("models, from pinned packages to bundles")
    bundles = {name: await asyncio.to_thread(_package, demo, name, cache) for name in names}
    demo.report["digests"] = {name: manifest.meta["content_digest"] for name, (_, manifest) in bundles.items()}
    return bundles


def _package(demo: Demo, name: str, cache: Path) -> tuple[Path, Manifest]:
    began = time.monotonic()
    with demo.console.status(name) as status:
        folder, manifest = package(name, cache, progress=lambda what, *_: status.update(f"{name}: {what}"))
    digest = str(manifest.meta["content_digest"])
    took = f"[dim]{time.monotonic() - began:.1f} s[/dim]"
    demo.say(f"{name} {manifest.version}, {manifest.size / 2**20:.0f} MiB, {digest} {took}")
    return folder, manifest


@asynccontextmanager
async def fleet(demo: Demo) -> AsyncIterator[Hub]:
    """The hub, with the devices enrolled."""
    async with AsyncExitStack() as stack:
        hub = await stack.enter_async_context(running(demo.folder))
        demo.say(f"hub at {hub.url} with its own broker")
        demo.title("enrol three devices")
        await demo.enrol(hub, stack)
        yield hub
