"""The tool caller's training data: repeatable, correct, as varied as declared, and none of it from BFCL."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from random import Random

import llguidance
import pytest

from edge_agent.agent import grammar, prompt
from edge_agent.agent.calls import Call, Nothing, parse_all, render_all, validate
from models.errors import ModelError
from models.fetch import default_cache
from models.toolcaller.data.bunches import bunches
from models.toolcaller.data.catalogue import blocked, functions, name_hash
from models.toolcaller.data.generate import KINDS, generate
from models.toolcaller.data.phrases import wording
from models.toolcaller.data.scene import Example
from models.toolcaller.data.slots import draw, scenes
from models.toolcaller.data.written import groups
from models.toolcaller.evaluate.overlap import Held
from models.toolcaller.evaluate.plant_cases import load

BYTES = llguidance.LLTokenizer("byte")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(generate(11, 6000))


def test_the_same_seed_gives_the_same_examples_and_another_seed_others() -> None:
    assert [e.row() for e in generate(3, 50)] == [e.row() for e in generate(3, 50)]
    assert list(generate(3, 50))[:20] == list(generate(3, 20))
    assert [e.prompt for e in generate(3, 50)] != [e.prompt for e in generate(4, 50)]


def test_every_completion_is_read_back_and_fits_the_tools_of_its_prompt(examples: list[Example]) -> None:
    for example in examples:
        decisions = parse_all(example.completion)
        calls = [d for d in decisions if isinstance(d, Call)]
        assert decisions == [Nothing()] or len(calls) == len(decisions)
        assert [validate(call, example.tools) for call in calls] == calls
        assert render_all(decisions) == "\n".join(dict.fromkeys(example.completion.split("\n")))
        assert example.several or len(decisions) == 1


def test_the_grammar_accepts_every_completion(examples: list[Example]) -> None:
    for example in examples[:400]:
        matcher = llguidance.LLMatcher(BYTES, grammar.build(example.tools, several=8), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        text = example.completion.encode()
        assert matcher.try_consume_tokens(list(text)) == len(text), example.completion
        assert matcher.is_accepting()


def test_a_prompt_is_what_the_agent_renders(examples: list[Example]) -> None:
    for example in examples:
        system = prompt.SYSTEM_ALL if example.several else prompt.SYSTEM
        assert example.prompt.startswith(prompt.preamble(example.tools, system))
        assert example.prompt.endswith("<|im_start|>assistant\n")
        assert prompt.chatml("user", example.request) in example.prompt


def test_kinds_come_in_their_declared_shares(examples: list[Example]) -> None:
    counts = Counter(example.kind for example in examples)
    for kind, share in KINDS.items():
        assert counts[kind] / len(examples) == pytest.approx(share, abs=0.035), kind


def test_an_argument_of_text_stands_in_the_request(examples: list[Example]) -> None:
    """Names, messages and ids are copied, never made up (choices, dates, times and codes may be said otherwise)."""
    missing = total = 0
    for example in examples:
        if example.kind in ("irrelevant", "missing"):
            continue
        for decision in parse_all(example.completion):
            for value in decision.args.values() if isinstance(decision, Call) else ():
                if isinstance(value, str) and not re.fullmatch(r"[\d:./-]+", value) and len(value) > 3:
                    total += 1
                    missing += value.lower() not in example.request.lower().replace("_", " ")
    assert total > 1000
    assert missing / total < 0.08


def test_the_catalogue_is_large_and_its_names_are_their_own() -> None:
    names = [name for function in functions() for name in function.names]
    assert len(functions()) >= 500
    assert len(set(names)) == len(names)
    assert len({function.domain for function in functions()}) >= 25


def test_no_tool_has_a_name_that_is_held_back(examples: list[Example]) -> None:
    assert not {spec.name for e in examples for spec in e.tools if name_hash(spec.name) in blocked()}


@pytest.fixture(scope="module")
def held() -> Held:
    try:
        return Held.load(default_cache())
    except ModelError as error:
        pytest.skip(f"bfcl-eval is not here: {error}")


@pytest.fixture(scope="module")
def texts(examples: list[Example]) -> list[str]:
    """Every request that training may see: what was written, what is drawn and composed, small talk."""
    drawn = [draw(scene, Random(seed)) for scene in scenes() for seed in range(12)]
    written = [request.text for group in [*groups(), *drawn] for request in group.requests]
    return written + [example.request for example in examples] + wording()["smalltalk"]


def test_no_function_is_named_as_one_of_bfcl(held: Held, examples: list[Example]) -> None:
    assert len(held.names) > 1000
    assert held.names <= blocked()
    made = [spec.name for bunch in itertools.islice(bunches(5), 200) for example in bunch for spec in example.tools]
    drawn = [api.spec.name for scene in scenes() for api in scene.apis]
    written = [spec.name for group in groups() for spec in group.tools] + drawn
    assert not [name for name in made + written + [s.name for e in examples for s in e.tools] if held.named(name)]


def test_no_request_shares_eight_words_in_a_row_with_bfcl(held: Held, texts: list[str]) -> None:
    assert len(held.grams) > 10_000
    assert not [text for text in texts if held.shares(text)]


def test_no_request_shares_six_words_in_a_row_with_the_plant_set_and_no_tool_is_one_of_the_plant(
    texts: list[str],
) -> None:
    theirs = Held((case.text for case in load()), size=6)
    assert len(theirs.grams) > 500
    assert not [text for text in texts if theirs.shares(text)]
    plant = {name for case in load() for name in re.findall(r"(\w+)\(", " ".join(case.calls + case.may))}
    assert {"read_sensor", "stop_line"} <= plant
    assert not [spec.name for group in groups() for spec in group.tools if spec.name in plant]
    assert not [api.spec.name for scene in scenes() for api in scene.apis if api.spec.name in plant]
