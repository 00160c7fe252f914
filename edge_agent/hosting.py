"""The installed models on their workers: what the update service switches, the agent generates with and tools infer on.

Invariants: a candidate is tried in a worker of its own, so one that crashes or fills the memory disturbs nothing that
runs; a model that kills its worker while it loads is Refused, not tried for ever; a request for a model that is not
installed is a clear Retry (it may still come). An adapter is loaded into its running base model beside the version
before, which is dropped after; a base model that is switched leaves its adapters behind: they are switched in again.
An endpoint of the settings is a language model too, on a worker of its own: one that hangs holds up no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import msgspec

from edge_agent.agent.confidence import Calibration
from edge_agent.agent.decide import Speaker
from edge_agent.agent.ports import WorkerModel
from edge_agent.config import Route
from edge_agent.engines.base import Generate, Piece
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.machine import available_memory
from edge_agent.serving.schedule import LOWEST, Serving
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.update import probe
from edge_agent.update.mirror import Mirror
from edge_agent.update.slots import Installed
from edge_agent.update.trial import SAMPLE, Figures, Untried, Why, Worse
from edge_agent.wire.bundle import BundleKind
from edge_agent.wire.tensor import Tensor
from edge_agent.wire.updates import Activation, Trial

ROLES = {BundleKind.ONNX: "network", BundleKind.LLM: "language", BundleKind.ADAPTER: "language"}
ENDPOINT = "endpoint"
"""The worker of all endpoints, and in place of a manifest's hash what they are installed as."""
LOAD_S = 300.0
NO_ADAPTER = "none"
AT_ONCE = Activation()
_MEMORY_FACTOR = 2.5  # a loaded model takes about its files' size, and as much while it is loaded


