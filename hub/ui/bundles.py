"""Models: what is published, where it is installed, and assigning it."""

from typing import Any

from nicegui import ui

from hub.errors import Refused
from hub.ui.frame import View, ago, empty, heading, page, set_rows, size, table
from hub.ui.overview import models_of, origin
from hub.ui.snapshots import Fleet

NAME = """<b>{{ props.row.name }}</b> <span class="muted">{{ props.row.version }}</span>"""
DIGEST = """<code :title="props.row.digest">{{ props.row.digest.slice(0, 12) }}</code>"""
ON = """<a v-for="d in props.row.on" class="chip" :class="d.tone" :href="'/devices/' + d.name">{{ d.name }}
  <i v-if="d.note">{{ d.note }}</i><q-tooltip v-if="d.why">{{ d.why }}</q-tooltip></a>
  <span v-if="!props.row.on.length" class="faint">no device</span>"""
ASSIGN = """<q-btn unelevated dense no-caps label="Assign" class="quiet" :disable="!!props.row.refused"
  @click="() => $parent.$emit('assign', props.row.id)"><q-tooltip v-if="props.row.refused">{{ props.row.refused }}
  </q-tooltip></q-btn>"""


@page("/models", "Models", "read:bundle", "read:device")
async def models(view: View) -> None:
    heading("Models", "signed bundles that devices install and check by themselves")
    with ui.element("section").classes("card") as listed:
        bundles = table(
            {"name": "Bundle", "kind": "Kind", "size": "Size", "digest": "Content", "published": "Published",
             "on": "Devices", "act": ""},
            {"name": NAME, "digest": DIGEST, "on": ON, "act": ASSIGN},
            minor=("kind", "size", "digest", "published"),
        )  # fmt: skip
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
        set_rows(bundles, [row(bundle, fleet) | {"refused": refused} for bundle in published])
        listed.set_visibility(bool(published))
        nothing.set_visibility(not published)

    bundles.on("assign", lambda event: assign(view, str(event.args)))
    await view.live(show, "read:bundle", "read:device")


def row(bundle: dict[str, Any], fleet: Fleet) -> dict[str, Any]:
    name, version = bundle["name"], bundle["version"]
    on = []
    for device in fleet.devices:
        for model in models_of(device):
            if model["name"] == name and version == model["target"]:
                note = "" if model["state"] == "committed" else model["state"]
                on.append({"name": device["name"], "tone": model["tone"], "note": note, "why": model["why"]})
            elif model["name"] == name and version == model["version"]:
                on.append({"name": device["name"], "tone": "", "note": "still running", "why": ""})
    return {
        "id": f"{name} {version}",
        "name": name,
        "version": version,
        "kind": bundle["kind"],
        "size": size(bundle["size"]),
        "digest": bundle["content_digest"],
        "published": f"{ago(bundle['published'])} by {bundle['published_by']}",
        "on": on,
    }


async def assign(view: View, id: str) -> None:
    """Choose devices that should install the bundle."""
    name, _, version = id.partition(" ")
    names = [device["name"] for device in (await view.snapshots.fleet()).devices]

    async def give() -> None:
        if not chosen.value:
            raise Refused(422, "no device is chosen", "choose at least one")
        for device in chosen.value:
            view.services.auth.require(view.session.subject, "assign:bundle", device)
            await view.services.assign_bundle(device, name, version, view.session.subject.name)
        dialog.close()
        ui.notify(f"{name} {version} assigned to {len(chosen.value)} devices: they check and install it now")

    with ui.dialog(value=True) as dialog, ui.card().classes("dialog"):
        ui.label(f"Assign {name} {version}").classes("title")
        chosen = ui.select(names, multiple=True, label="Devices", value=names if len(names) == 1 else [])
        chosen.props("outlined dense use-chips").classes("wide")
        with ui.row().classes("self-end"):
            ui.button("All", on_click=lambda: chosen.set_value(names)).props("flat no-caps")
            ui.button("Cancel", on_click=dialog.close).props("flat no-caps")
            view.button("Assign", give, "assign:bundle")
