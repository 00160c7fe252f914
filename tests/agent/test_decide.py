"""Which model decides, how sure it is, what is voted on, and when a person has to be asked."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent.approval import Approvals
from edge_agent.agent.confidence import Calibration, vote
from edge_agent.agent.decide import Speaker
from edge_agent.agent.energy import Meter
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.rules import Budget, Confidence, Policy, PolicyFile
from edge_agent.agent.transcript import Task, Transcripts, migrations
from edge_agent.engines.base import Generate, Piece
from edge_agent.errors import Refused, Retry
from edge_agent.store import Store
from edge_agent.wire.grants import Subject
from edge_agent.wire.signing import SigningKey
from tests.agent import plant
from tests.fakes import LocalTools

ADA = Subject("ada", ["admin"], 100.0)
READ, OTHER = 'read_sensor(sensor="vibration", line=1)', 'read_sensor(sensor="vibration", line=2)'
SLOW = "set_speed(line=1, percent=40.0)"
Said = tuple[str, float] | Exception


class Models:
    """Several models that say their texts in turn, each with its probability; samples have texts of their own."""

    def __init__(self, samples: tuple[str, ...] = (), **says: list[Said]) -> None:
        self._says, self._samples, self.asked = says, list(samples), list[Generate]()

    async def generate(self, request: Generate, timeout_s: float) -> Piece:
        self.asked.append(request)
        if request.temperature:
            said: Said = (self._samples.pop(0), 0.5)
        else:
            said = self._says[request.model].pop(0) if self._says[request.model] else ("none()", 0.99)
        if isinstance(said, Exception):
            raise said
        text, sure = said
        known = {"mean_logprob": math.log(sure) / 4, "choices": 4} if sure else {}
        return Piece(text, done=True, finish="stop", output_tokens=5, prompt_tokens=95, total_s=0.01, **known)  # type: ignore[arg-type]


Ask = Callable[..., Any]


@pytest.fixture
async def transcripts(tmp_path: Path) -> AsyncIterator[Transcripts]:
    store = Store(tmp_path / "state.db", migrations)
    yield Transcripts(store)
    store.close()


@pytest.fixture
def ask(transcripts: Transcripts) -> Ask:
    async def run(models: Models, approvals: bool = False, names: str = "ab", **policy: Any) -> tuple[Task, LocalTools]:
        tools, rules = LocalTools(*plant.ALL), Policy(**policy)
        speakers = [Speaker(name, model=name, cost=2.0 * (name == "b"), latency_s=0.2) for name in names]
        may = Approvals(SigningKey.from_seed(bytes(32)), lambda *_: True) if approvals else None
        parts: Any = (models, tools, transcripts, lambda *_: True)
        loop = AgentLoop(*parts, rules=lambda: rules, speakers=lambda: speakers, approvals=may)
        await loop.accept("t", "line 1 to 40", ADA, priority=0)
        return await loop.run("t"), tools

    return run


SURE = Confidence(ask=0.5, route=0.4)


async def test_a_sure_decision_is_asked_for_once_and_says_how_sure_it_is(ask: Ask) -> None:
    models = Models(a=[(READ, 0.9)], b=[])
    task, _ = await ask(models, confidence=SURE)
    assert (task.state, task.steps[0].model, task.steps[0].tried) == ("succeeded", "a", [])
    assert task.steps[0].confidence == pytest.approx(0.9)
    assert task.steps[0].logprob == pytest.approx(math.log(0.9) / 4)
    assert {(asked.model, asked.priority) for asked in models.asked} == {("a", 0)}
    assert len(models.asked) == 2


async def test_below_the_threshold_samples_vote_on_what_is_called_and_not_on_how_it_is_written(ask: Ask) -> None:
    models = Models(("read_sensor( line=2,sensor='x'", OTHER, OTHER.replace(", ", ",")), a=[(READ, 0.3)], b=[])
    task, tools = await ask(models, confidence=SURE)
    assert tools.calls == [("read_sensor", {"sensor": "vibration", "line": 2})]
    assert (task.steps[0].votes, task.steps[0].confidence) == ("2/4", pytest.approx((0.5 + 0.5) / 2))
    assert task.steps[0].tokens == 20
    assert len({asked.seed for asked in models.asked[:4]}) == 4


@pytest.mark.parametrize("first", [(READ, 0.1), Refused("it does not fit"), Retry("it restarts")])
async def test_an_unsure_or_broken_model_passes_the_decision_on_and_that_costs(ask: Ask, first: Said) -> None:
    unsure = ("gibberish", "gibberish", "gibberish")
    models = Models(unsure, a=[first], b=[(OTHER, 0.9)])
    task, tools = await ask(models, confidence=SURE)
    assert tools.calls == [("read_sensor", {"sensor": "vibration", "line": 2})]
    assert (task.steps[0].model, task.steps[0].cost) == ("b", pytest.approx(0.2))
    assert len(task.steps[0].tried) == 1
    assert task.steps[0].tried[0].startswith("a: ")


async def test_a_model_that_is_late_is_passed_over(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    models, answer = Models(a=[(READ, 0.9)], b=[(OTHER, 0.9)]), Models.generate

    async def slow(self: Models, request: Generate, timeout_s: float) -> Piece:
        await asyncio.sleep(5 if request.model == "a" else 0)
        return await answer(self, request, timeout_s)

    monkeypatch.setattr(Models, "generate", slow)
    task, _ = await ask(models)
    assert (task.steps[0].model, task.steps[0].tried) == ("b", ["a: it takes longer than 0.2 s"])


async def test_the_last_resort_is_a_person_for_an_act_and_a_word_of_doubt_for_a_reading(ask: Ask) -> None:
    unsure = Confidence(route=0.6)
    task, tools = await ask(Models(a=[(SLOW, 0.2)], b=[(SLOW, 0.5)]), approvals=True, confidence=unsure)
    assert (task.state, tools.calls, task.steps[-1].role) == ("waiting", [], "ask")
    assert task.steps[-1].why == "the model is only 50% sure"
    assert task.error == f"waits for an approval of {SLOW}: the model is only 50% sure"


async def test_where_nobody_can_be_asked_an_unsure_act_is_not_made_and_a_reading_is(ask: Ask) -> None:
    unsure = Confidence(route=0.6)
    task, tools = await ask(Models(a=[(SLOW, 0.2)]), names="a", confidence=unsure)
    assert (task.state, tools.calls) == ("failed", [])
    assert "set_speed needs an approval: the model is only 20% sure" in task.error


async def test_an_unsure_reading_is_answered_with_how_sure_it_was(ask: Ask) -> None:
    task, _ = await ask(Models(a=[(READ, 0.2)]), names="a", confidence=Confidence(route=0.6))
    assert task.answer == "sensor: vibration, line: 1, value: 41.5 (20% sure)"


async def test_a_model_that_tells_no_probability_is_neither_voted_on_nor_passed_over(ask: Ask) -> None:
    task, _ = await ask(Models(a=[(READ, 0.0)], b=[]), confidence=SURE)
    assert (task.state, task.steps[0].confidence, task.steps[0].tried) == ("succeeded", None, [])


async def test_a_task_ends_when_its_money_is_spent(ask: Ask) -> None:
    models = Models(a=[Refused("no")] * 9, b=[(READ, 0.9), (OTHER, 0.9)] * 9)
    task, tools = await ask(models, budget=Budget(cost=0.5))
    assert (task.error, len(tools.calls)) == ("out of money: 0.5", 3)


async def test_a_task_ends_when_its_energy_is_spent_by_declared_watts(ask: Ask, monkeypatch: Any) -> None:
    monkeypatch.setattr("edge_agent.agent.energy.SYS", Path("/nowhere"))
    task, _ = await ask(Models(a=[(READ, 0.9)] * 9, b=[]), watts=1e6, budget=Budget(joules=10.0))
    assert task.error == "out of energy: 10 J"
    assert task.joules > 10


def test_energy_is_read_from_rapl_over_its_wrap_then_from_hwmon_else_from_watts(tmp_path: Path) -> None:
    zone, part = tmp_path / "powercap/intel-rapl:0", tmp_path / "powercap/intel-rapl:0:0"
    for folder, joules in ((zone, 90), (part, 5)):
        folder.mkdir(parents=True)
        (folder / "energy_uj").write_text(f"{joules * 1_000_000}\n")
        (folder / "max_energy_range_uj").write_text("100000000\n")
    meter = Meter(lambda: 0.0, tmp_path)
    (zone / "energy_uj").write_text("97000000")
    assert meter.since() == pytest.approx(7.0)
    (zone / "energy_uj").write_text("3000000")
    assert meter.since() == pytest.approx(6.0)
    hwmon = tmp_path / "other/hwmon/hwmon0"
    hwmon.mkdir(parents=True)
    (hwmon / "energy1_input").write_text("1000000")
    meter = Meter(lambda: 0.0, tmp_path / "other")
    (hwmon / "energy1_input").write_text("3500000")
    assert meter.since() == pytest.approx(2.5)
    assert Meter(lambda: 1e9, tmp_path / "none").since() > 0


def test_calibration_is_monotone_and_by_default_the_models_own_probability() -> None:
    piece = Piece("x", mean_logprob=-0.1, choices=5)
    assert Calibration().probability(piece) == pytest.approx(math.exp(-0.5))
    assert Calibration(1.0, 2.0).probability(piece) == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert Calibration(1.0, 2.0).probability(Piece("x")) is None
    assert Calibration(9.0, 0.0).probability(Piece("x", mean_logprob=-1e6, choices=9)) == pytest.approx(0.0)


def test_a_vote_in_which_nobody_calls_anything_is_not_sure_at_all() -> None:
    assert vote([Piece("oops", choices=1), Piece("hm", choices=1)], Calibration())[1:] == (0.0, "0/2")


def test_the_policy_file_has_every_threshold_and_keeps_the_last_good_one(tmp_path: Path) -> None:
    file, path = PolicyFile(tmp_path / "policy.toml", 45.0), tmp_path / "policy.toml"
    assert file.now() == Policy(budget=Budget(seconds=45.0))
    path.write_text('untrusted = "ask"\nrepeats = 5\nwrong_calls = 2\n[budget]\nsteps = 4\n[confidence]\nask = 0.6\n')
    said = file.now()
    assert (said.untrusted, said.repeats, said.wrong_calls) == ("ask", 5, 2)
    assert (said.budget, said.confidence) == (Budget(steps=4, seconds=45.0), Confidence(ask=0.6))
    path.write_text("[confidence]\nask = 6")
    assert file.now() == said
    with pytest.raises(Refused, match="confidence"):
        file.read()
