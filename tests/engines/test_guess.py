"""Guessing ahead: what is likely by grammar and request, and that the model's own choices decide all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from llguidance import LLMatcher

from edge_agent.agent import grammar, prompt
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.engines.base import Generate
from edge_agent.engines.genai import GenaiModel

TOOLS = [
    ToolSpec("set_speed", "Set the speed of a line.", [Param("line", "int"), Param("percent", "float")]),
    ToolSpec("write_note", "Write a note.", [Param("text", "str")]),
    ToolSpec("cool_line", "Cool a line.", [Param("line", "int")]),
]
LARK = grammar.build(TOOLS)


@pytest.fixture(scope="module")
def model(smollm2_folder: Path) -> GenaiModel:
    return GenaiModel(smollm2_folder, context=512)


@pytest.mark.parametrize(
    ("request_text", "written", "guess"),
    [
        ("Line 2 to 45 percent", "set_speed(line", "="),  # not =-
        ("Line 2 to 45 percent", "set_speed(line=2", ", percent="),  # the number ends in the request
        ("Line 2 to 45 percent", "set_speed(line=2, percent=4", "5.0)"),
        ("Line 2 to 4.5 percent", "set_speed(line=2, percent=4", ".5)"),
        ("Note: the belt slips", 'write_note(text="the belt', ' slips")'),
        ("Note: the belt slips", 'write_note(text="', ""),
    ],
)
def test_a_guess_follows_grammar_and_request(model: GenaiModel, request_text: str, written: str, guess: str) -> None:
    tokens = model._tokenizer.tokenize_str(written)
    matcher = LLMatcher(model._tokenizer, LLMatcher.grammar_from_lark(LARK))
    assert matcher.consume_tokens(tokens)
    source = model._tokenizer.tokenize_str(prompt.suffix([prompt.Turn("user", request_text)]), parse_special=True)
    guessed = model._guesser.guess(matcher, tokens, source, 8)
    assert model._tokenizer.decode_str(guessed) == guess


def test_guesses_are_confirmed_by_the_model_and_save_runs(smollm2_folder: Path) -> None:
    asked = ["Line 2 to 45 percent", "Cool line 31", "Write a note: the belt slips again", "Line 7: 12.5 percent"]
    said, runs = {}, {}
    for ahead in (0, None):
        model = GenaiModel(smollm2_folder, context=512)
        model._ahead = ahead
        read, count = model._read, []
        model._read = lambda *args, read=read, count=count: count.append(1) or read(*args)  # type: ignore[method-assign]
        preamble = prompt.preamble(TOOLS)
        requests = [Generate(preamble, prompt.suffix([prompt.Turn("user", text)]), LARK, 64) for text in asked]
        said[ahead] = ["".join(piece.text for piece in model.generate(request, lambda: False)) for request in requests]
        runs[ahead] = len(count)
    assert said[None] == said[0]
    assert runs[None] < 0.8 * runs[0]
