"""A task's trace follows the conventions, holds no content unless asked to, and arrives at a real OTLP receiver."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as conventions

from edge_agent.agent.calls import Call
from edge_agent.agent.spans import spans
from edge_agent.agent.transcript import Step, Task
from edge_agent.config import Otel
from edge_agent.errors import Refused
from edge_agent.otel import Traces
from edge_agent.wire.grants import Subject
from tests.sync.brokers import until

OTTO = Subject("otto", ["operator"], 1.0)
SECRET = "the recipe of line 2"
PURGE = Call("purge", {"text": SECRET})
STEPS = [
    Step("model", f'purge(text="{SECRET}")', ts=101.0, ms=800.0, first_token_ms=90.0, prompt_tokens=256, tokens=8,
         cached_tokens=229, digest="ab" * 32, adapter="toolcaller 1.2", model="smollm2"),
    Step("ask", "cd" * 32, PURGE, ts=101.1, expires=4000.0),
    Step("approval", "signed", PURGE, ts=110.0),
    Step("intent", call=PURGE, ts=110.1),
    Step("tool", SECRET, PURGE, {"said": SECRET}, ts=110.4, ms=250.0),
    Step("tool", f"unknown tool {SECRET}", ok=False, ts=110.5),
    Step("tool", SECRET, Call("jam", {}), ok=False, ts=110.6, ms=50.0, at="blow[1]"),
    Step("model", "none()", ts=111.0, ms=100.0, prompt_tokens=270, tokens=2),
]  # fmt: skip
TASK = Task("t1", SECRET, OTTO, 100.0, "succeeded", SECRET, finished=111.5, runs=1, steps=STEPS)


def test_a_task_is_an_agent_that_asks_models_and_calls_tools() -> None:
    root, *below = spans(TASK)
    assert [span.name for span in (root, *below)] == [
        "invoke_agent outrider",
        "chat smollm2",
        "execute_tool purge",
        "execute_tool jam",
        "chat unknown",
    ]
    assert (root.start, root.end, root.error) == (100.0, 111.5, "")
    assert (root.attributes["gen_ai.conversation.id"], root.attributes["gen_ai.usage.input_tokens"]) == ("t1", 526)
    assert [(name, about) for name, _, about in root.events] == [
        ("outrider.ask", {"gen_ai.tool.name": "purge"}),
        ("outrider.approval", {"gen_ai.tool.name": "purge", "outrider.given": True}),
        ("outrider.wrong_call", {}),
    ]
    chat, tool, jam = below[:3]
    assert (chat.start, chat.end, chat.client) == (pytest.approx(100.2), 101.0, True)
    assert chat.attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(0.09)
    assert chat.attributes["gen_ai.usage.cache_read.input_tokens"] == 229
    assert (tool.start, tool.attributes["gen_ai.tool.call.id"]) == (pytest.approx(110.15), "t1:4")
    assert (jam.error, jam.attributes["outrider.step"]) == ("tool_error", "blow[1]")


def test_every_gen_ai_attribute_is_one_of_the_conventions() -> None:
    known = {value for name, value in vars(conventions).items() if name.startswith("GEN_AI")}
    for span in spans(TASK, content=True):
        assert {name for name in span.attributes if name.startswith("gen_ai.")} <= known
        assert span.attributes["gen_ai.operation.name"] in {
            value.value for value in conventions.GenAiOperationNameValues
        }


def test_content_is_there_only_when_it_is_asked_for() -> None:
    assert SECRET not in str(spans(TASK))
    root, chat, tool, *_ = spans(TASK, content=True)
    assert SECRET in root.attributes["gen_ai.input.messages"]
    assert SECRET in root.attributes["gen_ai.output.messages"]
    assert SECRET in msgspec.json.decode(chat.attributes["gen_ai.output.messages"])[0]["parts"][0]["content"]
    assert tool.attributes["gen_ai.tool.call.arguments"] == '{"text":"the recipe of line 2"}'


def test_a_run_of_a_workflow_is_one() -> None:
    task = Task("w1", "workflow press", OTTO, 1.0, "failed", steps=[Step("plan", "workflow: press", result={})])
    [root] = spans(task)
    assert (root.name, root.error, root.attributes["gen_ai.workflow.name"]) == (
        "invoke_workflow press",
        "task_failed",
        "press",
    )


class Collector(ThreadingHTTPServer):
    """An OTLP/HTTP receiver."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.got, self.headers, self.status = list[Any](), list[dict[str, str]](), 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    def spans(self) -> list[Sent]:
        scopes = [scope for request in self.got for each in request.resource_spans for scope in each.scope_spans]
        return [span for scope in scopes for span in scope.spans]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.headers.append(dict(self.headers))
        if self.server.status == 200:
            self.server.got.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def collecting() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


async def test_a_collector_gets_the_trace_with_its_parents_times_and_the_same_ids_each_time(tmp_path: Path) -> None:
    (tmp_path / "headers").write_text("x-api-key=k1\n")
    with collecting() as collector:
        traces = Traces(Otel(collector.url, str(tmp_path / "headers"), every_s=0.05), "press-1")
        traces.ended(TASK)
        await until(lambda: len(collector.spans()) == 5)
        traces.ended(TASK)
        await until(lambda: len(collector.spans()) == 10)
        traces.close()
        sent = collector.spans()
        assert collector.headers[0]["x-api-key"] == "k1"
        resource = {a.key: a.value.string_value for a in collector.got[0].resource_spans[0].resource.attributes}
    assert (resource["service.name"], resource["service.instance.id"]) == ("outrider", "press-1")
    first, again = sent[:5], sent[5:]
    assert [(s.trace_id, s.span_id) for s in first] == [(s.trace_id, s.span_id) for s in again]
    [root] = [span for span in first if not span.parent_span_id]
    assert {span.parent_span_id for span in first if span is not root} == {root.span_id}
    assert (root.name, root.start_time_unix_nano, root.end_time_unix_nano) == (
        "invoke_agent outrider",
        100 * 10**9,
        111_500_000_000,
    )
    assert [event.name for event in root.events] == ["outrider.ask", "outrider.approval", "outrider.wrong_call"]
    [jam] = [span for span in first if span.name == "execute_tool jam"]
    assert (jam.status.code, {a.key: a.value.string_value for a in jam.attributes}["error.type"]) == (2, "tool_error")


async def test_a_collector_that_is_away_costs_no_time_and_no_memory_without_bound() -> None:
    traces = Traces(Otel("http://127.0.0.1:9/v1/traces", every_s=0.05), "press-1")
    for _ in range(1500):
        traces.ended(TASK)
    processor = traces._provider._active_span_processor._span_processors[0]
    assert len(processor._batch_processor._queue) <= 2048  # type: ignore[attr-defined]
    before = time.monotonic()
    await asyncio.to_thread(traces.close)
    assert time.monotonic() - before < 10.0
    await until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("Otel")])


def test_headers_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be read"):
        Traces(Otel("http://c:4318/v1/traces", str(tmp_path / "none")), "press-1")
