"""`outrider rollout` as it is typed: the documented example, simulations, errors that say what to do."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge_agent.cli import main
from hub.rollout_cli import app, line, whole

EXAMPLE = str(Path(__file__).parents[2] / "docs" / "examples" / "rollout.yaml")


def outrider(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(args))
    return done.exit_code, done.output


def test_the_documented_plan_runs_through_and_stops_where_a_wave_is_bad() -> None:
    code, good = outrider("simulate", EXAMPLE, "--devices", "400", "--json")
    assert code == 0, good
    played = json.loads(good)
    assert (played["status"], played["devices"], played["told"]) == ("succeeded", 400, 400)
    assert [sum(wave.values()) for wave in played["waves"]] == [4, 36, 360]
    code, bad = outrider("simulate", EXAMPLE, "--devices", "400", "--failure", "0.2", "--wave", "3")
    assert code == 0, bad
    assert "paused after" in bad
    assert "wave 3: " in bad
    assert "x failed" in bad.splitlines()[0]
    assert bad == outrider("simulate", EXAMPLE, "--devices", "400", "--failure", "0.2", "--wave", "3")[1]


def test_an_approval_is_waited_for_and_silence_is_no_success(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(
        json.dumps({"waves": [{"count": 5}, {"approval": True}], "timeout_s": 600, "bundle": "b", "version": "2"})
    )
    played = json.loads(outrider("simulate", str(plan), "--devices", "20", "--approve-s", "86400", "--json")[1])
    assert played["seconds"] > 86400
    silent = json.loads(outrider("simulate", str(plan), "--devices", "20", "--silent", "1", "--json")[1])
    assert silent["status"] == "paused"
    assert "0.0% success" in silent["reason"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bundle: b", "no version"),
        ("[1]", "holds no plan"),
        ("bundle: b\nversion: '2'\nnot_before: 2027-01-01T22:00:00", "put a time in quotes"),
        ("bundle: b\nversion: '2'\ntimeout_s: .inf", "not JSON compliant"),
        ("a: [", "cannot be read"),
        ("bundle: b\nversion: 1", "version"),
    ],
)
def test_a_plan_that_is_wrong_is_one_sentence_with_a_hint(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    code, told = outrider("simulate", str(tmp_path / "plan.yaml"))
    assert code == 1
    assert says in told
    assert "Traceback" not in told


def test_waves_are_written_short_and_the_verb_is_part_of_outrider(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hub.errors import HubError
    from hub.rollout_cli import waves

    assert waves("5,10%,rest+") == [{"count": 5}, {"percent": 10.0}, {"approval": True}]
    with pytest.raises(HubError, match="no wave"):
        waves("ten")
    monkeypatch.setattr("sys.argv", ["outrider", "rollout", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "simulate" in capsys.readouterr().out


def test_what_is_shown_has_waves_gates_and_reasons() -> None:
    wave = {
        "wave": 1,
        "devices": 2,
        "steps": {"failed": 1, "succeeded": 1},
        "approval": True,
        "approved": True,
        "canary": True,
    }
    found = {"id": "a1", "bundle": "reader", "version": "2", "status": "paused", "wave": 1, "waves": [wave]}
    found |= {"reason": "1 of 2 failed", "commands": ["resume"]}
    assert line(found) == "a1 reader 2  paused  wave 1/1  1/2  1 of 2 failed"
    place = {"device": "press-1", "wave": 0, "step": "failed", "reason": "probe"}
    shown = whole(found | {"devices": [place]})
    assert "wave 1 canaries (approved): 1 failed, 1 succeeded" in shown
    assert shown.splitlines()[-1].split() == ["press-1", "wave", "1", "failed", "probe"]
