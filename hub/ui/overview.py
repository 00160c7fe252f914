"""The fleet at a glance: counters, devices, the latest tasks; and enrolling a device."""

from typing import Any

from nicegui import ui

from hub.ui import work
from hub.ui.frame import DOTS, Table, View, ago, code, dialog, empty, heading, number, offset, page, set_html
from hub.ui.snapshots import Fleet

SHOWN = 100
JOBS = 12
SKEWED_S = 5.0
TONES = {"committed": "ok", "failed": "bad", "quarantined": "bad", "idle": ""}


@page("/", "Fleet", "read:device", "read:job", "read:telemetry")
async def overview(view: View) -> None:
    with ui.row().classes("title-row"):
        heading("Fleet")
        ui.element("div").classes("grow")
        view.button("Enrol a device", lambda: enrol(view), "create:enrolment", icon="add")
    counters = ui.html().classes("stats")
    with ui.element("section").classes("card") as listed:
        search = ui.input(placeholder="Filter devices").props("dense borderless clearable").classes("search")
        headings = ("Device", "Last seen", "Clock", "Epoch · watermark", "Models", "Now")
        names = ("name", "seen", "offset", "watermark", "models", "task")
        devices = Table(dict(zip(names, headings, strict=True)), minor=("offset", "watermark", "task"))
        left = ui.label().classes("faint")
    with ui.element("div") as nobody:
        command = f"outrider agent --state ./state --hub {origin()} --token=TOKEN --name press-1"
        empty("No devices yet", "Make a single-use token above, then run this on the device:", command, "sensors")
    with ui.element("section").classes("wide") as tasks:
        heading("Latest tasks")
        with ui.element("div").classes("card"):
            names, headings = (
                ("when", "device", "asked", "did", "took", "state"),
                ("When", "Device", "Asked", "Did", "Took", "State"),
            )
            jobs = Table(dict(zip(names, headings, strict=True)), minor=("when", "took"))

    async def show() -> None:
        fleet = await view.snapshots.fleet()
        set_html(counters, counters_html(fleet))
        wanted = (search.value or "").strip().lower()
        found = [device for device in fleet.devices if wanted in device["name"]]
        devices.show([device_row(device, fleet) for device in found[:SHOWN]])
        left.set_text(f"{SHOWN} of {len(found)} devices shown: filter to find others" if len(found) > SHOWN else "")
        search.set_visibility(len(fleet.devices) > 8)
        listed.set_visibility(bool(fleet.devices))
        nobody.set_visibility(not fleet.devices)
        jobs.show([job_row(job) for job in fleet.jobs[:JOBS]])
        tasks.set_visibility(bool(fleet.jobs))

    await view.live(show, "read:device", "read:job", "read:telemetry")


def origin() -> str:
    """This hub's address as the viewer's browser knows it."""
    return str(ui.context.client.request.base_url).rstrip("/")


def counters_html(fleet: Fleet) -> str:
    online = sum(device["online"] for device in fleet.devices)
    lost = sum(device["lost"] for device in fleet.devices)
    rate = sum(fleet.rates[-5:]) / max(1, len(fleet.rates[-5:]))
    away = len(fleet.devices) - online
    there = f"{away} offline" if away else "all of them" if online else "none enrolled"
    cards = (
        stat("Devices online", f"{online}<small> of {len(fleet.devices)}</small>", there),
        stat("Records committed", number(fleet.committed), "each once, in order"),
        stat("Records per second", number(rate), spark(fleet.rates), "spark"),
        stat("Doubles skipped", number(fleet.doubled), "sent again, kept once"),
        stat("Records lost", number(lost), "declared by devices" if lost else "nothing", "bad" if lost else ""),
    )
    return "".join(cards)


def stat(label: str, value: str, note: str, tone: str = "") -> str:
    """A counter; its parts are HTML made here."""
    return f'<div class="stat card {tone}"><span>{label}</span><b>{value}</b><em>{note}</em></div>'


