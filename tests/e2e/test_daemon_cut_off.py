"""A device cut off for the whole run: its agent answers from knowledge, runs a workflow, honours roles and approvals
of people at the device, is restarted in the middle, and everything is at the hub afterwards, once."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.fleet import Device, Hub, running, until
from bench.link import Link
from tests.e2e.test_daemon_hub import _acked, _online, job, seqs
from tests.engines.endpoints import DONE, Handler, Scripted, says, server, stream

MANUAL = "# Line 2\nThe relief valve of line 2 opens at 9 bar. Its gasket is changed every 400 hours.\n"
FLOW = """workflow: relieve
version: "1"
steps:
  - {id: look, tool: read_gauge, args: {line: 2}}
  - {id: open, tool: open_valve, depends_on: [look], when: steps.look.result.value > 8.0, args: {line: 2}}
"""


def speaker(handler: Handler) -> None:
    """A model that looks things up when it is asked how often, purges when told to, and repeats what tools gave."""
    messages = handler.body["messages"]
    if messages[-1]["role"] == "tool":
        stream(says(messages[-1]["content"][:300]), says("", "stop"), DONE)(handler)
        return
    text = messages[-1]["content"]
    known = {tool["function"]["name"] for tool in handler.body["tools"]}
    name, args = ("purge", {"line": 2}) if "purge" in text else ("search_knowledge", {"question": text})
    if name not in known:
        stream(says("none()"), says("", "stop"), DONE)(handler)
        return
    call = {"index": 0, "id": "x", "type": "function", "function": {"name": name, "arguments": json.dumps(args)}}
    stream(says(tool_calls=[call]), says("", "tool_calls"), DONE)(handler)


@pytest.fixture
def endpoint() -> Iterator[Scripted]:
    with server(speaker) as made:
        yield made


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    async with running(tmp_path) as made:
        yield made


class Person:
    """Somebody at the device, with a token that was fetched before the cut."""

    def __init__(self, device: Device, token: str) -> None:
        self._device, self._headers, self._token = device, {"Authorization": f"Bearer {token}"}, token

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        answer = await self._device.client.request(method, path, json=body, headers=self._headers)
        return answer.status_code, answer.json()

    async def approve(self, id: str) -> tuple[int | None, str]:
        """As a person does it, at the device's command line."""
        argv = ["-m", "edge_agent.cli", "task", "approve", id, "--yes", "--token", self._token]
        argv += ["--api", f"127.0.0.1:{self._device.port}"]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, *argv, stdout=pipe, stderr=pipe)
        out, error = await process.communicate()
        return process.returncode, (out + error).decode()

    async def task(self, text: str) -> str:
        status, answer = await self.ask("POST", "/v1/tasks", {"text": text})
        assert status == 202, answer
        return str(answer["id"])

    async def end_of(self, id: str, *states: str) -> dict[str, Any]:
        wanted = states or ("succeeded", "failed")

        async def ended() -> dict[str, Any] | None:
            _, task = await self.ask("GET", f"/v1/tasks/{id}")
            return task if task.get("state") in wanted else None

        return await until(f"{id} {'/'.join(wanted)}", 60, ended)


