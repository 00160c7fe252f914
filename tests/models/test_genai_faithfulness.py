"""The promise of the conversion: the model says what float32 of the same weights says."""

from pathlib import Path

import pytest

from tests.models.faithfulness import PROMPTS, measure


@pytest.mark.slow
def test_top_token_agrees_with_float32_of_the_same_weights(
    smollm2_gguf: Path, smollm2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measure(smollm2_gguf, smollm2_folder)
    with capsys.disabled():
        print(
            f"\nfaithfulness: {found.decode:.1%} of {found.positions} positions token by token, "
            f"{found.prefill:.1%} of {found.prefill_positions} in fours; model folder {found.digest}"
        )
    assert len(PROMPTS) == 20
    assert found.positions >= 700
    assert found.decode >= 0.94
    assert found.prefill >= 0.92  # a quarter of the positions: two points of slack for the smaller sample
