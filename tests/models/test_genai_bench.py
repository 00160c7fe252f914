"""The race against llama-cpp-python is a fair one, or says why it cannot be run."""

import sys

import pytest

from bench import llama, llm
from edge_agent.agent import grammar
from edge_agent.errors import Refused


def test_a_missing_peer_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(Refused, match=r"outrider\[bench\]"):
        next(llm.run())


def test_a_row_is_the_median_of_paired_rounds() -> None:
    row = llm._row("call", "s", [0.1, 0.2, 0.1], [0.4, 0.4, 0.4], less=True)
    assert (row["value"], row["peer_value"], row["ratio"], row["n"]) == (0.1, 0.4, 4.0, 3)


def test_the_peers_grammars_are_ones_it_can_read() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    text = llama.gbnf(grammar.build(llm.TOOLS))
    assert text.startswith("root ::= ")
    assert not any(line.split(" ::= ")[0].isupper() for line in text.splitlines())
    assert llama_cpp.LlamaGrammar.from_string(text, verbose=False)
    assert llama.json_form(llm.TOOLS)
