"""What every engine of language models keeps: genai in this process, and an endpoint that is a device's own API."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.engines.base import Generate, LanguageModel, Piece
from edge_agent.engines.genai import GenaiModel
from edge_agent.engines.openai import OpenaiModel
from edge_agent.errors import Refused
from tests.engines.endpoints import device, folder, key

PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CITY = 'start: %json {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, '
CITY += '"required": ["city"], "additionalProperties": false}\n'
YES_NO = 'start: "yes" | "no"'


def ask(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def _genai(model_cache: Path, smollm2: Path, scratch: Path) -> Iterator[LanguageModel]:
    yield GenaiModel(smollm2)


def _openai(model_cache: Path, smollm2: Path, scratch: Path) -> Iterator[LanguageModel]:
    with device(model_cache) as served:
        yield OpenaiModel(folder(scratch / "plant", f"{served.url}/v1", key=key()))


@pytest.fixture(scope="module", params=[_genai, _openai], ids=["genai", "openai"])
def model(
    request: pytest.FixtureRequest, model_cache: Path, smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LanguageModel]:
    for made in request.param(model_cache, smollm2_folder, tmp_path_factory.mktemp("engine")):
        yield made
        made.close()


def generate(
    model: LanguageModel, text: str, cancelled: Callable[[], bool] = lambda: False, **more: Any
) -> tuple[str, Piece]:
    request = Generate(PREFIX, ask(text), **{"max_tokens": 12, **more})
    pieces = list(model.generate(request, cancelled))
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    return "".join(piece.text for piece in pieces), pieces[-1]


def test_what_is_loaded_says_what_it_is(model: LanguageModel) -> None:
    info = model.info
    assert info.engine
    assert info.provider
    assert info.model
    assert len(info.digest) == 64
    assert info.load_s >= 0
    assert json.dumps(info.extra)


def test_a_greedy_answer_is_right_counted_and_the_same_again(model: LanguageModel) -> None:
    said, last = generate(model, "What is the capital of France?")
    assert "Paris" in said
    assert last.finish in ("stop", "length")
    assert 0 < last.output_tokens <= 12
    assert last.prompt_tokens > last.output_tokens
    assert 0 < last.first_token_s <= last.total_s
    again, warm = generate(model, "What is the capital of France?")
    assert again == said
    assert warm.cached_tokens > 0


def test_text_comes_in_pieces_while_it_is_written(model: LanguageModel) -> None:
    pieces = list(model.generate(Generate(PREFIX, ask("Count from one to ten."), max_tokens=24), lambda: False))
    assert sum(bool(piece.text) for piece in pieces) > 2


def test_the_token_limit_ends_with_length(model: LanguageModel) -> None:
    _, last = generate(model, "Tell me everything about the sea.", max_tokens=5)
    assert (last.finish, last.output_tokens) == ("length", 5)


def test_a_stop_string_ends_the_text_and_is_never_shown(model: LanguageModel) -> None:
    free, _ = generate(model, "Count from one to ten.", max_tokens=30)
    stop = free[len(free) // 2 : len(free) // 2 + 3]
    said, last = generate(model, "Count from one to ten.", max_tokens=30, stop=["@@@", stop])
    assert said == free[: free.index(stop)]
    assert last.finish == "stop"


def test_a_seed_repeats_a_sample(model: LanguageModel) -> None:
    said = [generate(model, "A story:", temperature=1.5, seed=seed, max_tokens=6)[0] for seed in (5, 5, 5, 6)]
    assert said[1] == said[2]  # the first one also read the prompt, which may round its last bits otherwise
    assert len(set(said[1:])) > 1


def test_cancelling_ends_between_pieces_and_the_model_lives(model: LanguageModel) -> None:
    seen: list[Piece] = []
    for piece in model.generate(Generate(PREFIX, ask("Tell a long story."), max_tokens=400), lambda: len(seen) >= 3):
        seen.append(piece)
    assert seen[-1].finish == "cancelled"
    assert len(seen) < 40
    assert "Paris" in generate(model, "What is the capital of France?")[0]


def test_a_caller_that_leaves_early_costs_the_next_one_nothing(model: LanguageModel) -> None:
    stream = model.generate(Generate(PREFIX, ask("Tell a long story."), max_tokens=400), lambda: False)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert "Paris" in generate(model, "What is the capital of France?")[0]


def test_a_json_schema_is_kept_to(model: LanguageModel) -> None:
    said, last = generate(model, "Where is the Eiffel Tower? Answer as JSON.", grammar=CITY, max_tokens=40)
    assert list(json.loads(said)) == ["city"]
    assert last.finish == "stop"


def test_text_outside_a_lark_grammar_never_comes_back(model: LanguageModel) -> None:
    """An engine keeps to the grammar, or says that it could not."""
    said = why = ""
    try:
        said, _ = generate(model, "Is the sea wet? Answer yes or no.", grammar=YES_NO)
    except Refused as error:
        why = error.hint
    assert said in ("yes", "no") or (isinstance(model, OpenaiModel) and "cannot be held to a grammar" in why)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Generate("", ""), "0 tokens"),
        (Generate("", "hi", max_tokens=0), "at least 1"),
        (Generate("", "hi", temperature=-1.0), "temperature"),
        (Generate("", "hi", temperature=float("nan")), "temperature"),
        (Generate("", "hi", adapter="french"), "no adapter 'french'"),
        (Generate("", "hi", grammar="start: (("), "grammar is not usable"),
        (Generate("", "hi", grammar="start: %json {"), "grammar is not usable"),
        (Generate("", "word " * 6000), "tokens"),
    ],
)
def test_a_bad_request_is_refused_with_a_hint_and_the_model_lives(
    model: LanguageModel, request_: Generate, why: str
) -> None:
    with pytest.raises(Refused, match=why) as refused:
        list(model.generate(request_, lambda: False))
    assert refused.value.hint or "tokens" in why or "temperature" in refused.value.message
    assert generate(model, "Hello!", max_tokens=2)[1].output_tokens == 2


def test_an_adapter_that_is_none_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(Refused):
        model.load_adapter("french", tmp_path)
    with pytest.raises(Refused, match="no adapter 'french'"):
        model.unload_adapter("french")
