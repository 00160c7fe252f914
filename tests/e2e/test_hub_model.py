"""The fleet's own model behind the hub: a device asks it by its own token, the server's key stays at the hub."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from bench.fleet import Hub, running, until
from edge_agent import endpoints
from edge_agent.config import Endpoint
from hub import upstream
from hub.errors import Fatal
from hub.upstream import CONCURRENT, EACH, Upstream
from tests.e2e.daemon_process import DaemonProcess
from tests.e2e.daemon_process import until as seen
from tests.e2e.test_daemon_hub import enrolled
from tests.engines.endpoints import DONE, Handler, Scripted, says, server, stream, whole

KEY = "the-key-of-the-fleet"


def caller(handler: Handler) -> None:
    """Reads line 1 for whoever has the hub's key, then says what it read; talks when there is no tool."""
    if handler.headers.get("authorization") != f"Bearer {KEY}":
        whole(401, {"error": {"message": f"not {KEY}"}})(handler)
    elif handler.body["messages"][-1]["role"] == "tool":
        stream(says(f"Line 1: {handler.body['messages'][-1]['content']}"), says("", "stop"), DONE)(handler)
    elif "tools" in handler.body:
        function = {"name": "read_sensor", "arguments": '{"sensor": "speed", "line": 1}'}
        call = {"index": 0, "id": "x", "type": "function", "function": function}
        stream(says(tool_calls=[call]), says("", "tool_calls"), DONE)(handler)
    else:
        stream(says("Good "), says("day"), says("", "stop"), DONE)(handler)


@pytest.fixture
def model() -> Iterator[Scripted]:
    with server(caller) as made:
        yield made


