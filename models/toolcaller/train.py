"""Training the tool caller: LoRA (or full fine-tuning) over generated examples, on CPU or CUDA by the same command.

Invariants: everything follows from the seed and the step, so a run that was stopped goes on as if it had not been;
a checkpoint is published by rename; the log (`log.jsonl`) only grows.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from models.gguf_weights import Floats
from models.toolcaller.decoder import Decoder, load, logits
from models.toolcaller.packing import Bunch, Row, rows

Data = Callable[[int], Iterable[Bunch]]


@dataclass(frozen=True)
class Plan:
    """What a run does; saved beside its checkpoint."""

    seed: int = 1
    steps: int = 1000
    rows_per_step: int = 3
    row_tokens: int = 1280
    rank: int = 16
    alpha: float = 32.0
    rate: float = 1e-3
    average: float = 0.0  # what ships is a moving mean of the steps that forgets so slowly; 0: the last step
    warmup: int = 20
    decay: float = 0.01
    full: bool = False
    save_every_s: float = 300.0
    validate_every: int = 50


class Loss(torch.autograd.Function):
    """Summed cross-entropy of hidden states (n, width) against tokens (n,), `CHUNK` at a time.

    Forward makes the gradient too, so the logits (n, vocabulary) are made once and never kept.
    """

    CHUNK = 64

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        total, gradient = hidden.new_zeros(()), torch.empty_like(hidden)
        for at in range(0, len(target), Loss.CHUNK):
            part, right = hidden[at : at + Loss.CHUNK], target[at : at + Loss.CHUNK, None]
            scores = logits(part, head)
            every = scores.logsumexp(-1, keepdim=True)
            total += (every - scores.gather(-1, right)).sum()
            wrong = scores.sub_(every).exp_().scatter_add_(-1, right, -torch.ones_like(every))
            gradient[at : at + Loss.CHUNK] = wrong.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None


class Run:
    """One training run in a folder: `plan.json`, `checkpoint.pt`, `log.jsonl`, `adapter.npz` (float16)."""

    def __init__(
        self,
        gguf: Path,
        folder: Path,
        plan: Plan,
        data: Data,
        device: str = "",
        start: Mapping[str, Floats] | None = None,
    ) -> None:
        """Raises ValueError when `start`, the matrices to begin with, are not those of the plan's rank."""
        self.folder, self.plan, self._data = folder, plan, data
        _keep_memory()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.manual_seed(plan.seed)
        self._half = self.device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        self.model: Decoder = load(gguf, 0 if plan.full else plan.rank, plan.alpha, plan.full).to(self.device)
        if self._half:
            self.model.halve()
        self._trained = self.model.trained()
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=plan.decay
        )
        self.step, self._seen = 0, 0
        self._mean: dict[str, torch.Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(asdict(plan), indent=1) + "\n")
        if (folder / "checkpoint.pt").exists():
            self._load()
        elif start is not None:
            self._begin(start)

    def run(self, progress: Callable[[dict[str, Any]], None]) -> None:
        """Train to the plan's last step."""
        plan, saved = self.plan, time.monotonic()
        data = itertools.islice(rows(self._data(plan.seed), plan.row_tokens), self._seen, None)
        while self.step < plan.steps:
            began = time.monotonic()
            batch = list(itertools.islice(data, plan.rows_per_step))
            if not batch:
                break
            loss = self._learn(batch)
            self.step += 1
            self._seen += len(batch)
            entry: dict[str, Any] = {"step": self.step, "loss": round(loss, 4), "rate": self._rate()}
            entry["tokens_s"] = round(sum(len(row.tokens) for row in batch) / (time.monotonic() - began))
            if self.step % plan.validate_every == 0 or self.step == plan.steps:
                entry |= self.validate()
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            progress(entry)
            if time.monotonic() - saved > plan.save_every_s:
                self.save()
                saved = time.monotonic()
        self.save()

    def validate(self, count: int = 8) -> dict[str, float]:
        """Loss, and the share of conversations of an unseen seed whose learned tokens are all the likeliest."""
        held_out = itertools.islice(rows(self._data(self.plan.seed + 1_000_003), self.plan.row_tokens), count)
        total, tokens, right, examples = 0.0, 0, 0, 0
        with torch.no_grad():
            for row in held_out:
                hidden, target = self._hidden(row)
                scores = logits(hidden, self.model.embedding)
                total += F.cross_entropy(scores, target, reduction="sum").item()
                tokens += len(target)
                hits = (scores.argmax(-1) == target).cpu().tolist()
                owners = [row.nodes[at] for at in row.at]
                for _, group in itertools.groupby(zip(owners, hits, strict=True), key=lambda pair: pair[0]):
                    right += all(hit for _, hit in group)
                    examples += 1
        return {"validation_loss": round(total / tokens, 4), "validation_exact": round(right / examples, 4)}

    def save(self) -> None:
        """Publish checkpoint and adapter."""
        state = {"step": self.step, "seen": self._seen, "optimizer": self._optimizer.state_dict()}
        _publish(self.folder / "checkpoint.pt", state | {"trained": self._trained, "mean": self._mean})
        ships = self._mean or self._trained
        half = {name: value.detach().half().cpu().numpy() for name, value in ships.items()}
        partial = self.folder / "adapter.part.npz"
        np.savez(partial, **half)
        partial.replace(self.folder / "adapter.npz")

    def _begin(self, start: Mapping[str, Floats]) -> None:
        if {n: v.shape for n, v in start.items()} != {n: tuple(v.shape) for n, v in self._trained.items()}:
            raise ValueError(f"the adapter to start from is not of rank {self.plan.rank} over all matrices")
        with torch.no_grad():
            for name, value in self._trained.items():
                value.copy_(torch.from_numpy(start[name]))

    def _load(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt", map_location=self.device, weights_only=True)
        self.step, self._seen = state["step"], state["seen"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._mean = state.get("mean", {})
        with torch.no_grad():
            for name, value in self._trained.items():
                value.copy_(state["trained"][name])

    def _learn(self, batch: list[Row]) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        self._optimizer.zero_grad(set_to_none=True)
        tokens, total = sum(len(row.target) for row in batch), 0.0
        for row in batch:
            hidden, target = self._hidden(row)
            loss = Loss.apply(hidden, self.model.embedding, target) / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._trained.values(), 1.0)
        self._optimizer.step()
        for name, value in self._trained.items() if self.plan.average else ():
            self._mean.setdefault(name, value.detach().clone()).lerp_(value.detach(), 1 - self._keeps())
        return total

    def _keeps(self) -> float:
        """What the moving mean keeps of itself: as little as a plain mean would while there are few steps."""
        return min(self.plan.average, (self.step + 1) / (self.step + 10))

    def _hidden(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        """Where something is learned, and that. bfloat16 rows are padded to one length: each shape has its kernel."""
        to, count = self.device, len(row.tokens)
        more = self.plan.row_tokens - count if self._half else 0
        mask = np.eye(count + more, dtype=bool)
        mask[:count, :count] = row.mask()
        with torch.autocast(to.type, dtype=torch.bfloat16, enabled=self._half):
            hidden = self.model(
                torch.tensor(row.tokens + [0] * more, device=to),
                torch.tensor(row.positions + [0] * more, device=to),
                torch.from_numpy(mask).to(to),
            )
        return hidden[torch.tensor(row.at, device=to)], torch.tensor(row.target, device=to)

    def _rate(self) -> float:
        plan = self.plan
        if self.step < plan.warmup:
            return plan.rate * (self.step + 1) / plan.warmup
        done = (self.step - plan.warmup) / max(1, plan.steps - plan.warmup)
        return plan.rate * (0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, done))) / 2)


def _keep_memory() -> None:
    """Have glibc keep freed memory: pages that come back from the kernel at each step cost half the time on CPU."""
    libc = ctypes.CDLL(None)
    for option, size in ((-3, 1 << 25), (-1, 1 << 30), (-2, 1 << 28)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        getattr(libc, "mallopt", lambda *_: 0)(option, size)


def _publish(path: Path, value: Any) -> None:
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
