"""`outrider hub audit-verify`, `audit-export` and `retention`."""

from datetime import UTC, datetime
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
    lines = [f"{n}: {c['entries']} entries, {c['wrong'] or 'whole'}{_gone(c)}" for n, c in found["devices"].items()]
    return "\n".join([f"hub: {own}", *lines])


def _gone(chain: dict[str, Any]) -> str:
    gone = chain.get("pruned")
    return f"; older ones were pruned, up to seq {gone['seq']} of epoch {gone['epoch']}" if gone else ""


@app.command()
def retention(hub: Url = None, as_json: Json = False) -> None:
    """Show how long records and finished jobs are kept, and what was pruned."""
    with talking(hub) as client:
        tell(client.get("/v1/retention"), as_json, _retention)


def _retention(found: dict[str, Any]) -> str:
    at = f"{datetime.fromtimestamp(found['at'], UTC):%F %T} UTC" if found["at"] else "not yet"
    lines = [f"last run: {at}"]
    for what in ("records", "jobs", "uploads"):
        kept = found[what]
        age = f"{kept['days']:g} days" if kept["days"] else "for ever"
        since = datetime.fromtimestamp(kept["before"], UTC)
        lines.append(f"{what}: kept {age}, here since {since:%F}; pruned {kept['last']}, in all {kept['total']}")
    return "\n".join(lines)


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
        while devices and (entries := client.get("/v1/audit", after=after, limit=1000)["entries"]):
            for entry in entries:  # made meanwhile: they tell what of the above was pruned
                typer.echo(show[0](entry))
            after = entries[-1]["id"]
        for name, chain in verdicts.items():
            if form == "jsonl":
                typer.echo(msgspec.json.encode({"device": name, "chain": chain}))
            elif chain["wrong"]:
                typer.echo(f"outrider hub: the chain of {name} is broken: {chain['wrong']}", err=True)
