"""Waiting in step: what looks again and again wakes at the same moments as the rest of the daemon.

To wake a sleeping process costs a small machine more than most looks do (0.3 ms of processor time on a virtual
machine, measured), so parts that look once a second do it together.
"""

from __future__ import annotations

import asyncio
import contextlib
import time


async def tick(period_s: float) -> None:
    """Sleep until the monotonic clock reaches the next multiple of the period."""
    await asyncio.sleep(rest(period_s))


def rest(period_s: float) -> float:
    """Seconds until then."""
    return period_s - time.monotonic() % period_s


def steady() -> float:
    """Seconds that nobody can set, and that go on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def wait_up_to(seconds: float | None, event: asyncio.Event) -> None:
    """Not `asyncio.wait_for`: in Python 3.11 that loses a cancellation which comes together with the event."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
