"""The prompt: compact, the same for the same tools, and bounded."""

from edge_agent.agent import prompt
from tests.agent import plant


def test_a_signature_is_one_compact_line() -> None:
    assert prompt.signature(plant.set_speed.spec) == (
        "set_speed(line: int 1..3, percent: float 0..100 %, note?: str) - Set the speed of a line."
    )
    assert prompt.signature(plant.read_sensor.spec) == (
        'read_sensor(sensor: "vibration"|"temperature", line: int 1..3) - Read a sensor of a production line.'
    )


def test_the_preamble_shows_the_tools_own_examples_as_turns() -> None:
    text = prompt.preamble([tool.spec for tool in plant.ALL])
    assert "<|im_start|>user\nhow hot is line 2<|im_end|>\n" in text
    assert '<|im_start|>assistant\nread_sensor(sensor="temperature", line=2)<|im_end|>\n' in text
    bare = prompt.preamble([tool.spec for tool in plant.ALL], shots=False)
    assert text.startswith(bare)
    assert bare.count("<|im_start|>") == 1


def test_results_are_short_plain_text() -> None:
    assert prompt.result_text({"value": 41.50000001, "unit": "C", "ok": True}) == "value: 41.5, unit: C, ok: true"
    assert prompt.result_text([]) == "nothing"
    assert prompt.result_text([{"a": 1}, {"a": [1, 2]}]) == "a: 1; a: [1,2]"
    assert prompt.result_text(None) == "done"
    assert len(prompt.result_text("x" * 10_000)) == prompt.MAX_RESULT


ONLY_ASKS = (
    "What is line 2 set to?",
    "is line 3 running at 60?",
    "How fast does four go?",
    "Has the pump been started?",
    "Did somebody turn the oven down to 180?",
    "wie schnell läuft Linie 2?",
    "Which line is the hottest?",
    "When did line 2 stop?",
)
WISHES = (
    "Can you stop line 2?",
    "How about stopping line 2?",
    "Is line 2 hot? Then stop it.",
    "Is line 2 hot, and could you slow it?",
    "Why don't you stop line 2?",
    "Is it possible to stop line 2?",
    "What if line 2 is too hot, stop it?",
    "Kannst du Linie 2 stoppen?",
    "When line 2 is hot, stop it?",
    "Is it best to stop whichever line is hot?",
    "stop line 2",
)


def test_a_question_is_told_from_a_wish_in_a_questions_form() -> None:
    assert [text for text in ONLY_ASKS if not prompt.only_asks(text)] == []
    assert [text for text in WISHES if prompt.only_asks(text)] == []
