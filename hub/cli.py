"""`outrider hub`: run a hub, and talk to one.

Invariant: every verb prints a line for each thing, or one JSON document with `--json`; an error is a sentence with a
hint on stderr and exit status 1.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hub import audit_cli, devices_cli
from hub.errors import HubError
from hub.talk import Json, Url, errors, talking, tell

Root = Annotated[Path | None, typer.Option(help="Folder of the root key, which may be offline (DATA/root).")]


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

    with errors():
        write_config(out, Authority(data / "ca", root or data / "root", fleet), name, port, bind, user)
        url = f"mqtts://{name[0]}:{port}"
        tell(
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

    with errors():
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
    keep_days: Annotated[float, typer.Option(help="Records and uploads this old go; 0 keeps them for ever.")] = 90,
    prune_audit: Annotated[bool, typer.Option(help="Prune devices' audit entries with their records.")] = False,
    keep_jobs_days: Annotated[float, typer.Option(help="So are jobs that ended and fan-outs.")] = 90,
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
    with errors():
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
            keep_days=keep_days,
            prune_audit=prune_audit,
            keep_jobs_days=keep_jobs_days,
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
            gc.freeze()  # what is there by now stays: no collection looks through it again
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

    with errors():
        tell(log_in(hub, user, password, ca), as_json, lambda a: f"logged in at {a['hub']} as {a['user']}")


@app.command()
def token(
    device: Annotated[str, typer.Argument(help="For this device alone, and for longer.", show_default=False)] = "",
    hours: Annotated[float, typer.Option(help="How long a device's token is good, at most to the grants' end.")] = 24.0,
    hub: Url = None,
    as_json: Json = False,
) -> None:
    """Your token for a device's local API: `export OUTRIDER_TOKEN=$(outrider hub token)`."""
    with talking(hub) as client:
        made = {"access_token": client.token}
        if device:
            made = client.post(f"/v1/devices/{device}/offline-token", {"ttl_s": 3600 * hours})
        tell(made, as_json, lambda answer: str(answer["access_token"]))


@app.command("enrol-token")
def enrol_token(name: str | None = None, ttl_s: float = 3600, hub: Url = None, as_json: Json = False) -> None:
    """Make a single-use enrolment token."""
    with talking(hub) as client:
        made = client.post("/v1/enrolments", {"name": name, "ttl_s": ttl_s})
        tell(made, as_json, lambda answer: str(answer["token"]))


for part in (devices_cli.app, audit_cli.app):
    app.add_typer(part)
