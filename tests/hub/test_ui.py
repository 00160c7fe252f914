"""The dashboard in a real browser, against a real hub with devices that speak the contract over real MQTT."""

import asyncio
import contextlib
import hashlib
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nicegui import Client
from sqlalchemy.exc import OperationalError

from edge_agent.wire.grants import Subject
from edge_agent.wire.messages import Job, JobKind, JobReport, JobState, PresenceState
from hub.approvals import answer, asks
from hub.errors import Refused
from hub.ui.sessions import COOKIE, MAX_SESSIONS, Sessions
from hub.ui.snapshots import Snapshots
from tests.hub.browser import CHROMEDRIVER, CHROMIUM, Browser
from tests.hub.rig import PASSWORD, Device, Hub, enrolled, running, until

needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver: deploy/system-packages.sh"
)
Served = tuple[Hub, str]


async def log_in(window: Browser, url: str, path: str = "/", user: str = "admin", password: str = PASSWORD) -> None:
    await window.open(url + path)
    await window.type("input[name=user]", user)
    await window.type("input[name=password]", password)
    await window.click("button")


async def report(
    device: Device, id: str, state: JobState, result: dict[str, Any] | None = None, error: str = ""
) -> None:
    await device.report("job", msgspec.to_builtins(JobReport(id, state, time.time(), result or {}, error)))


async def complaints(window: Browser) -> list[str]:
    """What the browser's console holds against the page, a refused login apart."""
    entries = await window.command("POST", "/se/log", {"type": "browser"})
    return [entry["message"] for entry in entries if "status of 401" not in entry["message"]]


async def test_strangers_reach_the_login_and_nothing_else_and_cost_no_page(tmp_path: Path) -> None:
    async with running(tmp_path / "hub", dashboard=True) as hub:
        clients = len(Client.instances)
        hub.http.cookies.set(COOKIE, "forged")
        for path in ("/", "/devices/press-1", "/models", "/events", "/no-such-page"):
            answer = await hub.http.get(path)
            assert (answer.status_code, answer.headers["location"]) == (303, f"/login?next={path}")
        page = await hub.http.get("/login")
        assert page.status_code == 200
        assert page.headers["x-frame-options"] == "DENY"
        assert len(Client.instances) == clients
        unknown = await hub.http.get("/v1/nothing")
        assert unknown.status_code == 404
        assert unknown.json()["hint"]


async def test_login_sets_a_private_cookie_and_only_leads_to_this_hub(tmp_path: Path) -> None:
    async with running(tmp_path / "hub", dashboard=True) as hub:
        for wanted, leads in (
            ("/models", "/models"),
            ("https://evil.test/", "/"),
            ("//evil.test", "/"),
            ("/\\evil", "/"),
        ):
            form = {"user": "admin", "password": PASSWORD, "next": wanted}
            answer = await hub.http.post("/login", data=form)
            assert (answer.status_code, answer.headers["location"]) == (303, leads)
            assert "httponly" in answer.headers["set-cookie"].lower()
            assert "samesite=lax" in answer.headers["set-cookie"].lower()
        wrong = await hub.http.post("/login", data={"user": '"><script>', "password": "no"})
        assert wrong.status_code == 401
        assert "<script>" not in wrong.text
        huge = await hub.http.post("/login", content=b"x" * 100_000)
        assert huge.status_code == 413


@needs_chromium
async def test_a_wrong_password_says_so_and_a_right_one_leads_to_the_wanted_page(
    served: Served, window: Browser
) -> None:
    _, url = served
    await log_in(window, url, "/models", password="wrong")
    await window.see("Wrong user or password")
    await window.type("input[name=password]", PASSWORD)
    await window.click("button")
    await window.see("No bundles yet")
    await window.see("outrider models publish", "code, .code")
    assert (await window.url()).endswith("/models")
    assert await complaints(window) == []


@needs_chromium
async def test_a_device_appears_online_and_is_shown_offline_when_it_is_gone(served: Served, window: Browser) -> None:
    hub, url = served
    await log_in(window, url)
    await window.see("No devices yet")
    await window.see(f"--hub {url}", ".code")
    device = await enrolled(hub, "press-1")
    async with device.online():
        await window.see("press-1", ".device")
        await until(lambda: window.run("return !!document.querySelector('.device .dot.ok')"))
        bad = {"version": "1", "state": "quarantined", "error": "the probe answered otherwise", "target": "2"}
        await device.report("reported", {"version": 1, "doc": {"bundles": {"ocr": bad}}})
        await window.see("2 quarantined", ".chip.bad")
        await device.present("", PresenceState.OFFLINE)
        await until(lambda: window.run("return !!document.querySelector('.device .dot.off')"))
        await window.see("0 of 1", ".stat")
        await window.open(f"{url}/devices/press-1")
        await window.see("offline: it said so", ".badge")
    assert await complaints(window) == []


