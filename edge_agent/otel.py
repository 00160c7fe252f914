"""Traces to an OpenTelemetry collector, over OTLP/HTTP. Imported only where the settings name one (extra `otel`).

Invariants: a task that ended is handed over and nobody waits for it: the queue is bounded (MAX_QUEUE spans, more are
dropped), sent by a thread of its own. The same task has the same ids each time, so one told twice is seen once.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from edge_agent.agent.spans import Span, spans
from edge_agent.agent.transcript import Task
from edge_agent.config import Otel
from edge_agent.errors import Refused

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import IdGenerator
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
except ModuleNotFoundError as error:
    raise Refused(f"traces need {error.name}", "pip install 'outrider[otel]', or take [otel] out") from error

_log = logging.getLogger("outrider.otel")
MAX_QUEUE = 2048
TIMEOUT_S = 5.0
END_S = 2.0


class Traces:
    """Takes tasks that have ended. Raises Refused when a file of the settings cannot be read."""

    def __init__(self, settings: Otel, device: str) -> None:
        self._device, self._content, self._ids = device, settings.content, _Ids()
        resource = {"service.name": "outrider", "service.instance.id": device, "service.version": version("outrider")}
        self._provider = TracerProvider(ALWAYS_ON, Resource(resource), shutdown_on_exit=False, id_generator=self._ids)
        ca = settings.ca_file or None
        self._out = OTLPSpanExporter(settings.endpoint, ca, headers=_headers(settings.headers_file), timeout=TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(self._out, MAX_QUEUE, settings.every_s * 1e3))
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # each retry would be a line
        self._tracer = self._provider.get_tracer("outrider.agent")

    def ended(self, task: Task) -> None:
        """Hand a task over; returns at once, and a fault in here costs the trace, not the task."""
        try:
            self._hand_over(spans(task, self._content), task)
        except Exception:  # noqa: BLE001 - see above
            _log.exception("the trace of %s is lost", task.id)

    def _hand_over(self, made: Sequence[Span], task: Task) -> None:
        self._ids.seed, self._ids.n = f"{self._device}/{task.id}", 0
        context = None
        for each in made:
            kind = SpanKind.CLIENT if each.client else SpanKind.INTERNAL
            span = self._tracer.start_span(each.name, context, kind, each.attributes, start_time=_ns(each.start))
            for name, ts, about in each.events:
                span.add_event(name, about, _ns(ts))
            if each.error:
                span.set_attribute("error.type", each.error)
                span.set_status(Status(StatusCode.ERROR))
            span.end(_ns(max(each.start, each.end)))
            context = context or set_span_in_context(span)

    def close(self) -> None:
        """Send what waits, for at most END_S."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(END_S)
        self._out.shutdown()  # type: ignore[no-untyped-call]  # ends its retries


class _Ids(IdGenerator):
    """Ids made of the task's."""

    seed, n = "", 0

    def generate_trace_id(self) -> int:
        return int.from_bytes(hashlib.sha256(self.seed.encode()).digest()[:16], "big")

    def generate_span_id(self) -> int:
        self.n += 1
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{self.n}".encode()).digest()[:8], "big")


def _headers(file: str) -> dict[str, str]:
    try:
        lines = Path(file).read_text().splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read: {error}", "a file with a header on each line, NAME=VALUE") from error
    return {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines) if name.strip()}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
