"""One device: state, work and a box to ask for more, models, measurements, documents."""

import json
from typing import Any

from nicegui import ui

from edge_agent.wire.messages import JobKind
from hub import approvals
from hub.audit import millis
from hub.errors import Refused
from hub.jobs import MAX_TEXT
from hub.ui import work
from hub.ui.frame import DOTS, View, ago, e, empty, heading, measured, number, offset, page, set_html
from hub.ui.overview import models_of

JOBS = 12
RECORDS = 780  # the newest telemetry records, that the charts are drawn from
CHARTS = 6
COLOURS = ("#7573e6", "#2fa38f", "#d9963a", "#d0648d")  # of the lines in a chart; no more lines are drawn
Line = list[tuple[int, float]]


@page("/devices/{name}", "Device", "read:device")
async def device_page(view: View) -> None:
    name = view.args["name"]
    view.services.auth.require(view.session.subject, "read:device", name)
    try:
        await view.services.devices.get(name)
    except Refused as refused:
        empty(f"{refused.message[:1].upper()}{refused.message[1:]}", "It may have another name: see the fleet.")
        return
    ui.link("← Fleet", "/").classes("back")
    title, facts = ui.html().classes("title-row"), ui.html().classes("facts card")
    with ui.element("div").classes("two"):
        with ui.element("section").classes("main"):
            await waiting(view, name)
            await ask(view, name)
        with ui.element("section").classes("side"):
            models = ui.html().classes("wide")
            await measurements(view, name)
            documents = ui.html().classes("wide")

    async def show() -> None:
        device = await view.snapshots.device(name)
        dot, why = DOTS[device["state"]], f": {device['reason']}" if device["reason"] else ""
        badge = f'<span class="badge {dot}">{e(device["state"] + why)}</span>'
        set_html(title, f'<h1><i class="dot {dot}"></i>{e(name)}</h1>{badge}')
        set_html(facts, facts_html(device))
        set_html(models, models_html(device))
        set_html(documents, documents_html(device))

    await view.live(show, "read:device")


def facts_html(device: dict[str, Any]) -> str:
    facts = {
        "Last seen": ago(device["last_seen"]),
        "Clock": offset(device["clock_offset_s"]),
        "Epoch": device["epoch"],
        "Committed up to": number(device["watermark"]),
        "Lost": number(device["lost"]),
        "Missing": number(device["missing"]),
        "Agent": device["agent"] or "not known",
    }
    return "".join(f"<div><dt>{label}</dt><dd>{e(value)}</dd></div>" for label, value in facts.items())


def models_html(device: dict[str, Any]) -> str:
    rows = ""
    for model in models_of(device):
        why = f'<p class="bad">{e(model["why"])}</p>' if model["why"] else ""
        why += evidence_html(device, model["name"])
        digest = f'<code title="{e(model["digest"])}">{e(model["digest"][:12])}</code>' if model["digest"] else ""
        note = f'<span class="chip {model["tone"]}"><em>{e(model["note"])}</em></span>'
        kind = '<span class="muted">adapter</span>' if model["kind"] == "adapter" else ""
        rows += f'<div class="row"><b>{e(model["name"])}</b>{kind}{digest}{note}</div>{why}'
    none = '<p class="muted">Nothing installed. Assign a bundle on the <a href="/models">Models</a> page.</p>'
    return f'<div class="heading"><h2>Models</h2></div><div class="card pad">{rows or none}</div>'


def evidence_html(device: dict[str, Any], bundle: str) -> str:
    """Why a version rolled back, as the device reported it: figures, requests it failed at, the end of its log."""
    bundles = device["reported"].get("bundles")
    has = bundles.get(bundle) if isinstance(bundles, dict) else None
    why = has.get("why") if isinstance(has, dict) else None
    if not isinstance(why, dict):
        return ""
    text = e(json.dumps({key: value for key, value in why.items() if value}, indent=2, ensure_ascii=False))
    title = f"<b>Why {e(why.get('version') or 'it')} rolled back</b><span>figures, samples, log</span>"
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>"


