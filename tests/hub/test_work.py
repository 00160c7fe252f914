"""What devices sent of their work, as HTML and text, and the word that is given to a call which waits."""

import time
from typing import Any

import pytest

from edge_agent.wire.grants import Subject
from edge_agent.wire.messages import Job, JobState
from hub.approvals import Ask, answer
from hub.ui import work
from hub.ui.device import quantities
from hub.ui.overview import job_row
from tests.hub.rig import Device, Hub, enrolled, until

HUGE = int("9" * 331)


def job(**result: Any) -> dict[str, Any]:
    made = {"id": "j1", "device": "press-1", "kind": "task", "body": {"text": "stop"}, "subject": "ann", "error": ""}
    return made | {"state": "succeeded", "created": 1.0, "updated": 2.0, "result": result}


@pytest.mark.parametrize("number", [HUGE, -HUGE, 1e308, "7", None, [1]])
def test_no_number_that_a_device_sends_breaks_a_page(number: Any) -> None:
    said = {"role": "model", "text": "stop(line=2)", "ts": number, "ms": number, "prompt_tokens": number}
    made = {"role": "tool", "call": "stop(line=2)", "text": "stopped", "ts": number, "ms": number, "tokens": number}
    told = job(steps=[said | {"tokens": number}, made])
    assert "stop(line=2)" in work.card(told)
    assert job_row(told)["did"]["text"] == "stop(line=2) → stopped"
    bodies = [{"load": number}, {"tool": "read", "args": {}, "result": number}, {"load": 1}]
    charted = quantities([{"ts": ts, "body": body} for ts in (3.0, 1e308, -1e308) for body in bodies])
    assert (3000, 1.0) in charted["load"][""]


def test_a_number_that_is_none_is_left_out_of_the_sum() -> None:
    decisions: list[dict[str, Any]] = [{"ms": HUGE}, {"ms": "7"}, {"ms": 40}, {"ms": 2.0}]
    assert work.decided_ms(job(steps=[{"role": "model", **each} for each in decisions])) == 42.0


async def test_a_word_that_the_device_turned_down_can_be_given_again(hub: Hub) -> None:
    device, services = await enrolled(hub, "press-1"), hub.services
    ask = Ask("j1", "d" * 64, "purge(line=2)", "purge", expires=time.time() + 600)
    admin = Subject("admin", ["admin"], time.time())

    async def say() -> str:
        return await answer(services.auth, services.audit, services.jobs, admin, "press-1", ask, True)

    async with device.online():
        first = await say()
        assert await say() == first, "a second click while it is on its way"
        await until(lambda: words(device))
        report = {"id": first, "state": JobState.REJECTED.value, "ts": 1.0, "error": "1000 jobs wait"}
        await device.report("job", report)

        async def rejected() -> bool:
            return bool((await services.jobs.get(first))["state"] == "rejected")

        await until(rejected)
        again = await say()
        assert again != first
        await until(lambda: [job.id for job in words(device)] == [first, again])


def words(device: Device) -> list[Job]:
    return list({job.id: job for job in device.jobs}.values())