class Hosting:
    """The workers by role (see ROLES) and what is loaded on them.

    `order` names the agent's language models, `adapter` what its tasks use: empty for the first that is for tools.
    `connected` says whether the hub is there.
    """

    def __init__(
        self,
        workers: dict[str, WorkerProcess],
        order: Sequence[Route] = (),
        adapter: str = "",
        env: dict[str, str] | None = None,
    ) -> None:
        self.workers, self._order, self._chosen, self._env = workers, order, adapter, env or {}
        self.connected: Callable[[], bool] = lambda: True
        self.running: dict[str, Installed] = {}
        self._trials: dict[str, Mirror[Any, Any]] = {}

    async def switch(self, name: str, installed: Installed, beside: bool = True) -> None:
        """Load a version in place of the one that runs, beside it where memory can hold two. Raises Refused, Retry."""
        worker, before = self.workers[_role(installed)], self.running.get(name)
        if before is not None and _role(before) != _role(installed):
            raise Refused(f"{name} is another kind of model on this device", "give the bundle or endpoint another name")
        if installed.manifest.base is None:
            followers = {n: i for n, i in self.running.items() if (base := i.manifest.base) and base.name == name}
            for follower in followers:
                del self.running[follower]  # from here on no request names one
            try:
                if not worker.runs(name, installed.folder):
                    await _load(worker, name, installed, beside)
            except BaseException:
                self.running |= followers
                raise
            self.running[name] = installed
            return
        if not self._loaded(installed):
            await self._adapt(worker, installed)
        self.running[name] = installed
        if before is not None and before.id != installed.id:
            with contextlib.suppress(OutriderError):
                await worker.drop(_alias(before))

    async def probe(self, name: str, candidate: Installed, activation: Activation = AT_ONCE) -> Figures:
        """Try a candidate, with its golden probe and beside the version that runs. Raises Worse, Refused, Retry.

        It has a worker of its own; where that must not be (`kill-then-load`), the running version makes room.
        """
        before, plan = self.running.get(name), activation.trial
        if activation.policy == "kill-then-load" and before is not None and candidate.manifest.base is None:
            return await self._in_place(name, before, candidate, plan)
        worker = WorkerProcess.engine(_role(candidate), env=self._env)
        running = asyncio.create_task(worker.run(), name=f"probe-{name}")
        try:
            if candidate.manifest.base is None:
                await _load(worker, name, candidate)
            else:
                await _load(worker, candidate.manifest.base.name, self._base(candidate))
                await self._adapt(worker, candidate)
            new = _asking(worker, candidate)
            question = await _golden(candidate, new)
            if before is None or plan is None:
                return Figures("load" if question is None else "probe")
            mirror = _mirror(plan, candidate, new)
            if question is not None:
                await mirror.measure(question, await mirror.probe(question, self._old(before)))
            self._trials[name] = mirror
            return await mirror.run()
        except Refused as error:
            raise _evident(error, worker) from error
        finally:
            self._trials.pop(name, None)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _in_place(self, name: str, before: Installed, candidate: Installed, plan: Trial | None) -> Figures:
        worker = self.workers[_role(before)]
        mirror = _mirror(plan or Trial(seconds=0), candidate, new := _asking(worker, candidate))
        question = await asyncio.to_thread(_question, candidate)
        answers = [] if question is None or plan is None else await mirror.probe(question, self._old(before))
        try:
            await self.switch(name, candidate, beside=False)
            mirror.alone = True
            await _golden(candidate, new)
            await mirror.measure(question, answers)
            self._trials[name] = mirror
            return await mirror.run()
        except OutriderError as error:
            self._trials.pop(name, None)
            worse = _evident(error, worker) if isinstance(error, Refused) else error
            await self.switch(name, before, beside=False)
            raise worse from error
        finally:
            self._trials.pop(name, None)

    def _old(self, before: Installed) -> Callable[[Any], Awaitable[Any]]:
        ask = _asking(self.workers[_role(before)], before)
        return lambda question: ask(question, LOAD_S)

    async def generate(self, request: Generate, timeout_s: float) -> Piece:
        """A whole completion by the agent's language model, or the one it names. Raises Refused, Retry."""
        name = request.model or self.language_model()
        if name is None or name not in self.running:
            missing = name or (self._order[0].model if self._order else "a language model")
            raise Retry(f"{missing} is not installed", "publish and assign a bundle of kind llm to this device")
        worker = self.workers[_role(self.running[name])]
        if request.adapter and request.adapter not in worker.adapters:
            raise Retry("the adapter was switched meanwhile", "ask again")

        async def old(asked: Generate) -> Piece:
            return await WorkerModel(worker, name).generate(asked, timeout_s)

        trial = self._trials.get(request.adapter.partition("@")[0] or name)
        return await (old(request) if trial is None else trial.ask(request, old))

    def speaker(self) -> Speaker:
        """The first of `speakers`. Raises Retry."""
        return self.speakers()[0]

    def speakers(self) -> list[Speaker]:
        """What may speak for the agent now, in its order. Raises Retry when the configured adapter is not there."""
        first = self.language_model()
        order = self._order or ([Route(first)] if first else [])
        there = [r for r in order if r.model in self._llms() and (not r.connected or self.connected())]
        own = [r.model for r in there if _role(self.running[r.model]) != ENDPOINT]
        if own and self._chosen not in ("", NO_ADAPTER, *(name for model in own for name in self._adapters(model))):
            raise Retry(f"the adapter {self._chosen} is not installed for {first}", "assign it, or configure none")
        return [self._speaker(route) for route in there] or [Speaker()]

    def named(self, name: str) -> Speaker:
        """What speaks under a name, `MODEL` or `MODEL:ADAPTER` (or `MODEL:none`); empty: `speaker`. Raises Refused."""
        model, _, adapter = name.partition(":")
        known = [NO_ADAPTER, "", *self._adapters(model)]
        if name and (model not in self._llms() or adapter not in known):
            here = ", ".join(self.languages()) or "none"
            raise Refused(f"the language model {name} is not installed", f"installed: {here}")
        return self._speaker(Route(model), adapter) if name else self.speaker()

    def _speaker(self, route: Route, adapter: str = "") -> Speaker:
        installed, fit = self.running[route.model], self._adapters(route.model)
        tools = sorted(adapter for adapter, i in fit.items() if i.manifest.meta.get("task") == "tools")
        chosen = fit.get(adapter or self._chosen or next(iter(tools), ""))
        speaker = Speaker(
            installed.digest,
            endpoint=_role(installed) == ENDPOINT,
            model=route.model,
            calibration=_calibration(chosen or installed),
            several=(chosen or installed).manifest.meta.get("calls") == "several",
            cost=route.cost,
            latency_s=route.latency_s,
        )
        if chosen is None:
            return speaker
        title, shots = f"{chosen.manifest.name} {chosen.manifest.version}", chosen.manifest.meta.get("prompt")
        return msgspec.structs.replace(speaker, adapter=_alias(chosen), title=title, shots=shots != "signatures")

    async def infer(
        self, model: str, inputs: dict[str, Tensor], priority: int = 1, within_s: float = 60.0
    ) -> dict[str, Tensor]:
        """Run an installed network; a tool of the agent goes before the API's clients. Raises Refused, Retry."""
        if model not in self.running:
            networks = [n for n, i in self.running.items() if i.manifest.kind is BundleKind.ONNX]
            raise Refused(f"the network {model} is not installed", f"installed: {', '.join(networks) or 'none'}")

        async def old(asked: dict[str, Tensor]) -> dict[str, Tensor]:
            return await self.workers["network"].infer(model, asked, within_s, priority)

        trial = self._trials.get(model)
        return await (old(inputs) if trial is None else trial.ask(inputs, old))

    def languages(self) -> list[str]:
        """What can be talked to: `NAME` of a language model, `NAME:ADAPTER` of it with an adapter."""
        return sorted(self._languages())

    async def stream(self, name: str, request: Generate, timeout_s: float) -> AsyncGenerator[Piece, None]:
        """A completion by one of `languages`; leaving the iteration cancels it. Raises Refused, Retry."""
        known = self._languages()
        if name not in known:
            raise Refused(f"the language model {name} is not installed", f"installed: {', '.join(known) or 'none'}")
        model, adapter = known[name]
        role = _role(self.running[model])
        request = msgspec.structs.replace(request, adapter=adapter, chat=request.chat if role == ENDPOINT else {})
        text, began, trial = "", time.monotonic(), self._trials.get(adapter.partition("@")[0] or model)
        asked = self.workers[role].generate(model, request, timeout_s, request.priority)
        async with contextlib.aclosing(asked) as pieces:
            async for piece in pieces:
                text += piece.text if trial else ""
                yield piece
                if piece.done and trial is not None:
                    trial.heard(request, msgspec.structs.replace(piece, text=text), time.monotonic() - began)

    def _languages(self) -> dict[str, tuple[str, str]]:
        """By the name to talk to: the model, and the adapter as the engine knows it."""
        known: dict[str, tuple[str, str]] = {}
        for model, installed in self.running.items():
            if installed.manifest.kind is BundleKind.LLM:
                known[model] = model, ""
                known |= {f"{model}:{name}": (model, _alias(i)) for name, i in self._adapters(model).items()}
        return known

    async def ready(self, model: str) -> bool:
        """False while the model's worker is restarting."""
        try:
            await self.workers[_role(self.running[model])].ready(0)
        except (Retry, KeyError):
            return False
        return True

    def language_model(self) -> str | None:
        """The bundle the agent speaks with: the first of its order that is here, or the first there is."""
        llms = self._llms()
        if self._order:
            return next((route.model for route in self._order if route.model in llms), None)
        return min(llms, default=None, key=lambda name: (_role(self.running[name]) == ENDPOINT, name))

    def _llms(self) -> list[str]:
        return [name for name, i in self.running.items() if i.manifest.kind is BundleKind.LLM]

    def show(self, reported: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Per bundle and endpoint: how it fares by the update service's reports, and what runs it here."""
        shown = {}
        set_up = {name: i.digest for name, i in self.running.items() if _role(i) == ENDPOINT}
        reported = reported | {name: {"state": "configured", "digest": digest} for name, digest in set_up.items()}
        for name, report in reported.items():
            shown[name] = dict(report)
            installed = self.running.get(name)
            if installed is None or installed.digest != report["digest"] or not self._loaded(installed):
                shown[name]["state"] = "loading" if report["state"] == "committed" else report["state"]
                continue
            base = installed.manifest.base
            info = self.workers[_role(installed)].infos.get(base.name if base else name)
            engine = msgspec.to_builtins(info) if info else {}
            shown[name] |= {key: engine.get(key) for key in ("engine", "provider", "load_s")}
            if (served := self.workers[_role(installed)].served.get(name)) and served.engine:
                shown[name] |= {"engine": served.engine, "provider": served.provider}
                told = {
                    key: value for key, value in msgspec.structs.asdict(served).items() if key.startswith("engine_")
                }
                shown[name] |= told if served.engine_phase else {}
            if passed := engine.get("extra", {}).get("passed_over"):
                shown[name]["passed_over"] = passed
            shown[name] |= {"kind": installed.manifest.kind} | ({"base": base.name} if base else {})
        return shown

    def _adapters(self, model: str) -> dict[str, Installed]:
        of = {name: (i.manifest.base, i) for name, i in self.running.items()}
        return {name: i for name, (base, i) in of.items() if base and base.name == model and self._loaded(i)}

    def _loaded(self, installed: Installed) -> bool:
        """False for an adapter that its worker dropped when it was loaded again."""
        return installed.manifest.base is None or _alias(installed) in self.workers[_role(installed)].adapters

    def _base(self, adapter: Installed) -> Installed:
        base = adapter.manifest.base
        running = self.running.get(base.name) if base else None
        if base is None or running is None or running.digest != base.digest:
            raise Untried(f"the base model of {adapter.manifest.name} does not run here", "assign it to this device")
        return running

    async def _adapt(self, worker: WorkerProcess, adapter: Installed) -> None:
        model = self._base(adapter).manifest.name
        await _loading(worker, adapter, lambda: worker.adapt(model, _alias(adapter), adapter.folder, LOAD_S))


def _role(installed: Installed) -> str:
    kind = installed.manifest.kind
    if installed.id == ENDPOINT:
        return ENDPOINT
    if kind not in ROLES:
        raise Refused(f"this agent runs no bundle of kind {kind}", f"it runs: {', '.join(ROLES)}")
    return ROLES[kind]


def _calibration(installed: Installed) -> Calibration:
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(installed.manifest.meta.get("calibration", {}), Calibration)
    return Calibration()


def _alias(adapter: Installed) -> str:
    """An adapter's version as the engine knows it, so that two versions are loaded side by side."""
    return f"{adapter.manifest.name}@{adapter.id[:16]}"


Ask = Callable[[Any, float], Awaitable[Any]]


def _asking(worker: WorkerProcess, installed: Installed) -> Ask:
    """How a version on a worker is asked, after everybody else: tensors, or a request to a language model."""
    base, name = installed.manifest.base, installed.manifest.name

    async def infer(inputs: dict[str, Tensor], within_s: float) -> dict[str, Tensor]:
        return await worker.infer(name, inputs, within_s, LOWEST)

    async def generate(request: Generate, within_s: float) -> Piece:
        asked = msgspec.structs.replace(request, adapter=_alias(installed) if base else "", priority=LOWEST)
        return await WorkerModel(worker, base.name if base else name).generate(asked, within_s)

    return infer if installed.manifest.kind is BundleKind.ONNX else generate


def _mirror(plan: Trial, candidate: Installed, new: Ask) -> Mirror[Any, Any]:
    if candidate.manifest.kind is BundleKind.ONNX:
        least = 0.9 if plan.min_agreement is None else plan.min_agreement
        return Mirror(msgspec.structs.replace(plan, min_agreement=least), new, probe.agreement, probe.shown)
    return Mirror(plan, new, probe.said_alike, lambda request: request.prompt[-SAMPLE:])


def _question(candidate: Installed) -> Any | None:
    golden = probe.golden(candidate)
    return golden.inputs if golden is not None else probe.prompt(candidate)


async def _golden(candidate: Installed, ask: Ask) -> Any | None:
    """Ask the golden question, if there is one, and give it back. Raises Refused when the answer is another."""
    if (golden := await asyncio.to_thread(probe.golden, candidate)) is not None:
        probe.compare(candidate.manifest.probe, golden.outputs, await ask(golden.inputs, LOAD_S))
        return golden.inputs
    if (request := probe.prompt(candidate)) is not None:
        probe.compare_text(candidate.manifest.probe, (await ask(request, LOAD_S)).text)
    return request


def _evident(error: Refused, worker: WorkerProcess) -> Worse:
    """The refusal with the end of the worker's log."""
    why = error.why if isinstance(error, Worse) else Why(Figures("probe"))
    return Worse(error.message, error.hint, msgspec.structs.replace(why, log=list(worker.tail)))


async def _load(worker: WorkerProcess, name: str, installed: Installed, beside: bool = True) -> None:
    try:
        serving = msgspec.convert(installed.manifest.meta.get("serving", {}), Serving)
    except msgspec.ValidationError as error:
        raise Refused(
            f"{name} says wrongly how it is served: {error}", "mend meta.serving and package it again"
        ) from error
    size, free = installed.manifest.size, available_memory()
    told = int(serving.memory_mb * 2**20)
    needed, roomy = told or size, (told or _MEMORY_FACTOR * size) < free
    if needed > free and not worker.holds(name):  # one that is replaced makes room; no reason for quarantine: it passes
        mib = f"{needed / 2**20:.0f} MiB of memory and {free / 2**20:.0f} MiB are free"
        hint = "a smaller precision, fewer other models, or more memory for the service (MemoryMax, another device)"
        raise Untried(f"{name} {installed.manifest.version} needs {mib}", hint)
    beside = beside and roomy
    await _loading(worker, installed, lambda: worker.load(name, installed.folder, LOAD_S, serving, beside))


async def _loading(worker: WorkerProcess, installed: Installed, load: Callable[[], Awaitable[object]]) -> None:
    await worker.ready(LOAD_S)
    starts = worker.starts
    try:
        await load()
    except Retry as error:
        await asyncio.sleep(0)
        if not worker.connected or worker.starts != starts:
            what, how = f"{installed.manifest.name} {installed.manifest.version}", await worker.ending(starts)
            hint = "its log in the daemon's journal says why"
            if "memory" in how:
                hint = f"{available_memory() >> 20} MiB are free now, its files have {installed.manifest.size >> 20}"
            raise Refused(f"{what} kills its worker while it loads: {how}", hint) from error
        raise
