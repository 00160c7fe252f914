"""The engine of endpoints against servers that misbehave: what is wrong is named, tried again or not, and bounded."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from edge_agent.engines.base import Generate, Piece
from edge_agent.engines.openai import ATTEMPTS, FILE, OpenaiModel
from edge_agent.errors import OutriderError, Refused, Retry
from tests.engines.endpoints import DONE, Answer, Scripted, folder, says, server, stream, whole

ASK = Generate(
    "", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
)
GOOD = stream(says("Hel"), b": a comment\n\n", says("lo"), says("", "stop"), DONE)
CITY = 'start: %json {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}\n'
BUSY = whole(503, {"error": {"message": "loading"}})


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.engines.openai._PAUSE_S", 0.01)


@contextmanager
def loaded(path: Path, url: str, **more: Any) -> Iterator[OpenaiModel]:
    model = OpenaiModel(folder(path / "plant", url, "one", **more))
    try:
        yield model
    finally:
        model.close()


def said(model: OpenaiModel, request: Generate = ASK, cancelled: Callable[[], bool] = lambda: False) -> list[Piece]:
    return list(model.generate(request, cancelled))


def against(path: Path, *answers: Answer, request: Generate = ASK, **more: Any) -> tuple[list[Piece], Scripted]:
    with server(*answers) as endpoint, loaded(path, endpoint.url, **more) as model:
        return said(model, request), endpoint


def test_what_is_asked_is_a_streamed_chat_completion_and_what_comes_is_counted(tmp_path: Path) -> None:
    counts = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    end = stream(says("Hello"), says("", "length"), {"choices": [], "usage": counts}, DONE)
    request = Generate("", ASK.prompt, max_tokens=7, temperature=0.5, seed=3, stop=["\n"])
    pieces, endpoint = against(tmp_path, end, request=request, key="s3cret")
    path, headers, body = endpoint.asked[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer s3cret")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert body == {"model": "one", "stream": True, "stream_options": {"include_usage": True}, "messages": messages,
                    "max_tokens": 7, "temperature": 0.5, "seed": 3, "stop": ["\n"]}  # fmt: skip
    last = pieces[-1]
    assert ([piece.text for piece in pieces], last.finish) == (["Hello", ""], "length")
    assert (last.prompt_tokens, last.cached_tokens, last.output_tokens) == (9, 4, 2)
    assert 0 < last.first_token_s <= last.total_s


def test_events_may_be_cut_anywhere_and_end_without_done(tmp_path: Path) -> None:
    raw = (
        b"data: " + json.dumps(says("Hé")).encode() + b"\r\n\r\ndata:" + json.dumps(says("!", "stop")).encode() + b"\n"
    )
    pieces, endpoint = against(tmp_path, stream(*(raw[i : i + 1] for i in range(len(raw)))))
    assert "".join(piece.text for piece in pieces) == "Hé!"
    assert pieces[-1].output_tokens == 2
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize(
    ("answer", "kind", "why"),
    [
        (whole(401, {"error": {"message": "bad key"}}), Refused, r"refuses the key: 401 bad key .*give key_file"),
        (whole(403, {"detail": "not you"}), Refused, r"refuses the key: 403 not you"),
        (whole(404, {"error": {"message": "no model one"}}), Refused, r"404 no model one \(it lists one, two\)"),
        (whole(400, {"error": "too long"}), Refused, r"refuses the request: 400 too long"),
        (whole(302, b"", location="http://127.0.0.1:1/"), Refused, r"302 \(redirects are not followed"),
        (whole(200, b"<html>", kind="text/html"), Refused, r"answers text/html, no event stream"),
        (BUSY, Retry, r"one at http://127.0.0.1:\d+/v1 is busy or broken: 503 loading"),
        (whole(500, b"\xff" * 9000, kind="text/plain"), Retry, r"busy or broken: 500"),
        (stream(b"data: {nonsense\n\n"), Retry, r"no chat completion: b'{nonsense'"),
        (stream({"choices": "two"}), Retry, r"no chat completion"),
        (stream({"error": {"message": "out of memory"}}), Retry, r"gave up: out of memory"),
        (stream(b"data: " + b"x" * (1 << 20) + b"y"), Retry, r"a line without end"),
        (stream(says("Hel")), Retry, r"ended its answer in the middle"),
        (stream(says("Hel"), cut=True), Retry, r"broke off: .*"),
        (stream(cut=True), Retry, r"broke off: .*"),
    ],
)
def test_what_goes_wrong_is_named_and_the_next_request_works(
    tmp_path: Path, answer: Answer, kind: type[OutriderError], why: str
) -> None:
    with server(answer) as endpoint, loaded(tmp_path, endpoint.url) as model:
        with pytest.raises(kind, match=why):
            said(model)
        endpoint.answers = [GOOD]
        assert "".join(piece.text for piece in said(model)) == "Hello"


def test_a_server_that_is_not_there_is_tried_again_later(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with loaded(tmp_path, url) as model, pytest.raises(Retry, match=r"cannot be reached: .*does it run there"):
            said(model)


def test_a_busy_server_is_asked_again_a_bounded_number_of_times(tmp_path: Path) -> None:
    pieces, endpoint = against(tmp_path, BUSY, stream(cut=True), GOOD)
    assert ("".join(piece.text for piece in pieces), len(endpoint.asked)) == ("Hello", 3)
    with server(BUSY) as endpoint, loaded(tmp_path, endpoint.url) as model:
        with pytest.raises(Retry, match="503"):
            said(model)
        assert len(endpoint.asked) == ATTEMPTS


def test_what_was_given_out_is_never_said_twice(tmp_path: Path) -> None:
    with server(stream(says("Hel"), cut=True), GOOD) as endpoint, loaded(tmp_path, endpoint.url) as model:
        with pytest.raises(Retry, match="broke off"):
            said(model)
        assert len(endpoint.asked) == 1


def test_retry_after_is_waited_for_when_there_is_time_and_told_when_there_is_not(tmp_path: Path) -> None:
    began = time.monotonic()
    pieces, _ = against(tmp_path, whole(429, {}, retry_after="1"), GOOD)
    assert pieces[-1].finish == "stop"
    assert 1.0 <= time.monotonic() - began < 30.0
    for after in ("120", formatdate(time.time() + 120, usegmt=True)):
        with server(whole(429, {}, retry_after=after), GOOD) as endpoint, loaded(tmp_path, endpoint.url) as model:
            with pytest.raises(Retry, match="429"):
                said(model)
            assert len(endpoint.asked) == 1


def test_a_server_that_stalls_costs_its_time_and_no_more(tmp_path: Path) -> None:
    with server(stream(says("Hel"), stall=True)) as endpoint, loaded(tmp_path, endpoint.url, timeout_s=1.0) as model:
        began = time.monotonic()
        with pytest.raises(Retry, match=r"not done within 1 s"):
            said(model)
        assert 1.0 <= time.monotonic() - began < 10.0
        endpoint.answers = [GOOD]
        assert "".join(piece.text for piece in said(model)) == "Hello"


def test_cancelling_ends_a_stalled_request_and_a_pause_at_once(tmp_path: Path) -> None:
    for answer in (stream(says("Hel"), stall=True), whole(503, {}, retry_after="20")):
        with server(answer) as endpoint, loaded(tmp_path, endpoint.url) as model:
            began = time.monotonic()
            pieces = said(model, cancelled=lambda: time.monotonic() - began > 0.2)  # noqa: B023
            assert pieces[-1].finish == "cancelled"
            assert time.monotonic() - began < 10.0
            endpoint.answers = [GOOD]
            assert said(model)[-1].finish == "stop"


def test_text_under_a_schema_is_held_back_checked_and_refused_when_it_does_not_fit(tmp_path: Path) -> None:
    good = stream(says('\n{"city": '), says('"Rome"}'), says("", "stop"), DONE)
    pieces, endpoint = against(tmp_path, stream(says('{"ci'), cut=True), good, request=Generate("", "Where?", CITY))
    assert [piece.text for piece in pieces] == ['{"city": "Rome"}']
    wanted = endpoint.asked[0][2]["response_format"]
    assert wanted["json_schema"]["schema"]["required"] == ["city"]
    with pytest.raises(Refused, match="not what was asked for"):
        against(tmp_path, stream(says('{"town": 1}', "stop"), DONE), request=Generate("", "Where?", CITY))


def test_text_under_a_lark_grammar_is_checked_here_as_no_server_takes_it(tmp_path: Path) -> None:
    yes = Generate("", "Is it?", 'start: "yes" | "no"')
    pieces, endpoint = against(tmp_path, stream(says(" yes\n", "stop"), DONE), request=yes)
    assert pieces[-1].text == "yes"
    assert "grammar" not in endpoint.asked[0][2]
    with pytest.raises(Refused, match=r"maybe.*cannot be held to a grammar"):
        against(tmp_path, stream(says("maybe", "stop"), DONE), request=yes)


def test_calls_come_whole_from_their_parts_however_they_are_numbered(tmp_path: Path) -> None:
    def part(index: int, arguments: str, name: str | None = None) -> dict[str, Any]:
        return says(tool_calls=[{"index": index, "function": {"name": name, "arguments": arguments}}])

    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    request = Generate("", "", chat={"messages": [{"role": "user", "content": "go"}], "tools": tools})
    numbered = [part(0, '{"a"', "f"), part(1, "{}", "g"), part(0, ": 1}"), says("", "tool_calls")]
    pieces, endpoint = against(tmp_path, stream(*numbered, DONE), request=request)
    assert (pieces[-1].calls, pieces[-1].finish) == ([("f", '{"a": 1}'), ("g", "{}")], "stop")
    assert endpoint.asked[0][2]["tools"] == tools
    all_zero = [part(0, '{"a": 1}', "f"), part(0, "{}", "g"), says("", "tool_calls")]
    assert against(tmp_path, stream(*all_zero, DONE), request=request)[0][-1].calls == pieces[-1].calls


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (b"{", "cannot be set up"),
        (b'{"url": "ftp://h/v1", "model": "m"}', "is not like http://"),
        (b'{"url": "http://u:p@h/v1", "model": "m"}', "is not like http://"),
        (b'{"url": "http://h/v1", "model": ""}', "give a model"),
        (b'{"url": "http://h/v1", "model": "m", "colour": 1}', "colour"),
        (b'{"url": "http://h/v1", "model": "m", "ca_file": "/nowhere"}', "cannot be set up"),
        (b'{"url": "http://h/v1", "model": "m", "key_env": "NO_SUCH_KEY"}', "NO_SUCH_KEY holds no key"),
        (b'{"url": "http://h/v1", "model": "m", "key_file": "/nowhere"}', "/nowhere holds no key"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_load(tmp_path: Path, settings: bytes, why: str) -> None:
    (tmp_path / FILE).write_bytes(settings)
    with pytest.raises(Refused, match=why):
        OpenaiModel(tmp_path)


def test_a_key_that_is_replaced_is_used_and_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(GOOD) as endpoint, loaded(tmp_path, endpoint.url, key="first") as model:
        said(model)
        (tmp_path / "plant.key").write_text("second")
        said(model)
        assert [headers["Authorization"] for _, headers, _ in endpoint.asked] == ["Bearer first", "Bearer second"]
        assert "first" not in (tmp_path / "plant" / FILE).read_text() + str(model.info)
        monkeypatch.setenv("PLANT_KEY", "third")
        with loaded(tmp_path / "env", endpoint.url, key_env="PLANT_KEY") as other:
            said(other)
        assert endpoint.asked[-1][1]["Authorization"] == "Bearer third"
