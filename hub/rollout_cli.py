"""`outrider rollout`: make, watch, steer and simulate rollouts.

Invariant: as every verb of the hub's, it prints lines for people or one JSON document with `--json`, and an error is a
sentence with a hint on stderr and exit status 1.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hub.errors import HubError
from hub.talk import Json, Url, errors, talking, tell

app = typer.Typer(no_args_is_help=True, help="A version of a bundle in waves, over many devices.")
Id = Annotated[str, typer.Argument(help="The rollout's id.")]
PlanFile = Annotated[Path | None, typer.Argument(help="A YAML or JSON file with the plan; options go over it.")]
Many = Annotated[list[str] | None, typer.Option(help="Only devices in this group; may be given again.")]


def read(path: Path | None, **given: Any) -> dict[str, Any]:
    """A plan of a file and options."""
    import yaml

    plan: Any = {}
    if path is not None:
        try:
            plan = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise HubError(f"{path} cannot be read: {error}", "give a plan in YAML or JSON") from error
        if not isinstance(plan, dict):
            raise HubError(f"{path} holds no plan", "see docs/examples/rollout.yaml")
        try:
            json.dumps(plan, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise HubError(f"{path} is no JSON: {error}", 'put a time in quotes: "2027-01-01T22:00:00"') from error
    for field in ("bundle", "version"):
        if not given.get(field) and not plan.get(field):
            raise HubError(f"the plan names no {field}", f"give a file that does, or --{field}")
    return {**plan, **{name: value for name, value in given.items() if value not in (None, "")}}


def waves(text: str) -> list[dict[str, Any]] | None:
    """`5,10%,rest` as waves; `+` at the end of one asks for approval."""
    made = list[dict[str, Any]]()
    for part in text.split(",") if text else ():
        size = part.strip().removesuffix("+")
        wave: dict[str, Any] = {"approval": True} if part.strip().endswith("+") else {}
        try:
            if size.endswith("%"):
                wave["percent"] = float(size[:-1])
            elif size != "rest":
                wave["count"] = int(size)
        except ValueError:
            raise HubError(f"{part!r} is no wave", "write --waves 5,10%,rest+ (+: after an approval)") from None
        made.append(wave)
    return made or None


@app.command()
def create(
    plan: PlanFile = None,
    bundle: str = "",
    version: str = "",
    waves_: Annotated[str, typer.Option("--waves", help="5,10%,rest+ (+: after an approval).")] = "",
    group: Many = None,
    draft: Annotated[bool, typer.Option(help="Keep it until it is resumed.")] = False,
    hub: Url = None,
    as_json: Json = False,
) -> None:
    """Make a rollout of a plan's file, or of options."""
    with talking(hub) as client:
        document = read(plan, bundle=bundle, version=version, waves=waves(waves_))
        if group:
            document["select"] = document.get("select", {}) | {"groups": group}
        tell(client.post("/v1/rollouts", {"plan": document, "draft": draft}), as_json, line)


@app.command("list")
def list_(limit: int = 20, hub: Url = None, as_json: Json = False) -> None:
    """List rollouts, newest first."""
    with talking(hub) as client:
        tell(client.get("/v1/rollouts", limit=limit), as_json, line)


@app.command()
def show(
    id: Id,
    step: Annotated[str, typer.Option(help="Only devices that stand there, such as failed.")] = "",
    limit: Annotated[int, typer.Option(help="How many devices to show.")] = 50,
    hub: Url = None,
    as_json: Json = False,
) -> None:
    """Show a rollout, its waves, and its devices with the reasons."""
    with talking(hub) as client:
        found = client.get(f"/v1/rollouts/{id}")
        found["devices"] = client.get(f"/v1/rollouts/{id}/devices", step=step, limit=limit)
        tell(found, as_json, whole)


def _verb(name: str, words: str) -> None:
    def run(id: Id, hub: Url = None, as_json: Json = False) -> None:
        with talking(hub) as client:
            tell(client.post(f"/v1/rollouts/{id}/{name}", {}), as_json, line)

    app.command(name, help=words)(run)


