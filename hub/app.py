"""create_app(settings): the FastAPI application whose lifespan owns database, broker, MQTT session and runners.

Invariants: everything is made in order and ended in the opposite one; a runner that fails is logged and started again;
every route under /v1 declares its action or is on the short list of open ones, or the application does not start.
"""

import asyncio
import fcntl
import logging
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from edge_agent.errors import OutriderError
from edge_agent.sync.https import fingerprint
from edge_agent.sync.transport import MqttSession
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.topics import check_name
from hub import db as tables
from hub import objects
from hub.api import blobs, bundles, deadletters, devices, health, jobs, models, people, problems, rollouts
from hub.api.guard import declare_actions
from hub.audit import Audit
from hub.auth import GRANTS_RENEWAL_S, Auth, TokenKeys
from hub.blobs import Uploads
from hub.broker import EmbeddedBroker, Mosquitto
from hub.ca import DAY_S, Authority
from hub.db import Database
from hub.devices import Devices
from hub.downlink import Downlink
from hub.errors import Fatal
from hub.fanout import Fanouts
from hub.ingest import Ingest
from hub.jobs import Jobs
from hub.registry import Registry
from hub.repository import Repository, make_key
from hub.retention import Retention
from hub.rollout_runner import Rollouts
from hub.services import BrokerAddress, Services
from hub.telemetry import Telemetry
from hub.twin import Twin
from hub.upstream import Upstream

log = logging.getLogger(__name__)
JOB_TICK_S = 15.0
FANOUT_TICK_S = 1.0
ANCHOR_S = 10.0
RUNNER_PAUSE_S = 1.0
TRUST_TICK_S = 1800.0
TRUST_WARNING_DAYS = {"root": 60.0, "targets": 60.0}


@dataclass(frozen=True)
class Settings:
    """How to run a hub. `broker` is "embedded", or a URL with user and password, or `mqtts://host` of the Mosquitto
    whose files are in `broker_config`; `database` is a SQLAlchemy URL."""

    data: Path
    fleet: str = "main"
    broker: str = "embedded"
    broker_port: int = 0
    broker_ca: Path | None = None
    broker_config: Path | None = None
    root: Path | None = None  # where the root key is; `data/root` if not given
    longest_outage_days: float = 30.0
    keep_days: float = 90.0  # records and uploads; 0: for ever
    prune_audit: bool = False  # devices' audit entries with them
    keep_jobs_days: float = 90.0  # jobs that have ended
    database: str = ""
    blobs: str = ""  # an object store's URL; `data/blobs` if not given
    models: str = ""  # URL of an OpenAI-compatible server that devices may ask through the hub
    models_key: str = ""
    admin_password: str | None = None
    on_generated_password: Callable[[str], None] = lambda password: print(f"admin password (shown once): {password}")
    dashboard: bool = True
    own_https: bool = False  # HTTPS with a certificate of the hub's own CA


