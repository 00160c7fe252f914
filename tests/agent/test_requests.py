"""Requests in plain words: the real model does far better than chance, and chance is what is left without it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import llguidance
import msgspec
import pytest

from edge_agent.agent import grammar, prompt
from edge_agent.agent.calls import Call, parse
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.rules import Policy
from edge_agent.agent.tool import ToolSpec
from edge_agent.agent.transcript import Transcripts, migrations
from edge_agent.engines.base import Generate, Piece
from edge_agent.store import Store
from edge_agent.wire.grants import Subject
from tests.fakes import LocalTools
from tools.sim.pack import pack

REQUESTS: dict[str, list[tuple[str, list[str]]]] = msgspec.convert(
    {k: v for k, v in json.loads(Path(__file__).with_name("requests.json").read_text()).items() if k != "note"},
    dict[str, list[tuple[str, list[str]]]],
)
ADA = Subject("ada", ["admin"], 1.0)


class Coin:
    """A model with uniform logits: every byte the grammar allows is as likely as any other."""

    def __init__(self) -> None:
        self._random, self._bytes = random.Random(7), llguidance.LLTokenizer("byte")

    async def generate(self, request: Generate, timeout_s: float) -> Piece:
        matcher = llguidance.LLMatcher(self._bytes, request.grammar, log_level=0)
        said = b""
        while not matcher.is_stopped() and len(said) < 64:
            mask = matcher.compute_bitmask()
            allowed = [n for n in range(256) if mask[n // 8] >> (n % 8) & 1]
            if not allowed:
                break
            said += bytes([self._random.choice(allowed)])
            assert matcher.consume_token(said[-1])
        return Piece(said.decode(errors="replace"), done=True)


@pytest.fixture
def specs(tmp_path: Path) -> list[ToolSpec]:
    return [tool.spec for tool in pack(tmp_path / "plant", {"seed": "1", "start": "0"})]


def test_the_prompt_has_no_example_that_is_a_request_of_the_sets(specs: list[ToolSpec]) -> None:
    shown = {request.lower() for request, _ in prompt.examples(specs)}
    assert not shown & {request.lower() for requests in REQUESTS.values() for request, _ in requests}


def test_every_expected_call_is_one_the_model_can_make(specs: list[ToolSpec]) -> None:
    lark, tokens = grammar.build(specs), llguidance.LLTokenizer("byte")
    for requests in REQUESTS.values():
        for _, calls in requests:
            for call in calls:
                assert llguidance.LLMatcher(tokens, lark).consume_tokens(list(call.encode())), call


async def test_with_uniform_logits_success_falls_to_chance(tmp_path: Path, specs: list[ToolSpec]) -> None:
    tools = LocalTools(
        *pack(tmp_path / "plant", {"seed": "1", "start": "0"}), fail={s.name: ValueError() for s in specs}
    )
    store = Store(tmp_path / "state.db", migrations)
    transcripts = Transcripts(store)
    loop = AgentLoop(Coin(), tools, transcripts, lambda *_: True, rules=lambda: Policy(unsaid="act"))
    right, asked = 0, [request for requests in REQUESTS.values() for request in requests if request[1]]
    for n, (text, calls) in enumerate(asked):
        await loop.accept(str(n), text, ADA)
        before = len(tools.calls)
        try:
            await loop.run(str(n))
        except ValueError:
            name, args = tools.calls[before]
            right += parse(calls[0]) == Call(name, args)
    store.close()
    assert right <= len(asked) / 5


def test_the_real_model_does_better_than_chance_and_knows_when_to_stop(
    smollm2_folder: Path, specs: list[ToolSpec]
) -> None:
    from edge_agent.engines.genai import GenaiModel

    model, preamble, lark = GenaiModel(smollm2_folder), prompt.preamble(specs), grammar.build(specs)

    def say(*turns: prompt.Turn) -> str:
        request = Generate(preamble, prompt.suffix(turns), lark, max_tokens=64)
        return "".join(piece.text for piece in model.generate(request, lambda: False))

    right = ended = single = 0
    for text, calls in REQUESTS["held"]:
        right += say(prompt.Turn("user", text)) == (calls[0] if calls else "none()")
        if len(calls) == 1:
            single += 1
            shown = (
                prompt.Turn("user", text),
                prompt.Turn("assistant", calls[0]),
                prompt.Turn("tool", "line: 1, value: 4"),
            )
            ended += not say(*shown).startswith(tuple(spec.name for spec in specs))
    model.close()
    assert right >= len(REQUESTS["held"]) * 0.4
    assert ended >= single * 0.8
