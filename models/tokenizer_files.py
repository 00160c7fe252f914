"""Tokenizer files (Hugging Face layout) from the vocabulary inside a GGUF file.

Invariant: texts encode to the ids that llama.cpp gives for the same file. The `smollm` pre-tokenizer splits every
digit, then splits words as GPT-2 does (llama.cpp: llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM).
"""

from __future__ import annotations

from typing import Any

from models.gguf_weights import GgufWeights, UnsupportedModel

_CONTROL = 3  # gguf.TokenType.CONTROL


def tokenizer_files(weights: GgufWeights) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json as documents. Raises UnsupportedModel for other tokenizers."""
    kind = (weights.meta("tokenizer.ggml.model"), weights.meta("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise UnsupportedModel(f"tokenizer {kind[0]}/{kind[1]} is not converted; only gpt2/smollm is")
    tokens: list[str] = weights.meta("tokenizer.ggml.tokens")
    types: list[int] = weights.meta("tokenizer.ggml.token_type")
    merges: list[str] = weights.meta("tokenizer.ggml.merges")
    special = [(i, token) for i, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ == _CONTROL]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }

    def named(role: str) -> str:
        return tokens[int(weights.meta(f"tokenizer.ggml.{role}_token_id"))]

    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in special},
        "bos_token": named("bos"),
        "eos_token": named("eos"),
        "unk_token": named("unknown"),
        "pad_token": named("padding"),
        "chat_template": weights.meta("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": weights.shape.context,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