def create_app(settings: Settings) -> FastAPI:
    """The hub as an ASGI application. Raises Fatal at start when it cannot run."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            app.state.services = await _start(settings, stack)
            yield

    app = FastAPIOffline(  # the API's page, with nothing from elsewhere
        title="Outrider hub",
        version="1",
        description="Enrols devices, gives them work and signed bundles, and keeps what they send. "
        "Every /v1 route names the permission it needs as `x-action`.",
        lifespan=lifespan,
    )
    problems.install(app)
    for each in (people, devices, jobs, deadletters, bundles, rollouts, blobs, models):
        declare_actions(each.router)
        app.include_router(each.router)
    app.include_router(health.router)
    if settings.dashboard:
        from hub.ui.mount import mount  # takes a second to import

        mount(app)
    return app


async def _start(settings: Settings, stack: AsyncExitStack) -> Services:
    _lock(settings.data, stack)
    key = SigningKey.load_or_create(settings.data / "hub.key")
    url = settings.database or f"sqlite:///{settings.data / 'hub.db'}"
    database = await asyncio.to_thread(Database, url)
    stack.callback(database.close)
    auth = Auth(database, key, TokenKeys(settings.data / "tokens"))
    await auth.issue_grants()
    root, outage_s = settings.root or settings.data / "root", settings.longest_outage_days * DAY_S
    authority = Authority(settings.data / "ca", root, settings.fleet, outage_s)
    broker, ca = await _broker(settings, stack)
    trusted, mosquitto = settings.broker_ca, Mosquitto(settings.broker_config, authority)
    if settings.broker.startswith("mqtts://") and "@" not in settings.broker:
        trusted, ca = mosquitto.identity(), ca or authority.root_pem
    connected = asyncio.Event()
    try:
        check_name(settings.fleet, "fleet")
        session = MqttSession(
            broker.url_with_credentials if broker else settings.broker,
            await _client_id(database, settings.fleet),
            ca=trusted,
            subscriptions=Ingest.filters(settings.fleet),
            on_connect=lambda _present: connected.set(),
        )
    except (OutriderError, ValueError) as error:
        raise Fatal(str(error), "see outrider hub --help") from error
    at = session.address
    address = BrokerAddress(str(at), at.username or "", at.password or "", ca)
    downlink = Downlink(session, key, settings.fleet)
    devices_, twin, work = (
        Devices(database, authority, fingerprint(authority.root_pem) if settings.own_https else ""),
        Twin(database, downlink.desired),
        Jobs(database, downlink.job),
    )
    repository = await asyncio.to_thread(_repository, settings.data)
    registry = Registry(database, settings.data, repository, objects.at(settings.blobs, settings.data / "blobs"))
    upstream = Upstream(settings.models, settings.models_key) if settings.models else None
    if upstream:
        stack.push_async_callback(upstream.close)
    ingest = Ingest(database, session, devices_, downlink, work.send_queued)
    uploads, days = Uploads(settings.data), (settings.keep_days, settings.keep_jobs_days)
    services = Services(
        fleet=settings.fleet,
        key=key,
        db=database,
        broker=broker,
        mosquitto=mosquitto,
        address=address,
        session=session,
        downlink=downlink,
        auth=auth,
        devices=devices_,
        twin=twin,
        jobs=work,
        fanouts=Fanouts(database, work, downlink.job),
        registry=registry,
        rollouts=Rollouts(database, twin, registry, devices_, key),
        telemetry=Telemetry(database),
        uploads=uploads,
        audit=Audit(database),
        authority=authority,
        retention=Retention(database, uploads, *days, audit_too=settings.prune_audit),
        models=upstream,
    )
    await stack.enter_async_context(session)
    await stack.enter_async_context(_running(services, ingest, connected))
    if generated := await auth.first_admin(settings.admin_password):
        settings.on_generated_password(generated)  # last: a start that fails must not spend what is shown once
    return services


def _repository(data: Path) -> Repository:
    """The TUF repository; a hub that has none makes one, with offline keys for somebody to take away."""
    repository = Repository(data / "trust")
    if not repository.exists:
        offline = data / "trust" / "offline"
        shutil.rmtree(offline, ignore_errors=True)  # of a start that was cut off
        keys = [make_key(offline / f"root-{number}.key") for number in (1, 2, 3)]
        repository.create(keys, 2, {"bundles": ["bundles/*/*/*"]})
        log.warning("take the keys in %s to three safe places; two of them change whom devices trust", offline)
    return repository


def _lock(data: Path, stack: AsyncExitStack) -> None:
    """One hub a data directory, until the process ends."""
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = stack.enter_context((data / "hub.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Fatal(f"another hub uses {data}", "stop it, or give another --data") from None
    except OSError as error:
        raise Fatal(f"{data} cannot be used: {error}", "give a directory that can be written as --data") from error


async def _broker(settings: Settings, stack: AsyncExitStack) -> tuple[EmbeddedBroker | None, str]:
    """The embedded broker if it is wanted, and the PEM text of the CA for devices."""
    if settings.broker == "embedded":
        broker = EmbeddedBroker(settings.data, settings.broker_port)
        stack.callback(broker.stop)
        await asyncio.to_thread(broker.start)
        return broker, ""
    try:
        return None, settings.broker_ca.read_text() if settings.broker_ca else ""
    except OSError as error:
        raise Fatal(f"the broker's CA cannot be read: {error}", "give a PEM file as --broker-ca") from error


async def _client_id(database: Database, fleet: str) -> str:
    """This hub's MQTT client id, made once, so that the broker keeps its session."""

    def known_or_new(connection: sa.Connection) -> str:
        table = tables.settings
        known = connection.execute(sa.select(table.c.value).where(table.c.key == "client_id")).scalar()
        if known is None:
            known = f"hub-{fleet}-{secrets.token_hex(4)}"
            connection.execute(table.insert().values(key="client_id", value=known))
        return str(known)

    return await database.write(known_or_new)


@asynccontextmanager
async def _running(services: Services, ingest: Ingest, connected: asyncio.Event) -> AsyncIterator[None]:
    async def greet() -> None:
        """After every connection: what the broker may have forgotten."""
        while True:
            await connected.wait()
            connected.clear()
            try:
                await services.tell_broker()
                await services.downlink.grants(services.auth.grants_text)
                await services.twin.send_all()
            except BaseException:
                connected.set()  # all of it again
                raise

    async def tend_jobs() -> None:
        while True:
            await asyncio.sleep(JOB_TICK_S)
            await services.jobs.expire()
            if services.session.connected:
                await services.twin.send_owed()
            for device in (await services.jobs.waiting()).intersection(services.devices.liveness.claiming()):
                await services.jobs.send_queued(device)

    async def fan_out() -> None:
        while True:
            await asyncio.sleep(FANOUT_TICK_S)
            await services.fanouts.release(set(services.devices.liveness.claiming()))

    async def renew_grants() -> None:
        while True:
            await asyncio.sleep(GRANTS_RENEWAL_S)
            if services.auth.keys.due:
                await services.auth.rotate_keys("hub")
            await services.auth.issue_grants()
            await services.downlink.grants(services.auth.grants_text)
            services.mosquitto.identity()

    async def anchor() -> None:
        while True:
            await asyncio.sleep(ANCHOR_S)
            await services.audit.anchor()

    async def renew_trust() -> None:
        while True:
            for role, days in (await services.registry.trusted(Repository.renew)).items():
                if days < TRUST_WARNING_DAYS.get(role, 0):
                    log.warning("%s of the repository expires in %.0f days: outrider trust prolong", role, days)
            await asyncio.sleep(TRUST_TICK_S)

    runners = {"ingest": ingest.run, "greet": greet, "jobs": tend_jobs, "grants": renew_grants, "anchor": anchor}
    runners |= {"fanouts": fan_out, "trust": renew_trust, "rollouts": services.rollouts.run}
    runners |= {"retention": services.retention.run}
    tasks = [asyncio.create_task(_for_ever(name, run), name=name) for name, run in runners.items()]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _for_ever(name: str, run: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await run()
        except Exception:  # a runner's failure must not end the others
            log.exception("runner %s failed; starting it again", name)
        await asyncio.sleep(RUNNER_PAUSE_S)
