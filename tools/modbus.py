"""Registers of Modbus TCP devices, by the names that the pack's file gives them.

Invariants: nothing but what the file lists is read, and nothing but what it calls writable is written; values are in
the unit of the file, scaled, and inside its range or an error; what was written is read back by the device (the tool's
`check`); a connection that broke is made anew for the next call, and an answer is waited for `timeout_s` at most.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from pymodbus.client import ModbusTcpClient
from pymodbus.exceptions import ModbusException

from edge_agent.agent.tool import Check, Param, Tool, ToolError, Undo, declare
from tools import settings

Type = Literal["int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64", "bit"]
_EXCEPTIONS = {1: "illegal function", 2: "illegal address", 3: "illegal value", 4: "device failure", 6: "busy"}
_EXCEPTIONS |= {5: "acknowledge", 10: "gateway path unavailable", 11: "gateway target does not answer"}


class Register(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A value is raw * `scale` + `offset`, in `unit`, from `low` to `high`; a `bit` is a coil or a discrete input."""

    address: Annotated[int, Meta(ge=0, le=65535)]
    type: Type = "uint16"
    table: Literal["holding", "input"] = "holding"
    writable: bool = False
    scale: float = 1.0
    offset: float = 0.0
    unit: str = ""
    low: float | None = None
    high: float | None = None
    words: Literal["big", "little"] = "big"
    device: Annotated[int, Meta(ge=0, le=255)] = 1

    def __post_init__(self) -> None:
        if self.scale == 0 or (self.writable and self.table == "input"):
            raise ValueError("scale is not 0, and an input is not writable")

    @property
    def kind(self) -> Any:
        return ModbusTcpClient.DATATYPE[self.type.upper()]

    def value(self, raw: Any) -> float:
        """Rounded to what the type can tell."""
        digits = 7 if self.type == "float32" else 12
        return float(f"{raw * self.scale + self.offset:.{digits}g}")

    def raw(self, value: float) -> Any:
        plain = (value - self.offset) / self.scale
        return plain if self.type.startswith("float") else round(plain)

    def outside(self, value: float) -> str:
        """What is wrong with a value; empty when it is in range."""
        low = float("-inf") if self.low is None else self.low
        high = float("inf") if self.high is None else self.high
        return "" if low <= value <= high else f"{value:g} {self.unit}, out of its range {low:g} to {high:g}"


class Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device that speaks Modbus TCP, and its registers by name."""

    host: str
    registers: Annotated[dict[str, Register], Meta(min_length=1, max_length=200)]
    port: Annotated[int, Meta(ge=1, le=65535)] = 502
    timeout_s: Annotated[float, Meta(gt=0, le=30)] = 2.0


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    servers: Annotated[dict[str, Server], Meta(min_length=1, max_length=32)]


class Link:
    """A connection, made when it is used."""

    def __init__(self, name: str, server: Server) -> None:
        self._where = f"{name} ({server.host}:{server.port})"
        self._client: Any = ModbusTcpClient(server.host, port=server.port, timeout=server.timeout_s, retries=0)
        weakref.finalize(self, self._client.close)

    def ask(self, what: str, work: Callable[[ModbusTcpClient], Any]) -> Any:
        """The answer. Raises ToolError."""
        try:
            if not self._client.connected and not self._client.connect():
                raise ToolError(f"{self._where} cannot be reached")
            answer = work(self._client)
        except (ModbusException, OSError) as error:
            self._client.close()
            raise ToolError(f"{self._where} does not answer: {error}") from error
        if answer.isError():
            code = getattr(answer, "exception_code", 0)
            raise ToolError(f"{self._where} refuses {what}: {_EXCEPTIONS.get(code, 'exception')} ({code})")
        return answer


class Modbus:
    """The tools."""

    def __init__(self, given: Settings) -> None:
        links = {name: Link(name, server) for name, server in given.servers.items()}
        self.registers = {
            register: (links[name], each)
            for name, server in given.servers.items()
            for register, each in server.registers.items()
        }

    def read_register(self, name: str) -> dict[str, Any]:
        """Read a value of a machine (a Modbus register)."""
        link, register = self.registers[name]
        value = self._read(link, register, name)
        if wrong := register.outside(value):
            raise ToolError(f"{name} reads {wrong}: it is not used")
        return {"name": name, "value": value, "unit": register.unit}

    def write_register(self, name: str, value: float) -> dict[str, Any]:
        """Set a value of a machine (a Modbus register)."""
        link, register = self.registers[name]
        if wrong := register.outside(value):
            raise ToolError(f"{name} is not set to {wrong}")
        raw, before = register.raw(value), self._read(link, register, name)
        if register.type == "bit":
            if raw not in (0, 1):
                raise ToolError(f"{name} is set to 0 or 1, not {value:g}")
            link.ask(name, lambda c: c.write_coil(register.address, bool(raw), device_id=register.device))
        else:
            try:
                words = ModbusTcpClient.convert_to_registers(raw, register.kind, word_order=register.words)
            except Exception as error:  # of struct or of the library: the value has no such form
                raise ToolError(f"{name} cannot be {value:g}: no {register.type} holds {raw:g}") from error
            link.ask(name, lambda c: c.write_registers(register.address, words, device_id=register.device))
        return {"name": name, "value": register.value(raw), "unit": register.unit, "before": before}

    def _read(self, link: Link, register: Register, name: str) -> float:
        at, device = register.address, register.device
        if register.type == "bit":
            of = "read_coils" if register.table == "holding" else "read_discrete_inputs"
            answer = link.ask(name, lambda c: getattr(c, of)(at, count=1, device_id=device))
            return float(answer.bits[0])
        of, count = f"read_{register.table}_registers", register.kind.value[1]
        answer = link.ask(name, lambda c: getattr(c, of)(at, count=count, device_id=device))
        raw = ModbusTcpClient.convert_from_registers(answer.registers, register.kind, word_order=register.words)
        return register.value(raw)


def pack(state: Path, options: dict[str, str]) -> Sequence[Tool]:
    """`read_register`, and `write_register` where a register is writable. Raises ValueError."""
    given = settings.read("modbus", state, options, Settings)
    names = [name for server in given.servers.values() for name in server.registers]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the register {twice[0]} is there twice: each name once, over all servers")
    tools, limit = Modbus(given), 5 + 6 * max(server.timeout_s for server in given.servers.values())
    units = sorted({register.unit for _, register in tools.registers.values()})
    shown = [Param("name", "choice", choices=sorted(names)), Param("value", "float")]
    shown.append(Param("unit", "choice", choices=units))
    made = [settings.choosing(declare(tools.read_register, timeout_s=limit), settings.fields(*shown), name=names)]
    if writable := [name for name, (_, register) in tools.registers.items() if register.writable]:
        write = declare(
            tools.write_register,
            risk="act",
            idempotent=False,  # made again, it would take what it wrote for what was before, which an undo sets
            timeout_s=limit,
            check=Check("read_register", {"name": "$name"}, equals="$result.value", wait_s=1.0),
            undo=Undo("write_register", {"name": "$name", "value": "$result.before"}),
        )
        made.append(settings.choosing(write, settings.fields(*shown, Param("before", "float")), name=writable))
    return made
