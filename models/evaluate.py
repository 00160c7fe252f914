"""How well a network or a language model answers: measures by what the answers are, on made or given data.

Invariants: a model is asked through the engine that serves it; data without truths, a measure that does not fit the
data and answers that do not fit the truths are ModelErrors, never a number. Given data is .npz files as for calibration
(quantize.py) with the truths beside the inputs:

    truth          integers, a class a sample | booleans, yes or no a sample or score | text, what there is to read
    truth_boxes    (n, 4) as x0 y0 x1 y1, with truth_classes (n,): what is in one picture, a file a picture
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.engines.onnxruntime import OnnxNetwork, model_file
from edge_agent.errors import OutriderError
from models import metrics, tasks
from models.errors import ModelError
from models.fetch import Progress, quiet
from models.golden import arrays, tensors
from models.inspect import inspect, network
from models.objects import found
from models.quantize import MAX_FEEDS, Feeds, check, layer_errors, samples, simplify
from models.tasks import TASKS, Array

PROSE = "prose"
PROBED = 8  # feeds kept for the comparison of layers


@dataclass(frozen=True)
class How:
    """F-beta's weight of recall, the score from which an answer counts, the output to read (empty: the only one)."""

    beta: float = 1.0
    threshold: float = 0.5
    output: str = ""


Measure = Callable[[list[Any], list[Any], How], float]
Counting = Callable[[list[Any], list[Any], How], list[metrics.Counts]]


def _rates(count: Counting) -> dict[str, Measure]:
    """Means over the classes that are counted apart."""
    return {
        "precision": lambda a, t, how: float(np.mean([c.precision() for c in count(a, t, how)])),
        "recall": lambda a, t, how: float(np.mean([c.recall() for c in count(a, t, how)])),
        "f-beta": lambda a, t, how: float(np.mean([c.f_beta(how.beta) for c in count(a, t, how)])),
    }


def _by_class(answers: list[Any], truths: list[Any], _: How) -> list[metrics.Counts]:
    a, t = np.asarray(answers), np.asarray(truths)
    return [metrics.counts(a == c, t == c) for c in np.unique(t)]


def _chosen(answers: list[Any], truths: list[Any], how: How) -> list[metrics.Counts]:
    return [metrics.counts(np.asarray(answers) >= how.threshold, truths)]


def _sure(answers: list[Any], truths: list[Any], how: How) -> list[metrics.Counts]:
    """Boxes of a class against those of that class: classes are moved apart so that they never overlap."""
    far = [np.asarray(b, float).reshape(-1, 4)[s := np.asarray(p) >= how.threshold] + 1e6 * np.asarray(c)[s][:, None]
           for b, p, c in answers]  # fmt: skip
    there = [np.asarray(b, float).reshape(-1, 4) + 1e6 * np.asarray(c).reshape(-1, 1) for b, c in truths]
    return [metrics.box_counts(far, there)]


MEASURES: dict[str, dict[str, Measure]] = {
    "classes": {"top-1": lambda a, t, _: metrics.agreement(a, t), **_rates(_by_class)},
    "chances": {"auc": lambda a, t, _: metrics.auc(a, t), **_rates(_chosen)},
    "texts": {"cer": lambda a, t, _: metrics.character_error_rate(a, t)},
    "regions": _rates(lambda a, t, _: [metrics.box_counts(a, t)]),
    "objects": {
        "map-50": lambda a, t, _: metrics.mean_average_precision(a, t),
        "map-50-95": lambda a, t, _: metrics.mean_average_precision_to_95(a, t),
        **_rates(_sure),
    },
    "tokens": {"perplexity": lambda a, _, __: metrics.perplexity(a)},
}
"""By what the answers are and by name."""
KINDS = {
    "labels": "texts", "scenes": "regions", "objects": "objects", "digits": "classes", "photographs": "classes",
    "speech": "chances",
}  # fmt: skip
_HINT = f"made data is for the recipes' networks ({', '.join(TASKS)}); give your own as .npz files"


@dataclass
class Answers:
    """What a model said, what is true, and the first inputs it was asked with."""

    kind: str
    said: list[Any] = field(default_factory=list)
    truths: list[Any] = field(default_factory=list)
    kept: list[Feeds] = field(default_factory=list)


