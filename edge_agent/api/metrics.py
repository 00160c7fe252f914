"""What the API served, by model, in Prometheus's text format 0.0.4, and what the workers say of themselves.

Invariants: only installed models are counted, so the labels are bounded; a counter never goes down while the daemon
runs, apart from what a worker counts since it loaded a model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
from starlette.requests import ClientDisconnect

from edge_agent.serving.supervisor import WorkerProcess

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TEXTS = {
    "outrider_requests_total": "counter", "outrider_failures_total": "counter", "outrider_request_seconds": "histogram",
    "outrider_worker_restarts_total": "counter", "outrider_worker_waiting": "gauge", "outrider_worker_served": "gauge",
    "outrider_agent_total": "counter",
}  # fmt: skip
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass
class _Count:
    requests: int = 0
    failures: int = 0
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * len(BUCKETS))


class Metrics:
    """Requests by model."""

    def __init__(self) -> None:
        self._counts: dict[str, _Count] = {}

    @contextmanager
    def timed(self, model: str) -> Iterator[None]:
        """Count a request to an installed model, as failed when it raises and its client is still there."""
        count, began = self._counts.setdefault(model, _Count()), time.monotonic()
        try:
            yield
        except ClientDisconnect:
            raise
        except Exception:
            count.failures += 1
            raise
        finally:
            took = time.monotonic() - began
            count.requests += 1
            count.seconds += took
            for i, bound in enumerate(BUCKETS):
                count.buckets[i] += took <= bound

    def text(self, workers: Mapping[str, WorkerProcess], agent: Mapping[str, int]) -> str:
        """The exposition."""
        lines: dict[str, list[str]] = {name: [f"# TYPE {name} {kind}"] for name, kind in _TEXTS.items()}

        def add(name: str, value: float, suffix: str = "", /, **labels: str) -> None:
            text = ",".join(f'{key}="{label.translate(_ESCAPES)}"' for key, label in labels.items())
            lines[name].append(f"{name}{suffix}{{{text}}} {value:g}")

        for model, count in sorted(self._counts.items()):
            add("outrider_requests_total", count.requests, model=model)
            add("outrider_failures_total", count.failures, model=model)
            for bound, within in zip((*map(str, BUCKETS), "+Inf"), (*count.buckets, count.requests), strict=True):
                add("outrider_request_seconds", within, "_bucket", model=model, le=bound)
            add("outrider_request_seconds", count.seconds, "_sum", model=model)
            add("outrider_request_seconds", count.requests, "_count", model=model)
        for name, worker in sorted(workers.items()):
            add("outrider_worker_restarts_total", max(0, worker.starts - 1), worker=name)
            add("outrider_worker_waiting", worker.waiting, worker=name)
            for model, served in sorted(worker.served.items()):
                counts = {key: n for key, n in msgspec.structs.asdict(served).items() if not isinstance(n, str)}
                for what, value in counts.items():
                    add("outrider_worker_served", value, model=model, what=what)
        for what, times in sorted(agent.items()):
            add("outrider_agent_total", times, what=what)
        return "\n".join(line for group in lines.values() for line in group) + "\n"
