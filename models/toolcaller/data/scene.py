"""What one example is drawn from: its tools, its speaker, and the prompt they make.

Invariant: the prompt is exactly what `edge_agent.agent.prompt` renders for these tools and turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec

from edge_agent.agent import prompt
from edge_agent.agent.calls import Call, render_all
from edge_agent.agent.prompt import Turn
from edge_agent.agent.tool import ToolSpec
from models.toolcaller.data.catalogue import Function, Made, functions, make
from models.toolcaller.data.phrases import finish, wording
from models.toolcaller.data.requests import Asked, ask
from models.toolcaller.data.values import Voice

TRIES = 600  # draws for a wanted function before any other is taken
COUNTED = ("parts", "count", "stock", "rpm", "percent")


class Example(msgspec.Struct, frozen=True):
    """One training example; `several` says that the prompt asks for all calls at once (`prompt.SYSTEM_ALL`)."""

    prompt: str
    completion: str
    kind: str
    several: bool
    request: str
    tools: list[ToolSpec]

    def row(self) -> dict[str, Any]:
        """The example as a line of JSON: tools by name."""
        return {**msgspec.structs.asdict(self), "tools": [spec.name for spec in self.tools]}


class Scene:
    """What one example is drawn from: its random source, voice, and tools so far."""

    def __init__(self, rng: Random) -> None:
        self.rng, self.voice = rng, Voice(rng)
        self.taken: set[str] = set()
        self.made: list[Made] = []

    def tool(self, wanted: Callable[[Function], bool] | None = None) -> Made:
        """A new tool of a function not yet used that is `wanted`."""
        used = [made.function for made in self.made]
        for _ in range(TRIES):
            function = self.rng.choice(functions())
            if (wanted is None or wanted(function)) and not any(function is one for one in used):
                break
        made = make(function, self.rng, self.taken)
        self.made.append(made)
        return made

    def crowd(self, count: int, near: Function) -> None:
        """Distractors: about half from the domain of `near`."""
        for _ in range(count):
            same = self.rng.random() < 0.5
            self.tool(of_domain(near.domain) if same else None)

    def example(
        self, kind: str, turns: Sequence[Turn], calls: Sequence[Call], several: bool, shots: float = 0
    ) -> Example:
        """Render the prompt; with chance `shots` the tools carry examples of their own."""
        specs = [made.spec for made in self.made]
        if self.rng.random() < shots:
            most = self.rng.choice([1, 1, 2])
            specs = [msgspec.structs.replace(m.spec, examples=self._shots(m, most)) for m in self.made]
        self.rng.shuffle(specs)
        system = prompt.SYSTEM_ALL if several else prompt.SYSTEM
        text = prompt.preamble(specs, system) + prompt.suffix(turns)
        return Example(text, render_all(calls), kind, several, turns[0].text, specs)

    def _shots(self, made: Made, most: int) -> list[tuple[str, dict[str, Any]]]:
        asked = [ask(made, Voice(self.rng)) for _ in range(self.rng.randint(0, most))]
        return [(finish(a.pieces, self.voice, context=False), a.call.args) for a in asked]

    def say(self, asked: Asked) -> str:
        return finish(asked.pieces, self.voice, asked.domain)


def of_domain(name: str) -> Callable[[Function], bool]:
    return lambda function: function.domain == name


def is_device(function: Function) -> bool:
    return function.device


def result(function: Function, rng: Random, value: float | None = None) -> str:
    """What a tool might answer, as `prompt.result_text` writes it."""
    if not function.result:
        if function.templates[0].mark == "N":
            return prompt.result_text({"result": round(rng.uniform(0, 500), rng.randint(0, 3))})
        return str(rng.choice(wording()["results"]))
    name, _, values = function.result.partition(":")
    low, dots, high = values.partition("..")
    if not dots:
        return prompt.result_text({name: rng.choice(values.split("|"))})
    number = round(rng.uniform(float(low), float(high)), 1)
    number = int(number) if name in COUNTED else number
    return prompt.result_text({name: number if value is None else value})