def evaluate(
    model: Path,
    data: str,
    wanted: Sequence[str] = (),
    how: How | None = None,
    fp32: Path | None = None,
    per_layer: bool = False,
    count: int = 0,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Measures of `model`, and of `fp32` beside it, on a task of models/tasks.py, `prose`, or files. Raises ModelError.

    `count`: at most so many samples (tokens of text), 0 for 1,000 of what is made and for all that is given.
    """
    how, files = how or How(), {"value": model} | ({"fp32": fp32} if fp32 else {})
    if how.beta < 0:
        raise ModelError(f"beta is {how.beta:g}", "0 or more: 1 counts precision and recall alike, 2 recall twice")
    if per_layer and fp32 is None:
        raise ModelError("layers are compared with those of the FP32 network", "--fp32 FILE")
    answers: dict[str, Answers] = {}
    for name, file in files.items():
        answers[name] = _asked(opened(file), data, how, count, lambda *p, n=file.name: progress(f"{n}: {p[0]}", *p[1:]))
    first = answers["value"]
    if data in TASKS and TASKS[data].truth == "fp32":
        if fp32 is None:
            raise ModelError(f"{data} compares with the FP32 network", "--fp32 FILE")
        first.truths = answers["fp32"].truths = answers["fp32"].said
    known = MEASURES[first.kind]
    if unknown := [name for name in wanted if name not in known]:
        raise ModelError(f"{', '.join(unknown)} cannot be measured on {data}", f"its answers have {', '.join(known)}")
    rows = {}
    for name in dict.fromkeys(wanted or known):
        rows[name] = {who: known[name](a.said, a.truths, how) for who, a in answers.items()}
    report: dict[str, Any] = {"model": str(model), "data": data, "answers": first.kind, "metrics": rows}
    report |= {"samples": len(first.truths) or len(first.said), "beta": how.beta, "threshold": how.threshold}
    if per_layer and fp32 is not None:
        if first.kind == "tokens":
            raise ModelError("layers of language models are not compared", "leave --per-layer out")
        progress("comparing layers", 0, 0)
        report["layers"] = _layers(opened(fp32), opened(model), first.kept)
    return report


def opened(path: Path) -> Path:
    """The .onnx file, or the language model's folder, of a bundle, a folder or a file. Raises ModelError."""
    from models.package import open_bundle

    if (path / "bundle.json").is_file():
        open_bundle(path)
        path = path / "files"
    if (path / "genai_config.json").is_file():
        return path
    try:
        return model_file(path)
    except OutriderError as error:
        raise ModelError(error.message, "a bundle's folder, an .onnx file, or a language model's folder") from error


def _asked(model: Path, data: str, how: How, count: int, progress: Progress) -> Answers:
    if model.is_dir():
        return _read_text(model, data, count, progress)
    if data == PROSE:
        raise ModelError(f"{model.name} is no language model", f"--data: files, or one of {', '.join(TASKS)}")
    if data in TASKS:
        return _made(model, data, count or 1000, progress)
    return _given(model, Path(data), how, count, progress)


def _read_text(model: Path, data: str, count: int, progress: Progress) -> Answers:
    from models.language import losses, prose, windows

    try:
        text = prose() if data == PROSE else Path(data).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{data} is no text to read", f"--data {PROSE}, or a UTF-8 text file") from error
    parts = windows(model, text, count or (1000 if data == PROSE else 100_000))
    if sum(map(len, parts)) < 2:
        raise ModelError(f"{data} has no two tokens", "a longer text")
    progress("reading", 0, 0)
    return Answers("tokens", losses(model, parts)[0])


def _made(model: Path, name: str, count: int, progress: Progress) -> Answers:
    task, got = TASKS[name], Answers(KINDS[name])
    engine: OnnxNetwork | None = None

    def run(feed: dict[str, Array]) -> dict[str, Array]:
        nonlocal engine
        if engine is None:
            check(feed, {value["name"]: value for value in inspect(model)["inputs"]}, name)
            engine = network(model, probe=tensors(feed))
        if len(got.kept) < PROBED:
            got.kept.append(feed)
        return arrays(engine.infer(tensors(feed)))

    for sample, truths in task.samples("evaluation", count):
        progress("asking", len(got.truths), count)
        try:
            got.said += task.answers(run, sample)
        except (KeyError, IndexError, ValueError) as error:
            raise ModelError(f"{model.name} does not answer as the task {name} expects: {error}", _HINT) from error
        got.truths += truths
    return got


def _given(model: Path, data: Path, how: How, count: int, progress: Progress) -> Answers:
    got, declared = Answers(""), {value["name"]: value for value in inspect(model)["inputs"]}
    engine: OnnxNetwork | None = None
    every = samples(data, "evaluation data")[: count or MAX_FEEDS * 50]
    for done, sample in enumerate(every):
        progress("asking", done, len(every))
        feed = {name: a for name, a in sample.items() if not name.startswith("truth") or name in declared}
        check(feed, declared, data.name)
        engine = engine or network(model, probe=tensors(feed))
        truth = {name: a for name, a in sample.items() if name not in feed}
        kind, said, truths = _answered(arrays(engine.infer(tensors(feed))), truth, how)
        if got.kind not in ("", kind):
            raise ModelError(f"{data} has truths for {got.kind} and for {kind}", "evaluate them apart")
        got.kind, got.said, got.truths = kind, got.said + said, got.truths + truths
        got.kept += [feed] * (len(got.kept) < PROBED)
    return got


def _answered(answer: Feeds, truth: Feeds, how: How) -> tuple[str, list[Any], list[Any]]:
    """What one run says and what is true, an entry a sample."""
    if {"truth_boxes", "truth_classes"} <= truth.keys():
        if not {"boxes", "scores"} <= answer.keys():
            raise ModelError(f"the outputs are {sorted(answer)}", "boxes (1, n, 4) and scores (1, n, classes)")
        boxes, classes = truth["truth_boxes"].reshape(-1, 4), truth["truth_classes"].ravel()
        if len(boxes) != len(classes):
            raise ModelError(f"{len(boxes)} true boxes have {len(classes)} classes", "one class a box")
        return "objects", [_detected(answer["scores"], answer["boxes"])], [(boxes, classes)]
    if "truth" not in truth:
        raise ModelError("the data says nothing of what is true", "an array truth, or truth_boxes and truth_classes")
    true, out = truth["truth"], _output(answer, how)
    if true.dtype.kind == "U":
        kind, said = "texts", tasks.texts(out) if out.ndim == 2 and out.dtype.kind in "iu" else []
    elif true.dtype.kind == "b":
        scores = out[:, 1] if out.ndim == 2 and out.shape[1] == 2 and true.size == len(out) else out
        kind, said = "chances", scores.ravel().tolist()
    elif true.dtype.kind in "iu":
        classes = out if out.dtype.kind in "iu" else out.argmax(1) if out.ndim == 2 else out[:0]
        kind, said = "classes", classes.tolist()
    else:
        raise ModelError(f"truth is {true.dtype}", "integers for classes, booleans for yes or no, text for reading")
    if len(said) != true.size:
        form = {"texts": "code points (n, steps)", "chances": "a score a truth", "classes": "scores (n, classes)"}[kind]
        raise ModelError(f"the output is {out.dtype}{list(out.shape)} for {true.size} truths", f"{kind} need {form}")
    return kind, said, true.ravel().tolist()


def _output(answer: Mapping[str, Array], how: How) -> Array:
    name = how.output or next(iter(answer))
    if name not in answer or (not how.output and len(answer) > 1):
        raise ModelError(f"the outputs are {sorted(answer)}", "--output says which one to read")
    return answer[name]


def _detected(scores: Array, boxes: Array) -> tuple[Array, Array, Array]:
    """Boxes, scores and classes of a picture: maps as of models/objects.py, or (1, n, classes) and (1, n, 4)."""
    if scores.ndim == 4:
        return found(scores[0], boxes[0])
    flat, places = scores.reshape(-1, scores.shape[-1]), boxes.reshape(-1, 4)
    if len(flat) != len(places):
        raise ModelError(f"scores are {list(scores.shape)} of boxes {list(boxes.shape)}", "scores (1, n, classes)")
    rows, classes = np.nonzero(flat > 0.0)
    return places[rows], flat[rows, classes], classes


def _layers(reference: Path, altered: Path, data: list[Feeds]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        rows = layer_errors(simplify(reference, Path(scratch) / "fp32.onnx"), altered, data)
    if not rows:
        raise ModelError("the two networks have no layer in common", "--fp32 is the file that this one was made from")
    return rows
