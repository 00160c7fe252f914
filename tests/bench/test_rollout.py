"""The rollout benchmark on a small scale: a hub, Mosquitto, a hundred MQTT sessions, and a wave that fails."""

import shutil

import pytest

from bench.rollout import run


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin"),
    reason="needs mosquitto: deploy/system-packages.sh",
)
def test_a_wave_that_fails_pauses_within_its_sample() -> None:
    paused, tick, memory = run(devices=100)
    assert paused["paused"], paused
    assert paused["value"] <= paused["goal"] == 30
    assert paused["told"] <= 30
    assert "1 of 30 failed" in paused["reason"]
    assert tick["value"] < tick["goal"]
    assert 50 < memory["value"] < memory["goal"]
