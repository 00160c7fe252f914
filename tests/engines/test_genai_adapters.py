"""Adapters beside the exact weights: what they compute, switching, bounds, refusals; two layers of the real model."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edge_agent.engines.adapters import read_adapter, read_arrays
from edge_agent.engines.base import Generate, Piece
from edge_agent.engines.genai import GenaiModel
from edge_agent.errors import Refused, Retry
from edge_agent.wire.bundle import content_digest, scan
from models.errors import ModelError
from models.genai_build import write_genai_folder
from models.gguf_weights import GgufWeights
from models.toolcaller.adapter import rounded, write_adapter
from models.toolcaller.merge import MergedWeights
from tests.models.faithfulness import Reference, Sequence

SHAPES = {
    "attn_q": (576, 576),
    "attn_k": (192, 576),
    "attn_v": (192, 576),
    "attn_output": (576, 576),
    "ffn_gate": (1536, 576),
    "ffn_up": (1536, 576),
    "ffn_down": (576, 1536),
}
TOKENS = [504, 1575, 1197, 314, 253, 4180, 282, 260, 3575]


def two_layers(weights: GgufWeights) -> GgufWeights:
    weights.shape = dataclasses.replace(weights.shape, layers=2)
    return weights


def trained(run: Path, seed: int = 1, rank: int = 4) -> Path:
    """A run's folder as training leaves it, its adapter large enough to say something else."""
    run.mkdir()
    random, arrays = np.random.default_rng(seed), {}
    for layer in range(2):
        for name, (rows, columns) in SHAPES.items():
            a, b = random.normal(size=(rank, columns)) / 24, random.normal(size=(rows, rank)) / 4
            arrays |= {f"layers.{layer}.{name}.a": a, f"layers.{layer}.{name}.b": b}
    np.savez(run / "adapter.npz", **{name: value.astype(np.float16) for name, value in arrays.items()})
    (run / "plan.json").write_text(json.dumps({"alpha": 2.0 * rank, "rank": rank}))
    return run


def folder(out: Path, base: Path, **more: int) -> Path:
    write_adapter(trained(out.with_name(out.name + "-run"), **more), out, content_digest(scan(base)))
    return out


@pytest.fixture(scope="module")
def weights(smollm2_gguf: Path) -> GgufWeights:
    return two_layers(GgufWeights(smollm2_gguf))


