"""Bundles by their kind: models go to their workers, workflows into the library of this device's work.

Invariants: a version of a workflow bundle is taken only when each of its definitions passes the check against the tools
and grants of this device, and its policy.toml, if it has one, can be used; two bundles never define the same workflow;
a bundled definition goes before a file of the same name in the device's own folder; the interlocks of all policies hold
together, from before the first act after a start.
"""

from __future__ import annotations

import asyncio
from typing import Any

from edge_agent.agent import policy
from edge_agent.agent.interlock import Interlocked
from edge_agent.agent.rules import PolicyFile
from edge_agent.agent.workflow import Broken, read
from edge_agent.agent.workflow_check import check
from edge_agent.agent.workflow_triggers import Library
from edge_agent.errors import Refused, Retry
from edge_agent.hosting import Hosting
from edge_agent.update.slots import Installed, Slots
from edge_agent.update.trial import Figures, Untried
from edge_agent.wire.bundle import BundleKind
from edge_agent.wire.updates import Activation

POLICY = "policy.toml"


class Bundled:
    """The update service's Prober and Switch."""

    def __init__(
        self, hosting: Hosting, library: Library, tools: Interlocked, allowed: policy.Allowed, slots: Slots
    ) -> None:
        self._hosting, self._library, self._tools, self._allowed = hosting, library, tools, allowed
        for name in slots.names():
            installed = slots.current(name)
            if installed is not None and installed.manifest.kind is BundleKind.WORKFLOW:
                self._take(name, installed)

    async def probe(self, name: str, candidate: Installed, activation: Activation) -> Figures:
        """Raises Worse or Refused when it is no good here, Untried when that cannot be told now."""
        if candidate.manifest.kind is not BundleKind.WORKFLOW:
            return await self._hosting.probe(name, candidate, activation)
        await asyncio.to_thread(PolicyFile(candidate.folder / POLICY).read)
        try:
            specs = await self._tools.specs()
        except Retry as error:
            raise Untried(error.message, error.hint) from error
        for file, text in (await asyncio.to_thread(_texts, candidate)).items():
            try:
                flow, marks = read(text)
                found = check(flow, marks, specs, self._allowed)
            except Broken as broken:
                found = broken.problems
            if found:
                more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
                first = found[0]
                raise Refused(f"{file}:{first.line}:{first.column}: {first.message}{more}", first.hint)
            if flow.workflow in self._library.others(name):
                raise Refused(f"{file}: another bundle has the workflow {flow.workflow}", "give it another name")
        return Figures("load")

    async def switch(self, name: str, installed: Installed) -> None:
        """Raises Refused, Retry."""
        if installed.manifest.kind is not BundleKind.WORKFLOW:
            await self._hosting.switch(name, installed)
            return
        self._take(name, installed)

    def _take(self, name: str, installed: Installed) -> None:
        self._library.bundles[name] = installed.folder
        self._tools.files[name] = PolicyFile(installed.folder / POLICY)

    def show(self, reported: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """As `Hosting.show`, with the workflow bundles as they are reported."""
        flows = {name: each for name, each in reported.items() if name in self._library.bundles}
        models = self._hosting.show({name: each for name, each in reported.items() if name not in flows})
        return models | {name: {**each, "kind": "workflow"} for name, each in flows.items()}


def _texts(candidate: Installed) -> dict[str, str]:
    files, documents = sorted(candidate.folder.glob("*.yaml")), sorted(candidate.folder.glob("documents/**/*"))
    if not files and not documents and not (candidate.folder / POLICY).exists():
        raise Refused(f"{candidate.manifest.name} has no .yaml file, no {POLICY} and no documents", "put some in it")
    try:
        for document in (path for path in documents if path.is_file()):
            document.read_text()
        return {path.name: path.read_text() for path in files}
    except UnicodeDecodeError as error:
        raise Refused(f"{candidate.manifest.name} has a file that is no text: {error}") from error