@needs_chromium
async def test_a_task_is_asked_in_the_browser_and_its_way_and_result_appear(served: Served, window: Browser) -> None:
    hub, url = served
    device = await enrolled(hub, "press-1")
    async with device.online():
        await log_in(window, url, "/devices/press-1")
        await window.type(".ask input", "what is the vibration on line 2?\n")
        [job] = await until(lambda: device.jobs)
        assert (job.body, job.subject, job.roles) == ({"text": "what is the vibration on line 2?"}, "admin", ["admin"])
        await report(device, job.id, JobState.RUNNING)
        await window.see("running", ".job .way .done:nth-child(3)")
        call = {"role": "tool", "call": 'read_sensor(sensor="vibration", line=2)', "text": "3.42 mm/s", "ms": 4.2}
        said = {"role": "model", "text": call["call"], "ms": 101.0}
        result = {"answer": "<img src=x onerror='document.title=1'>", "steps": [said, call]}
        await report(device, job.id, JobState.SUCCEEDED, result)
        await window.see('read_sensor(sensor="vibration", line=2)', ".job .step")
        await window.see("decided in 101 ms", ".job")
        await window.see("<img src=x", ".job p")  # what a device says is text
        await window.open(url)
        await window.see("3.42 mm/s", ".table")
    assert await complaints(window) == []


def sent(device: Device) -> list[Job]:
    """What came, each once: a job that is not confirmed yet comes again."""
    return list({job.id: job for job in device.jobs}.values())


def waits(id: str, call: str = "purge(line=2)", **more: Any) -> dict[str, Any]:
    ask = {"digest": hashlib.sha256(id.encode()).hexdigest(), "call": call, "tool": "purge", "text": "empty line 2"}
    return {"waiting": {id: ask | {"subject": "otto", "expires": time.time() + 3600, **more}}}


@needs_chromium
async def test_a_dangerous_call_is_shown_in_words_and_approved_by_who_may_once(served: Served, window: Browser) -> None:
    hub, url = served
    await hub.services.auth.add_user("olga", ["operator"], PASSWORD, by="test")
    device = await enrolled(hub, "press-1")
    async with device.online():
        await hub.services.jobs.create(
            "press-1", JobKind.TASK, {"text": "empty line 2"}, subject="otto", roles=["operator"]
        )
        [asked] = await until(lambda: sent(device))
        await report(device, asked.id, JobState.RUNNING)
        local = waits("local-7", "purge(line=1)", text="<b>of a trigger</b>", why="it says <b>line 1</b>")["waiting"]
        rubbish = {"x": 3, "y": {"digest": 4}, "z": {}}
        doc = {"waiting": waits(asked.id)["waiting"] | local | rubbish}
        await device.report("reported", {"version": 1, "doc": doc})
        await log_in(window, url, "/devices/press-1", user="olga")
        await window.see("otto asked: empty line 2", ".waits")
        await window.see("otto asked: <b>of a trigger</b>", ".waits")  # what people and devices say is text
        await window.see("it says <b>line 1</b>; digest", ".waits")
        assert await window.run("return document.querySelectorAll('.waits').length") == 2
        await window.see("purge(line=2)", ".waits code")
        await window.see("waiting for approval", ".job:not(.waits) .badge.wait")
        digest = doc["waiting"][asked.id]["digest"]
        assert await window.run("return document.querySelector('.job:not(.waits) .step code[title]').title") == digest
        force = "for (const b of document.querySelectorAll('.waits button')) { b.disabled = false; b.click() }"
        await window.run(force)
        services, olga = hub.services, Subject("olga", ["operator"], time.time())
        [first, *_] = asks(await services.devices.get("press-1"))
        with pytest.raises(Refused, match="olga may not approve:call of purge"):
            await answer(services.auth, services.audit, services.jobs, olga, "press-1", first, True)
        assert len(sent(device)) == 1
        await window.open(url)
        await window.click("[aria-label='Log out']")
        await log_in(window, url, "/devices/press-1")
        await window.see("purge(line=2)", ".waits")
        card = "[...document.querySelectorAll('.waits')].find(x => x.innerText.includes('line=2'))"
        await window.run(f"{card}.querySelectorAll('button')[0].click()")
        await window.run(f"{card}.querySelectorAll('button')[0].click()")
        _, given = await until(lambda: sent(device)[1:] and sent(device))
        wanted = {"tool": "approve_call", "args": {"id": asked.id, "call": digest, "approve": True}}
        assert (given.kind, given.body, given.subject, given.roles) == (JobKind.TOOL, wanted, "admin", ["admin"])
        await device.report("reported", {"version": 2, "doc": {"waiting": local}})
        await until(lambda: window.run("return document.querySelectorAll('.waits').length == 1"))
        await window.run("document.querySelectorAll('.waits button')[1].click()")
        *_, denied = await until(lambda: sent(device)[2:] and sent(device))
        assert (denied.body["args"]["id"], denied.body["args"]["approve"]) == ("local-7", False)
        assert len(sent(device)) == 3  # the second click was the same word again
        entries = [entry for entry in await hub.services.audit.newest(50) if entry["action"].endswith(":call")]
        assert [(entry["actor"], entry["action"]) for entry in entries if entry["detail"]["task"] == "local-7"] == [
            ("admin", "deny:call")
        ]
        told = {"device": "press-1", "task": asked.id, "call": "purge(line=2)", "digest": digest}
        assert told | {"where": "127.0.0.1"} in [entry["detail"] for entry in entries]
    assert await complaints(window) == []