def documents_html(device: dict[str, Any]) -> str:
    def document(title: str, note: str, value: Any) -> str:
        text = e(json.dumps(value, indent=2, ensure_ascii=False)) if value else "{}"
        return f"<details><summary><b>{title}</b><span>{note}</span></summary><pre>{text}</pre></details>"

    desired = document("Desired", f"version {device['desired_version']}, the hub decides", device["desired"])
    reported = document("Reported", "the device decides", device["reported"])
    return f'<div class="heading"><h2>Documents</h2></div><div class="card">{desired}{reported}</div>'


async def waiting(view: View, name: str) -> None:
    """Calls that wait for somebody's word, whoever asked and by whatever way, with the buttons to give it."""
    if view.why_not("read:job", name):
        return
    listed, cards = ui.element("div").classes("jobs"), dict[str, tuple[ui.element, ui.html, approvals.Ask]]()

    def add(ask: approvals.Ask) -> None:
        async def say(approve: bool) -> None:
            services, subject = view.services, view.session.subject
            await approvals.answer(services.auth, services.audit, services.jobs, subject, name, ask, approve)
            notify = f"{'Approved' if approve else 'Denied'}: {ask.call}"
            ui.notify(notify, type="positive" if approve else "info", position="top")

        reason = approvals.why_not(view.services.auth, view.session.subject, name, ask)
        with listed, ui.element("div").classes("card job waits") as card:
            html = ui.html()
            with ui.element("div").classes("answers"):
                view.act("Approve", lambda: say(True), reason, icon="check")
                view.act("Deny", lambda: say(False), reason, icon="close", quiet=True)
        cards[ask.digest] = card, html, ask

    async def show() -> None:
        found = {ask.digest: ask for ask in approvals.asks(await view.snapshots.device(name))}
        for gone in cards.keys() - found.keys():
            cards.pop(gone)[0].delete()
        for digest, ask in found.items():
            if digest not in cards:
                add(ask)
            head = f'<b>{e(ask.subject)} asked: {e(ask.text)}</b><span class="badge wait">waiting for approval</span>'
            step = f"{e(ask.at)}: " if ask.at else ""
            set_html(cards[digest][1], f"<header>{head}</header><p>{step}{work.ask_html(ask)}</p>")

    await view.live(show, "read:job", every=0.5)


async def ask(view: View, name: str) -> None:
    """The box for a request, and the device's work, newest first."""
    if reason := view.why_not("read:job", name):
        empty("Its work is not shown", reason, icon="block")
        return

    async def submit() -> None:
        words = text.value.strip()
        if not 0 < len(words) <= MAX_TEXT:
            raise Refused(422, "the request is empty or too long", f"write 1 to {MAX_TEXT} characters")
        await view.services.jobs.create(
            name, JobKind.TASK, {"text": words}, subject=view.session.subject.name, roles=view.session.subject.roles
        )
        text.set_value("")
        await show()

    refused = view.why_not("run:task", name)
    with ui.element("div").classes("card ask"):
        text = ui.input(placeholder=refused or f"Ask {name}, such as: what is the vibration on line 2?")
        text.props(f"borderless dense maxlength={MAX_TEXT} aria-label='Ask this device'").classes("grow")
        text.set_enabled(not refused)
        send = view.button("Ask", submit, "run:task", name, icon="send")
        text.on("keydown.enter", lambda: send.run_method("click"))
    none = ui.html('<div class="nothing">Nothing asked yet. The answer will appear here, step by step.</div>')
    listed = ui.element("div").classes("jobs")
    cards: dict[str, ui.html] = {}

    async def show() -> None:
        jobs = await view.snapshots.jobs(name, JOBS)
        asks = {ask.id: ask for ask in approvals.asks(await view.snapshots.device(name))}
        none.set_visibility(not jobs)
        for job in reversed(jobs):
            if job["id"] not in cards:
                with listed:
                    cards[job["id"]] = made = ui.html().classes("card job")
                made.move(target_index=0)
            set_html(cards[job["id"]], work.card(job, asks.get(job["id"])))
        for gone in cards.keys() - {job["id"] for job in jobs}:
            cards.pop(gone).delete()

    await view.live(show, "read:job", every=0.5)