def spark(values: list[float]) -> str:
    """A small line chart as SVG, scaled to its largest value."""
    if len(values) < 2:
        return ""
    top, step = max(max(values), 1.0), 100 / (len(values) - 1)
    points = " ".join(f"{n * step:.1f},{23 - 21 * value / top:.1f}" for n, value in enumerate(values))
    area = f'<polygon points="0,24 {points} 100,24"/>'
    return f'<svg viewBox="0 0 100 24" preserveAspectRatio="none">{area}<polyline points="{points}"/></svg>'


def device_row(device: dict[str, Any], fleet: Fleet) -> dict[str, Any]:
    name, online, ahead = device["name"], device["online"], device["clock_offset_s"]
    why = f"{device['state']}: {device['reason']}" if device["reason"] else device["state"]
    running, epoch = fleet.running.get(name), str(device["epoch"])
    chips = [
        {"text": m["name"], "note": m["note"], "kind": f"chip {m['tone']}", "tip": m["why"]} for m in models_of(device)
    ]
    return {
        "id": name,
        "name": {"text": name, "href": f"/devices/{name}", "kind": "device", "icon": f"dot {DOTS[device['state']]}"},
        "seen": {"text": ago(device["last_seen"]), "kind": "" if online else "faint", "tip": why},
        "offset": {"text": offset(ahead), "kind": "warn" if abs(ahead or 0) > SKEWED_S else ""},
        "watermark": [
            {"text": f"{epoch if len(epoch) <= 6 else f'…{epoch[-5:]}'} · ", "kind": "muted", "tip": f"epoch {epoch}"},
            number(device["watermark"]),
        ],
        "models": chips or [{"text": "none", "kind": "faint"}],
        "task": {"text": work.asked(running), "icon": "spin", "kind": "task"}
        if running
        else {"text": "idle", "kind": "faint"},
    }


def models_of(device: dict[str, Any]) -> list[dict[str, str]]:
    """What runs on a device and what it should run, as it reported; `why` tells of a failure."""
    reported, wanted = device["reported"].get("bundles"), device["bundles"]
    reported, wanted = (each if isinstance(each, dict) else {} for each in (reported, wanted))
    rows = []
    for name in sorted({*reported, *wanted}):
        has, target = (each if isinstance(each, dict) else {} for each in (reported.get(name), wanted.get(name)))
        row = {key: str(has.get(key) or "") for key in ("version", "digest", "target", "kind")}
        row["target"] = str(target.get("version") or row["target"] or row["version"])
        state = str(has.get("state") or "waiting")
        if state == "committed" and row["target"] != row["version"]:
            state = "waiting"
        note = row["target"] if state == "committed" else f"{row['target']} {state}"
        why = str(has.get("error") or "")
        rows.append(row | {"name": name, "state": state, "note": note, "tone": TONES.get(state, "busy"), "why": why})
    return rows


def job_row(job: dict[str, Any]) -> dict[str, Any]:
    did, state = work.summary(job), job["state"]
    return {
        "id": job["id"],
        "when": ago(job["created"]),
        "device": {"text": job["device"], "href": f"/devices/{job['device']}"},
        "asked": work.asked(job),
        "did": {"text": did, "kind": "mono clip", "tip": did},
        "took": f"{job['updated'] - job['created']:.1f} s" if state in work.ENDED else "",
        "state": {"text": state, "kind": f"badge {work.tone(state)}"},
    }


async def enrol(view: View) -> None:
    """Ask for a name, then show the token once with the command that uses it."""

    async def make() -> None:
        token = await view.services.devices.create_enrolment(
            view.session.subject.name, name.value.strip() or None, hours.value * 3600
        )
        made = name.value.strip() or "NAME"
        form.clear()
        with form:
            ui.label("Run this once on the device. The token is shown only now, and is good for one device.")
            code(f"outrider agent --state ./{made} --hub {origin()} --token={token} --name {made}")
            ui.button("Done", on_click=box.close).props("flat no-caps").classes("self-end")

    with dialog("Enrol a device") as box, ui.column().classes("form") as form:
        name = ui.input("Name, such as press-1 (empty: the device chooses)").props("outlined dense autofocus")
        hours = ui.select({1: "one hour", 24: "one day", 168: "one week"}, value=1, label="Good for")
        hours.props("outlined dense")
        with ui.row().classes("self-end"):
            ui.button("Cancel", on_click=box.close).props("flat no-caps")
            view.button("Make token", make, "create:enrolment")
