"""`outrider hub devices`, `jobs`, `task`, `fanout`, …: what a person tells devices and hears of them."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_agent.wire.messages import TERMINAL
from hub.errors import HubError
from hub.talk import Json, Url, talking, tell

app = typer.Typer()


@app.command()
def devices(hub: Url = None, as_json: Json = False) -> None:
    """List devices with their true presence."""
    with talking(hub) as client:
        tell(client.get("/v1/devices"), as_json, _device_line)


@app.command()
def desired(
    device: str,
    set: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of `config`; VALUE null removes.")] = None,
    file: Annotated[Path | None, typer.Option(help="A merge patch of the whole document, as JSON.")] = None,
    expect: Annotated[int | None, typer.Option(help="Only when the document is at this version.")] = None,
    hub: Url = None,
    as_json: Json = False,
) -> None:
    """Configure a device (`--set telemetry_s=5 --set log=debug`), or show what is desired and what it reports."""
    with talking(hub) as client:
        patch = _patch(set or [], file)
        if patch:
            headers = {} if expect is None else {"If-Match": f'"{expect}"'}
            client.patch(f"/v1/devices/{device}/desired", patch, headers=headers)
        seen = client.get(f"/v1/devices/{device}")
        shown = {name: seen[name] for name in ("desired", "desired_version", "reported", "reported_version")}
        tell(shown, as_json, _twin_lines)


def _patch(given: list[str], file: Path | None) -> dict[str, Any]:
    try:
        patch = json.loads(file.read_text()) if file else {}
    except (OSError, ValueError) as error:
        raise HubError(f"{file} is no JSON document: {error}", 'such as {"config": {"log": "debug"}}') from error
    if not isinstance(patch, dict):
        raise HubError(f"{file} is no JSON object", 'such as {"config": {"log": "debug"}}')
    for each in given:
        key, equals, text = each.partition("=")
        if not key or not equals:
            raise HubError(f"--set {each!r} is not KEY=VALUE", "such as --set telemetry_s=5")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        patch.setdefault("config", {})[key] = value
    return patch


def _twin_lines(seen: dict[str, Any]) -> str:
    config = seen["reported"].get("config")
    config = config if isinstance(config, dict) else {"error": "nothing reported yet"}
    told = config.get("error") or f"took that of version {config.get('version')}"
    asked = json.dumps(seen["desired"].get("config", {}))
    lines = f"desired, version {seen['desired_version']}: config {asked}", f"the device: {told}"
    return "\n".join(lines)


@app.command("revoke-device")
def revoke_device(device: str, hub: Url = None) -> None:
    """Void a device's key and certificates; a token made for its name lets it enrol again."""
    with talking(hub) as client:
        client.delete(f"/v1/devices/{device}")
        typer.echo(f"{device} is revoked")


@app.command()
def task(device: str, text: str, key: str = "", hub: Url = None, as_json: Json = False) -> None:
    """Give a device a task in plain words."""
    with talking(hub) as client:
        job = client.post(f"/v1/devices/{device}/tasks", {"text": text, "idempotency_key": key})
        tell(job, as_json, _job_line)


@app.command()
def fanout(
    group: str,
    text: Annotated[str, typer.Argument(help="A task in plain words; with --tool nothing.")] = "",
    tool: Annotated[str, typer.Option(help="Call this tool instead.")] = "",
    args: Annotated[str, typer.Option(help="The tool's arguments, as JSON.")] = "{}",
    at_once: Annotated[int, typer.Option(help="At most so many devices at a time; 0: all.")] = 0,
    key: str = "",
    ttl_s: float = 3600,
    hub: Url = None,
    as_json: Json = False,
) -> None:
    """Give every device of a group a job."""
    with talking(hub) as client:
        try:
            body = {"tool": tool, "args": json.loads(args)} if tool else {"text": text}
        except ValueError as error:
            raise HubError(f"--args is no JSON: {error}", """such as '{"line": 2}'""") from error
        job = {"kind": "tool" if tool else "task", "body": body, "idempotency_key": key, "ttl_s": ttl_s}
        tell(client.post(f"/v1/groups/{group}/jobs", job | {"at_once": at_once}), as_json, _fanout_lines)


@app.command("fanout-show")
def fanout_show(fanout: str, hub: Url = None, as_json: Json = False) -> None:
    """How the jobs of a fan-out fare."""
    with talking(hub) as client:
        tell(client.get(f"/v1/fanouts/{fanout}"), as_json, _fanout_lines)


def _fanout_lines(seen: dict[str, Any]) -> str:
    states = ", ".join(f"{n} {state}" for state, n in seen["states"].items())
    lines = (f"  {j['id']} {j['device']:20} {'held' if j['held'] else j['state']}{_far(j)}" for j in seen["jobs"])
    return "\n".join([f"{seen['id']} for {seen['group']}: {states}", *lines])