@needs_chromium
async def test_the_whole_transcript_of_a_task_is_on_its_card(served: Served, window: Browser) -> None:
    hub, url = served
    device = await enrolled(hub, "press-1")
    async with device.online():
        await hub.services.jobs.create(
            "press-1", JobKind.TASK, {"text": "empty it"}, subject="otto", roles=["operator"]
        )
        [job] = await until(lambda: sent(device))
        now = time.time()
        steps: list[Any] = [
            {"role": "model", "text": "purge(line=2)", "ts": now, "ms": 847.2, "prompt_tokens": 256, "tokens": 8},
            {"role": "check", "text": "purge(line=2)", "ts": now, "adapter": "toolcaller 1.2"},
            {"role": "ask", "text": "ab" * 32, "call": "purge(line=2)", "ts": now, "expires": now},
            {"role": "approval", "text": "ann", "call": "purge(line=2)", "ok": False},
            {"role": "tool", "at": "blow", "text": "<img src=x onerror='document.title=1'>", "ok": False, "ms": "?"},
            "rubbish",
            {"role": ["?"], "text": {"a": 1}},
        ]
        await report(device, job.id, JobState.FAILED, {"steps": steps}, "ann denied purge(line=2)")
        await log_in(window, url, "/devices/press-1")
        await window.see("6 steps", ".transcript summary")
        await window.click(".transcript summary")
        for words in (
            "847.2 ms · 256 tokens read, 8 said",
            "toolcaller 1.2",
            "May purge(line=2) be done? digest abababababababab",
            "ann denied purge(line=2)",
            "blow <img src=x",
        ):
            await window.see(words, ".transcript")
    assert await complaints(window) == []


@needs_chromium
async def test_a_viewer_sees_but_cannot_act_and_a_revoked_one_is_sent_away(served: Served, window: Browser) -> None:
    hub, url = served
    await hub.services.auth.add_user("guest", ["viewer"], PASSWORD, by="test")
    device = await enrolled(hub, "press-1")
    async with device.online():
        await log_in(window, url, "/devices/press-1", user="guest")
        await window.see("Committed up to")
        assert await window.run("return document.querySelector('.ask button').disabled")
        assert "guest may not run:task" in await window.run("return document.querySelector('.ask input').placeholder")
        force = "const b = document.querySelector('.ask button'); b.disabled = false; b.click()"
        await window.run(force)
        await window.open(f"{url}/events")
        await window.see("guest may not read:audit")
        assert device.jobs == []
        await window.open(url)
        await window.see("press-1", ".device")
        await hub.services.revoke_user("guest", by="admin")
        await window.see("guest may not read:device")
        await window.open(f"{url}/models")
        await window.see("guest may not read:bundle")


@needs_chromium
async def test_an_enrolment_token_from_the_dashboard_is_good_once(served: Served, window: Browser) -> None:
    hub, url = served
    await log_in(window, url)
    await window.click(".title-row button")
    await window.type(".dialog input", "oven-1")
    await window.click(".dialog .bg-primary")
    await window.see("--token", ".dialog .code")
    token = (await window.text(".dialog .code .mono")).split("--token=")[1].split()[0]
    await Device.enrol(hub.http, "oven-1", token)
    await window.see("oven-1", ".device")
    second = await hub.http.post("/v1/enrol", json={"token": token, "name": "oven-1", "public_key": "A" * 43})
    assert second.status_code in (409, 422)
    await window.click(".dialog .form > button")
    await until(lambda: window.run("return !document.querySelector('.q-dialog__backdrop')"))
    await window.click("[aria-label='Log out']")
    await window.see("Log in to see")
    await window.open(url)
    await window.see("Log in to see")


