"""Training on a toy network: it learns, goes on as if it had not been stopped, and starts from another adapter."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'outrider[train]'")

from models.gguf_weights import Shape  # noqa: E402
from models.toolcaller import train  # noqa: E402
from models.toolcaller.adapter import write_adapter  # noqa: E402
from models.toolcaller.decoder import Decoder  # noqa: E402
from models.toolcaller.packing import Bunch, Conversation  # noqa: E402
from models.toolcaller.train import Plan, Run  # noqa: E402

PLAN = Plan(steps=60, rows_per_step=1, row_tokens=64, rank=4, rate=1e-2, warmup=2, validate_every=30)


class Toy:
    """Weights of a tiny decoder."""

    shape = Shape(2, 32, 64, 2, 1, 16, 40, 128, 10000.0, 1e-5)

    def dense(self, name: str) -> np.ndarray:
        s = self.shape
        size = s.head_size
        sizes = {"attn_q": (s.width, s.width), "attn_k": (size, s.width), "attn_v": (size, s.width)}
        sizes |= {"attn_output": (s.width, s.width), "ffn_gate": (s.hidden, s.width), "ffn_up": (s.hidden, s.width)}
        sizes |= {"ffn_down": (s.width, s.hidden), "token_embd": (s.vocabulary, s.width)}
        random = np.random.default_rng(sum(name.encode()))
        return random.normal(0, 0.2, sizes[name.split(".")[-2]]).astype(np.float32)

    def vector(self, name: str) -> np.ndarray:
        return np.ones(self.shape.width, np.float32)


def data(seed: int) -> Iterator[Bunch]:
    """Each conversation repeats its first token; two of a bunch share their beginning."""
    random = Random(seed)
    while True:
        first = random.randint(3, 39)
        yield [Conversation([1, 2, first, end, first, first], [False] * 4 + [True] * 2) for end in (7, 8)]


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load", lambda _, rank, alpha, full: Decoder(Toy(), rank, alpha, full))


def run(folder: Path, plan: Plan = PLAN, **more: object) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = []
    Run(Path("toy.gguf"), folder, plan, data, "cpu", **more).run(entries.append)
    return entries


@pytest.mark.parametrize("full", [False, True])
def test_a_run_learns(tmp_path: Path, full: bool) -> None:
    entries = run(tmp_path, Plan(**{**PLAN.__dict__, "full": full, "rate": 1e-3 if full else 1e-2}))
    assert entries[-1]["validation_loss"] < 0.8 * entries[0]["loss"]
    assert (tmp_path / "adapter.npz").exists()


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    plan = Plan(**{**PLAN.__dict__, "average": 0.9})
    whole = run(tmp_path / "whole", plan)
    first = Run(Path("toy.gguf"), tmp_path / "cut", plan, data, "cpu")

    def stop(entry: dict[str, float]) -> None:
        if entry["step"] == 25:
            first.save()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    rest = run(tmp_path / "cut", plan)
    assert [entry["step"] for entry in rest] == list(range(26, 61))
    assert rest[-1]["validation_loss"] == pytest.approx(whole[-1]["validation_loss"], rel=1e-3)
    ships, other = (dict(np.load(tmp_path / name / "adapter.npz")) for name in ("whole", "cut"))
    for name, value in ships.items():
        np.testing.assert_allclose(value, other[name], atol=2e-3)


def test_what_ships_is_the_mean_of_the_last_steps_where_that_is_asked_for(tmp_path: Path) -> None:
    steps: list[dict[str, np.ndarray]] = []
    made = Run(Path("toy.gguf"), tmp_path, Plan(**{**PLAN.__dict__, "steps": 3, "average": 0.5}), data, "cpu")
    made.run(lambda _: steps.append({n: v.detach().numpy().copy() for n, v in made.model.trained().items()}))
    keeps = [min(0.5, n / (n + 9)) for n in (1, 2, 3)]
    for name, value in np.load(tmp_path / "adapter.npz").items():
        mean = steps[0][name]
        for step, keep in zip(steps, keeps, strict=True):
            mean = keep * mean + (1 - keep) * step[name]
        np.testing.assert_allclose(value, mean, atol=1e-3)


def test_a_run_starts_from_another_adapter_of_its_rank_and_refuses_others(tmp_path: Path) -> None:
    from edge_agent.engines.adapters import read_arrays

    before = run(tmp_path / "one")
    write_adapter(tmp_path / "one", tmp_path / "one" / "adapter", "0" * 64)
    start = read_arrays(tmp_path / "one" / "adapter" / "adapter.npz")
    again = run(tmp_path / "two", Plan(**{**PLAN.__dict__, "steps": 1, "rate": 1e-6}), start=start)
    assert again[0]["loss"] < 0.8 * before[0]["loss"]
    with pytest.raises(ValueError, match="rank 2"):
        Run(Path("toy.gguf"), tmp_path / "three", Plan(**{**PLAN.__dict__, "rank": 2}), data, "cpu", start)


def test_the_loss_and_its_gradient_are_those_of_cross_entropy_over_all_logits() -> None:
    torch.manual_seed(1)
    head, target = torch.randn(50, 32), torch.randint(50, (150,))
    ours = torch.randn(150, 32, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    (loss := train.Loss.apply(ours, head, target) / 7).backward()
    (expected := torch.nn.functional.cross_entropy(theirs @ head.T, target, reduction="sum") / 7).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad)
