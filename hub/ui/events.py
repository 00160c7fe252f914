"""Events: the newest entries of the audit log, and a check of its chain."""

import json
from typing import Any

from nicegui import ui

from hub.ui.frame import Table, View, clock, heading, page

SHOWN = 200


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
        headings = {"id": "No.", "when": "When", "actor": "Who", "action": "Did", "detail": "Detail"}
        entries = Table(headings, minor=("id", "when"))

    async def show() -> None:
        entries.show([row(entry) for entry in await view.snapshots.events(SHOWN)])

    await view.live(show, "read:audit", every=2.0)


def row(entry: dict[str, Any]) -> dict[str, Any]:
    refused = entry["action"].startswith(("refuse:", "dead:"))
    detail = json.dumps(entry["detail"], ensure_ascii=False)
    return {
        "id": entry["id"],
        "when": clock(entry["ts"]),
        "actor": entry["actor"],
        "action": {"text": entry["action"], "kind": "badge bad" if refused else "badge"},
        "detail": {"text": detail, "kind": "mono clip long", "tip": detail},
    }
