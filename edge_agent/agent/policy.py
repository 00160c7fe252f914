"""May this subject use this tool: the rules that stand between a decision and its effect.

Invariants: deny by default; the model never sees a tool its subject may not use; the check is made again right before
the effect; reading needs `read:tool`, everything else `call:tool`, and what the tool itself declares, each for the
tool's name; a dangerous tool needs an approval besides (approval.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edge_agent.agent.tool import ToolSpec
from edge_agent.errors import Refused
from edge_agent.wire.grants import Subject

Allowed = Callable[[Subject, str, str], bool]
"""(subject, action, resource) by the device's cached grants and clock."""


class Forbidden(Refused):
    """Known, but not allowed."""


def action(spec: ToolSpec) -> str:
    """The permission that a tool needs."""
    return "read:tool" if spec.risk == "read" else "call:tool"


def needs(spec: ToolSpec) -> list[str]:
    """All of them: that and the tool's own."""
    return [action(spec), *([spec.permission] if spec.permission else [])]


def must(subject: Subject, action: str, allowed: Allowed) -> None:
    """Raises Forbidden when the subject may not do this on the device."""
    if not allowed(subject, action, ""):
        raise Forbidden(f"{subject.name} may not {action} on this device", "its grants do not say so")


def usable(specs: Sequence[ToolSpec], subject: Subject, allowed: Allowed) -> list[ToolSpec]:
    """The tools that the subject's grants cover, in their order."""
    return [spec for spec in specs if all(allowed(subject, each, spec.name) for each in needs(spec))]


def check(spec: ToolSpec, subject: Subject, allowed: Allowed) -> None:
    """Raises Forbidden when the call may not be made."""
    for each in needs(spec):
        if not allowed(subject, each, spec.name):
            hint = f"it needs {each} for {spec.name}; the roles are {', '.join(subject.roles) or 'none'}"
            raise Forbidden(f"{subject.name} may not use {spec.name}", hint)
