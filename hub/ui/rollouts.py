"""Rollouts: what goes out, how far each wave is, why it stopped; and telling it what to do."""

from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import ui

from hub.errors import Refused
from hub.ui.frame import Table, View, ago, clock, dialog, e, empty, heading, page, set_html

TONES = {
    "succeeded": "ok",
    "running": "busy",
    "scheduled": "busy",
    "aborted": "bad",
    "paused": "bad",
    "rolled_back": "bad",
}
STEPS = {
    "succeeded": "ok",
    "failed": "bad",
    "missed": "bad",
    "assigned": "busy",
    "downloading": "busy",
    "trying": "busy",
}
PARTS = (
    ("ok", ("succeeded",)),
    ("busy", ("assigned", "downloading", "trying", "reverting")),
    ("bad", ("failed", "missed")),
)
VERBS = {"pause": "Pause", "resume": "Resume", "approve": "Approve", "abort": "Abort", "rollback": "Roll back"}
SURE = {
    "abort": "It ends here. Devices that have the version keep it.",
    "rollback": "It ends here, and devices that took the version go back to the one before.",
}
SHOWN = 200


@page("/rollouts", "Rollouts", "read:rollout")
async def rollouts(view: View) -> None:
    heading("Rollouts", "a version in waves: it goes on only while enough devices do well")
    with ui.element("section").classes("card") as listed:
        names = ("bundle", "status", "progress", "wave", "why", "made")
        headings = ("Bundle", "Status", "Devices", "Wave", "Why", "Made")
        table = Table(dict(zip(names, headings, strict=True)), minor=("wave", "why", "made"))
    with ui.element("div") as nothing:
        empty("No rollouts yet", "Write a plan, try it on virtual devices, and make it:",
              "outrider rollout simulate plan.yaml && outrider rollout create plan.yaml", "waves")  # fmt: skip

    async def show() -> None:
        found = await view.snapshots.get("rollouts", view.services.rollouts.list)
        table.show([row(each) for each in found])
        listed.set_visibility(bool(found))
        nothing.set_visibility(not found)

    await view.live(show, "read:rollout")


def row(found: dict[str, Any]) -> dict[str, Any]:
    have = sum(wave["steps"].get("succeeded", 0) for wave in found["waves"])
    name = {"text": f"{found['bundle']} {found['version']}", "href": f"/rollouts/{found['id']}", "kind": "strong"}
    return {
        "id": found["id"],
        "bundle": name,
        "status": {"text": found["status"].replace("_", " "), "kind": f"badge {TONES.get(found['status'], '')}"},
        "progress": f"{have} of {sum(wave['devices'] for wave in found['waves'])}",
        "wave": f"{found['wave']} of {len(found['waves'])}",
        "why": {"text": found["reason"], "kind": "clip", "tip": found["reason"]},
        "made": f"{ago(found['created'])} by {found['created_by']}",
    }


@page("/rollouts/{id}", "Rollout", "read:rollout")
async def rollout(view: View) -> None:
    id = view.args["id"]
    try:
        await view.services.rollouts.get(id)
    except Refused as refused:
        empty(f"{refused.message[:1].upper()}{refused.message[1:]}", "It may have been on another hub: see the list.")
        return
    ui.link("← Rollouts", "/rollouts").classes("back")
    with ui.row().classes("title-row"):
        title = ui.html()
        ui.element("div").classes("grow")
        buttons = {verb: button(view, id, verb) for verb in VERBS}
    why, waves = ui.html().classes("wide"), ui.html().classes("wide")
    steps = {"": "all", **{step: step for step in STEPS}}
    with ui.element("section").classes("card wide"):
        with ui.element("div").classes("search"):
            chosen = ui.select(steps, value="").props("dense borderless aria-label='Which devices'")
        names, headings = ("device", "wave", "step", "why", "when"), ("Device", "Wave", "Stands", "Why", "Since")
        table = Table(dict(zip(names, headings, strict=True)), minor=("wave", "when"))
        more = ui.label().classes("faint")

    async def show() -> None:
        service = view.services.rollouts
        found = await view.snapshots.get(f"rollout {id}", lambda: service.get(id))
        step = str(chosen.value or "")
        places = await view.snapshots.get(f"rollout {id} {step}", lambda: service.devices(id, step, limit=SHOWN))
        set_html(title, title_html(found))
        set_html(why, f'<p class="card pad">{e(found["reason"] or "under way")}</p>')
        set_html(waves, "".join(wave_html(wave, found["wave"]) for wave in found["waves"]))
        for verb, wrapped in buttons.items():
            wrapped.set_visibility(verb in found["commands"])
        table.show([device_row(place) for place in places])
        more.set_text(f"The first {SHOWN} devices are shown: choose where they stand" if len(places) == SHOWN else "")

    chosen.on_value_change(show)
    await view.live(show, "read:rollout")


