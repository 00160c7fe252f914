"""`outrider eval`: how often the tool caller is right, on BFCL, on the plant and on a site's own requests.

Invariant: the model runs as on a device (its engine, prompt, grammar, two threads); rows are JSON lines with `--json`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_agent.engines.base import LanguageModel
from edge_agent.errors import Refused

DEFAULT = "toolcaller"
app = typer.Typer(
    no_args_is_help=True, help="How often the tool caller is right: BFCL, the plant set, a site's own calls."
)
Model = Annotated[Path | None, typer.Option(help="A genai folder; default: smollm2, built when it is not there.")]
Adapter = Annotated[str, typer.Option(help="An adapter: one that ships by name, a folder, or none.")]
Threads = Annotated[int, typer.Option(help="Threads of the engine.")]
Limit = Annotated[int, typer.Option(help="At most so many cases of each kind; 0 is all.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a row.")]


class Split(StrEnum):
    """20 % of the cases may be read; the others are only counted."""

    DEV = "dev"
    TEST = "test"


@app.command()
def bfcl(
    split: Annotated[Split, typer.Option(help="Which cases.")] = Split.TEST,
    category: Annotated[list[str] | None, typer.Option(help="Only this category; may be repeated.")] = None,
    limit: Limit = 0,
    model: Model = None,
    adapter: Adapter = DEFAULT,
    threads: Threads = 2,
    wrong: Annotated[Path | None, typer.Option(help="Where wrong development cases go, as JSON lines.")] = None,
    calibrate: Annotated[Path | None, typer.Option(help="The adapter folder that keeps how sure it may be.")] = None,
    as_json: Json = False,
) -> None:
    """BFCL v4's single-turn categories, scored by BFCL's own checker; goes on where it was stopped."""
    from bench.rows import show
    from models.fetch import default_cache
    from models.toolcaller.evaluate import bfcl as data
    from models.toolcaller.evaluate import run

    if (wrong or calibrate) and split is not Split.DEV:
        raise Refused("test cases are never shown, nor calibrated on", "use --split dev")
    cache = default_cache()
    wheel = data.fetch_wheel(cache)
    cases = [case for name in category or data.PUBLISHED for case in data.cases(wheel, name, split.value, limit)]
    with (
        _opened(model, threads, run.CONTEXT) as engine,
        _adapted(engine, model, adapter) as loaded,
        _progress(len(cases), "BFCL") as step,
    ):
        kept = run.Kept(cache / "eval" / f"{engine.info.digest[:16]}.jsonl")
        results = list(run.evaluate(engine, cases, data.checker(wheel), kept, loaded, step))
        digest = engine.info.digest[:12]
    if wrong:
        _write(wrong, run.wrong(results, cases))
    if calibrate:
        from models.toolcaller.evaluate.calibrate import calibration, keep

        keep(calibrate, calibration(results))
    show(({**row, "model": digest, "adapter": loaded} for row in run.rows(results, split.value)), as_json)


@app.command()
def plant(
    kind: Annotated[list[str] | None, typer.Option(help="Only this kind of case; may be repeated.")] = None,
    split: Annotated[Split, typer.Option(help="The test set, or the one to develop with.")] = Split.TEST,
    limit: Limit = 0,
    model: Model = None,
    adapter: Adapter = DEFAULT,
    threads: Threads = 2,
    scripted: Annotated[bool, typer.Option("--scripted", help="The right calls instead of a model's.")] = False,
    wrong: Annotated[Path | None, typer.Option(help="Where wrong development cases go, as JSON lines.")] = None,
    as_json: Json = False,
) -> None:
    """200 requests to the simulated plant through the agent loop, judged by calls and by the plant's state."""
    import msgspec

    from bench import plant_eval
    from bench.rows import show
    from edge_agent.agent.decide import Speaker
    from models.toolcaller.evaluate.plant_cases import GOALS, load

    if unknown := set(kind or ()) - set(GOALS):
        raise Refused(f"there is no kind {', '.join(unknown)}", f"known: {', '.join(GOALS)}")
    if wrong and split is Split.TEST:
        raise Refused("test cases are never shown", "use --split dev")
    by_kind = {name: [case for case in load(split.value) if case.kind == name] for name in kind or GOALS}
    cases = [case for of in by_kind.values() for case in of[: limit or None]]
    with ExitStack() as stack:
        step, speaker, asked = stack.enter_context(_progress(len(cases), "plant")), Speaker("scripted"), None
        if not scripted:
            engine = stack.enter_context(_opened(model, threads, 2048))
            loaded = stack.enter_context(_adapted(engine, model, adapter))
            speaker = Speaker(digest=engine.info.digest, adapter=loaded, shots=not loaded)
            asked = plant_eval.InProcess(engine)
        outcomes = asyncio.run(plant_eval.run(asked, cases, step, speaker))
    if wrong:
        _write(wrong, (msgspec.to_builtins(outcome) for outcome in outcomes if outcome.failure))
    by = {"model": speaker.digest[:12], "adapter": speaker.adapter}
    show(({**row, **by} for row in plant_eval.rows(outcomes)), as_json)


