"""What was done to the plant, on disk: one JSON line an action, after a header with the lines they start from.

Invariants: an action is fsynced before it counts. Nothing is kept in memory, so any process that opens the folder
sees the same world, before and after a crash. A torn last line is an action that never happened and is cut off;
a damaged line elsewhere is an error. Past MAX_ACTIONS the header takes the folded state and the actions go.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edge_agent.wire import durable
from tools.sim.plant import Action, Line, Verb, fold, initial, state

MAX_ACTIONS = 256


class JournalError(Exception):
    """The journal is damaged, or of another plant."""


class Header(msgspec.Struct, frozen=True):
    """Seed and start of the plant, and the lines the actions below start from."""

    seed: int
    start: float
    lines: list[Line]
    v: int = 1


class Journal:
    """The journal in `folder`; made with `seed` and `start` when it is not there. Safe between processes."""

    def __init__(self, folder: Path, seed: int, start: float) -> None:
        """Raises JournalError when the folder holds a plant of another seed."""
        self._path, self._lock = folder / "plant.jsonl", folder / "plant.lock"
        folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if not self._content():
                self._replace(Header(seed, start, initial(seed, start)))
            header, _ = self._read()
        if header.seed != seed:
            raise JournalError(f"{self._path} is a plant of seed {header.seed}, not {seed}: use that or another folder")
        self.seed, self.start = header.seed, header.start

    def lines(self, now: float) -> dict[int, Line]:
        """The plant at `now`."""
        with self._locked():
            header, actions = self._read()
        return state(header.lines, actions, now)

    def act(self, line: int, verb: Verb, now: float, percent: float = 0.0) -> Line:
        """Do it, durably, and return the line just after. Raises OSError when it could not be written: not done."""
        with self._locked():
            header, actions = self._read()
            at = state(header.lines, actions, now)[line].at
            actions.append(Action(at, line, verb, percent))
            if len(actions) > MAX_ACTIONS:
                self._replace(msgspec.structs.replace(header, lines=fold(header.lines, actions)))
            else:
                self._append(actions[-1])
        return state(header.lines, actions, at)[line]

    def _read(self) -> tuple[Header, list[Action]]:
        try:
            first, *rest = self._content()
            return msgspec.json.decode(first, type=Header), [msgspec.json.decode(r, type=Action) for r in rest]
        except (msgspec.MsgspecError, ValueError) as error:
            raise JournalError(f"{self._path} is damaged: {error}; move it away to start a new plant") from error

    def _content(self) -> list[bytes]:
        """The whole lines; what follows the last newline was torn and is cut off."""
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with self._path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())
        return data[:whole].splitlines()

    def _append(self, action: Action) -> None:
        data = msgspec.json.encode(action) + b"\n"
        with self._path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise

    def _replace(self, header: Header) -> None:
        durable.write(self._path, msgspec.json.encode(header) + b"\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