def button(view: View, id: str, verb: str) -> ui.element:
    """A command; those that end the rollout ask first."""
    action = "approve:rollout" if verb == "approve" else "manage:rollout"

    async def give() -> None:
        await view.services.rollouts.command(id, verb, view.session.subject.name)
        ui.notify(f"{VERBS[verb]}: done")

    async def ask() -> None:
        with dialog(f"{VERBS[verb]} this rollout?") as box:
            ui.label(SURE[verb])

            async def sure() -> None:
                await give()
                box.close()

            with ui.row().classes("self-end"):
                ui.button("Cancel", on_click=box.close).props("flat no-caps")
                view.button(VERBS[verb], sure, action)

    run: Callable[[], Awaitable[None]] = ask if verb in SURE else give
    with ui.element("span").classes(f"verb-{verb}") as wrapped:
        view.button(VERBS[verb], run, action, quiet=verb in ("pause", "abort", "rollback"))
    return wrapped


def title_html(found: dict[str, Any]) -> str:
    badge = f'<span class="badge {TONES.get(found["status"], "")}">{e(found["status"].replace("_", " "))}</span>'
    note = f'<span class="faint">{e(found["id"])} · {clock(found["created"])} by {e(found["created_by"])}</span>'
    return f"<h1>{e(found['bundle'])} {e(found['version'])} {badge}</h1>{note}"


def wave_html(wave: dict[str, Any], current: int) -> str:
    """A wave as a bar: what succeeded, what is under way, what failed."""
    total, steps = wave["devices"], wave["steps"]
    bar = ""
    for tone, names in PARTS:
        if count := sum(steps.get(name, 0) for name in names):
            bar += f'<i class="{tone}" style="width:{100 * count / total:.2f}%"></i>'
    name = f"Wave {wave['wave']}{', canaries' if wave['canary'] else ''}"
    gate = ("approved" if wave["approved"] else "needs approval") if wave["approval"] else ""
    words = " · ".join([*(f"{count} {step}" for step, count in steps.items()), *([gate] if gate else [])])
    here = " here" if wave["wave"] == current else ""
    head = f"<header><b>{e(name)}</b><span>{e(words or 'nobody yet')}</span></header>"
    return f'<div class="wave card pad{here}">{head}<div class="bar">{bar}</div></div>'


def device_row(place: dict[str, Any]) -> dict[str, Any]:
    past = "\n".join(f"{clock(at)} {step}{f': {reason}' if reason else ''}" for at, step, reason in place["history"])
    figures = ", ".join(f"{name} {value}" for name, value in place["figures"].items())
    why = " · ".join(part for part in (place["reason"], figures) if part)
    return {
        "id": place["device"],
        "device": {"text": place["device"], "href": f"/devices/{place['device']}", "kind": "device"},
        "wave": str(place["wave"] + 1),
        "step": {"text": place["step"], "kind": f"badge {STEPS.get(place['step'], '')}", "tip": past},
        "why": {"text": why, "kind": "clip long", "tip": why},
        "when": ago(place["changed"]),
    }
