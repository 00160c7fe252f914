"""What the agent's loop costs, and how long it is from an utterance to its effect.

Invariants: transcripts are in a real store on disk; `loop_overhead` is a whole step (decide, policy, act) with a
model and a tool that take no time, its peer by SQLite alone a commit for each result and three for the task, in turns
with it, `cpu` its processor time; `effect.*` runs the shipped model and adapter in the language worker and the tools in
the tool runner, as a device does, with the preamble read, and its clock stops in the tool; `memory_search` is words and
vectors fused over 100,000 chunks, the question's embedding not counted (`memory_embed` is that).
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench import toolcall
from bench.rows import FIELDS
from edge_agent.agent.act import Tools
from edge_agent.agent.calls import render
from edge_agent.agent.decide import Model, Speaker
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.ports import RunnerTools, WorkerModel
from edge_agent.agent.rules import Budget, Policy
from edge_agent.agent.tool import Tool, ToolSpec, tool
from edge_agent.agent.transcript import Transcripts, migrations
from edge_agent.engines.base import Generate, Piece
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.store import Store
from edge_agent.wire.grants import Subject

CHUNKS, QUESTIONS = 100_000, 60
GOALS = {"loop_overhead": 2.0, "memory_search": 30.0}
STEPS, TASKS = 5, 40
_ADA = Subject("ada", ["admin"], 0.0)
_MODEL = "smollm2"


def run(folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """The rows."""
    with tempfile.TemporaryDirectory(prefix="bench-agent-", dir=folder) as scratch:
        steps, commits, cpu = asyncio.run(_overhead(Path(scratch)))
        peer = {"peer": "its commits alone", "peer_value": round(median(commits), 3)}
        ratio = {"ratio": round(median(steps) / median(commits), 2)}
        yield row("loop_overhead", steps) | peer | ratio | {"cpu": round(cpu, 3)}
        yield from asyncio.run(_effects(Path(scratch)))
        yield from _memory(Path(scratch))


def row(name: str, ms: Sequence[float], value: float | None = None) -> dict[str, Any]:
    """One row: the median if no value is given."""
    value = round(median(ms) if value is None else value, 3)
    found = dict.fromkeys(FIELDS) | {"name": name, "value": value, "unit": "ms", "n": len(ms)}
    return found | ({"goal": GOALS[name], "held": value < GOALS[name]} if name in GOALS else {})


def p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1]


@tool()
def read_gauge(number: int) -> dict[str, Any]:
    """Read a gauge."""
    return {"number": number, "value": 41.5, "unit": "bar"}


class Scripted:
    """Reads STEPS gauges and ends, in no time."""

    def __init__(self) -> None:
        self._asked = 0

    async def generate(self, request: Generate, timeout_s: float) -> Piece:
        self._asked += 1
        n = self._asked % (STEPS + 1)
        return Piece(f"read_gauge(number={n})" if n else "none()", done=True, finish="stop", output_tokens=9)


class Instant:
    """One tool, in this process."""

    async def specs(self) -> Sequence[ToolSpec]:
        return [read_gauge.spec]

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        return read_gauge.function(**args)


@contextlib.contextmanager
def _loop(folder: Path, model: Model, tools: Tools, speaker: Speaker, steps: int) -> Iterator[AgentLoop]:
    store = Store(folder / "state.db", migrations)
    try:
        rules = Policy(budget=Budget(steps=steps, seconds=300.0))
        parts = (model, tools, Transcripts(store), lambda *_: True)
        yield AgentLoop(*parts, rules=lambda: rules, speakers=lambda: [speaker])
    finally:
        store.close()


async def _overhead(folder: Path) -> tuple[list[float], list[float], float]:
    """Milliseconds a step of each task, those of its commits alone, and of processor time."""
    found, bare, cpu = [], [], 0.0
    db = sqlite3.connect(folder / "bare.db", isolation_level=None)
    for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "CREATE TABLE t (body BLOB)"):
        db.execute(statement)
    with _loop(folder / "overhead", Scripted(), Instant(), Speaker(), STEPS + 1) as loop:
        for n in range(TASKS):
            began, used = time.perf_counter(), time.process_time()
            await loop.accept(f"t{n}", "read the gauges", _ADA)
            task = await loop.run(f"t{n}")
            found.append(1e3 * (time.perf_counter() - began) / (STEPS + 1))
            cpu += 1e3 * (time.process_time() - used) / (STEPS + 1) / TASKS
            assert task.state == "succeeded", task.error
            began = time.perf_counter()
            for _ in range(STEPS + 3):  # each result, accepted, begun, ended
                db.execute("INSERT INTO t VALUES (?)", [b"x" * 300])
            bare.append(1e3 * (time.perf_counter() - began) / (STEPS + 1))
    db.close()
    return found, bare, cpu


def stopwatches(_: Path, options: dict[str, str]) -> list[Tool]:
    """A pack whose tools do nothing but say when they were called, by the clock that all processes share."""
    specs, _cases = toolcall.catalogues()[options["size"]]
    return [Tool(spec, lambda **_: time.monotonic(), wants_context=False) for spec in specs]


async def _effects(folder: Path) -> list[dict[str, Any]]:
    """From utterance to effect, with ten and with fifty tools."""
    from models.adapter import describe, shipped
    from models.fetch import default_cache
    from models.package import build

    base, adapter = build(_MODEL, default_cache()), shipped().get(toolcall.ADAPTER)
    shots = adapter is None or describe(adapter).prompt != "signatures"
    speaker = Speaker(adapter=toolcall.ADAPTER if adapter else "", shots=shots)
    found = []
    async with _running(WorkerProcess.engine("language")) as worker:
        await worker.load(_MODEL, base)
        if adapter:
            await worker.adapt(_MODEL, toolcall.ADAPTER, adapter)
        for size, (specs, cases) in toolcall.catalogues().items():
            argv = [sys.executable, "-m", "edge_agent.agent.toolrunner", "--pack", "bench.agent:stopwatches"]
            argv += ["--state", str(folder / size), "--option", f"size={size}"]
            async with _running(WorkerProcess("tools", argv, grace_s=0)) as runner:
                with _loop(folder / size, WorkerModel(worker, _MODEL), RunnerTools(runner), speaker, 1) as loop:
                    await loop.warm()
                    ms, right = [], 0
                    for n, case in enumerate(cases):
                        began = time.monotonic()
                        await loop.accept(f"t{n}", case.text, _ADA)
                        task = await loop.run(f"t{n}")
                        if task.result is not None:
                            ms.append(1e3 * (task.result - began))
                        right += any(render(step.call) == case.call for step in task.steps if step.call)
            share = {"asked": len(cases), "right": round(right / len(cases), 3), "tools": len(specs)}
            found += [row(f"effect.{size}", ms) | share, row(f"effect.{size}.p95", ms, p95(ms)) | share]
    return found


@contextlib.asynccontextmanager
async def _running(worker: WorkerProcess) -> AsyncIterator[WorkerProcess]:
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _memory(folder: Path) -> Iterator[dict[str, Any]]:
    """How long a search takes among many pieces, and how often it finds the right one among the pages of Python."""
    import tomllib
    from pydoc_data.topics import topics

    import numpy as np

    from edge_agent.agent import memory

    pages = {name: text for name, text in topics.items() if len(text) <= 7100}
    questions = tomllib.loads(Path(__file__).with_name("retrieval.toml").read_text())["questions"]
    rng, words = np.random.default_rng(1), " ".join(pages.values()).split()

    def directions(texts: Sequence[str]) -> memory.Vectors:
        rows = rng.standard_normal((len(texts), 384)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]

    many = memory.Memory(folder / "many.db", quota=1 << 30)
    while (have := sum(source.pieces for source in many.sources())) < CHUNKS:
        texts = (" ".join(words[at] for at in rng.integers(0, len(words), 90)) for _ in range(5000))
        many.add(f"document {have}", "\n\n".join(texts))
    many.embed(directions)
    asked, vectors, ms, cpu = list(questions) * 2, directions(list(questions) * 2), [], []
    many.search("warm", vectors[0])
    for question, vector in zip(asked[:QUESTIONS], vectors, strict=False):
        began, used = time.perf_counter(), time.process_time()
        many.search(question, vector)
        ms.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.process_time() - used))
    more = {"p50": round(median(ms), 3), "cpu": round(p95(cpu), 3), "pieces": have}
    yield row("memory_search", ms, p95(ms)) | more
    yield from _retrieval(folder, pages, questions)


def _retrieval(folder: Path, pages: dict[str, str], questions: dict[str, str]) -> Iterator[dict[str, Any]]:
    import onnxruntime

    from edge_agent.agent import memory
    from models.fetch import default_cache
    from models.package import build
    from tools.knowledge import WordPiece, batch

    built = build("minilm", default_cache())
    session = onnxruntime.InferenceSession(str(built / "model.onnx"))
    wordpiece = WordPiece((built / "vocab.txt").read_text().splitlines())
    ms: list[float] = []

    def embed(texts: Sequence[str]) -> memory.Vectors:
        began = time.perf_counter()
        vectors: memory.Vectors = session.run(None, batch(wordpiece, texts))[0]
        ms.append(1e3 * (time.perf_counter() - began))
        return vectors

    kept = memory.Memory(folder / "pages.db")
    for name, text in pages.items():
        kept.add(name, text)
    kept.embed(embed)
    ms.clear()
    asked = {question: embed([question])[0] for question in questions}
    yield row("memory_embed", ms)
    for by in ("words", "meaning", "both"):
        ranks = []
        for question, phrase in questions.items():
            found = kept.search(question if by != "meaning" else "", None if by == "words" else asked[question], 10)
            ranks.append(next((n for n, f in enumerate(found, 1) if phrase in " ".join(f.text.split())), 0))
        shares = {
            "recall5": sum(0 < n <= 5 for n in ranks) / len(ranks),
            "mrr": sum(1 / n for n in ranks if n) / len(ranks),
        }
        for name, share in shares.items():
            yield row(f"memory_{name}.{by}", ranks, share) | {"unit": "share"}
