"""A model behind an endpoint works for the agent: asked by messages and tools, read as the agent's own text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_agent.agent.calls import Answer, Call, CallError, Nothing, parse, validate
from edge_agent.agent.chat import chat, said
from edge_agent.agent.decide import Speaker, next_call
from edge_agent.agent.prompt import Turn
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.engines.base import Piece

SPECS = [
    ToolSpec(
        "set_speed",
        "Set the speed of a line.",
        [
            Param("line", "int", low=1, high=3),
            Param("mode", "choice", choices=["slow", "fast"], about="how"),
            Param("percent", "float", unit="%", required=False),
            Param("steps", "list", items=Param("item", "dict", fields=[Param("at", "float")]), required=False),
        ],
    )
]


def reply(text: str = "", *calls: tuple[str, str], finish: str = "stop") -> Piece:
    return Piece(text, done=True, finish=finish, calls=list(calls))


def test_an_endpoint_is_asked_by_messages_and_nothing_of_ours_that_it_cannot_read() -> None:
    request = next_call(Speaker("d", endpoint=True), SPECS, [Turn("user", "line 1 slowly")])
    assert (request.prefix, request.prompt, request.grammar) == ("", "", "")
    assert request.chat == chat(SPECS, [Turn("user", "line 1 slowly")])
    assert next_call(Speaker("d"), SPECS, []).chat == {}


def test_where_no_tool_may_answer_none_is_named_as_servers_refuse_an_empty_list() -> None:
    asked = next_call(Speaker("d", endpoint=True), SPECS, [Turn("user", "is line 1 slow?")], fit=[])
    assert asked.chat.keys() == {"messages"}


def test_tools_are_told_as_json_schemas() -> None:
    function = chat(SPECS, [])["tools"][0]["function"]
    assert (function["name"], function["description"]) == ("set_speed", "Set the speed of a line.")
    parameters = function["parameters"]
    assert parameters["required"] == ["line", "mode"]
    assert parameters["properties"]["line"] == {"type": "integer", "minimum": 1, "maximum": 3}
    assert parameters["properties"]["mode"] == {"description": "how", "type": "string", "enum": ["slow", "fast"]}
    assert parameters["properties"]["percent"] == {"description": "in %", "type": "number"}
    assert parameters["properties"]["steps"]["items"]["properties"] == {"at": {"type": "number"}}


def test_a_call_and_its_result_are_one_pair_and_an_error_without_a_call_is_told_by_the_user() -> None:
    turns = [
        Turn("user", "line 1 slowly"),
        Turn("assistant", 'set_speed(line=1, mode="slow")'),
        Turn("tool", "done"),
        Turn("assistant", "set_speed(("),
        Turn("tool", "error: not a call"),
    ]
    messages = chat(SPECS, turns)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant", "user"]
    [called] = messages[2]["tool_calls"]
    assert json.loads(called["function"]["arguments"]) == {"line": 1, "mode": "slow"}
    assert messages[3] == {"role": "tool", "tool_call_id": called["id"], "content": "done"}
    assert messages[4]["content"] == "set_speed(("


@pytest.mark.parametrize(
    ("piece", "means"),
    [
        (reply("", ("set_speed", '{"line": 1, "mode": "slow", "percent": null}')), {"line": 1, "mode": "slow"}),
        (reply("so:", ("set_speed", '{"line": 2.0, "mode": "fast", "percent": 1e-7}')), {"line": 2, "mode": "fast"}),
        (reply('set_speed(line=3, mode="fast")'), {"line": 3, "mode": "fast"}),
        (reply(" It runs. "), Answer("It runs.")),
        (reply('He said "no"\nand went'), Answer('He said "no"\nand went')),
        (reply("none()"), Nothing()),
        (reply("  "), Nothing()),
        (reply("", finish="length"), None),
        (reply("", ("set_speed", '{"line": ')), None),
        (reply("", ("set_speed", "[1]")), None),
        (reply("", ("rm -rf", "{}")), None),
        (reply("", ("set_speed", '{"line": {"a": null}}')), None),
    ],
)
def test_what_comes_back_is_a_call_an_answer_none_or_refused_by_the_parser(piece: Piece, means: Any) -> None:
    text = said(piece)
    if means is None:
        with pytest.raises(CallError):
            parse(text)
        return
    found = parse(text)
    if isinstance(found, Call):
        args = validate(found, SPECS).args
        assert {key: args[key] for key in means} == means
    else:
        assert found == means
