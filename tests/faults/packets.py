"""A network whose packets can be lost and delayed: a TUN interface in front of the kernel's own TCP.

Every packet to `FAR` comes to this process, which swaps its two addresses (the checksums stay right) and gives it back:
a connection to FAR reaches what listens at NEAR, and each packet of both directions passes here. It needs root and
/dev/net/tun. Where `tc netem` works (it is tried on the interface itself) the kernel loses and delays them, else this
process does; `how` says which.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import random
import struct
import subprocess
from types import TracebackType

NEAR, FAR = "10.213.97.1", "10.213.97.2"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class Packets:
    """`loss` is the share of packets dropped, `delay_s` each one's way. Raises OSError where it cannot be."""

    def __init__(self) -> None:
        self._loss, self._delay_s = 0.0, 0.0
        self.carried = self._dropped = 0
        self._random = random.Random(7)
        self._tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._name = name = f"faults{os.getpid() % 10000}"
        try:
            fcntl.ioctl(self._tun, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
            for command in (["addr", "add", NEAR, "peer", FAR, "dev", name], ["link", "set", name, "up"]):
                subprocess.run(["ip", *command], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            os.close(self._tun)
            raise OSError(f"no TUN interface: {error}") from error
        refused = self._netem()
        self._kernel = not refused
        self.how = f"tc netem refused ({refused}): this process" if refused else "tc netem"

    @property
    def loss(self) -> float:
        return self._loss

    @loss.setter
    def loss(self, share: float) -> None:
        self._set(share, self._delay_s)

    @property
    def delay_s(self) -> float:
        return self._delay_s

    @delay_s.setter
    def delay_s(self, seconds: float) -> None:
        self._set(self._loss, seconds)

    @property
    def dropped(self) -> int:
        if not self._kernel:
            return self._dropped
        shown = subprocess.run(["tc", "-s", "-j", "qdisc", "show", "dev", self._name], capture_output=True, check=True)
        return sum(int(each.get("drops", 0)) for each in json.loads(shown.stdout))

    def _set(self, share: float, seconds: float) -> None:
        self._loss, self._delay_s = share, seconds
        if self._kernel and (refused := self._netem()):
            raise OSError(f"tc netem worked and does no more: {refused}")

    def _netem(self) -> str:
        """Have the kernel do it: why not, or an empty text."""
        rule = ["netem", "loss", f"{self._loss:.1%}", "delay", f"{self._delay_s * 1000:.0f}ms", "limit", "100000"]
        command = ["tc", "qdisc", "replace", "dev", self._name, "root", *rule]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return str(error)
        return done.stderr.strip()[:80] if done.returncode else ""

    def __enter__(self) -> Packets:
        asyncio.get_running_loop().add_reader(self._tun, self._readable)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._tun)
        os.close(self._tun)  # the interface goes with it
        self._tun = -1

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = os.read(self._tun, 65536)
                if packet[0] >> 4 != 4:
                    continue
                self.carried += 1
                if not self._kernel and self._random.random() < self._loss:
                    self._dropped += 1
                    continue
                swapped = packet[:12] + packet[16:20] + packet[12:16] + packet[20:]
                asyncio.get_running_loop().call_later(0 if self._kernel else self._delay_s, self._give, swapped)

    def _give(self, packet: bytes) -> None:
        if self._tun >= 0:
            with contextlib.suppress(BlockingIOError):
                os.write(self._tun, packet)
