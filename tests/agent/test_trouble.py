"""What goes wrong all the time is told at once, then now and then, and when it is over."""

import logging

import pytest

from edge_agent.trouble import Trouble


def test_repeated_trouble_is_one_line_a_minute_and_one_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    trouble = Trouble(logging.getLogger("outrider.test"), "no sample", clock=lambda: now)
    trouble.over()
    assert not caplog.messages
    for second in range(150):
        now = float(second)
        trouble.tell("the disk is full")
    assert caplog.messages == [
        "no sample: the disk is full",
        "no sample: the disk is full (60 times since the last such line)",
        "no sample: the disk is full (60 times since the last such line)",
    ]
    caplog.clear()
    trouble.over()
    trouble.over()
    assert caplog.messages == ["no sample: well again after 149 s"]
    for second in range(150, 170):  # it comes and goes
        now = float(second)
        trouble.tell("again")
        trouble.over()
    assert len(caplog.messages) == 1
    now = 180.0
    trouble.tell("again")
    assert caplog.messages[-1] == "no sample: again (50 times since the last such line)"
