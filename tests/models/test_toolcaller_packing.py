"""What training predicts: right assistant turns, each in its own conversation, what is shared only once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.toolcaller.packing import Conversation, Row, conversation, rows

TEXT = (
    "<|im_start|>system\nTools.<|im_end|>\n<|im_start|>user\nstop it<|im_end|>\n"
    "<|im_start|>assistant\nbad()<|im_end|>\n"
    "<|im_start|>tool\nerror: no such line<|im_end|>\n<|im_start|>assistant\ngood()<|im_end|>\n"
    "<|im_start|>tool\nok<|im_end|>\n<|im_start|>assistant\nnone()"
)


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def read_by(row: Row, index: int) -> list[int]:
    """The tokens that a token of the row reads, in the order of their positions."""
    seen = np.flatnonzero(row.mask()[index])
    return [row.tokens[i] for i in sorted(seen, key=lambda i: row.positions[i])]


def test_right_turns_are_learned_with_their_end_and_a_turn_that_failed_is_not() -> None:
    item = conversation(TEXT, characters)
    learned = "".join(chr(t) for t, learn in zip(item.tokens, item.learned, strict=True) if learn)
    assert learned == "good()<|im_end|>none()<|im_end|>"
    assert "".join(map(chr, item.tokens)) == TEXT + "<|im_end|>"


def test_what_a_bunch_shares_is_in_the_row_once_and_read_by_all_of_it() -> None:
    bunch = [Conversation([1, 2, 3, 4], [False, True, True, True]), Conversation([1, 2, 5], [False, True, True])]
    other = [Conversation([6, 7], [False, True])]
    (row,) = rows([bunch, other], 16)
    assert row.tokens == [1, 2, 3, 4, 5, 6, 7]
    assert row.positions == [0, 1, 2, 3, 2, 0, 1]
    pairs = [(row.tokens[at], target) for at, target in zip(row.at, row.target, strict=True)]
    assert pairs == [(1, 2), (2, 3), (3, 4), (2, 5), (6, 7)]
    assert [read_by(row, i) for i in range(7)] == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 5], [6], [6, 7]]


tokens = st.lists(st.integers(1, 3), min_size=2, max_size=9)


@given(st.lists(st.lists(tokens, min_size=1, max_size=4), max_size=5))
def test_a_row_trains_what_its_conversations_would_train_alone(texts: list[list[list[int]]]) -> None:
    """Every learned token is predicted by the token before it, which reads exactly its own conversation up to there."""
    bunches = [[Conversation(text, [i > 0 for i in range(len(text))]) for text in bunch] for bunch in texts]
    packed = list(rows(bunches, 8))
    found = {(*read_by(row, at), target) for row in packed for at, target in zip(row.at, row.target, strict=True)}
    assert found == {tuple(t[: i + 1]) for bunch in texts for t in bunch if len(t) <= 8 for i in range(1, len(t))}
    assert all(len(row.tokens) <= 8 for row in packed)
    for row in packed:
        for at in range(len(row.tokens)):
            assert len(read_by(row, at)) == row.positions[at] + 1
