"""The composition root: what a device is made of and how the parts meet.

Invariants: every part is one object with one `run()`, a named task in one TaskGroup; a part that fails or ends takes
the daemon down with its reason, and systemd starts it anew (crash-only: nothing is left to clean up); SIGTERM stops
cleanly. This process imports no pydantic, numpy, onnxruntime: workers do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

from edge_agent import enrol, support
from edge_agent.agent import transcript
from edge_agent.agent.approval import Approvals
from edge_agent.agent.interlock import Interlocked
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.ports import RunnerTools
from edge_agent.agent.replay import Replay
from edge_agent.agent.rules import PolicyFile
from edge_agent.agent.transcript import Transcripts
from edge_agent.agent.workflow_topics import Topics
from edge_agent.api.app import LocalApi
from edge_agent.audit import Audit
from edge_agent.bundled import Bundled
from edge_agent.config import Settings
from edge_agent.endpoints import Endpoints, environment
from edge_agent.engines.base import ACCELERATOR, ENGINES
from edge_agent.errors import Fatal, OutriderError, Retry
from edge_agent.history import History
from edge_agent.hosting import ENDPOINT, ROLES, Hosting
from edge_agent.notify import notify, watchdog
from edge_agent.reports import Reports
from edge_agent.rhythm import tick
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.store import Store
from edge_agent.sync import https
from edge_agent.sync.blobs import Blobs
from edge_agent.sync.inbox import Inbox
from edge_agent.sync.outbox import Limits, Outbox
from edge_agent.sync.proxy import Proxy
from edge_agent.sync.session import Session
from edge_agent.sync.twin import GrantsCache, Twin
from edge_agent.telemetry import Telemetry
from edge_agent.tuning import Tuner
from edge_agent.update.download import Downloads, hub_client
from edge_agent.update.neighbours import Neighbours
from edge_agent.update.service import UpdateService
from edge_agent.update.slots import Installed, Slots
from edge_agent.update.trust import Director, Repository
from edge_agent.wire.bundle import BundleKind
from edge_agent.wire.grants import Grants, Subject, allowed
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.tokens import issue_device_token
from edge_agent.work import Work

SETTLE_S = 1.0
"""A switch is followed by the switch of what depends on it: the preamble is read when both are done."""
_log = logging.getLogger("outrider")


class Daemon:
    """The parts. Made by `Daemon.open`, which reads the state directory; `run` brings them to life."""

    def __init__(
        self,
        settings: Settings,
        identity: enrol.Identity,
        store: Store,
        outbox: Outbox,
        twin: Twin,
        cache: GrantsCache,
    ) -> None:
        state = settings.state
        self._settings, self._identity, self._key = settings, identity, SigningKey.load(state / enrol.KEY)
        self._store, self._outbox, self._twin, self._cache = store, outbox, twin, cache
        self._began, self._up, self._cold = time.monotonic(), False, asyncio.Event()
        env = {ACCELERATOR: ",".join(settings.accelerator), ENGINES: str(state / "engines")}
        self._workers = {role: WorkerProcess.engine(role, env=env) for role in ROLES.values()}
        if settings.endpoints:
            self._workers[ENDPOINT] = WorkerProcess.engine(ENDPOINT, env=environment(settings.endpoints))
        self._hosting = Hosting(self._workers, settings.order(), settings.adapter, env)
        self._workers["tools"] = WorkerProcess(
            "tools", self._runner(), answer=self._hosting.infer, grace_s=0, env=_for_tools(os.environ)
        )
        rules = PolicyFile(state / "policy.toml", settings.task_s)
        runner = RunnerTools(self._workers["tools"])
        self._tools = Interlocked(runner, rules)
        self._inbox, transcripts = Inbox(store, outbox), Transcripts(store)
        parts = (self._hosting, self._tools, transcripts, self._allowed)
        asks = Approvals(self._key, self._allowed, lambda: rules.now().approval_s)
        self._agent = AgentLoop(*parts, rules=rules.now, speakers=self._hosting.speakers, approvals=asks)
        self.replay = Replay(*parts, rules.now, self._hosting.named)
        self._audit = audit = Audit(store, outbox)
        self.work = Work(self._inbox, self._agent, transcripts, self._tools, audit, self._allowed, approvals=asks)
        self._reports = reports = Reports(twin, audit, self.work.triggers.event)
        slots = Slots(state / "bundles")
        self._bundled = Bundled(self._hosting, self.work.library, self._tools, self._allowed, slots)
        rhythm = (settings.telemetry_s, settings.telemetry_ttl_s)
        self._history = History(state / "history.db")
        self._telemetry = Telemetry(
            runner, outbox, state, *rhythm, settings.sample, self._history, lambda: self.work.triggers.lost
        )
        self._hub = settings.hub or identity.hub, https.given(settings.ca)[0] or identity.ca
        self._http = hub_client(self._hub[0], https.verify(self._hub[1]))
        self.blobs = Blobs(state / "blobs", outbox, self._http, self._token, settings.blobs_mb << 20)
        self._inbox.limit = settings.jobs
        enrolled, downloads, trust = identity.enrolled, Downloads(self._http, self._token), state / "trust"
        director = Director(trust, identity.hub_key, enrolled.fleet, enrolled.device)
        self._updates = UpdateService(
            state / "bundles",
            director,
            Repository(trust, downloads, director, identity.hub_key),
            downloads,
            self._bundled,
            self._switch,
            reports.bundle,
            budget=settings.bundles_mb << 20 or None,
            rules=settings.updates,
        )
        if settings.neighbours:
            self._updates.neighbours = Neighbours(enrolled.device, enrolled.fleet, slots, settings.neighbours)
        self._endpoints = Endpoints(settings.endpoints, state, *self._hub, self._token, self._switch)
        self._renewal = enrol.Renewal(state, identity.enrolled.device, self._http, self._token)
        self.work.support = self._support
        self._tuner = Tuner(settings, twin, self._tune)
        self._session = self._connect(self._inbox)
        self._hosting.connected = lambda: self._session.connected
        own = identity.enrolled.device
        self._traces = None
        if settings.otel is not None:
            from edge_agent.otel import Traces  # a library that no other device needs

            self._traces = Traces(settings.otel, own)
            self.work.on_end = self._traces.ended
        self.work.triggers.zone = lambda: self._updates.time_zone
        heard = (self.work.triggers.topics, self.work.triggers.message)
        self._site = Topics(settings.site, own, *heard) if settings.site else None
        size, near = settings.request_mb << 20, self._updates.neighbours
        self._api = LocalApi(self, settings.api, max_body=size, name=own, near=near, refused=self._audit.refused)

    @classmethod
    async def open(cls, settings: Settings, identity: enrol.Identity) -> Daemon:
        """Raises Retry (state in use, port taken, disk full), Refused (settings), Fatal (damaged)."""
        store = Store(settings.state / "outrider.db", transcript.migrations)
        try:
            outbox = await Outbox.open(store, Limits(bytes=settings.outbox_mb << 20))
            twin = await Twin.open(store, outbox)
            cache = await GrantsCache.open(store, identity.hub_key)
            if cache.grants is None:
                await cache.accept(identity.enrolled.grants)
            return cls(settings, identity, store, outbox, twin, cache)
        except BaseException:
            store.close()
            raise

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises an ExceptionGroup with what a part failed of."""
        near = self._updates.neighbours
        parts: dict[str, Callable[[], Awaitable[None]]] = {
            **{name: worker.run for name, worker in self._workers.items()},
            "session": self._session.run,
            "certificate": self._renewal.run,
            "updates": self._updates.run,
            "blobs": self.blobs.run,
            "desired": partial(self._reports.directives, self._updates),
            "config": self._tuner.run,
            "telemetry": self._telemetry.run,
            "work": self.work.run,
            "api": self._api.run,
            "profile": partial(self._reports.profile, self._tools, self._speaks),
            "warm": self._warm,
            "endpoints": self._endpoints.run,
            "link": self._watch_link,
            "waiting": partial(self._reports.waiting, self._updates, self.work.asks),
            **({"site": self._site.run} if self._site else {}),
            **({"neighbours": partial(near.find, *self._api.address)} if near else {}),
        }
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_forever(name, run), name=name) for name, run in parts.items()]
                tasks.append(group.create_task(watchdog(self._line), name="watchdog"))
                self._up = True
                notify("READY=1", f"STATUS={self._line()}")
                _log.info("%s is up; local API at %s", self._identity.enrolled.device, self._api.url)
                await stop.wait()
                notify("STOPPING=1")
                for task in tasks:
                    task.cancel()
        finally:
            if self._traces is not None:
                await asyncio.to_thread(self._traces.close)
            await self._http.aclose()
            self._history.close()
            self._store.close()

    # api.Device

    @property
    def models(self) -> Hosting:
        return self._hosting

    @property
    def updates(self) -> UpdateService:
        return self._updates

    def grants(self) -> Grants | None:
        return self._cache.grants

    def healthy(self) -> bool:
        return self._up

    async def status(self) -> dict[str, Any]:
        enrolled, box, grants = self._identity.enrolled, self._outbox, self._cache.grants
        specs: list[Any] = []
        with contextlib.suppress(OutriderError, TimeoutError):
            async with asyncio.timeout(1.0):  # wait_for of Python 3.11 can lose a cancellation
                specs = list(await self._tools.specs()) if self._workers["tools"].specs else []
        return {
            "device": enrolled.device,
            "fleet": enrolled.fleet,
            "agent": version("outrider"),
            "uptime_s": round(time.monotonic() - self._began, 1),
            "connected": self._session.connected,
            "link_error": str(self._session.error or ""),
            "sync": self._session.counters,
            "outbox": {"depth": box.depth, "bytes": box.size},
            "epoch": box.epoch,
            "last_seq": box.last_seq,
            "acked": box.acked,
            "grants_epoch": grants.epoch if grants else None,
            "models": self._bundled.show(self._twin.reported.get("bundles", {})),
            "reported": self._twin.reported,
            "speaks": self._speaks(),
            "tools": specs,
            "workers": {name: {"pid": w.pid, "starts": w.starts} for name, w in self._workers.items()},
            "running": self.work.current,
            "site": self._site.status() if self._site else None,
        }

    # how the parts meet

    def _connect(self, inbox: Inbox) -> Session:
        enrolled, given = self._identity.enrolled, self._settings.broker
        own = "@" in given  # an override may carry its own user and password
        return Session(
            fleet=enrolled.fleet,
            device=enrolled.device,
            key=self._key,
            hub_key=self._identity.hub_key,
            broker=given or enrolled.broker.url,
            username=None if own else enrolled.broker.username or None,
            password=None if own else enrolled.broker.password or None,
            ca=enrol.tls(self._settings.state, self._identity),
            proxy=self._settings.proxy,
            outbox=self._outbox,
            inbox=inbox,
            twin=self._twin,
            grants=self._cache,
            audit=self._audit,
            agent=version("outrider"),
        )

    def _allowed(self, subject: Subject, action: str, resource: str) -> bool:
        grants = self._cache.grants
        device = self._identity.enrolled.device
        return grants is not None and allowed(grants, subject, action, resource, now=time.time(), device=device)

    def _runner(self) -> list[str]:
        options = [part for option in self._settings.option for part in ("--option", option)]
        packs = ",".join(self._settings.packs) or self._settings.pack
        where = ["--pack", packs, "--state", str(self._settings.state / "tools")]
        return [sys.executable, "-m", "edge_agent.agent.toolrunner", *where, *options]

    def _token(self, lifetime_s: float = 300) -> str:
        enrolled, grants = self._identity.enrolled, self._cache.grants
        now = max(time.time(), grants.issued_at if grants else 0.0)
        return issue_device_token(self._key, enrolled.fleet, enrolled.device, now=now, lifetime_s=lifetime_s)

    async def _switch(self, name: str, installed: Installed) -> None:
        await self._bundled.switch(name, installed)
        if installed.manifest.kind in (BundleKind.LLM, BundleKind.ADAPTER) and self._hosting.language_model():
            self._cold.set()

    async def _warm(self) -> None:
        while True:
            await self._cold.wait()
            await asyncio.sleep(SETTLE_S)
            self._cold.clear()
            try:
                await self._agent.warm()
            except OutriderError as error:
                _log.warning("the language model is not warm: %s", error)

    async def _support(self) -> dict[str, Any]:
        """A blob for who helps: its name, size and SHA-256."""
        content = await support.collect(self._settings, await self.status())
        name = f"support-{time.strftime('%Y%m%dT%H%M%S')}.zip"
        sha256 = await self.blobs.put(content, name, "application/zip")
        return {"name": name, "size": len(content), "sha256": sha256}

    def _tune(self, settings: Settings) -> None:
        self._telemetry.configure(settings.telemetry_s, settings.telemetry_ttl_s, settings.sample)
        self._outbox.limit(Limits(bytes=settings.outbox_mb << 20))
        self.blobs.quota, self._inbox.limit = settings.blobs_mb << 20, settings.jobs
        logging.getLogger().setLevel(settings.log.upper())

    async def _watch_link(self) -> None:
        """A new connection is the moment to try failed downloads again; workflows wait for it, and for its end."""
        seen, up = 0, self._session.connected
        while True:
            if up != self._session.connected:
                up, now = self._session.connected, time.time()
                await self.work.triggers.event(f"link.{'up' if up else 'down'}", "", {"id": f"{now:.0f}", "depth": 1})
            if self._session.counters.connections > seen:
                seen = self._session.counters.connections
                self._updates.retry_now()
            await tick(1.0)

    def _speaks(self) -> dict[str, str]:
        """The digest of the agent's language model, and its adapter."""
        with contextlib.suppress(Retry):
            speaker = self._hosting.speaker()
            return {"model": speaker.digest, "adapter": speaker.title}
        return {"model": "", "adapter": ""}

    def _line(self) -> str:
        link = "connected" if self._session.connected else "offline"
        return f"{link}, {self._outbox.depth} records wait, {len(self._hosting.running)} models"