async def measurements(view: View, name: str) -> None:
    """The newest telemetry as small charts, one a quantity."""
    if view.why_not("read:telemetry", name):
        return
    heading("Telemetry")
    grid = ui.element("div").classes("charts")
    none = ui.html('<div class="card pad muted">No measurements yet.</div>')
    charts: dict[str, tuple[ui.html, ui.echart]] = {}

    async def show() -> None:
        drawn = quantities(await view.snapshots.records(name, RECORDS))
        none.set_visibility(not drawn)
        for quantity, lines in list(drawn.items())[:CHARTS]:
            if quantity not in charts:
                with grid, ui.element("div").classes("card chart"):
                    charts[quantity] = (ui.html(), ui.echart(chart_options()))
            title, chart = charts[quantity]
            set_html(title, legend_html(quantity, lines))
            drawings = [drawing(colour, points) for colour, points in zip(COLOURS, lines.values(), strict=False)]
            if chart.options["series"] != drawings:
                chart.options["series"] = drawings
                chart.update()

    await view.live(show, "read:telemetry", every=2.0)


def quantities(records: list[dict[str, Any]]) -> dict[str, dict[str, Line]]:
    """Lines of (ms since the Unix epoch, value) by quantity and label; the device's own health comes last."""
    found: dict[str, dict[str, Line]] = {}
    for record in records:
        for quantity, label, value in numbers(record["body"]):
            point = (millis(record["ts"]), value)
            found.setdefault(quantity, {}).setdefault(label, []).append(point)
    health = {quantity for quantity in found if quantity.startswith("health ")}
    ordered = sorted(found, key=lambda quantity: (quantity in health, quantity))
    return {quantity.removeprefix("health "): dict(sorted(found[quantity].items())) for quantity in ordered}


def numbers(body: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(quantity, label, value): a sampled call by its words and numbers, such as vibration and line 2; else by path."""
    if isinstance(args := body.get("args"), dict) and "tool" in body:
        words = " ".join(str(value) for value in args.values() if isinstance(value, str)) or str(body["tool"])
        label = " ".join(f"{key} {value}" for key, value in args.items() if not isinstance(value, str))
        result = body.get("result")
        read = measured(result.get("value") if isinstance(result, dict) else result)
        return [] if read is None else [(words, label, read)]
    pairs: list[tuple[str, str, float]] = []
    for key, value in body.items():
        if isinstance(value, dict):
            pairs += [(f"{key} {quantity}", label, read) for quantity, label, read in numbers(value)]
        elif not isinstance(value, bool) and (read := measured(value)) is not None:
            pairs.append((key.replace("_", " "), "", read))
    return pairs


def legend_html(quantity: str, lines: dict[str, Line]) -> str:
    """The quantity, and the latest value of each line in its colour."""
    latest = "".join(
        f'<b title="{e(label)}"><i style="background:{colour}"></i>{number(points[-1][1])}{short(label)}</b>'
        for colour, (label, points) in zip(COLOURS, lines.items(), strict=False)
    )
    return f"<span>{e(quantity)}</span>{latest}"


def short(label: str) -> str:
    """A line's name beside its value."""
    return f' <small class="faint">{e(label[:24])}</small>' if label else ""


def drawing(colour: str, points: Line) -> dict[str, Any]:
    line = {"width": 1.5, "color": colour}
    return {"type": "line", "data": points, "showSymbol": False, "lineStyle": line, "itemStyle": {"color": colour}}


def chart_options() -> dict[str, Any]:
    """Axes fitted to the data, readable on light and dark."""
    label = {"color": "#8b8f9c", "fontSize": 10, "hideOverlap": True}
    quiet = {"axisLabel": label, "axisTick": {"show": False}, "splitNumber": 2}
    return {
        "animation": False,
        "grid": {"left": 36, "right": 6, "top": 8, "bottom": 18},
        "tooltip": {"trigger": "axis", "confine": True},
        "xAxis": quiet
        | {"type": "time", "splitLine": {"show": False}, "axisLine": {"lineStyle": {"color": "#8b8f9c55"}}},
        "yAxis": quiet | {"type": "value", "scale": True, "splitLine": {"lineStyle": {"color": "#8b8f9c22"}}},
        "series": [],
    }
