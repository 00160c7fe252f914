"""Registers of a real Modbus TCP server in another process: values, exceptions, silence, a server that comes back."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent.act import Acts, Ended
from edge_agent.agent.calls import Call, CallError, validate
from edge_agent.agent.tool import Tool, ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.agent.transcript import Task, Transcripts, migrations
from edge_agent.errors import Fatal
from edge_agent.store import Store
from edge_agent.wire.grants import Subject
from tests.fakes import LocalTools

FILE = """
[servers.press]
host = "127.0.0.1"
port = {port}
timeout_s = 1.5
[servers.press.registers]
level = {{address = 0, scale = 0.1, unit = "%", low = 0, high = 100, writable = true}}
flow = {{address = 2, type = "float32", unit = "l/min", writable = true}}
oil = {{address = 0, table = "input", scale = 0.1, unit = "°C", low = -20, high = 20}}
room = {{address = 1, table = "input", scale = 0.1, offset = 1, unit = "°C"}}
pump = {{address = 5, type = "bit", writable = true}}
stuck = {{address = 20, writable = true}}
slow = {{address = 30}}
busy = {{address = 40}}
nowhere = {{address = 60}}
"""


def free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def serving(port: int) -> Iterator[None]:
    argv = [sys.executable, "-m", "tests.tools.modbus_peer", str(port)]
    with subprocess.Popen(argv, cwd=Path(__file__).parents[2]) as process:
        try:
            for _ in range(500):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.02)
            yield
        finally:
            process.kill()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    at = free()
    with serving(at):
        yield at


def tools(folder: Path, text: str) -> dict[str, Tool]:
    (folder / "modbus.toml").write_text(text)
    return {tool.spec.name: tool for tool in load("tools.modbus", folder, {})}


@pytest.fixture
def made(tmp_path: Path, port: int) -> dict[str, Tool]:
    return tools(tmp_path, FILE.format(port=port))


@pytest.fixture
async def act(tmp_path: Path, made: dict[str, Tool]) -> AsyncIterator[Any]:
    store = Store(tmp_path / "s.db", migrations)
    transcripts, local = Transcripts(store), LocalTools(*made.values())
    acts = Acts(local, transcripts, lambda *_: True, time.time)
    task = await transcripts.add(Task("t", "do", Subject("ada", ["operator"], 1.0), 1.0))

    async def call(tool: str, **args: Any) -> Any:
        return await acts.act(task, made[tool].spec, validate(Call(tool, args), [made[tool].spec]), 5.0)

    call.undo = lambda n: acts.undo(task, n)  # type: ignore[attr-defined]
    call.task = task  # type: ignore[attr-defined]
    yield call
    store.close()


async def test_values_have_scale_and_unit_and_what_is_written_is_read_back(act: Any) -> None:
    for name, value, got, unit in (("level", 41.26, 41.3, "%"), ("flow", 0.1, 0.1, "l/min"), ("pump", 1, 1.0, "")):
        step = await act("write_register", name=name, value=value)
        assert step.ok, step.text
        assert (step.result["value"], step.result["unit"], step.result["before"]) == (got, unit, 0.0)
        assert (await act("read_register", name=name)).result["value"] == got
    assert (await act("read_register", name="room")).result == {"name": "room", "value": 22.5, "unit": "°C"}
    for n, name in ((1, "level"), (5, "flow"), (9, "pump")):
        assert act.task.steps[n].call.args["name"] == name
        assert (await act.undo(n)).result["value"] == 0.0
        assert (await act("read_register", name=name)).result["value"] == 0.0


async def test_a_write_cut_short_after_its_effect_is_not_made_again(
    tmp_path: Path, made: dict[str, Tool], act: Any
) -> None:
    """Made again, it would take the value that it wrote itself for the one before, and an undo would change nothing."""

    class Dies(LocalTools):
        async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
            await super().call(name, args, timeout_s)
            raise EOFError

    store = Store(tmp_path / "dies.db", migrations)
    transcripts, spec = Transcripts(store), made["write_register"].spec
    task = await transcripts.add(Task("t", "do", Subject("ada", ["operator"], 1.0), 1.0))
    level = validate(Call("write_register", {"name": "level", "value": 40.0}), [spec])
    with pytest.raises(EOFError):
        await Acts(Dies(*made.values()), transcripts, lambda *_: True, time.time).act(task, spec, level, 5.0)
    again = await transcripts.get("t")
    assert again is not None
    with pytest.raises(Ended, match="effect unknown"):
        await Acts(LocalTools(*made.values()), transcripts, lambda *_: True, time.time).act(again, spec, level, 5.0)
    store.close()
    assert (await act("write_register", name="level", value=0.0)).result["before"] == 40.0


async def test_a_register_that_does_not_take_the_value_is_an_error(act: Any) -> None:
    step = await act("write_register", name="stuck", value=5)
    assert not step.ok
    assert "was made, but read_register value read back 7.0 where 5.0 was set" in step.text


@pytest.mark.parametrize(
    ("tool", "args", "told"),
    [
        ("read_register", {"name": "oil"}, "oil reads 21.5 °C, out of its range -20 to 20: it is not used"),
        ("write_register", {"name": "level", "value": 101.0}, "level is not set to 101 %, out of its range 0 to 100"),
        ("write_register", {"name": "stuck", "value": 70000.0}, "no uint16 holds 70000"),
        ("write_register", {"name": "pump", "value": 2.0}, "pump is set to 0 or 1, not 2"),
        ("read_register", {"name": "nowhere"}, r"refuses nowhere: illegal address \(2\)"),
        ("read_register", {"name": "busy"}, r"refuses busy: busy \(6\)"),
    ],
)
def test_what_is_out_of_range_or_refused_is_said(
    made: dict[str, Tool], tool: str, args: dict[str, Any], told: str
) -> None:
    with pytest.raises(ToolError, match=told):
        made[tool].function(**args)


def test_the_model_can_name_only_what_the_file_lists_and_write_only_what_is_writable(made: dict[str, Tool]) -> None:
    specs = [tool.spec for tool in made.values()]
    assert [spec.risk for spec in specs] == ["read", "act"]
    for call in (Call("read_register", {"name": "valve"}), Call("write_register", {"name": "oil", "value": 1.0})):
        with pytest.raises(CallError, match="is one of"):
            validate(call, specs)


def test_silence_ends_after_its_time_and_the_next_call_is_answered(made: dict[str, Tool]) -> None:
    began = time.monotonic()
    with pytest.raises(ToolError, match="does not answer"):
        made["read_register"].function(name="slow")
    assert time.monotonic() - began < 3.5
    assert made["read_register"].function(name="room")["value"] == 22.5, "not the late answer to the last question"


def test_a_server_that_goes_and_comes_back_is_reached_again(tmp_path: Path) -> None:
    at = free()
    read = tools(tmp_path, FILE.format(port=at))["read_register"].function
    with pytest.raises(ToolError, match=f"press \\(127.0.0.1:{at}\\) cannot be reached"):
        read(name="room")
    for _ in range(2):
        with serving(at):
            assert read(name="room")["value"] == 22.5
        with pytest.raises(ToolError, match="press"):
            read(name="room")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "missing required field `servers`"),
        ('[servers.a]\nhost="x"\nregisters={a={address=70000}}', r"<= 65535.*registers.*address"),
        ('[servers.a]\nhost="x"\nregisters={a={address=1, type="int8"}}', "Invalid enum value 'int8'"),
        ('[servers.a]\nhost="x"\nregisters={a={address=1, table="input", writable=true}}', "an input is not writable"),
        ('[servers.a]\nhost="x"\nregisters={a={adress=1}}', "unknown field `adress`"),
        (
            '[servers.a]\nhost="x"\nregisters={a={address=1}}\n[servers.b]\nhost="y"\nregisters={a={address=1}}',
            "the register a is there twice",
        ),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(Fatal, match=told):
        tools(tmp_path, text)