@app.command()
def calls(
    file: Annotated[Path, typer.Argument(help="Tools and requests as in docs/toolcaller.md, not what was trained on.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="One that ships, a folder or none; may be repeated: they take turns.")
    ] = None,
    model: Model = None,
    threads: Threads = 2,
    wrong: Annotated[Path | None, typer.Option(help="Where wrong decisions go, as JSON lines.")] = None,
    as_json: Json = False,
) -> None:
    """A site's own requests, asked of one adapter or of several that switch at every request."""
    import msgspec

    from bench.rows import show
    from models.toolcaller.data.written import WrittenError, of_site
    from models.toolcaller.evaluate import own

    try:
        groups = of_site(file)
    except (OSError, UnicodeError, WrittenError) as error:
        raise Refused(f"{file} cannot be used:\n{error}", "docs/toolcaller.md tells the form") from error
    names = adapter or [DEFAULT]
    with ExitStack() as stack:
        engine = stack.enter_context(_opened(model, threads, 2048, len(names)))
        loaded = [stack.enter_context(_adapted(engine, model, name)) for name in dict.fromkeys(names)]
        total = len(loaded) * sum(len(group.requests) for group in groups)
        step = stack.enter_context(_progress(total, "calls"))
        outcomes = list(own.evaluate(engine, groups, loaded, step))
    if wrong:
        _write(wrong, (msgspec.to_builtins(outcome) for outcome in outcomes if not outcome.right))
    show(own.rows(outcomes), as_json)


@contextmanager
def _opened(folder: Path | None, threads: int, context: int, generators: int = 1) -> Iterator[LanguageModel]:
    from edge_agent.engines.genai import GenaiModel
    from models.fetch import default_cache
    from models.package import build

    folder = folder or build("smollm2", default_cache())
    model = GenaiModel(folder, threads=threads, context=context, generators=generators)
    try:
        yield model
    finally:
        model.close()


@contextmanager
def _adapted(engine: LanguageModel, model: Path | None, adapter: str) -> Iterator[str]:
    """The name by which requests choose the adapter: its own and its content's digest; empty for none.

    Another model than the default takes the default adapter for none.
    """
    from edge_agent.wire.bundle import content_digest, scan
    from models.adapter import shipped

    if adapter == "none" or (adapter == DEFAULT and (model or DEFAULT not in shipped())):
        yield ""
        return
    folder = shipped().get(adapter, Path(adapter))
    if not folder.is_dir():
        raise Refused(f"there is no adapter {adapter}", f"a folder, none, or one that ships: {', '.join(shipped())}")
    name = f"{folder.name}@{content_digest(scan(folder))[:12]}"
    engine.load_adapter(name, folder)
    yield name


@contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[], None]]:
    """A bar on stderr; nothing when it is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda: bars.advance(task)


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines: Sequence[str] = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines))