_verb("pause", "Give the version to no more devices.")
_verb("resume", "Go on, with what failed so far taken note of; or let a draft begin.")
_verb("approve", "Let the next wave that waits for it begin.")
_verb("abort", "End it; devices that have the version keep it.")
_verb("rollback", "End it, and send back the devices that took the version.")


@app.command()
def label(
    device: str,
    group: Many = None,
    tag: Annotated[list[str] | None, typer.Option(help="May be given again.")] = None,
    zone: Annotated[str, typer.Option(help="Time zone of its site, such as Europe/Berlin.")] = "",
    hub: Url = None,
    as_json: Json = False,
) -> None:
    """Set a device's groups, tags and time zone."""
    with talking(hub) as client:
        said = client.put(f"/v1/devices/{device}/labels", {"groups": group or [], "tags": tag or [], "zone": zone})
        tell(said, as_json, lambda labels: f"{device}: {json.dumps(labels)}")


@app.command()
def simulate(
    plan: PlanFile = None,
    devices: Annotated[int, typer.Option(min=1, max=200_000, help="How many virtual devices.")] = 1000,
    failure: Annotated[float, typer.Option(min=0, max=1, help="Share of devices on which the version fails.")] = 0.0,
    wave: Annotated[int, typer.Option(min=0, help="Only in this wave; 0: in every one.")] = 0,
    offline: Annotated[float, typer.Option(min=0, max=1, help="Share that is offline, half of it for good.")] = 0.0,
    slow: Annotated[float, typer.Option(min=0, max=1, help="Share that takes ten times as long.")] = 0.0,
    silent: Annotated[float, typer.Option(min=0, max=1, help="Share that takes it and says nothing.")] = 0.0,
    install_s: Annotated[float, typer.Option(min=1, help="How long a device takes, about.")] = 120.0,
    approve_s: Annotated[float, typer.Option(min=0, help="How long a person takes to approve.")] = 3600.0,
    size: Annotated[int, typer.Option(min=0, help="The bundle's bytes.")] = 90_000_000,
    seed: int = 1,
    as_json: Json = False,
) -> None:
    """Play a plan against virtual devices, with the hub's own rules and no hub: what would happen, and a plot."""
    from hub import rollout_sim
    from hub.rollout_plan import parse

    with errors():
        parsed = parse({"bundle": "bundle", "version": "next"} | (read(plan) if plan else {}))
        model = rollout_sim.Model(
            failing=failure,
            wave=wave,
            offline=offline,
            slow=slow,
            silent=silent,
            install_s=install_s,
            approve_s=approve_s,
            size=size,
        )
        played = rollout_sim.play(parsed, devices, model, seed)
        tell(rollout_sim.facts(played), as_json, lambda _: rollout_sim.show(played))


def line(found: dict[str, Any]) -> str:
    have = sum(wave["steps"].get("succeeded", 0) for wave in found["waves"])
    total = sum(wave["devices"] for wave in found["waves"])
    place = f"wave {found['wave']}/{len(found['waves'])}"
    head = f"{found['id']} {found['bundle']} {found['version']}  {found['status']}  {place}  {have}/{total}"
    return f"{head}  {found['reason']}".rstrip()


def whole(found: dict[str, Any]) -> str:
    lines = [line(found), f"  it can: {', '.join(found['commands']) or 'nothing more'}"]
    for wave in found["waves"]:
        gate = (" (approved)" if wave["approved"] else " (needs approval)") if wave["approval"] else ""
        steps = ", ".join(f"{count} {step}" for step, count in wave["steps"].items())
        lines.append(f"  wave {wave['wave']}{' canaries' if wave['canary'] else ''}{gate}: {steps or 'nobody yet'}")
    lines += [
        f"  {d['device']:20} wave {d['wave'] + 1} {d['step']:11} {d['reason']}".rstrip() for d in found["devices"]
    ]
    return "\n".join(lines)
