"""`outrider hub audit-verify` and `audit-export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hub.errors import HubError
from hub.talk import Json, Url, errors, talking, tell

app = typer.Typer()
WALKING_S = 1800.0  # the hub follows each chain from its start before it answers


@app.command("audit-verify")
def audit_verify(
    file: Annotated[Path | None, typer.Argument(help="An export as JSON Lines, checked with no hub.")] = None,
    devices: Annotated[bool, typer.Option(help="It has devices' entries: what was anchored must be there.")] = True,
    hub: Url = None,
    as_json: Json = False,
) -> None:
    """Check that no entry of the audit logs was changed or taken out; exits 1 when one was."""
    if file is not None:
        from hub.audit import check_export

        with errors():
            try:
                with file.open("rb") as lines:
                    found: dict[str, Any] = check_export(lines, devices)
            except (OSError, ValueError) as error:
                raise HubError(
                    f"{file} cannot be read: {error}", "give an export as JSON Lines, from its start"
                ) from error
    else:
        with talking(hub) as client:
            found = client.get("/v1/audit/verify", timeout=WALKING_S)
    wrong = [name for name, chain in found["devices"].items() if chain["wrong"]]
    tell(found, as_json, _chains)
    raise typer.Exit(bool(wrong) or found["first_broken"] is not None)


def _chains(found: dict[str, Any]) -> str:
    own = "whole" if found["first_broken"] is None else f"broken from entry {found['first_broken']} on"
    lines = [f"{name}: {c['entries']} entries, {c['wrong'] or 'whole'}" for name, c in found["devices"].items()]
    return "\n".join([f"hub: {own}", *lines])


@app.command("audit-export")
def audit_export(
    form: Annotated[str, typer.Option("--format", help="jsonl, or cef for a SIEM")] = "jsonl",
    after: Annotated[int, typer.Option(help="Only entries of the hub with an id above this.")] = 0,
    devices: Annotated[bool, typer.Option(help="Devices' entries too.")] = True,
    hub: Url = None,
) -> None:
    """Print the audit log, oldest first, one entry a line; then devices' entries and each chain's verdict."""
    import msgspec

    from hub.audit import cef, cef_device

    with talking(hub) as client:
        if form not in ("jsonl", "cef"):
            raise HubError(f"format {form!r} is not known", "jsonl or cef")
        show: Any = {"jsonl": (msgspec.json.encode, msgspec.json.encode), "cef": (cef, cef_device)}[form]
        verdicts = client.get("/v1/audit/verify", timeout=WALKING_S)["devices"] if devices else {}
        while entries := client.get("/v1/audit", after=after, limit=1000)["entries"]:
            for entry in entries:
                typer.echo(show[0](entry))
            after = entries[-1]["id"]
        place: dict[str, Any] = {}
        while devices and (entries := client.get("/v1/audit/devices", **place)["entries"]):
            for entry in entries:
                typer.echo(show[1](entry))
            place = {name: entries[-1][name] for name in ("device", "epoch", "seq")}
        for name, chain in verdicts.items():
            if form == "jsonl":
                typer.echo(msgspec.json.encode({"device": name, "chain": chain}))
            elif chain["wrong"]:
                typer.echo(f"outrider hub: the chain of {name} is broken: {chain['wrong']}", err=True)
