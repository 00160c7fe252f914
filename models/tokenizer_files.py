"""Tokenizer files (Hugging Face layout) from the vocabulary inside a GGUF file.

Invariant: texts encode to the ids that llama.cpp gives for the same file (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_…).
"""

from __future__ import annotations

from typing import Any

from gguf import TokenType

from models.gguf_weights import GgufWeights, UnsupportedModel

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": _WORDS % digits}, "behavior": "Isolated", "invert": False}


_PRE = {
    "smollm": {"type": "Digits", "individual_digits": True},
    "llama-bpe": _split("{1,3}"),
    "qwen2": _split(""),
}


def tokenizer_files(weights: GgufWeights) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json as documents. Raises UnsupportedModel for other tokenizers."""
    kind = (weights.meta("tokenizer.ggml.model"), weights.meta("tokenizer.ggml.pre"))
    if kind[0] != "gpt2" or kind[1] not in _PRE:
        hint = f"gpt2 with {', '.join(_PRE)}; of other models import the safetensors checkpoint, which has its own"
        raise UnsupportedModel(f"the tokenizer {kind[0]}/{kind[1]} is not converted", hint)
    tokens: list[str] = weights.meta("tokenizer.ggml.tokens")
    types: list[int] = weights.meta("tokenizer.ggml.token_type")
    merges: list[str] = weights.meta("tokenizer.ggml.merges")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {
        i: {"content": token, **flags, "special": type_ == TokenType.CONTROL}
        for i, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ in (TokenType.CONTROL, TokenType.USER_DEFINED)
    }
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pre = whole | {"use_regex": kind[1] == "smollm"}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added.items()],
        "normalizer": {"type": "NFC"} if kind[1] == "qwen2" else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [_PRE[kind[1]], pre],
        },
        "post_processor": None,
        "decoder": whole,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            **({"ignore_merges": True} if kind[1] == "llama-bpe" else {}),
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }

    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
    }
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := weights.meta(f"tokenizer.ggml.{name}_token_id", -1)) >= 0:
            config[f"{role}_token"] = tokens[int(token)]
    config |= {"chat_template": weights.meta("tokenizer.chat_template", "")}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": weights.shape.context}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