def _for_tools(environ: Mapping[str, str]) -> dict[str, str]:
    """What of the environment packs may see: their own secrets, and where their files are."""
    return {key: value for key, value in environ.items() if key.startswith("TOOL_") or key == "OUTRIDER_CONFIG"}


async def _forever(name: str, run: Callable[[], Awaitable[None]]) -> None:
    await run()
    raise Fatal(f"{name} ended by itself", "this is a bug; the daemon starts anew")


async def _serve(settings: Settings, identity: enrol.Identity) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    daemon = await Daemon.open(settings, identity)
    await daemon.run(stop)


def main(settings: Settings) -> None:
    """Enrol if need be, then serve until SIGTERM. Raises OutriderError with what to do."""
    logging.basicConfig(
        level=settings.log.upper(), stream=sys.stderr, format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )
    logging.getLogger().addHandler(support.RECENT)
    for chatty in ("httpx", "httpcore", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if settings.proxy:
        Proxy.parse(settings.proxy)
        os.environ |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), settings.proxy)
    identity = enrol.load(settings.state)
    if identity is None:
        identity = enrol.enrol(settings.state, settings.hub, settings.token, settings.name, ca=settings.ca)
        _log.info("enrolled as %s of %s", identity.enrolled.device, identity.enrolled.fleet)
    elif settings.name and settings.name != identity.enrolled.device:
        _log.warning("this state directory is %s's; the name %s is not used", identity.enrolled.device, settings.name)
    try:
        asyncio.run(_serve(settings, identity))
    except BaseExceptionGroup as group:
        known = group.subgroup(OutriderError)
        if known is None or len(known.exceptions) < len(group.exceptions):
            raise
        first: BaseException = known
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group