async def person(hub: Hub, device: Device, name: str, role: str) -> Person:
    await hub.post("/v1/users", {"name": name, "password": "a long enough one", "roles": [role]})
    login = await hub.client.post("/v1/login", json={"user": name, "password": "a long enough one"})
    headers = {"Authorization": f"Bearer {login.json()['access_token']}"}
    made = await hub.client.post(f"/v1/devices/{device.name}/offline-token", json={"ttl_s": 3600}, headers=headers)
    return Person(device, made.json().get("access_token", login.json()["access_token"]))


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_the_agent_of_a_device_that_is_cut_off_does_all_its_work(
    hub: Hub, tmp_path: Path, endpoint: Scripted
) -> None:
    port = int((await hub.get("/v1/broker"))["url"].rsplit(":", 1)[1])
    (tmp_path / "agent.toml").write_text(f'model = "m"\n[endpoints.m]\nurl = "{endpoint.url}"\nmodel = "big"\n')
    async with Link("127.0.0.1", port) as link:
        device = Device("press-1", tmp_path, hub)
        (device.state / "tools" / "documents").mkdir(parents=True, mode=0o700)
        (device.state / "workflows").mkdir()
        (device.state / "workflows" / "relieve.yaml").write_text(FLOW)
        (device.state / "tools" / "documents" / "manual.md").write_text(MANUAL)
        token = (await hub.post("/v1/enrolments", {"name": "press-1", "ttl_s": 600}))["token"]
        pack = ("--pack", "tests.e2e.cut_off_pack,tools.knowledge", "--config", str(tmp_path / "agent.toml"))
        broker = ("--broker", f"mqtt://127.0.0.1:{link.port}", "--telemetry-s", "1")
        await device.start("--hub", hub.url, "--token", token, *pack, *broker)
        await until("press-1 online", 60, _online, hub, device)
        otto, vera = await person(hub, device, "otto", "operator"), await person(hub, device, "vera", "viewer")
        ann = await person(hub, device, "ann", "admin")

        link.cut()
        await device.process.kill()
        await device.start()
        await until("the device again", 60, _up, device)
        status, _ = await otto.ask("POST", "/v1/tools/add_document", {"args": {"name": "manual.md"}})
        assert status == 202

        task = await otto.end_of(await otto.task("how often is the gasket of line 2 changed?"))
        assert (task["state"], task["error"]) == ("succeeded", "")
        assert "every 400 hours" in task["answer"]
        assert task["sources"] == ["manual.md 1"]

        status, told = await vera.ask("POST", "/v1/tools/run_workflow", {"args": {"name": "relieve"}})
        assert (status, told["detail"]) == (403, "vera may not run:task on this device")
        _, started = await otto.ask("POST", "/v1/tools/run_workflow", {"args": {"name": "relieve"}})
        run = await otto.end_of(started["result"]["id"])
        assert run["answer"] == "look succeeded, open succeeded"

        waits = await otto.task("purge line 2")
        shown = await otto.end_of(waits, "waiting")
        assert shown["steps"][-1]["call"]["args"] == {"line": 2}
        await device.process.kill()
        await device.start()
        await until("the device again", 60, _up, device)
        args = {"id": waits, "call": shown["steps"][-1]["text"]}
        assert (await otto.ask("POST", "/v1/tools/approve_call", {"args": args}))[0] == 403
        code, told = await ann.approve(waits)
        assert (code, told.splitlines()[0]) == (0, "otto asked: purge line 2")
        assert "may purge(line=2) be done? until" in told
        assert (await otto.end_of(waits))["state"] == "succeeded"
        assert (await ann.ask("POST", "/v1/tools/approve_call", {"args": args}))[0] == 422
        assert (device.state / "tools" / "effects").read_text().splitlines() == ["valve 2", "purged 2"]
        assert not (await device.status())["connected"]

        link.mend()
        target = (await device.status())["last_seq"]
        await until("the last ack", 90, _acked, device, target)
        assert [seq for seq in await seqs(hub, "press-1") if seq <= target] == list(range(1, target + 1))
        told = await hub.get("/v1/telemetry", device="press-1", kind="audit", limit=1000)
        events = [record["body"]["event"] for record in told["records"]]
        assert [event for event in events if event in ("submit", "workflow", "ask", "approve")] == [
            "submit", "workflow", "submit", "ask", "ask", "approve",
        ]  # fmt: skip
        jobs = await hub.get("/v1/telemetry", device="press-1", kind="job", limit=1000)
        ends = {record["body"]["id"]: record["body"]["state"] for record in jobs["records"]}
        assert ends[waits] == ends[started["result"]["id"]] == "succeeded"
        assert (await hub.get("/v1/audit/verify"))["first_broken"] is None

        purging = {"kind": "task", "body": {"text": "purge line 2"}}
        asked = (await hub.post("/v1/devices/press-1/jobs", purging))["id"]  # now with a hub that sees the call

        async def shows(waiting: bool) -> dict[str, Any] | None:
            reported: dict[str, Any] = (await hub.get("/v1/devices/press-1"))["reported"]
            found = reported.get("waiting") or {}
            return (found if asked in found else None) if waiting else ({"none": 0} if asked not in found else None)

        ask = (await until("the ask at the hub", 60, shows, True))[asked]
        assert (ask["call"], ask["text"], ask["subject"]) == ("purge(line=2)", "purge line 2", "admin")
        word = {"tool": "approve_call", "args": {"id": asked, "call": ask["digest"], "approve": True}}
        assert (await job(hub, device, word))["state"] == "succeeded"
        done = await until("the end of the task", 60, _ended, hub, asked)
        assert done["state"] == "succeeded", done
        roles = [step["role"] for step in done["result"]["steps"]]
        assert roles[-5:-1] == ["ask", "approval", "intent", "tool"]
        await until("the ask gone", 60, shows, False)
        await device.stop()


async def _ended(hub: Hub, id: str) -> dict[str, Any] | None:
    seen: dict[str, Any] = await hub.get(f"/v1/jobs/{id}")
    return seen if seen["result"] else None


async def _up(device: Device) -> bool | None:
    """The tools answer and the endpoint is set up."""
    device.process.check()
    status = await device.status()
    return True if status["tools"] and status["speaks"]["model"] else None
