"""Models: what is published, where it is installed, and assigning it."""

from typing import Any

from nicegui import ui

from hub.errors import Refused
from hub.ui.frame import Table, View, ago, dialog, empty, heading, page, size
from hub.ui.overview import models_of, origin
from hub.ui.snapshots import Fleet


@page("/models", "Models", "read:bundle", "read:device")
async def models(view: View) -> None:
    heading("Models", "signed bundles that devices install and check by themselves")
    with ui.element("section").classes("card") as listed:
        headings = ("Bundle", "Kind", "Size", "Content", "Published", "Devices", "")
        names = ("name", "kind", "size", "digest", "published", "on", "act")
        bundles = Table(dict(zip(names, headings, strict=True)), minor=names[1:5])
    with ui.element("div") as nothing:
        command = f"OUTRIDER_PASSWORD=… outrider models publish smollm2 --hub {origin()}"
        empty(
            "No bundles yet",
            "Publish a model, or a folder of one, from the machine that has it:",
            command,
            "inventory_2",
        )

    async def show() -> None:
        published, fleet = await view.snapshots.bundles(), await view.snapshots.fleet()
        refused = view.why_not("assign:bundle")
        act = {"text": "Assign", "act": True, "off": refused}
        bundles.show([row(bundle, fleet) | {"act": act} for bundle in published])
        listed.set_visibility(bool(published))
        nothing.set_visibility(not published)

    bundles.on("act", lambda event: assign(view, str(event.args)))
    await view.live(show, "read:bundle", "read:device")


def row(bundle: dict[str, Any], fleet: Fleet) -> dict[str, Any]:
    name, version = bundle["name"], bundle["version"]
    on = []
    for device in fleet.devices:
        for model in models_of(device):
            if model["name"] == name and version in (model["target"], model["version"]):
                wanted = version == model["target"]
                note = ("" if model["state"] == "committed" else model["state"]) if wanted else "still running"
                kind, tip = (f"chip {model['tone']}", model["why"]) if wanted else ("chip", "")
                link = f"/devices/{device['name']}"
                on.append({"text": device["name"], "href": link, "kind": kind, "note": note, "tip": tip})
    return {
        "id": f"{name} {version}",
        "name": [{"text": f"{name} ", "kind": "strong"}, {"text": version, "kind": "muted"}],
        "kind": bundle["kind"],
        "size": size(bundle["size"]),
        "digest": {"text": bundle["content_digest"][:12], "kind": "mono", "tip": bundle["content_digest"]},
        "published": f"{ago(bundle['published'])} by {bundle['published_by']}",
        "on": on or [{"text": "no device", "kind": "faint"}],
    }


async def assign(view: View, id: str) -> None:
    """Choose devices that should install the bundle."""
    if view.ended():
        return
    name, _, version = id.partition(" ")
    names = [device["name"] for device in (await view.snapshots.fleet()).devices]

    async def give() -> None:
        if not chosen.value:
            raise Refused(422, "no device is chosen", "choose at least one")
        for device in chosen.value:
            view.services.auth.require(view.session.subject, "assign:bundle", device)
            await view.services.assign_bundle(device, name, version, view.session.subject.name)
        box.close()
        ui.notify(f"{name} {version} assigned to {len(chosen.value)} devices: they check and install it now")

    with dialog(f"Assign {name} {version}") as box:
        chosen = ui.select(names, multiple=True, label="Devices", value=names if len(names) == 1 else [])
        chosen.props("outlined dense use-chips").classes("wide")
        with ui.row().classes("self-end"):
            ui.button("All", on_click=lambda: chosen.set_value(names)).props("flat no-caps")
            ui.button("Cancel", on_click=box.close).props("flat no-caps")
            view.button("Assign", give, "assign:bundle")
