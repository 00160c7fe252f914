"""`outrider models import`: small random checkpoints answer as a numpy forward does; bad files say what would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
from gguf import GGMLQuantizationType as Kind
from onnx import TensorProto, helper
from safetensors.numpy import save_file
from typer.testing import CliRunner

from edge_agent.engines.base import Generate
from edge_agent.engines.choose import profile_of
from edge_agent.engines.genai import GenaiModel
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.wire.bundle import BundleKind, Manifest
from models.cli import app
from models.errors import ModelError
from models.importing import import_model
from models.package import open_bundle

LAYERS, WIDTH, HIDDEN, HEADS, KV, TOKENS, BASE, EPSILON = 2, 64, 96, 4, 2, 288, 10000.0, 1e-5
HEAD = {"llama": 16, "qwen2": 16, "qwen3": 32}
READ = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]
END = "<|endoftext|>"
Tensors = dict[str, np.ndarray]
BYTES = {33 + i: chr(33 + i) for i in range(94)} | {i: chr(i) for i in [*range(161, 173), *range(174, 256)]}
ALPHABET = [BYTES.get(i) or chr(256 + sum(j not in BYTES for j in range(i))) for i in range(256)]
NAMES = [*ALPHABET, "th", END, *(f"<extra {i}>" for i in range(TOKENS - 258))]


def random(family: str, untied: bool = False) -> Tensors:
    """Weights by their GGUF names, queries and keys in half-split order."""
    dice, head = np.random.default_rng(7), HEAD[family]
    query, key = HEADS * head, KV * head
    sizes = {"attn_q": (query, WIDTH), "attn_k": (key, WIDTH), "attn_v": (key, WIDTH), "attn_output": (WIDTH, query)}
    sizes |= {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
    found = {"token_embd.weight": dice.normal(0, 1, (TOKENS, WIDTH)), "output_norm.weight": dice.uniform(0.5, 2, WIDTH)}
    for i in range(LAYERS):
        found |= {f"blk.{i}.{n}.weight": dice.normal(0, 1 / d[1] ** 0.5, d) for n, d in sizes.items()}
        found |= {f"blk.{i}.{n}.weight": dice.uniform(0.5, 2, WIDTH) for n in ("attn_norm", "ffn_norm")}
        if family == "qwen2":
            found |= {f"blk.{i}.attn_{n}.bias": dice.normal(0, 1, sizes[f"attn_{n}"][0]) for n in "qkv"}
        if family == "qwen3":
            found |= {f"blk.{i}.attn_{n}_norm.weight": dice.uniform(0.5, 2, head) for n in "qk"}
    if untied:
        found["output.weight"] = dice.normal(0, 1, (TOKENS, WIDTH))
    return {name: value.astype(np.float32) for name, value in found.items()}


def forward(
    w: Tensors, head: int, pairs: bool = False, stretch: float | np.ndarray = 1.0, tokens: list[int] = READ
) -> np.ndarray:
    """Logits after tokens, written from the papers; `pairs`: the rotary embedding turns neighbours, as llama.cpp's."""

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight

    def turn(x: np.ndarray) -> np.ndarray:
        angle = np.arange(len(x))[:, None, None] / BASE ** (np.arange(0, head, 2) / head) / stretch
        a, b = (x[..., 0::2], x[..., 1::2]) if pairs else (x[..., : head // 2], x[..., head // 2 :])
        one, other = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
        return np.stack([one, other], -1).reshape(x.shape) if pairs else np.concatenate([one, other], -1)

    x, count = w["token_embd.weight"][tokens].astype(np.float64), len(tokens)
    for i in range(LAYERS):
        part = {n.removeprefix(f"blk.{i}."): v for n, v in w.items() if n.startswith(f"blk.{i}.")}
        h = norm(x, part["attn_norm.weight"])
        apart = {n: h @ part[f"attn_{n}.weight"].T + part.get(f"attn_{n}.bias", 0) for n in "qkv"}
        q, k, v = (apart[n].reshape(count, -1, head) for n in "qkv")
        if "attn_q_norm.weight" in part:
            q, k = norm(q, part["attn_q_norm.weight"]), norm(k, part["attn_k_norm.weight"])
        q, k = turn(q), turn(k)
        heads = []
        for n in range(HEADS):
            scores = q[:, n] @ k[:, n * KV // HEADS].T / head**0.5 + np.triu(np.full((count, count), -np.inf), 1)
            chances = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(chances / chances.sum(-1, keepdims=True) @ v[:, n * KV // HEADS])
        x = x + np.concatenate(heads, -1) @ part["attn_output.weight"].T
        h = norm(x, part["ffn_norm.weight"])
        gate = h @ part["ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ part["ffn_up.weight"].T)) @ part["ffn_down.weight"].T
    return norm(x, w["output_norm.weight"])[-1] @ w.get("output.weight", w["token_embd.weight"]).T


def interleaved(name: str, value: np.ndarray) -> np.ndarray:
    """As llama.cpp's converter stores queries and keys."""
    heads = {"attn_q": HEADS, "attn_k": KV}.get(name.split(".")[-2])
    return value if heads is None else value.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(value.shape)


def write_gguf(path: Path, tensors: Tensors, family: str, kind: Kind, pre: str = "llama-bpe") -> Tensors:
    """Write the file; returns what it holds, as float32."""
    writer, held = gguf.GGUFWriter(path, family), Tensors()
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_key_length(HEAD.get(family, 16))
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(NAMES)
    writer.add_token_types([1] * 257 + [3] * (TOKENS - 257))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    for name, value in tensors.items():
        value = interleaved(name, value) if family == "llama" else value
        wide = value.ndim == 2
        raw = gguf.quants.quantize(value, kind) if wide else value
        writer.add_tensor(name, raw, raw_dtype=kind if wide else Kind.F32)
        held[name] = gguf.quants.dequantize(raw, kind) if wide else value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


HF = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
HF |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
HF |= {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj"}
HF |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"} | {f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"}


def write_checkpoint(folder: Path, tensors: Tensors, family: str, dtype: Any, **more: Any) -> Tensors:
    """Write a checkpoint in two files; returns what it holds, as float32."""
    folder.mkdir()
    held = {name: value.astype(dtype) for name, value in tensors.items()}
    own = {}
    for name, value in held.items():
        *front, leaf, end = name.split(".")
        own[".".join(["model.layers", front[1], HF[leaf], end] if front else [HF[leaf], end])] = value
    for number, part in enumerate((list(own)[::2], list(own)[1::2])):
        save_file({name: own[name] for name in part}, folder / f"model-{number}.safetensors")
    config = {"model_type": family, "num_hidden_layers": LAYERS, "hidden_size": WIDTH, "intermediate_size": HIDDEN}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HEAD[family], "vocab_size": TOKENS}
    config |= {"max_position_embeddings": 128, "rms_norm_eps": EPSILON, "eos_token_id": 257, "rope_theta": BASE}
    config |= {"tie_word_embeddings": "output.weight" not in tensors}
    (folder / "config.json").write_text(json.dumps(config | more))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    words = {"type": "BPE", "vocab": {name: i for i, name in enumerate(NAMES)}, "merges": []}
    added = {"id": 257, "content": END, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    document = {"version": "1.0", "added_tokens": [added | {"normalized": False}], "pre_tokenizer": level}
    (folder / "tokenizer.json").write_text(json.dumps(document | {"decoder": level, "model": words}))
    return {name: value.astype(np.float32) for name, value in held.items()}


def answers(bundle: Path) -> np.ndarray:
    params = og.GeneratorParams(model := og.Model(str(bundle / "files")))
    params.set_search_options(max_length=64)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(READ, np.int32))
    return np.array(generator.get_logits()).reshape(-1)


def check(bundle: Path, manifest: Manifest, wanted: np.ndarray, tolerance: float) -> None:
    assert open_bundle(bundle) == manifest
    found = answers(bundle)
    assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted)
    model = GenaiModel(bundle / "files", context=64)
    asked = Generate("", manifest.probe["prompt"], max_tokens=manifest.probe["max_tokens"])
    assert "".join(piece.text for piece in model.generate(asked, lambda: False)) == manifest.probe["text"]
    model.close()


@pytest.mark.parametrize(
    ("family", "kind", "stored"),
    [
        ("llama", Kind.Q4_0, "int4"),
        ("llama", Kind.Q4_1, "int4"),
        ("llama", Kind.Q8_0, "int8"),
        ("llama", Kind.F16, "int8"),
        ("qwen2", Kind.Q4_1, "int4"),
        ("qwen3", Kind.Q8_0, "int8"),
    ],
)
def test_gguf_answers_as_its_own_numbers_do(tmp_path: Path, family: str, kind: Kind, stored: str) -> None:
    pre = "llama-bpe" if family == "llama" else "qwen2"
    held = write_gguf(tmp_path / "m.gguf", random(family), family, kind, pre)
    wanted = forward(held, HEAD[family], pairs=family == "llama")
    manifest = import_model(tmp_path / "m.gguf", "mine", tmp_path / "exact", precision="fp32")
    check(tmp_path / "exact", manifest, wanted, 1e-4)
    manifest = import_model(tmp_path / "m.gguf", "mine", tmp_path / "small", license_="MIT")
    check(tmp_path / "small", manifest, wanted, 0.1)
    assert (list(manifest.precisions), manifest.kind, manifest.license) == ([stored], BundleKind.LLM, "MIT")


@pytest.mark.parametrize(
    ("family", "dtype", "untied"),
    [("llama", np.float32, True), ("qwen2", ml_dtypes.bfloat16, False), ("qwen3", np.float16, True)],
)
def test_safetensors_answer_as_their_own_numbers_do(tmp_path: Path, family: str, dtype: Any, untied: bool) -> None:
    held = write_checkpoint(tmp_path / "m", random(family, untied), family, dtype)
    (tmp_path / "m" / "LICENSE").write_text("free")
    wanted = forward(held, HEAD[family])
    for precision, tolerance in (("fp32", 1e-4), ("int8", 0.1), ("int4", 0.4)):
        manifest = import_model(tmp_path / "m", "mine", tmp_path / precision, precision=precision)
        check(tmp_path / precision, manifest, wanted, tolerance)
        assert (tmp_path / precision / "files" / "LICENSE").read_text() == "free"


def test_frequencies_are_stretched_as_llama_3_says(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    held = write_checkpoint(tmp_path / "m", random("llama"), "llama", np.float32, rope_scaling=rope)
    waves = 2 * np.pi * BASE ** (np.arange(0, 16, 2) / 16)
    middle = 1 / ((1 - (64 / waves - 1) / 3) / 8 + (64 / waves - 1) / 3)
    stretch = np.where(waves < 64 / 4, 1, np.where(waves > 64, 8, middle))
    manifest = import_model(tmp_path / "m", "mine", tmp_path / "out", precision="fp32")
    check(tmp_path / "out", manifest, forward(held, 16, stretch=stretch), 1e-4)


def network(path: Path, op: str = "Relu", domain: str = "", dims: Any = ("rows", 4)) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims)) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], domain=domain)], "g", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 20)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def test_network_is_checked_and_probed_by_the_command(tmp_path: Path) -> None:
    file = network(tmp_path / "Net.onnx")
    command = ["import", str(file), "--out", str(tmp_path / "b"), "--shape", "x=2x4", "--version", "3", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    manifest = open_bundle(tmp_path / "b")
    assert (manifest.name, manifest.version, manifest.kind) == ("net", "3", BundleKind.ONNX)
    assert manifest.inputs == [{"name": "x", "dtype": "float32", "shape": [-1, 4]}]
    assert json.loads(done.stdout)["digest"] == manifest.meta["content_digest"]
    command = ["import", str(tmp_path / "absent"), "--out", str(tmp_path / "c"), "--json"]
    told = json.loads(CliRunner().invoke(app, command).stdout)
    assert "no model that can be imported" in told["error"]
    assert ".safetensors" in told["hint"]


def test_ranges_of_free_dimensions_come_with_the_bundle(tmp_path: Path) -> None:
    net = network(tmp_path / "m.onnx")
    import_model(net, "net", tmp_path / "b", profile="x=1x4:2x4:8x4")
    files = tmp_path / "b" / "files"
    assert profile_of(files, OnnxNetwork(files)) == {"x": ((1, 4), (2, 4), (8, 4))}
    for profile, why in (
        ("y=1x4:2x4:8x4", "names y"),
        ("x=1x4:2x4:8x5", "for .-1, 4."),
        ("x=2x4:1x4:8x4", "for .-1, 4."),
        ("x=1x4x1:2x4x1:8x4x1", "for .-1, 4."),
    ):
        with pytest.raises(ModelError, match=why):
            import_model(net, "net", tmp_path / "bad", profile=profile)


def refusal(path: Path, out: Path, **more: Any) -> str:
    with pytest.raises(ModelError) as caught:
        import_model(path, "mine", out / "bundle", **more)
    assert not (out / "bundle").exists()
    assert not list(out.glob(".mine-*"))
    return str(caught.value)


def test_network_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    assert "not an ONNX model" in refusal(tmp_path / "text.onnx", tmp_path)
    file = network(tmp_path / "free.onnx")
    assert "--shape x=" in refusal(file, tmp_path)
    assert "--shape x=" in refusal(file, tmp_path, shapes="x=2x5")
    assert "no input z" in refusal(file, tmp_path, shapes="x=2x4,z=1")
    assert "makes no sense" in refusal(file, tmp_path, shapes="x=two")
    file = network(tmp_path / "strange.onnx", "Nonsense", "com.example")
    assert "com.example.Nonsense" in refusal(file, tmp_path, shapes="x=2x4")


def test_gguf_that_cannot_be_used_says_what_would_do(tmp_path: Path) -> None:
    file, whole = tmp_path / "m.gguf", random("llama")
    file.write_bytes(b"not a model" * 100)
    assert "fetch it again" in refusal(file, tmp_path)
    write_gguf(file, whole, "llama", Kind.Q4_0)
    file.write_bytes(file.read_bytes()[:-5000])
    assert "fetch it again" in refusal(file, tmp_path)
    write_gguf(file, whole, "gemma", Kind.Q4_0)
    assert "converted are llama, qwen2, qwen3" in refusal(file, tmp_path)
    write_gguf(file, whole, "llama", Kind.Q5_0)
    said = refusal(file, tmp_path)
    assert "stored as Q5_0" in said
    assert "Q4_0, Q4_1, Q8_0, F16" in said
    write_gguf(file, whole, "llama", Kind.Q4_0, "deepseek-llm")
    assert "the safetensors checkpoint" in refusal(file, tmp_path)
    write_gguf(file, whole | {"blk.1.attn_k.weight": whole["blk.1.attn_v.weight"][:16]}, "llama", Kind.Q4_0)
    assert "blk.1.attn_k.weight is [16, 64], the configuration says [32, 64]" in refusal(file, tmp_path)
    write_gguf(file, whole, "llama", Kind.Q4_0)
    assert "int4, int8" in refusal(file, tmp_path, precision="int3").replace("int8, int4", "int4, int8")


def test_checkpoint_that_cannot_be_used_says_what_would_do(tmp_path: Path) -> None:
    whole, folder = random("llama"), tmp_path / "m"
    write_checkpoint(folder, whole, "llama", np.float32, hidden_size=96)
    assert "the configuration says [64, 96]" in refusal(folder, tmp_path)
    good = json.loads((folder / "config.json").read_text()) | {"hidden_size": WIDTH}
    for change, why in [
        ({"model_type": "gemma"}, "converted are llama, qwen2, qwen3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "default or llama3"),
        ({"num_hidden_layers": 3}, "blk.2.attn_q.weight is missing"),
        ({"hidden_size": "wide"}, "config.json of m"),
    ]:
        (folder / "config.json").write_text(json.dumps(good | change))
        assert why in refusal(folder, tmp_path)
    (folder / "config.json").write_text(json.dumps(good))
    (folder / "tokenizer.json").rename(tmp_path / "kept")
    assert "tokenizer.json of the same checkpoint belongs beside" in refusal(folder, tmp_path)
    (tmp_path / "kept").rename(folder / "tokenizer.json")
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be read" in refusal(folder, tmp_path)
    (folder / "config.json").unlink()
    assert "config.json of the same checkpoint belongs beside" in refusal(folder, tmp_path)
