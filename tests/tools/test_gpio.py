"""Lines of a GPIO chip: on the kernel's simulator (gpio-sim) where there is one, and what is said where not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.agent.calls import Call, CallError, validate
from edge_agent.agent.tool import Tool, ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.errors import Fatal

SIM = Path("/sys/kernel/config/gpio-sim")


def tools(folder: Path, text: str) -> dict[str, Tool]:
    (folder / "gpio.toml").write_text(text)
    return {tool.spec.name: tool for tool in load("tools.gpio", folder, {})}


@pytest.fixture
def chip() -> Iterator[tuple[Path, Path]]:
    """A simulated chip of eight lines: its device, and where the world pulls and sees its lines."""
    bank = SIM / f"outrider-{os.getpid()}" / "bank0"
    bank.mkdir(parents=True)
    (bank / "num_lines").write_text("8")
    live = bank.parent / "live"
    live.write_text("1")
    name = (bank / "chip_name").read_text().strip()
    yield Path("/dev") / name, Path("/sys/devices/platform") / (bank.parent / "dev_name").read_text().strip() / name
    live.write_text("0")
    bank.rmdir()
    bank.parent.rmdir()


@pytest.mark.skipif(not SIM.is_dir(), reason="this kernel has no gpio-sim: modprobe gpio-sim")
def test_lines_are_read_and_held(tmp_path: Path, chip: tuple[Path, Path]) -> None:
    device, world = chip
    made = tools(
        tmp_path,
        f'[lines]\nguard = {{line = 1, chip = "{device}", bias = "up"}}\n'
        f'fault = {{line = 2, chip = "{device}", active_low = true}}\n'
        f'lamp = {{line = 3, chip = "{device}", output = true}}\n',
    )
    read, set_ = made["read_line"].function, made["set_line"].function
    for pull, on in (("pull-up", True), ("pull-down", False)):
        for n in (1, 2):
            (world / f"sim_gpio{n}" / "pull").write_text(pull)
        assert (read(name="guard")["on"], read(name="fault")["on"]) == (on, not on)
    for on in (True, False, True):
        assert set_(name="lamp", on=on)["on"] is on
        assert (world / "sim_gpio3" / "value").read_text().strip() == str(int(on))
        assert read(name="lamp")["on"] is on


def test_a_chip_that_is_not_there_is_told_with_its_line(tmp_path: Path) -> None:
    made = tools(
        tmp_path,
        '[lines]\nguard = {line = 17, chip = "/dev/gpiochip99"}\n'
        'lamp = {line = "LED", chip = "/dev/null", output = true}',
    )
    with pytest.raises(ToolError, match=r"guard \(line 17 of /dev/gpiochip99\) cannot be had: No such file"):
        made["read_line"].function(name="guard")
    with pytest.raises(ToolError, match=r"lamp \(line LED of /dev/null\) cannot be had"):
        made["set_line"].function(name="lamp", on=True)


def test_only_outputs_can_be_set_and_each_is_read_back(tmp_path: Path) -> None:
    made = tools(tmp_path, "[lines]\nguard = {line = 1}\nlamp = {line = 2, output = true}")
    spec = made["set_line"].spec
    assert (spec.risk, spec.check and spec.check.tool, spec.undo and spec.undo.tool) == ("act", "read_line", "set_line")
    assert not spec.repeatable, "made again, it would take the value that it set for the one before"
    with pytest.raises(CallError, match="is one of lamp"):
        validate(Call("set_line", {"name": "guard", "on": True}), [spec])
    assert list(tools(tmp_path, "[lines]\nguard = {line = 1}")) == ["read_line"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "missing required field `lines`"),
        ("[lines]\na = {line = -1}", ">= 0"),
        ('[lines]\na = {line = 1, bias = "left"}', "Invalid enum value 'left'"),
        ("[lines]\na = {pin = 1}", "unknown field `pin`|missing required field `line`"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(Fatal, match=told):
        tools(tmp_path, text)
