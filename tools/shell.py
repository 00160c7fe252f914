"""One command in a sandbox: bubblewrap around it, or no command at all.

Invariants: the command sees the system's programs read-only, folders that the pack's file names, a /tmp of its own and
nothing of the device: no network, no keys, no state, no other process; it runs as nobody with bounds on memory, CPU
time, processes, open files and what it writes; past its time, or with more output than is kept, its whole tree is
killed. Where a sandbox cannot be had the tool refuses and says what to install; nothing runs without one.
Not bounded by the sandbox itself: the memory of all processes together, which the service's own MemoryMax bounds.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

import msgspec
from msgspec import Meta

from edge_agent.agent.tool import Tool, ToolError, declare
from tools import settings

NOBODY = 65534
PROBE_S = 15.0
_SYSTEM = ("/usr", "/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d")
_LINKS = ("/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32")
_KEPT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file, which need not be there; `read` are folders and files that commands may see besides."""

    read: list[str] = []
    timeout_s: Annotated[float, Meta(gt=0, le=300)] = 20.0
    memory_mb: Annotated[int, Meta(ge=16, le=4096)] = 256
    cpu_s: Annotated[int, Meta(ge=1, le=300)] = 10
    processes: Annotated[int, Meta(ge=4, le=512)] = 32
    tmp_mb: Annotated[int, Meta(ge=1, le=1024)] = 16
    output: Annotated[int, Meta(ge=100, le=48 * 1024)] = 16 * 1024


class Ended(TypedDict):
    """How a command ended: `status` is its own, 128 and the signal's number when it was killed by one."""

    status: int
    output: str


class Shell:
    """The tool."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._good = settings, False

    def run_command(self, command: str) -> Ended:
        """Run a shell command in a sandbox with no network and no access to the device's own files."""
        if "\0" in command or not command.strip():
            raise ToolError("there is no command")
        self._sandboxed()
        status, output, cut = self._run(["/bin/sh", "-c", command], self._settings.timeout_s)
        text = output.decode(errors="replace")
        if cut:
            raise ToolError(f"{cut} and was killed; its output began: {text[:300]}")
        return {"status": 128 - status if status < 0 else status, "output": text}

    def problem(self) -> str:
        """Why there is no sandbox here, and what to do; empty when there is one."""
        for program, package in (("bwrap", "bubblewrap"), ("prlimit", "util-linux"), ("setpriv", "util-linux")):
            if shutil.which(program) is None:
                return f"there is no {program} on this device: apt-get install {package}"
        status, output, _ = self._run(["/bin/true"], PROBE_S)
        hint = "are user namespaces allowed (sysctl user.max_user_namespaces; deploy/shell.conf for the service)?"
        told = output.decode(errors="replace").strip()[:300]
        return f"bubblewrap makes no sandbox here: {told}; {hint}" if status else ""

    def _sandboxed(self) -> None:
        if not self._good and (problem := self.problem()):
            raise ToolError(f"no command is run without a sandbox: {problem}")
        self._good = True

    def _argv(self, command: list[str]) -> list[str]:
        given, binds = self._settings, list[str]()
        for path in _SYSTEM:
            binds += ["--ro-bind-try", path, path]
        for link in _LINKS:
            there = Path(link)
            binds += ["--symlink", str(there.readlink()), link] if there.is_symlink() else ["--ro-bind-try", link, link]
        limits = {"as": given.memory_mb << 20, "cpu": given.cpu_s, "nproc": given.processes, "nofile": 256, "core": 0}
        limits |= {"fsize": given.tmp_mb << 20}
        box = [
            "--unshare-all",
            "--unshare-user",
            "--disable-userns",
            "--die-with-parent",
            "--new-session",
            "--clearenv",
        ]
        box += ["--cap-drop", "ALL", *binds, "--dev", "/dev", "--proc", "/proc", "--size", str(given.tmp_mb << 20)]
        box += [
            "--tmpfs",
            "/tmp",
            *(a for path in given.read for a in ("--ro-bind-try", path, path)),
            "--chdir",
            "/tmp",
            *(a for k, v in _KEPT.items() for a in ("--setenv", k, v)),
        ]
        drop = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.geteuid() == 0 else []
        bounds = [f"--{name}={value}:{value}" for name, value in limits.items()]
        # the outer process makes the sandbox with no bound on its memory, the inner one runs in it with all
        return ["setpriv", *drop, "--no-new-privs", "bwrap", *box, "--", "/usr/bin/prlimit", *bounds, *command]

    def _run(self, command: list[str], within_s: float) -> tuple[int, bytes, str]:
        """Status, output, and why it was killed ("": it was not)."""
        deadline, output = time.monotonic() + within_s, b""
        process = subprocess.Popen(
            self._argv(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_KEPT,
            cwd="/",
        )
        assert process.stdout is not None
        cut = ""
        try:
            while not cut:
                ready = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
                if not ready:
                    cut = f"it was not over after {within_s:g} s"
                elif piece := os.read(process.stdout.fileno(), 8192):
                    output += piece
                    if len(output) > self._settings.output:
                        cut = f"it wrote more than {self._settings.output} bytes"
                else:
                    break
        finally:
            if cut:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(
                        process.pid, signal.SIGKILL
                    )  # and with it the first process of the sandbox, and all others
            process.stdout.close()
            process.wait()
        return process.returncode, output[: self._settings.output], cut


def pack(state: Path, options: dict[str, str]) -> Sequence[Tool]:
    """`run_command`, which is dangerous. Raises ValueError."""
    given = settings.read("shell", state, options, Settings, needed=False)
    return [
        declare(
            Shell(given).run_command, risk="danger", idempotent=False, timeout_s=given.timeout_s + 10, concurrent=True
        )
    ]
