"""What training predicts: right assistant turns, each in its own conversation."""

import itertools

import numpy as np

from models.toolcaller.packing import Conversation, conversation, rows

TEXT = (
    "<|im_start|>system\nTools.<|im_end|>\n<|im_start|>user\nstop it<|im_end|>\n"
    "<|im_start|>assistant\nbad()<|im_end|>\n"
    "<|im_start|>tool\nerror: no such line<|im_end|>\n<|im_start|>assistant\ngood()<|im_end|>\n"
    "<|im_start|>tool\nok<|im_end|>\n<|im_start|>assistant\nnone()"
)


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_right_turns_are_learned_with_their_end_and_a_turn_that_failed_is_not() -> None:
    item = conversation(TEXT, characters)
    learned = "".join(chr(t) for t, learn in zip(item.tokens, item.learned, strict=True) if learn)
    assert learned == "good()<|im_end|>none()<|im_end|>"
    assert "".join(map(chr, item.tokens)) == TEXT + "<|im_end|>"


def test_a_token_reads_its_own_conversation_and_nothing_after_it() -> None:
    items = [Conversation([1, 2, 3], [False, True, True]), Conversation([4, 5], [False, True])]
    (row,) = rows(items, 8)
    assert row.positions == [0, 1, 2, 0, 1]
    assert [(row.tokens[at], target) for at, target in zip(row.at, row.target, strict=True)] == [(1, 2), (2, 3), (4, 5)]
    assert row.mask().astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip


def test_rows_keep_the_order_and_the_length_and_leave_out_what_is_too_long() -> None:
    items = [Conversation([n] * n, [True] * n) for n in (3, 3, 9, 2, 5)]
    packed = list(rows(items, 8))
    assert list(itertools.chain.from_iterable(row.tokens for row in packed)) == [3] * 6 + [2] * 2 + [5] * 5
    assert all(len(row.tokens) <= 8 and np.diag(row.mask()).all() for row in packed)