@pytest.fixture(scope="module")
def bases(weights: GgufWeights, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("base")
    for bits in (4, 8, 32):
        write_genai_folder(weights, root / str(bits), bits=bits)
    return {bits: root / str(bits) for bits in (4, 8, 32)}


@pytest.fixture(scope="module")
def wanted(smollm2_gguf: Path, weights: GgufWeights, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Logits in NumPy float32: of the base, and with W + scale * B A of the adapter that ships."""
    root = tmp_path_factory.mktemp("wanted")
    write_adapter(trained(root / "run"), root, "")
    merged = two_layers(MergedWeights(smollm2_gguf, root))
    return {name: Reference(w).extend([Sequence(TOKENS)])[-1] for name, w in (("", weights), ("site", merged))}


@pytest.fixture
def model(bases: dict[int, Path]) -> GenaiModel:
    return GenaiModel(bases[4], context=256, adapters=3)


def logits(model: GenaiModel, adapter: str) -> np.ndarray:
    cache = model._new_cache(adapter)
    cache.generator.append_tokens(np.array(TOKENS, np.int32))
    return np.array(cache.generator.get_logits()).reshape(-1)


def say(model: GenaiModel, adapter: str = "", prompt: str = "The machine is") -> str:
    request = Generate("", prompt, max_tokens=8, adapter=adapter)
    return "".join(piece.text for piece in model.generate(request, lambda: False))


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-4), (4, 0.1), (8, 0.1)])
def test_an_adapter_is_added_to_the_weights(
    bases: dict[int, Path], wanted: dict[str, np.ndarray], tmp_path: Path, bits: int, tolerance: float
) -> None:
    model = GenaiModel(bases[bits], context=64)
    model.load_adapter("site", folder(tmp_path / "site", bases[bits]))
    change = np.linalg.norm(wanted["site"] - wanted[""])
    for name in ("site", ""):
        assert np.linalg.norm(logits(model, name) - wanted[name]) < tolerance * change


def test_each_request_has_its_own_and_none_is_the_default(
    bases: dict[int, Path], model: GenaiModel, tmp_path: Path
) -> None:
    plain, exact = say(model), logits(model, "")
    for seed, name in enumerate(("one", "two")):
        model.load_adapter(name, folder(tmp_path / name, bases[4], seed=seed, rank=4 + seed))
    said = {name: say(model, name) for name in ("", "one", "two")}
    assert len(set(said.values())) == 3
    for name in ("one", "", "two", "", "two", "one", "one"):
        assert say(model, name) == said[name]
    assert said[""] == plain
    assert np.array_equal(logits(model, ""), exact)
    model.load_adapter("one", tmp_path / "two")
    assert say(model, "one") == said["two"]
    assert len(model._caches) <= 2


def test_unloading_frees_it_with_its_caches(bases: dict[int, Path], model: GenaiModel, tmp_path: Path) -> None:
    site = folder(tmp_path / "site", bases[4])
    for name in "abc":
        model.load_adapter(name, site)
    with pytest.raises(Refused, match="beside 3 adapters"):
        model.load_adapter("d", site)
    half = model.generate(Generate("", "The", max_tokens=50, adapter="a"), lambda: False)
    next(half)
    with pytest.raises(Retry, match="in use"):
        model.unload_adapter("a")
    half.close()
    for name in "abc":
        say(model, name)
        model.unload_adapter(name)
        with pytest.raises(Refused, match=f"no adapter '{name}'"):
            say(model, name)
    assert not model._caches
    assert "onnx_adapter" not in Path("/proc/self/maps").read_text()
    with pytest.raises(Refused, match="no adapter 'a'"):
        model.unload_adapter("a")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: (f / "adapter.json").unlink(), "no whole adapter"),
        (lambda f: (f / "adapter.json").write_text('{"format": 2, "base": "", "scale": 1}'), "format is 2"),
        (lambda f: (f / "adapter.npz").unlink(), "no whole adapter"),
        (lambda f: (f / "adapter.npz").write_bytes(b"PK"), "no whole adapter"),
        (lambda f: (f / "adapter.npz").write_bytes((f / "adapter.npz").read_bytes()[:-3000]), "no whole adapter"),
        (lambda f: flip(f / "adapter.npz", 5000), "damaged"),
        (lambda f: change(f, lambda a: a.pop("layers.1.attn_k.a")), r"layers\.1\.attn_k\.a"),
        (lambda f: change(f, lambda a: a.pop("layers.1.ffn_up.b.scale")), r"layers\.1\.ffn_up\.b\.scale"),
        (lambda f: change(f, lambda a: a.update({"layers.1.head.a": np.zeros((4, 4))})), "which no layer has"),
        (lambda f: change(f, lambda a: a.update({"layers.1.attn_q.a": np.zeros((3, 576))})), "ranks"),
        (lambda f: change(f, lambda a: a.update({"layers.1.attn_q.a": np.zeros((4, 575))})), "no whole adapter"),
        (lambda f: change(f, lambda a: a.update({"layers.1.attn_output.a": np.zeros((4, 575))})), "does not fit"),
        (lambda f: change(f, lambda a: a.update({"layers.1.ffn_down.b": np.zeros((575, 4))})), "does not fit"),
        (lambda f: change(f, lambda a: a.update({"layers.1.attn_q.b": np.full((576, 4), np.inf)})), "too large"),
        (lambda f: change(f, lambda a: [a.update({n.replace("s.1", "s.9"): a.pop(n)}) for n in [*a]]), "does not fit"),
        (lambda f: change(f, lambda a: a.clear()), "empty"),
        (
            lambda f: (f / "adapter.json").write_text('{"format": 1, "base": "beef", "scale": 1}'),
            "digest beef, this is",
        ),
        (lambda f: about(f, logit_bias={"none": 101.0}), "by up to 100"),
        (lambda f: about(f, logit_bias={"": 1.0}), "logit_bias"),
        (lambda f: about(f, logit_bias={f"word{n}": 1.0 for n in range(17)}), "up to 16 words"),
        (lambda f: about(f, logit_bias={"none": "much"}), "no whole adapter"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_one_before_stays(
    bases: dict[int, Path],
    shared: tuple[GenaiModel, str],
    tmp_path: Path,
    spoil: object,
    match: str,
) -> None:
    model, said = shared
    bad = folder(tmp_path / "bad", bases[4], seed=5)
    spoil(bad)
    with pytest.raises(Refused, match=match) as refused:
        model.load_adapter("site", bad)
    assert refused.value.hint
    assert say(model, "site") == said


@pytest.fixture(scope="module")
def shared(bases: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[GenaiModel, str]:
    model = GenaiModel(bases[4], context=256)
    model.load_adapter("site", folder(tmp_path_factory.mktemp("shared") / "site", bases[4]))
    return model, say(model, "site")


def test_a_bias_tips_the_first_word_under_a_grammar_and_nothing_else(
    bases: dict[int, Path], model: GenaiModel, tmp_path: Path
) -> None:
    asked = Generate("", "The machine is", 'start: "halt none" | "none halt" | "go none halt"', 8, adapter="site")
    plain, said = say(model, "", asked.prompt), dict[str, list[Piece]]()
    for word in ("halt", "none", "go", ""):
        site = folder(tmp_path / (word or "plain"), bases[4])
        about(site, logit_bias={word: 60.0} if word else {})
        model.load_adapter("site", site)
        said[word] = list(model.generate(asked, lambda: False))
        assert say(model, "site", asked.prompt) != plain  # without a grammar: as the adapter's matrices say
    texts = {word: "".join(piece.text for piece in pieces) for word, pieces in said.items()}
    assert texts == {"halt": "halt none", "none": "none halt", "go": "go none halt", "": texts[""]}
    assert said["halt"][-1].probability > 0.99 >= said[""][-1].probability
    free = {say(model, "site", asked.prompt)}
    about(site, logit_bias={"none": 60.0})
    model.load_adapter("site", site)
    assert {say(model, "site", asked.prompt)} == free
    model.unload_adapter("site")
    assert not model._bias


def about(folder: Path, **more: object) -> None:
    file = folder / "adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def change(folder: Path, what: object) -> None:
    with np.load(folder / "adapter.npz") as file:
        arrays = {name: file[name] for name in file.files}
    what(arrays)
    np.savez(folder / "adapter.npz", **arrays)


def test_what_ships_is_the_same_each_time_and_close_to_what_was_trained(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", rank=16)
    first, second = (write_adapter(run, tmp_path / name, "0" * 64) for name in "ab")
    assert first == second
    about = json.loads((tmp_path / "a" / "adapter.json").read_text())
    assert about == {"format": 1, "base": "0" * 64, "rank": 16, "scale": 2.0, "prompt": "signatures"}
    assert (tmp_path / "a" / "adapter.npz").stat().st_size < 5.2e6 / 15  # two of thirty layers
    with np.load(run / "adapter.npz") as was:
        a, b = (was[f"layers.0.attn_output.{part}"].astype(np.float32) for part in "ab")
    parameters, _ = read_adapter(tmp_path / "a", "0" * 64)
    product = parameters["blk.0.attn_output.a"] @ parameters["blk.0.attn_output.b"]
    wanted = 2.0 * (b @ a).T
    assert np.linalg.norm(product - wanted) < 0.015 * np.linalg.norm(wanted)
    assert rounded(np.zeros((4, 8), np.float32), 1)[0].any() == 0


def test_a_run_that_has_no_adapter_does_not_ship(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a training run"):
        write_adapter(tmp_path, tmp_path / "out", "0" * 64)
    (tmp_path / "plan.json").write_text('{"alpha": 32, "rank": 16}')
    np.savez(tmp_path / "adapter.npz", **{"layers.0.attn_q.weight": np.zeros((4, 4), np.float16)})
    with pytest.raises(ModelError, match="a full run"):
        write_adapter(tmp_path, tmp_path / "out", "0" * 64)
    assert not (tmp_path / "out").exists()


def test_of_several_runs_the_mean_ships_and_only_of_one_form(tmp_path: Path) -> None:
    one, two, odd = trained(tmp_path / "one"), trained(tmp_path / "two"), trained(tmp_path / "odd", rank=2)
    change(two, lambda arrays: arrays.update({name: value * 3 for name, value in arrays.items()}))
    write_adapter(two, tmp_path / "shipped", "0" * 64)
    write_adapter(one, tmp_path / "mean", "0" * 64, None, two, tmp_path / "shipped")
    wanted, made = read_arrays(one / "adapter.npz"), read_arrays(tmp_path / "mean" / "adapter.npz")
    for name, value in wanted.items():
        assert np.abs(made[name] - value * 7 / 3).max() <= 0.02 * np.abs(value).max()
    with pytest.raises(ModelError, match=r"odd and .*one are not of one form"):
        write_adapter(one, tmp_path / "out", "0" * 64, None, odd)
    assert not (tmp_path / "out").exists()
