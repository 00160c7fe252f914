"""Trouble that comes again and again, told so that it does not fill the log it is told in.

Invariants: the first time is a line at once, then at most one line each `every_s` with how often it came meanwhile; its
end is one line, and only when its beginning was one, so that coming and going is no flood either.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class Trouble:
    """One kind of trouble of one part."""

    def __init__(
        self, log: logging.Logger, what: str, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log, self._what, self._every_s, self._clock = log, what, every_s, clock
        self._since, self._told = 0.0, float("-inf")
        self._times = 0  # since the last line
        self._on = False

    def tell(self, reason: object) -> None:
        """It happened (again)."""
        now = self._clock()
        self._times += 1
        if now - self._told < self._every_s:
            return
        if not self._on:
            self._on, self._since = True, now
        again = f" ({self._times} times since the last such line)" if self._times > 1 else ""
        self._log.warning("%s: %s%s", self._what, reason, again)
        self._told, self._times = now, 0

    def over(self) -> None:
        """It went well."""
        if self._on:
            self._log.warning("%s: well again after %.0f s", self._what, self._clock() - self._since)
            self._on = False
