"""`outrider hub`: run a hub, and talk to one.

Invariant: every verb prints a line for each thing, or one JSON document with `--json`; an error is a sentence with a
hint on stderr and exit status 1.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edge_agent.wire.messages import TERMINAL
from hub.errors import HubError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Root = Annotated[Path | None, typer.Option(help="Folder of the root key, which may be offline (DATA/root).")]
Url = Annotated[str | None, typer.Option("--hub", help="The hub's URL; else OUTRIDER_HUB, else the last login's.")]


class RunByDefault(TyperGroup):
    """`outrider hub --data DIR` is `outrider hub run --data DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "--install-completion", "--show-completion"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=RunByDefault, help="Run a hub, and talk to one.", no_args_is_help=True)
broker = typer.Typer(help="The MQTT broker of a site.", no_args_is_help=True)


@broker.callback()
def _broker() -> None:
    """A group, though it has one verb."""


@broker.command()
def config(
    data: Annotated[Path, typer.Option(help="The hub's data directory, which holds the certificate authority.")],
    out: Annotated[Path, typer.Option(help="Folder to write mosquitto.conf and its files to.")],
    name: Annotated[list[str], typer.Option(help="Host name or address that devices use; may be given again.")],
    port: int = 8883,
    bind: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    user: Annotated[str, typer.Option(help="User that Mosquitto runs as, when started as root.")] = "mosquitto",
    fleet: Annotated[str, typer.Option(help="Name of the fleet.")] = "main",
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Write a Mosquitto configuration: mutual TLS, topic rules for each device, limits, revoked certificates."""
    from hub.broker import write_config
    from hub.ca import Authority

    with _errors():
        write_config(out, Authority(data / "ca", root or data / "root", fleet), name, port, bind, user)
        url = f"mqtts://{name[0]}:{port}"
        _print(
            {"config": str(out / "mosquitto.conf"), "url": url},
            as_json,
            lambda made: (
                f"{made['config']} is written. Start Mosquitto with it, then: "
                f"outrider hub --data {data} --broker {url} --broker-config {out}"
            ),
        )


@app.command("renew-ca")
def renew_ca(
    data: Annotated[Path, typer.Option(help="The hub's data directory.")],
    fleet: str = "main",
    root: Root = None,
) -> None:
    """Sign the hub's issuing certificate for another ten years; needs the root key."""
    from hub.ca import renew_issuing

    with _errors():
        renew_issuing(data / "ca", root or data / "root", fleet)
        typer.echo("renewed: start the hub again, and write the broker's configuration again")


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="Where the hub keeps everything.")],
    http: Annotated[str, typer.Option(help="Address to serve HTTP on.")] = "127.0.0.1:8080",
    broker: Annotated[
        str,
        typer.Option(
            help="embedded (for trying out: loopback, one password for all, no rules by topic, sessions in memory), "
            "mqtt(s)://user:password@host:port, or mqtts://host of our own Mosquitto"
        ),
    ] = "embedded",
    broker_port: Annotated[int, typer.Option(help="Port of the embedded broker; 0 picks one once.")] = 0,
    broker_ca: Annotated[Path | None, typer.Option(help="PEM file of the CA that signed the broker.")] = None,
    broker_config: Annotated[
        Path | None, typer.Option(help="Folder of `outrider broker config`, kept up to date.")
    ] = None,
    root: Root = None,
    longest_outage_days: Annotated[float, typer.Option(help="A device's certificate outlives this in any case.")] = 30,
    database: Annotated[str, typer.Option(help="SQLAlchemy URL; SQLite in --data if not given.")] = "",
    blobs: Annotated[str, typer.Option(help="s3://BUCKET/PREFIX, with AWS_*; a folder in --data if not given.")] = "",
    models: Annotated[
        str, typer.Option(help="OpenAI-compatible server that devices may ask through the hub; OUTRIDER_MODELS_KEY.")
    ] = "",
    fleet: Annotated[str, typer.Option(help="Name of the fleet.")] = "main",
    dashboard: Annotated[bool, typer.Option(help="Serve the dashboard at /.")] = True,
    https: Annotated[
        list[str] | None, typer.Option(help="Serve HTTPS by the hub's own CA, for this host name; may be given again.")
    ] = None,
    cert: Annotated[Path | None, typer.Option(help="Serve HTTPS with this certificate chain, PEM.")] = None,
    key: Annotated[Path | None, typer.Option(help="The key of --cert, PEM.")] = None,
) -> None:
    """Run a hub until it is told to stop."""
    from hub.app import Settings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with _errors():
        host, _, port = http.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise HubError(f"{http!r} is not an address", "write --http 127.0.0.1:8080; a port is at most 65535")
        settings = Settings(
            data=data,
            fleet=fleet,
            broker=broker,
            broker_port=broker_port,
            broker_ca=broker_ca,
            broker_config=broker_config,
            root=root,
            longest_outage_days=longest_outage_days,
            database=database,
            blobs=blobs,
            models=models,
            models_key=os.environ.get("OUTRIDER_MODELS_KEY", ""),
            admin_password=os.environ.get("OUTRIDER_ADMIN_PASSWORD"),
            on_generated_password=lambda password: typer.echo(f"user admin, password {password} (shown once)"),
            dashboard=dashboard,
            own_https=bool(https and not cert),
        )
        if (cert is None) is not (key is None):
            raise HubError("--cert and --key go together", "or give --https NAME for a certificate of the hub's own CA")
        asyncio.run(_serve(settings, host.strip("[]"), int(port), https or [], (cert, key) if cert and key else None))


async def _serve(settings: Any, host: str, port: int, names: list[str], given: tuple[Path, Path] | None) -> None:
    import uvicorn

    from hub.app import create_app

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # the lifespan must end in order after the server, so the signals are ours

    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise HubError(f"cannot serve HTTP on {host}:{port}: {error}", "give another --http") from error
    application = create_app(settings)
    limits: Any = {"limit_concurrency": 1000, "timeout_graceful_shutdown": 3}
    config = uvicorn.Config(application, lifespan="off", log_level="warning", **limits)
    config.load()
    server = Server(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: setattr(server, "should_exit", True))
    with listening:
        async with application.router.lifespan_context(application):
            services = application.state.services
            if given or names:
                config.ssl = services.authority.https(settings.data / "https", names, given)
                typer.echo(
                    f"the hub's CA: sha256:{services.devices.ca}" if services.devices.ca else f"HTTPS by {given}"
                )
            scheme = "https" if config.ssl else "http"
            typer.echo(f"hub at {scheme}://{host}:{port}, broker at {services.address.url}")
            if services.broker:
                typer.echo("the broker is the embedded one, for trying out; for a site: outrider broker config")
            await server.serve(sockets=[listening])


@app.command()
def login(
    password: Annotated[str, typer.Option(prompt=True, hide_input=True, envvar="OUTRIDER_PASSWORD")],
    user: str = "admin",
    hub: Annotated[str, typer.Option(envvar="OUTRIDER_HUB")] = "http://127.0.0.1:8080",
    ca: Annotated[str, typer.Option(help="CA of the hub's HTTPS: a PEM file or sha256:FINGERPRINT.")] = "",
    as_json: Json = False,
) -> None:
    """Log in; the token, and the hub's CA if one is given, are kept in the user's configuration folder."""
    from hub.client import login as log_in

    with _errors():
        _print(log_in(hub, user, password, ca), as_json, lambda a: f"logged in at {a['hub']} as {a['user']}")


@app.command()
def token(
    device: Annotated[str, typer.Argument(help="For this device alone, and for longer.", show_default=False)] = "",
    hours: Annotated[float, typer.Option(help="How long a device's token is good, at most to the grants' end.")] = 24.0,
    hub: Url = None,
    as_json: Json = False,
) -> None:
    """Your token for a device's local API: `export OUTRIDER_TOKEN=$(outrider hub token)`."""
    with _hub(hub) as client:
        made = {"access_token": client.token}
        if device:
            made = client.post(f"/v1/devices/{device}/offline-token", {"ttl_s": 3600 * hours})
        _print(made, as_json, lambda answer: str(answer["access_token"]))


@app.command("enrol-token")
def enrol_token(name: str | None = None, ttl_s: float = 3600, hub: Url = None, as_json: Json = False) -> None:
    """Make a single-use enrolment token."""
    with _hub(hub) as client:
        made = client.post("/v1/enrolments", {"name": name, "ttl_s": ttl_s})
        _print(made, as_json, lambda answer: str(answer["token"]))


@app.command()
def devices(hub: Url = None, as_json: Json = False) -> None:
    """List devices with their true presence."""
    with _hub(hub) as client:
        _print(client.get("/v1/devices"), as_json, _device_line)


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
    with _hub(hub) as client:
        patch = _patch(set or [], file)
        if patch:
            headers = {} if expect is None else {"If-Match": f'"{expect}"'}
            client.patch(f"/v1/devices/{device}/desired", patch, headers=headers)
        seen = client.get(f"/v1/devices/{device}")
        shown = {name: seen[name] for name in ("desired", "desired_version", "reported", "reported_version")}
        _print(shown, as_json, _twin_lines)


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

        with _errors():
            try:
                with file.open("rb") as lines:
                    found: dict[str, Any] = check_export(lines, devices)
            except (OSError, ValueError) as error:
                raise HubError(
                    f"{file} cannot be read: {error}", "give an export as JSON Lines, from its start"
                ) from error
    else:
        with _hub(hub) as client:
            found = client.get("/v1/audit/verify")
    wrong = [name for name, chain in found["devices"].items() if chain["wrong"]]
    _print(found, as_json, _chains)
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

    with _hub(hub) as client:
        if form not in ("jsonl", "cef"):
            raise HubError(f"format {form!r} is not known", "jsonl or cef")
        show: Any = {"jsonl": (msgspec.json.encode, msgspec.json.encode), "cef": (cef, cef_device)}[form]
        verdicts = client.get("/v1/audit/verify")["devices"] if devices else {}
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


@app.command("revoke-device")
def revoke_device(device: str, hub: Url = None) -> None:
    """Void a device's key and certificates; a token made for its name lets it enrol again."""
    with _hub(hub) as client:
        client.delete(f"/v1/devices/{device}")
        typer.echo(f"{device} is revoked")


@app.command()
def task(device: str, text: str, key: str = "", hub: Url = None, as_json: Json = False) -> None:
    """Give a device a task in plain words."""
    with _hub(hub) as client:
        job = client.post(f"/v1/devices/{device}/tasks", {"text": text, "idempotency_key": key})
        _print(job, as_json, _job_line)


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
    with _hub(hub) as client:
        try:
            body = {"tool": tool, "args": json.loads(args)} if tool else {"text": text}
        except ValueError as error:
            raise HubError(f"--args is no JSON: {error}", """such as '{"line": 2}'""") from error
        job = {"kind": "tool" if tool else "task", "body": body, "idempotency_key": key, "ttl_s": ttl_s}
        _print(client.post(f"/v1/groups/{group}/jobs", job | {"at_once": at_once}), as_json, _fanout_lines)


@app.command("fanout-show")
def fanout_show(fanout: str, hub: Url = None, as_json: Json = False) -> None:
    """How the jobs of a fan-out fare."""
    with _hub(hub) as client:
        _print(client.get(f"/v1/fanouts/{fanout}"), as_json, _fanout_lines)


def _fanout_lines(seen: dict[str, Any]) -> str:
    states = ", ".join(f"{n} {state}" for state, n in seen["states"].items())
    lines = (f"  {j['id']} {j['device']:20} {'held' if j['held'] else j['state']}{_far(j)}" for j in seen["jobs"])
    return "\n".join([f"{seen['id']} for {seen['group']}: {states}", *lines])


@app.command()
def cancel(id: str, hub: Url = None, as_json: Json = False) -> None:
    """Take back a job, or what is left of a fan-out."""
    with _hub(hub) as client:
        if len(id) == 17 and id.startswith("f"):  # a job has 16 digits
            _print(client.post(f"/v1/fanouts/{id}/cancel", {}), as_json, _fanout_lines)
        else:
            _print(client.post(f"/v1/jobs/{id}/cancel", {}), as_json, _job_line)


@app.command()
def jobs(device: str | None = None, limit: int = 20, hub: Url = None, as_json: Json = False) -> None:
    """List jobs, newest first."""
    with _hub(hub) as client:
        _print(client.get("/v1/jobs", device=device, limit=limit), as_json, _job_line)


@app.command()
def support(
    device: str,
    out: Annotated[Path | None, typer.Option(help="File to write; its own name if not given.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the device.")] = 120,
    hub: Url = None,
    as_json: Json = False,
) -> None:
    """Fetch what is needed to help: checks, settings with no secrets, status, the last log lines, in a ZIP file."""
    with _hub(hub) as client:
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
                    return _print(made | {"file": str(file)}, as_json, lambda m: f"{m['file']}: {m['size']} bytes")
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
    with _hub(hub) as client:
        made = client.publish(folder, name, version, kind, license, {})
        _print(made, as_json, lambda m: f"{m['name']} {m['version']} {m['manifest_sha256']}")


@app.command()
def assign(device: str, name: str, version: str, hub: Url = None, as_json: Json = False) -> None:
    """Make a device install a published bundle."""
    with _hub(hub) as client:
        done = client.post(f"/v1/devices/{device}/bundles", {"name": name, "version": version})
        _print(done, as_json, lambda d: f"{d['device']} shall have {name} {version}")


@contextmanager
def _hub(url: str | None) -> Iterator[Any]:
    from hub.client import HubClient

    with _errors(), HubClient(url) as client:
        yield client


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
    made = result.get("calls")
    made = [each for each in made if isinstance(each, dict)] if isinstance(made, list) else []
    calls = "; ".join(f"{each.get('call')} → {each.get('result')}" for each in made)
    ended = job["error"] or result.get("answer") or result.get("result") or ""
    ended = ended if isinstance(ended, str) else json.dumps(ended, ensure_ascii=False)
    return line + "".join(f"\n    {' '.join(more.split())[:200]}" for more in (calls, ended) if more)


def _far(job: dict[str, Any]) -> str:
    if job["state"] not in ("running", "delivered"):
        return ""
    progress, ends = job.get("progress"), "  (is to end)" if job.get("cancelled_by") else ""
    of = f" of {progress['total']}" if progress and progress["total"] else ""
    return (f"  {progress['done']}{of}: {progress['text']}" if progress else "") + ends


def _print(answer: Any, as_json: bool, line: Callable[[dict[str, Any]], str]) -> None:
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        for one in answer if isinstance(answer, list) else [answer]:
            typer.echo(line(one))


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except HubError as error:
        typer.echo(f"outrider hub: {error}", err=True)
        raise typer.Exit(1) from None