@app.command()
def cancel(id: str, hub: Url = None, as_json: Json = False) -> None:
    """Take back a job, or what is left of a fan-out."""
    with talking(hub) as client:
        if len(id) == 17 and id.startswith("f"):  # a job has 16 digits
            tell(client.post(f"/v1/fanouts/{id}/cancel", {}), as_json, _fanout_lines)
        else:
            tell(client.post(f"/v1/jobs/{id}/cancel", {}), as_json, _job_line)


@app.command()
def jobs(device: str | None = None, limit: int = 20, hub: Url = None, as_json: Json = False) -> None:
    """List jobs, newest first."""
    with talking(hub) as client:
        tell(client.get("/v1/jobs", device=device, limit=limit), as_json, _job_line)


@app.command()
def support(
    device: str,
    out: Annotated[Path | None, typer.Option(help="File to write; its own name if not given.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the device.")] = 120,
    hub: Url = None,
    as_json: Json = False,
) -> None:
    """Fetch what is needed to help: checks, settings with no secrets, status, the last log lines, in a ZIP file."""
    with talking(hub) as client:
        job = client.post(f"/v1/devices/{device}/jobs", {"kind": "tool", "body": {"tool": "support_bundle"}})
        end = time.monotonic() + timeout
        while True:
            time.sleep(0.5)
            job = client.get(f"/v1/jobs/{job['id']}")
            made = job["result"].get("result")
            if job["state"] in TERMINAL and not isinstance(made, dict):
                told = f"{device} made none: {job['error'] or job['state']}"
                raise HubError(told, "there: outrider doctor --bundle FILE")
            try:
                if isinstance(made, dict):
                    file = out or Path(f"{device}-{Path(str(made['name'])).name}")
                    client.download(f"/v1/devices/{device}/blobs/{made['sha256']}", file)
                    return tell(made | {"file": str(file)}, as_json, lambda m: f"{m['file']}: {m['size']} bytes")
            except HubError:
                if time.monotonic() > end:
                    raise
            if time.monotonic() > end:
                raise HubError(f"{device} has not answered in {timeout:g} s", "outrider hub jobs shows when it has")


@app.command()
def publish(
    folder: Path,
    name: str = "",
    version: str = "",
    kind: str = "",
    license: str = "",
    hub: Url = None,
    as_json: Json = False,
) -> None:
    """Upload a folder and publish it as a bundle; a bundle.json in it may give the manifest's fields."""
    with talking(hub) as client:
        made = client.publish(folder, name, version, kind, license, {})
        tell(made, as_json, lambda m: f"{m['name']} {m['version']} {m['manifest_sha256']}")


@app.command()
def assign(device: str, name: str, version: str, hub: Url = None, as_json: Json = False) -> None:
    """Make a device install a published bundle."""
    with talking(hub) as client:
        done = client.post(f"/v1/devices/{device}/bundles", {"name": name, "version": version})
        tell(done, as_json, lambda d: f"{d['device']} shall have {name} {version}")


def _device_line(device: dict[str, Any]) -> str:
    presence = device["presence"]
    state = f"{presence['state']:7}"
    offset = "" if presence["clock_offset_s"] is None else f"  clock {presence['clock_offset_s']:+.3f} s"
    why = f"  ({presence['reason']})" if presence["reason"] else ""
    return f"{device['name']:20} {state} epoch {device['epoch']} seq {device['watermark']}{offset}{why}"


def _job_line(job: dict[str, Any]) -> str:
    """The job, and below it its calls and its answer or error."""
    what = job["body"].get("text") or job["body"].get("tool") or ""
    line = f"{job['id']} {job['device']:20} {job['state']:10} {what}".rstrip() + _far(job)
    result = job["result"]
    told = result.get("steps")
    steps = [step for step in told if isinstance(step, dict)] if isinstance(told, list) else []
    made = [step for step in steps if step.get("role") == "tool" and "call" in step]
    calls = "; ".join(f"{step['call']} → {step.get('text')}" for step in made)
    ended = job["error"] or result.get("answer") or result.get("result") or ""
    ended = ended if isinstance(ended, str) else json.dumps(ended, ensure_ascii=False)
    return line + "".join(f"\n    {' '.join(more.split())[:200]}" for more in (calls, ended) if more)


def _far(job: dict[str, Any]) -> str:
    if job["state"] not in ("running", "delivered"):
        return ""
    progress, ends = job.get("progress"), "  (is to end)" if job.get("cancelled_by") else ""
    of = f" of {progress['total']}" if progress and progress["total"] else ""
    return (f"  {progress['done']}{of}: {progress['text']}" if progress else "") + ends
