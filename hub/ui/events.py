"""Events: the newest entries of the audit log, and a check of its chain."""

import json

from nicegui import ui

from hub.ui.frame import View, clock, heading, page, set_rows, table

SHOWN = 200
ACTION = """<span class="badge" :class="props.row.tone">{{ props.row.action }}</span>"""
DETAIL = """<span class="mono clip long" :title="props.row.detail">{{ props.row.detail }}</span>"""


@page("/events", "Events", "read:audit")
async def events(view: View) -> None:
    async def check() -> None:
        broken = await view.services.audit.first_broken()
        if broken is None:
            ui.notify("Every entry follows from the one before it", type="positive", position="top")
        else:
            ui.notify(
                f"The chain breaks at entry {broken}", type="negative", position="top", timeout=0, close_button=True
            )

    with ui.row().classes("title-row"):
        heading("Events", "what people and devices did, each entry chained to the one before")
        ui.element("div").classes("grow")
        view.button("Check the chain", check, "read:audit", icon="verified", quiet=True)
    with ui.element("section").classes("card"):
        entries = table(
            {"id": "No.", "when": "When", "actor": "Who", "action": "Did", "detail": "Detail"},
            {"action": ACTION, "detail": DETAIL},
            minor=("id", "when"),
        )

    async def show() -> None:
        newest = await view.snapshots.events(SHOWN)
        set_rows(
            entries,
            [
                {
                    "id": entry["id"],
                    "when": clock(entry["ts"]),
                    "actor": entry["actor"],
                    "action": entry["action"],
                    "tone": "bad" if entry["action"].startswith(("refuse:", "dead:")) else "",
                    "detail": json.dumps(entry["detail"], ensure_ascii=False),
                }
                for entry in newest
            ],
        )

    await view.live(show, "read:audit", every=2.0)
