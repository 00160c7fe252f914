"""A site's own requests are judged as it meant them, for each adapter by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from edge_agent.engines.base import EngineInfo, Generate, Piece
from models.toolcaller.data.written import Group, of_site
from models.toolcaller.evaluate import own

DAIRY = Path(__file__).parents[2] / "docs/examples"


class Knows:
    """Says what is right when asked with the adapter "site", and otherwise that nothing is to be done."""

    def __init__(self, groups: list[Group]) -> None:
        self.info = EngineInfo("fake", "cpu", "fake", "0", 0.0)
        self.asked: list[str] = []
        self._right = {
            request.text: [calls for _, _, calls in own._steps(request)]
            for group in groups
            for request in group.requests
        }

    def generate(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Piece]:
        self.asked.append(request.adapter)
        steps = self._right[next(text for text in self._right if f"\n{text}<|im_end|>" in request.prompt)]
        step = steps[request.prompt.count("<|im_start|>tool")]
        calls = step if request.adapter == "site" else []
        yield Piece("\n".join(own.render(call) for call in reversed(calls)) or "none()", done=True)

    def load_adapter(self, name: str, folder: Path) -> None: ...
    def unload_adapter(self, name: str) -> None: ...
    def close(self) -> None: ...


def test_adapters_take_turns_and_each_is_judged_by_what_the_site_meant() -> None:
    groups = of_site(DAIRY / "dairy-check.txt")
    requests = [request for group in groups for request in group.requests if not request.story]
    groups = [Group(group.name, group.domain, group.tools, {}, requests) for group in groups]
    model = Knows(groups)
    rows = {
        (row["adapter"], row["name"]): row for row in own.rows(list(own.evaluate(model, groups, ["site", "other"])))
    }
    assert model.asked == ["site", "other"] * len(requests)
    assert rows["site", "all"]["value"] == 100
    none = sum(not request.calls for request in requests)
    assert rows["other", "none"]["value"] == 100
    assert rows["other", "several"]["value"] == 0
    assert rows["other", "all"]["value"] == round(100 * none / len(requests), 1)


def test_the_requests_to_check_with_are_not_among_those_to_train_on() -> None:
    trained = {request.text.lower() for group in of_site(DAIRY / "dairy.txt") for request in group.requests}
    checked = {request.text.lower() for group in of_site(DAIRY / "dairy-check.txt") for request in group.requests}
    assert len(checked) >= 28
    assert not trained & checked
