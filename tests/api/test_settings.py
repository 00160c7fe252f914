"""Settings and the command line: what is wrong is named, with the nearest right thing."""

import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.config import Settings, load
from edge_agent.errors import Refused


def outrider(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_agent.cli", *args]
    environment = {"PATH": "/usr/bin:/bin", "TERM": "dumb", "COLUMNS": "120", **env}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('state = "/var/a"\noutbox_mb = 8\noption = ["seed=3"]\n')
    assert load({"outbox_mb": None}, file) == Settings(Path("/var/a"), outbox_mb=8, option=["seed=3"])
    assert load({"state": tmp_path, "outbox_mb": 9}, file).outbox_mb == 9


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('stat = "/var/a"', "did you mean 'state'"),
        ("colour = 1", "known: accelerator, adapter, api, blobs_mb, broker"),
        ('state = "/var/a"\naccelerator = ["gpu"]', "accelerator"),
        ('state = "/var/a"\n[endpoints.plant]\nurl = "localhost:1"\nmodel = "m"', "is not like http://"),
        (
            'state = "/var/a"\n[endpoints.plant]\nurl = "http://h/v1"\nmodel = "m"\nkey = "secret"',
            "unknown field `key`",
        ),
        ('state = "/var/a"\noutbox_mb = "much"', "outbox_mb"),
        ('state = "/var/a"\noutbox_mb = 0', "more than 0"),
        ('state = "/var/a"\napi = "8471"', "not HOST:PORT"),
        ('state = "/var/a"\nlog = "loud"', "debug, info"),
        ("state = ", "cannot be read"),
        ("hub = 'http://h'", "no state directory"),
    ],
)
def test_a_wrong_setting_is_refused_with_a_hint(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(text)
    with pytest.raises(Refused, match=says):
        load({}, file)


def test_the_help_lists_every_verb_and_imports_none() -> None:
    code = (
        "import sys, edge_agent.cli as c\n"
        "try: c.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'fastapi', 'numpy', 'httpx', 'paho', 'starlette', 'edge_agent.daemon', 'hub.cli', 'bench.cli'}\n"
        "print('imported:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    for verb in ("agent", "task", "doctor", "hub", "models", "bench", "demo"):
        assert f"\n  {verb} " in done.stdout
    assert "imported: []" in done.stdout


def test_a_verb_that_is_not_there_or_not_installed_says_so() -> None:
    unknown = outrider("nonsense")
    assert unknown.returncode == 2
    assert "nonsense" in unknown.stderr
    blocked = "import sys; sys.modules['httpx'] = None; sys.argv = ['outrider', 'task', 'x']\n"
    blocked += "import edge_agent.cli as c; c.main()"
    missing = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=60, check=False)
    assert missing.returncode == 69
    assert "outrider[edge]" in missing.stderr


def test_errors_are_a_line_and_a_hint_never_a_traceback(tmp_path: Path) -> None:
    no_state = outrider("agent")
    assert (no_state.returncode, no_state.stderr.count("\n")) == (78, 2)
    assert "--state" in no_state.stderr
    nobody = outrider("task", "x", "--api", "127.0.0.1:9", "--token", "t")
    assert nobody.returncode == 75
    assert "outrider agent" in nobody.stderr
    assert "Traceback" not in no_state.stderr + nobody.stderr


def test_doctor_names_what_is_wrong_and_changes_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = outrider("doctor", "--json", "--state", str(state), "--broker", "http://x", "--hub", "http://127.0.0.1:9")
    assert done.returncode == 1
    for name in ("python", "extras", "state", "disk", "hub", "broker", "model", "systemd"):
        assert f'"name":"{name}"' in done.stdout
    assert "not a broker address" in done.stdout
    assert not state.exists()
