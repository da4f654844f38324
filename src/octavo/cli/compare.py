"""``octavo compare``: many models on the same text with the same to spend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from octavo.comparing.settings import Comparison
    from octavo.stop import StopSignal

app = typer.Typer(add_completion=False)

Out = Annotated[Path | None, typer.Option("--out", "-o", help="The folder. Default: runs/NAME.")]
Seconds = Annotated[float | None, typer.Option(help="CPU seconds of training for each model.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens each model is trained on.")]
Flops = Annotated[float | None, typer.Option(help="FLOPs of matrix products for each model.")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Trainings of each model, with seeds from 1 on.")]
Data = Annotated[list[Path] | None, typer.Option(help="Text: files or folders; repeatable. Default: the recipe's.")]
Pairs = Annotated[
    list[Path] | None, typer.Option(help="Minimal pairs: JSONL files, a folder of them or a zip; repeatable.")
]
AtMost = Annotated[int | None, typer.Option(min=1, help="Minimal pairs of each file.")]
Jobs = Annotated[int, typer.Option(min=1, help="Trainings side by side, each on one thread.")]
MaxTime = Annotated[str | None, typer.Option(help="Stop after this long (90s, 50m, 2h); exit code 75.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and the table.")]


@app.command(epilog="Example:  octavo compare eras --data input.txt --seconds 60 --pairs blimp.zip")
def compare(
    comparison: Annotated[str, typer.Argument(help="A comparison's name (eras) or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as many as you like")] = None,
    data: Data = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this model; repeatable.")] = None,
    seconds: Seconds = None,
    tokens: Tokens = None,
    flops: Flops = None,
    seeds: Seeds = None,
    pairs: Pairs = None,
    pairs_at_most: AtMost = None,
    out: Out = None,
    jobs: Jobs = 1,
    max_time: MaxTime = None,
    quiet: Quiet = False,
) -> None:
    """Train many models on the same text with the same budget, and compare bits per byte.

    Every training is kept: run again, only what is new or changed is trained. Writes table.md, results.json and
    drawings against tokens, FLOPs, seconds, parameters and state bytes.
    """
    from octavo.stop import StopSignal

    with StopSignal(max_time) as stop:  # before the imports, which take seconds
        from octavo.comparing.settings import Comparison

        loaded = Comparison.load(comparison, overrides or [])
        loaded = with_options(loaded, data, budget_of(seconds, tokens, flops), seeds, pairs, pairs_at_most)
        perform(loaded, out, jobs, tuple(only or ()), stop, quiet)


def budget_of(seconds: float | None, tokens: int | None, flops: float | None) -> dict[str, Any]:
    """The one budget that is given; empty if none is."""
    from octavo.errors import ConfigError

    given = {"seconds": seconds, "tokens": tokens, "flops": flops}
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        raise ConfigError("more than one budget is given", fix="give one of --seconds, --tokens and --flops")
    return found


def with_options(
    comparison: Comparison,
    data: list[Path] | None,
    budget: dict[str, Any],
    seeds: int | None,
    pairs: list[Path] | None,
    at_most: int | None,
) -> Comparison:
    from octavo.comparing.settings import Comparison

    plain = comparison.model_dump(mode="json")
    if data:
        sources = (plain["base"].get("data") or {}).get("sources") or [{}]
        first = sources[0] if isinstance(sources[0], dict) else {}
        kept = {key: value for key, value in first.items() if key in ("document_bytes", "encoding")}
        plain["base"]["data"] = {
            **(plain["base"].get("data") or {}),
            "sources": [{**kept, "path": str(p)} for p in data],
        }
        for model in plain["models"].values():
            if isinstance(model.get("data"), dict):
                model["data"] = {k: v for k, v in model["data"].items() if k != "sources"}
    if budget:
        plain["budget"] = budget
    if seeds is not None:
        plain["seeds"] = list(range(1, seeds + 1))
    if pairs:
        plain["pairs"] = {"paths": [str(path) for path in pairs], "at_most": at_most}
    elif at_most is not None and plain["pairs"]:
        plain["pairs"]["at_most"] = at_most
    return Comparison.model_validate(plain)


def perform(
    comparison: Comparison, out: Path | None, jobs: int, only: tuple[str, ...], stop: StopSignal, quiet: bool
) -> None:
    from octavo.comparing import page
    from octavo.comparing.bench import Bench
    from octavo.errors import StopRequested
    from octavo.report.words import printable
    from octavo.run import RunFolder
    from octavo.training.progress import Console

    folder = out if out is not None else Path("runs") / comparison.name
    console = Console("quiet" if quiet else "auto")
    with RunFolder(folder).lock():
        try:
            rows = Bench(comparison, folder, console, stop, jobs, only).run()
        except StopRequested as error:
            raise StopRequested(
                error.what, fix="give the same command again: it goes on", kept=f"every finished training in {folder}"
            ) from None
        paths = page.write(rows, comparison, folder)
    seeds = f"{len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else "one seed"
    typer.echo(f"\n{comparison.budget} a model, {seeds}; ± is half a 95 % interval over seeds\n")
    typer.echo("\n".join(map(printable, page.lines(rows))))
    typer.echo("\n" + "\n".join(str(path) for path in paths))
