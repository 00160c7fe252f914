"""Talking to systemd: sd_notify(3) over NOTIFY_SOCKET, a path or an abstract name.

Invariant: without NOTIFY_SOCKET nothing happens; a notification that cannot be delivered never stops the daemon, the
watchdog is there to notice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable


def notify(*states: str) -> bool:
    """Send states such as `READY=1`; True when they were handed to the manager."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.sendto("\n".join(states).encode(), address)
        except OSError as error:
            logging.getLogger("outrider").warning("systemd does not hear %s: %s", states[0], error)
            return False
    return True


def watchdog_s() -> float:
    """How often to pet the watchdog: half of WATCHDOG_USEC, 0 when there is none for this process."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 2e6 if usec.isdecimal() else 0.0


async def watchdog(status: Callable[[], str]) -> None:
    """Pet the watchdog as long as the event loop turns."""
    interval = watchdog_s()
    while interval:
        notify("WATCHDOG=1", f"STATUS={status()}")
        await asyncio.sleep(interval)
