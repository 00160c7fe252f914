"""The engine Protocol: what runs a model inside a worker process.

Invariants: an engine is used by one thread at a time; `load` either leaves a ready engine or raises with the
reason; nothing falls back to another provider in silence. Language models stream pieces and honour `cancelled`
between tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edge_agent.errors import Refused
from edge_agent.wire.tensor import Tensor

ACCELERATOR, ENGINES = "OUTRIDER_ACCELERATOR", "OUTRIDER_ENGINES"
"""A network worker's environment: accelerators in the order they are tried in, the folder for compiled engines."""

BUILD = "build"
"""In `EngineInfo.extra`, how an engine that is compiled meanwhile comes along: fields of `serving.frames.Served`."""


class EngineInfo(msgspec.Struct, frozen=True):
    """What is loaded, for logs, metrics and the dashboard."""

    engine: str
    provider: str
    model: str
    digest: str
    load_s: float
    extra: dict[str, Any] = {}


class Network(Protocol):
    """A loaded network: tensors in, tensors out, by name."""

    info: EngineInfo

    def infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once. Raises Refused for a wrong name, dtype or shape, naming what the model takes."""
        ...

    def close(self) -> None: ...


class Generate(msgspec.Struct, frozen=True):
    """One request to a language model. `prefix` is kept in the KV cache between requests, `prompt` follows it.

    `chat` is the same request as OpenAI's `messages`, `tools` and so on, for engines that take no text and no Lark.
    `model` and `priority` (0 goes first, 3 last) are for who brings it to an engine: which one, and when. With
    `logprobs` pieces tell their tokens, each with the `top_logprobs` likeliest.
    """

    prefix: str
    prompt: str
    grammar: str = ""
    max_tokens: int = 128
    stop: list[str] = []
    temperature: float = 0.0
    seed: int = 0
    adapter: str = ""
    chat: dict[str, Any] = {}
    model: str = ""
    priority: int = 2
    logprobs: bool = False
    top_logprobs: int = 0


class Token(msgspec.Struct, frozen=True, array_like=True):
    """A token that was written, the logarithm of its probability among those that were allowed, and the likeliest."""

    text: bytes
    logprob: float
    top: list[tuple[bytes, float]] = []


class Piece(msgspec.Struct, frozen=True):
    """A piece of generated text; the last one has `done` and the counts.

    `choices` are the tokens that the grammar did not force, `mean_logprob` is over them; an endpoint tells neither.
    `calls` answers `Generate.chat` in the last piece: tools by name with JSON arguments, as the model wrote them.
    """

    text: str
    done: bool = False
    finish: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0
    mean_logprob: float = 0.0
    choices: int = 0
    calls: list[tuple[str, str]] | None = None
    tokens: list[Token] = []

    @property
    def probability(self) -> float:
        """Of the whole text among all that the grammar allowed."""
        return math.exp(self.mean_logprob * self.choices)


class LanguageModel(Protocol):
    """A loaded language model."""

    info: EngineInfo

    def generate(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Piece]:
        """Stream the completion. Raises Refused when the grammar, the adapter or the lengths cannot be served."""
        ...

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make an adapter folder selectable as `Generate.adapter`, between requests; the same name replaces it.

        Raises Refused, with nothing changed, when it is damaged, of another base model, or one too many.
        """
        ...

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter and its caches. Raises Refused when there is none of that name."""
        ...

    def close(self) -> None: ...


def check_request(request: Generate) -> None:
    """Raises Refused for limits that no engine takes."""
    if request.max_tokens < 1 or not 0 <= request.temperature < 100:
        raise Refused("max_tokens is at least 1 and temperature from 0 to 100")


def bundle_path(root: Path, name: str) -> Path:
    """A file of an installed bundle. Raises ValueError when the name leaves the folder."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"{name!r} leaves the bundle")
    return path
