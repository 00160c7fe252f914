"""Recipes of language models: perplexity as numpy computes it, a gate in per cent of it, bundles that answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.engines.base import Generate
from edge_agent.engines.genai import GenaiModel
from edge_agent.wire.bundle import content_digest, scan
from models import recipe as recipes
from models.errors import ModelError
from models.language import measured, prose
from models.package import build, open_bundle
from models.safetensors_weights import SafetensorsWeights
from tests.models import test_import as small

SPEED = {"prompt": [8], "decode": [4]}


def test_prose_is_english_sentences_enough_for_the_recipe() -> None:
    text = prose()
    assert len(text.split()) > 4000
    assert ">>>" not in text
    assert text == prose()


def test_perplexity_is_that_of_numpy(tmp_path: Path) -> None:
    held = small.write_checkpoint(tmp_path / "m", small.random("llama"), "llama", np.float32)
    made, rows = measured(SafetensorsWeights(tmp_path / "m"), tmp_path / "work", 48, SPEED, lambda *_: None)
    tokens = [small.NAMES.index(small.ALPHABET[byte]) for byte in prose().encode()[:48]]
    losses = []
    for end in range(1, 48):
        logits = small.forward(held, 16, tokens=tokens[:end])
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[end]])
    assert rows["fp32"]["value"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert rows["fp32"]["top_1_of_fp32"] == 1
    assert rows["int8"]["value"] == pytest.approx(rows["fp32"]["value"], rel=0.2)
    assert list(made) == list(rows) == ["fp32", "int8", "int4"]
    assert rows["int8"]["bytes"] == sum(entry.size for entry in scan(made["int8"]))
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in rows.values())


def test_gate_judges_perplexity_in_per_cent() -> None:
    recipe, fp32 = recipes.read("smollm2"), {"metric": "perplexity", "value": 20.0, "of_fp32": 1.0}
    assert recipes.judge(recipe, "int4", fp32 | {"value": 20.39, "of_fp32": 0.2}, fp32) == []
    worse = recipes.judge(recipe, "int4", fp32 | {"value": 20.5, "of_fp32": 0.2}, fp32)
    assert worse == ["perplexity is 2.50 % above fp32, the budget is 2"]
    assert recipes.judge(recipe, "int8", fp32 | {"value": 19.0, "of_fp32": 0.3}, fp32) == []


@pytest.mark.parametrize(
    ("line", "why"),
    [("task = 'labels'", "is not known"), ("speed = {x = [1]}", "counts of tokens"), ("budget = {fp16 = 1}", "fp16")],
)
def test_recipe_of_a_language_model_that_makes_no_sense_is_refused(tmp_path: Path, line: str, why: str) -> None:
    given = {"name": "'r'", "source": "'smollm2'", "task": "'prose'", "evaluation": "100", "budget": "{int8 = 1}"}
    given |= {"speed": "{prompt = [16], decode = [4]}"} | dict([line.split(" = ", 1)])
    (tmp_path / "r.toml").write_text("\n".join(f"{name} = {value}" for name, value in given.items()))
    with pytest.raises(ModelError, match=why):
        recipes.read(str(tmp_path / "r.toml"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shipped_recipe_makes_bundles_that_answer(model_cache: Path, tmp_path: Path) -> None:
    result: dict[str, Any] = recipes.run(recipes.read("smollm2"), model_cache, tmp_path / "out", samples=200)
    rows = result["precisions"]
    assert rows["fp32"]["value"] < 60
    assert rows["int4"]["of_fp32"] < 0.25
    for name in rows:
        bundle = tmp_path / "out" / "bundles" / name
        manifest = open_bundle(bundle)
        model = GenaiModel(bundle / "files")
        asked = Generate("", manifest.probe["prompt"], max_tokens=manifest.probe["max_tokens"])
        assert "".join(piece.text for piece in model.generate(asked, lambda: False)) == manifest.probe["text"]
        model.close()
        assert (bundle / "files" / "LICENSE").is_file()
    exact = content_digest(scan(tmp_path / "out" / "bundles" / "int4" / "files"))
    assert exact == content_digest(scan(build("smollm2", model_cache)))
