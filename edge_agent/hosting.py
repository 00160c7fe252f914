"""The installed models on their workers: what the update service switches, the agent generates with and tools infer on.

Invariants: a candidate is tried in a worker of its own, so one that crashes or fills the memory disturbs nothing that
runs; a model that kills its worker while it loads is Refused, not tried for ever; a request for a model that is not
installed is a clear Retry (it may still come).
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from edge_agent.agent.ports import WorkerModel
from edge_agent.engines.base import Generate, Piece
from edge_agent.errors import Refused, Retry
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.update import probe
from edge_agent.update.slots import Installed
from edge_agent.wire.bundle import BundleKind
from edge_agent.wire.tensor import Tensor

ROLES = {BundleKind.ONNX: "network", BundleKind.LLM: "language"}
LOAD_S = 300.0


class Hosting:
    """The workers by role (see ROLES) and what is loaded on them. `preferred` names the agent's language model."""

    def __init__(self, workers: dict[str, WorkerProcess], preferred: str = "") -> None:
        self._workers, self._preferred = workers, preferred
        self.running: dict[str, Installed] = {}

    async def switch(self, name: str, installed: Installed) -> None:
        """Load a version in place of the one that runs. Raises Refused, Retry."""
        await _load(self._workers[_role(installed)], name, installed)
        self.running[name] = installed

    async def probe(self, name: str, candidate: Installed) -> None:
        """Try a candidate with its golden probe in a worker of its own. Raises Refused, Retry."""
        worker = WorkerProcess.engine(_role(candidate))
        running = asyncio.create_task(worker.run(), name=f"probe-{name}")
        try:
            await _load(worker, name, candidate)
            if (golden := await asyncio.to_thread(probe.golden, candidate)) is not None:
                found = await worker.infer(name, golden.inputs, LOAD_S)
                probe.compare(candidate.manifest.probe, golden.outputs, found)
            if (request := probe.prompt(candidate)) is not None:
                piece = await WorkerModel(worker, name).generate(request, LOAD_S)
                probe.compare_text(candidate.manifest.probe, piece.text)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def generate(self, request: Generate, timeout_s: float) -> Piece:
        """A whole completion by the agent's language model. Raises Refused, Retry."""
        name = self.language_model()
        if name is None:
            missing = self._preferred or "a language model"
            raise Retry(f"{missing} is not installed", "publish and assign a bundle of kind llm to this device")
        return await WorkerModel(self._workers["language"], name).generate(request, timeout_s)

    async def infer(self, model: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run an installed network, for a tool. Raises Refused, Retry."""
        if model not in self.running:
            networks = [n for n, i in self.running.items() if i.manifest.kind is BundleKind.ONNX]
            raise Refused(f"the network {model} is not installed", f"installed: {', '.join(networks) or 'none'}")
        return await self._workers["network"].infer(model, inputs)

    def language_model(self) -> str | None:
        """The bundle the agent speaks with: the preferred one, or the first there is."""
        llms = sorted(name for name, i in self.running.items() if i.manifest.kind is BundleKind.LLM)
        if self._preferred:
            return self._preferred if self._preferred in llms else None
        return llms[0] if llms else None

    def show(self, reported: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Per bundle: how it fares by the update service's reports, and what runs it here."""
        shown = {}
        for name, report in reported.items():
            shown[name] = dict(report)
            installed = self.running.get(name)
            if installed is None or installed.digest != report["digest"]:
                shown[name]["state"] = "loading" if report["state"] == "committed" else report["state"]
                continue
            info = self._workers[_role(installed)].infos.get(name)
            engine = msgspec.to_builtins(info) if info else {}
            shown[name] |= {key: engine.get(key) for key in ("engine", "provider", "load_s")}
            shown[name]["kind"] = installed.manifest.kind
        return shown


def _role(installed: Installed) -> str:
    kind = installed.manifest.kind
    if kind not in ROLES:
        raise Refused(f"this agent runs no bundle of kind {kind}", f"it runs: {', '.join(ROLES)}")
    return ROLES[kind]


async def _load(worker: WorkerProcess, name: str, installed: Installed) -> None:
    await worker.ready(LOAD_S)
    starts = worker.starts
    try:
        await worker.load(name, installed.folder, LOAD_S)
    except Retry as error:
        await asyncio.sleep(0)
        if worker.pid is None or worker.starts != starts:
            what = f"{name} {installed.manifest.version}"
            raise Refused(
                f"{what} kills its worker while it loads", "its log in the daemon's journal says why"
            ) from error
        raise