@pytest.fixture
async def hub(tmp_path: Path, model: Scripted, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    monkeypatch.setenv("OUTRIDER_MODELS_KEY", KEY)
    async with running(tmp_path, "--models", model.url) as made:
        monkeypatch.delenv("OUTRIDER_MODELS_KEY")
        yield made


ASKED = {"model": "big", "messages": [{"role": "user", "content": "hello"}]}


async def test_a_task_of_a_device_runs_on_the_fleets_model_and_the_key_never_comes_there(
    hub: Hub, model: Scripted, tmp_path: Path
) -> None:
    config = tmp_path / "agent.toml"
    config.write_text('model = "fleet"\n[endpoints.fleet]\nurl = "hub"\nmodel = "big"\n')
    device = await enrolled(hub, tmp_path, "press-1", "--config", str(config))
    try:
        body = {"text": "how fast is line 1?"}
        id = (await device.client.post("/v1/tasks", json=body)).json()["id"]

        async def ended() -> dict[str, Any] | None:
            task: dict[str, Any] = (await device.client.get(f"/v1/tasks/{id}")).json()
            return task if task["state"] != "running" else None

        task = await until("the end of the task", 60, ended)
        assert (task["state"], task["answer"]) == ("succeeded", "Line 1: sensor: speed, line: 1, value: 7.5")
        said = (await device.client.post("/v1/chat/completions", json=ASKED | {"model": "fleet"})).json()
        assert said["choices"][0]["message"]["content"] == "Good day"
        assert model.asked[-1][2]["model"] == "big"
        model.answers = [whole(403, {"error": {"message": f"not {KEY}"}})]
        refused = await device.client.post("/v1/chat/completions", json=ASKED | {"model": "fleet"})
        assert "refuses the hub" in refused.text
        files = [path.read_bytes() for path in device.state.rglob("*") if path.is_file()]
        assert not [raw for raw in [*files, refused.content, device.process.log.read_bytes()] if KEY.encode() in raw]
        token = device.state / "endpoints" / "fleet.key"
        assert token.stat().st_mode & 0o077 == 0
    finally:
        await device.stop()


async def users(hub: Hub, role: str, *names: str) -> list[dict[str, str]]:
    """The headers of new users."""
    made = []
    for name in names:
        who = {"name": name, "password": f"a-long-password-of-{name}"}
        await hub.post("/v1/users", who | {"roles": [role]})
        token = (await hub.post("/v1/login", {"user": name, "password": who["password"]}))["access_token"]
        made.append({"Authorization": f"Bearer {token}"})
    return made


async def test_the_model_is_for_those_who_may_and_for_so_many_at_a_time_of_each_and_of_all(
    hub: Hub, model: Scripted
) -> None:
    async with httpx.AsyncClient(base_url=hub.url, timeout=30) as stranger:
        assert (await stranger.post("/v1/chat/completions", json=ASKED)).status_code == 401
    (vera,) = await users(hub, "viewer", "vera")
    assert (await hub.client.post("/v1/chat/completions", json=ASKED, headers=vera)).status_code == 403
    assert not model.asked, "nothing of theirs went on"
    assert [each["id"] for each in (await hub.get("/v1/models"))["data"]] == ["one", "two"]

    model.answers = [stream(says("wait"), stall=True)]

    async def ask(who: dict[str, str] | None = None) -> httpx.Response:
        return await hub.client.post("/v1/chat/completions", json=ASKED, headers=who)

    held = [asyncio.create_task(ask()) for _ in range(EACH)]

    async def all_there() -> bool | None:
        return len(model.asked) == len(held) or None

    await until("all of one", 30, all_there)
    more = await ask()
    assert (more.status_code, more.headers["retry-after"]) == (429, "2")
    assert more.json()["detail"] == f"{EACH} requests of admin are with the fleet's model"
    *others, last = await users(hub, "operator", "ann", "bob", "cleo", "dan")
    held += [asyncio.create_task(ask(who)) for who in others for _ in range(EACH)]
    await until("all of them", 30, all_there)
    more = await ask(last)
    assert (more.status_code, more.json()["detail"]) == (429, f"{CONCURRENT} requests are with the fleet's model")
    for task in held[1:]:
        task.cancel()
    await asyncio.gather(*held[1:], return_exceptions=True)
    model.answers = [caller]

    async def free() -> bool | None:
        return (await ask()).status_code == 200 or None

    await until("their places are free", 30, free)
    model.let_go.set()
    assert (await held[0]).status_code == 200


def thinks(handler: Handler) -> None:
    """Says nothing, not even that it heard, before it knows the whole answer."""
    handler.server.let_go.wait(60)
    whole(200, {})(handler)


async def test_who_leaves_before_the_answer_begins_gives_the_place_back(hub: Hub, model: Scripted) -> None:
    model.answers = [thinks]
    held = [asyncio.create_task(hub.client.post("/v1/chat/completions", json=ASKED)) for _ in range(EACH)]

    async def all_there() -> bool | None:
        return len(model.asked) == EACH or None

    await until("all of them", 30, all_there)
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    model.answers = [caller]

    async def free() -> bool | None:
        return (await hub.client.post("/v1/chat/completions", json=ASKED)).status_code == 200 or None

    await until("their places are free", 10, free)


async def test_who_takes_nothing_of_an_answer_is_cut_off_and_gives_the_place_back(
    model: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "TAKE_S", 0.05)
    model.answers = [stream(says("Good day"), DONE)]
    fleet, never, body = Upstream(model.url), asyncio.Event(), [{"type": "http.request", "body": b"{}"}]

    async def receive() -> Any:
        if not body:
            await never.wait()
        return body.pop()

    async def full(_: Any) -> None:
        await never.wait()

    scope = {"type": "http", "method": "POST", "headers": [], "asgi": {"spec_version": "2.3"}}
    async with asyncio.timeout(10):
        await (await fleet.pass_on(Request(scope, receive), "chat/completions", "ann"))(scope, receive, full)
    assert not fleet._active
    await fleet.close()


@pytest.mark.parametrize("url", ["http://HOST:PORT/v1", "http://[::1", "http://127.0.0.1/v1?key=x", "127.0.0.1:80/v1"])
def test_what_is_no_url_of_a_server_is_told_at_the_start(url: str) -> None:
    with pytest.raises(Fatal, match="is no URL"):
        Upstream(url)


async def test_a_server_that_is_away_and_a_hub_without_one_are_told(tmp_path: Path, hub: Hub, model: Scripted) -> None:
    model.shutdown()
    model.server_close()
    away = await hub.client.post("/v1/chat/completions", json=ASKED)
    assert away.status_code == 502
    assert "--models" in away.text
    (tmp_path / "other").mkdir()
    async with running(tmp_path / "other") as without:
        none = await without.client.post("/v1/chat/completions", json=ASKED)
        assert none.status_code == 404
        assert "outrider hub run --models" in none.text


def test_a_device_lives_on_when_the_token_for_the_hubs_model_cannot_be_written(tmp_path: Path) -> None:
    device = DaemonProcess(tmp_path / "press-1")
    (device.state / "endpoints").write_text("in the way")
    config = tmp_path / "agent.toml"
    config.write_text('[endpoints.fleet]\nurl = "hub"\nmodel = "big"\n')
    try:
        device.start("--config", str(config))
        seen("the reason in the log", lambda: "the endpoint fleet gets no token" in device.log.read_text())
        assert device.status()["device"] == "press-1"
        assert device.end() == 0
    finally:
        device.end(signal.SIGKILL)


async def test_the_token_is_made_anew_when_the_clock_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without a battery for its clock is told the time after its start."""
    now = [1000.0]
    monkeypatch.setattr(endpoints, "AGAIN_S", 0.01)
    monkeypatch.setattr(endpoints, "time", SimpleNamespace(time=lambda: now[0]))

    async def switch(*_: object) -> None: ...

    fleet, hub = {"fleet": Endpoint("hub", "big")}, ("http://127.0.0.1:9", "")
    part = endpoints.Endpoints(fleet, tmp_path, *hub, lambda _: f"at {now[0]:.0f}", switch)
    running = asyncio.create_task(part.run())
    try:
        for at in (1000.0, 900_000.0, 901_801.0, 5000.0):
            now[0] = at

            async def made(at: float = at) -> bool | None:
                token = tmp_path / "endpoints" / "fleet.key"
                return (token.exists() and token.read_text() == f"at {at:.0f}") or None

            await until("a token of now", 5, made)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def test_a_device_reaches_the_fleets_model_where_its_hub_is_now_and_through_its_proxy(tmp_path: Path) -> None:
    device = DaemonProcess(tmp_path / "press-1", hub="http://old.invalid")
    with server(stream(says("Good day"), says("", "stop"), DONE)) as proxy:  # asked for whole URLs, as one is
        config = tmp_path / "agent.toml"
        at = f'hub = "http://moved.invalid"\nproxy = "{proxy.url.removesuffix("/v1")}"\n'
        config.write_text(at + '[endpoints.fleet]\nurl = "hub"\nmodel = "big"\n')
        try:
            device.start("--config", str(config))
            seen("the endpoint", lambda: device.status()["models"].get("fleet", {}).get("engine"))
            said = device.ask("POST", "/v1/chat/completions", ASKED | {"model": "fleet"})
            assert said.json()["choices"][0]["message"]["content"] == "Good day", said.text
            assert proxy.asked[-1][0] == "http://moved.invalid/v1/chat/completions"
            assert device.end() == 0
        finally:
            device.end(signal.SIGKILL)
