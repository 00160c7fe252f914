"""The tokenizer built from the GGUF file reads texts as llama.cpp does."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLTokenizer

GOLDEN = json.loads((Path(__file__).parent / "smollm2_tokens.json").read_text())
MISSING = "\x04\x06\x13\x14\x16\x1d"


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder: Path) -> LLTokenizer:
    return LLTokenizer(str(smollm2_folder / "tokenizer.json"), n_vocab=49152, eos_token=2)


def test_texts_have_the_ids_that_llama_cpp_gives(tokenizer: LLTokenizer) -> None:
    """smollm2_tokens.json was written by llama-cpp-python 0.3.36: digits, Unicode, white space, special tokens."""
    for case in GOLDEN:
        assert tokenizer.tokenize_str(case["text"], parse_special=True) == case["ids"], case["text"]


def test_any_text_comes_back(tokenizer: LLTokenizer) -> None:
    # the model's vocabulary has no token for the bytes F1 and F2 (planes from U+40000) and six control characters
    @given(st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters=MISSING)))
    def comes_back(text: str) -> None:
        assert tokenizer.decode_bytes(tokenizer.tokenize_str(text)) == text.encode()

    comes_back()


def test_the_chat_template_and_special_tokens_are_the_models_own(smollm2_folder: Path) -> None:
    config = json.loads((smollm2_folder / "tokenizer_config.json").read_text())
    assert "<|im_start|>" in config["chat_template"]
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