@needs_chromium
async def test_a_bundle_assigned_in_the_browser_reaches_the_device(served: Served, window: Browser) -> None:
    hub, url = served
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    entry = {"path": "model.bin", "size": len(content), "sha256": digest}
    admin = await hub.login()
    await admin.put(f"/v1/blobs/{digest}", content=content)
    await admin.post(
        "/v1/bundles", json={"manifest": {"name": "ocr", "version": "2", "kind": "onnx", "files": [entry]}}
    )
    device = await enrolled(hub, "press-1")
    async with device.online():
        await log_in(window, url, "/models")
        await window.see("ocr 2", "td")
        await window.click("td button")
        gone = "return ![...document.querySelectorAll('.dialog .bg-primary')].some(x => x.offsetParent !== null)"
        for _ in range(3):  # on a busy machine a first click may be lost
            await window.click(".dialog .bg-primary")  # the only device is chosen already
            with contextlib.suppress(AssertionError):
                await until(lambda: window.run(gone), 5.0)
                break
        await window.see("press-1", ".chip")
        desired = await until(lambda: device.desired and device.desired[-1])
        assert desired.doc["bundles"]["ocr"]["version"] == "2"
        await window.see("waiting", ".chip.busy")
    assert await complaints(window) == []
    await admin.aclose()


@needs_chromium
async def test_every_page_fits_a_phone_in_both_looks_and_loads_from_the_hub_alone(
    served: Served, window: Browser
) -> None:
    hub, url = served
    device = await enrolled(hub, "press-1")
    async with device.online():
        await device.report(
            "telemetry", {"tool": "read_sensor", "args": {"sensor": "speed", "line": 1}, "result": 61.5}
        )
        await log_in(window, url)
        for path in ("/", "/devices/press-1", "/models", "/events"):
            await window.open(url + path)
            for dark in (True, False):
                await window.look(390, 844, dark)
                await until(lambda: window.run("return !!document.querySelector('nav a.here')"))
                wanted = "body--dark" if dark else "body--light"
                await until(lambda w=wanted: window.run("return document.body.classList.contains(arguments[0])", w))
                width = await window.run("return document.documentElement.scrollWidth")
                assert width <= 390, f"{path} is {width} wide"
        assert await complaints(window) == []


async def test_a_hundred_open_tabs_ask_the_database_once_a_second() -> None:
    asked = 0

    async def load() -> int:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        return asked

    def no_services() -> Any:
        raise AssertionError("not needed here")

    snapshots = Snapshots(no_services)
    assert set(await asyncio.gather(*(snapshots.get("fleet", load) for _ in range(100)))) == {1}
    assert await snapshots.get("fleet", load, max_age_s=0.0) == 2
    for n in range(300):
        await snapshots.get(f"device {n}", lambda: asyncio.sleep(0))
    assert len(snapshots._kept) <= 256
    assert len(snapshots._locks) <= 256


async def test_sessions_end_with_their_token_and_are_bounded(tmp_path: Path) -> None:
    async with running(tmp_path / "hub") as hub:
        auth, sessions = hub.services.auth, Sessions()
        token, _ = await auth.login("admin", PASSWORD, "test")
        first = sessions.open(auth, token)
        assert sessions.get(auth, first.id) is first
        first.token = "expired"
        assert sessions.get(auth, first.id) is None
        for _ in range(3):
            sessions.open(auth, token)
        assert len(sessions._sessions) == 3 < MAX_SESSIONS


@needs_chromium
async def test_a_page_that_cannot_be_kept_up_to_date_says_so_and_recovers(served: Served, window: Browser) -> None:
    hub, url = served
    await log_in(window, url)
    await window.see("No devices yet")
    healthy, devices = hub.services.devices.list, hub.services.devices

    async def broken() -> list[dict[str, Any]]:
        raise OperationalError("SELECT", {}, OSError("disk I/O error"))

    devices.list = broken  # type: ignore[method-assign]
    await window.see("What you see is not up to date", ".q-notification")
    await window.see("disk I/O error", ".q-notification")
    devices.list = healthy  # type: ignore[method-assign]
    await enrolled(hub, "press-1")
    await window.see("press-1", ".device")
