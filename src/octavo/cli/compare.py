"""``octavo compare``: many models on the same text with the same to spend."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from octavo.comparing.settings import Comparison
    from octavo.stop import StopSignal

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Options:
    """What ``compare`` and ``ablate`` take beside what is compared."""

    data: Annotated[
        list[Path] | None, typer.Option(help="Text: files or folders; repeatable. Default: the recipe's.")
    ] = None
    seconds: Annotated[float | None, typer.Option(help="CPU seconds of training for each model.")] = None
    tokens: Annotated[int | None, typer.Option(help="Tokens each model is trained on.")] = None
    flops: Annotated[float | None, typer.Option(help="FLOPs of matrix products for each model.")] = None
    seeds: Annotated[int | None, typer.Option(min=1, help="Trainings of each model, with seeds from 1 on.")] = None
    pairs: Annotated[
        list[Path] | None, typer.Option(help="Minimal pairs: JSONL files, a folder of them or a zip; repeatable.")
    ] = None
    pairs_at_most: Annotated[int | None, typer.Option(min=1, help="Minimal pairs of each file.")] = None
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder. Default: runs/NAME.")] = None
    jobs: Annotated[int, typer.Option(min=1, help="Trainings side by side, each on one thread.")] = 1
    max_time: Annotated[str | None, typer.Option(help="Stop after this long (90s, 50m, 2h); exit code 75.")] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and the table.")] = False

    def budget(self) -> dict[str, Any]:
        """The one budget that is given; empty if none is."""
        from octavo.errors import ConfigError

        given = {"seconds": self.seconds, "tokens": self.tokens, "flops": self.flops}
        found = {name: value for name, value in given.items() if value is not None}
        if len(found) > 1:
            raise ConfigError("more than one budget is given", fix="give one of --seconds, --tokens and --flops")
        return found

    def onto(self, comparison: Comparison, budget: dict[str, Any]) -> Comparison:
        """``comparison`` with what is given here in place of what it says."""
        from octavo.comparing.settings import Comparison

        plain = comparison.model_dump(mode="json")
        if self.data:
            sources = (plain["base"].get("data") or {}).get("sources") or [{}]
            first = sources[0] if isinstance(sources[0], dict) else {}
            kept = {key: value for key, value in first.items() if key in ("document_bytes", "encoding")}
            plain["base"]["data"] = {
                **(plain["base"].get("data") or {}),
                "sources": [{**kept, "path": str(path)} for path in self.data],
            }
            for model in plain["models"].values():
                if isinstance(model.get("data"), dict):
                    model["data"] = {k: v for k, v in model["data"].items() if k != "sources"}
        if budget:
            plain["budget"] = budget
        if self.seeds is not None:
            plain["seeds"] = list(range(1, self.seeds + 1))
        if self.pairs:
            plain["pairs"] = {"paths": [str(path) for path in self.pairs], "at_most": self.pairs_at_most}
        elif self.pairs_at_most is not None and plain["pairs"]:
            plain["pairs"]["at_most"] = self.pairs_at_most
        return Comparison.model_validate(plain)

    def perform(self, comparison: Comparison, stop: StopSignal, only: tuple[str, ...] = ()) -> None:
        """Train what is missing, write the page and print the table."""
        from octavo.comparing import page
        from octavo.comparing.bench import Bench
        from octavo.errors import StopRequested
        from octavo.report.words import printable
        from octavo.run import RunFolder
        from octavo.training.progress import Console

        folder = self.out if self.out is not None else Path("runs") / comparison.name
        console = Console("quiet" if self.quiet else "auto")
        with RunFolder(folder).lock():
            try:
                rows = Bench(comparison, folder, console, stop, self.jobs, only).run()
            except StopRequested as error:
                kept = f"every finished training in {folder}"
                raise StopRequested(error.what, fix="give the same command again: it goes on", kept=kept) from None
            paths = page.write(rows, comparison, folder)
        seeds = f"{len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else "one seed"
        typer.echo(f"\n{comparison.budget} a model, {seeds}; ± is half a 95 % interval over seeds\n")
        typer.echo("\n".join(map(printable, page.lines(rows))))
        typer.echo("\n" + "\n".join(str(path) for path in paths))


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """``verb(..., options)`` as typer reads it: the fields of ``Options`` are options like its own."""

    def parameters(of: Any) -> dict[str, inspect.Parameter]:
        hints = get_type_hints(of, include_extras=True)
        found = inspect.signature(of).parameters.values()
        return {one.name: one.replace(annotation=hints[one.name]) for one in found}

    @functools.wraps(verb)
    def called(**given: Any) -> None:
        options = Options(**{field.name: given.pop(field.name) for field in fields(Options)})
        verb(**given, options=options)

    own = parameters(verb)
    del own["options"]
    every = own | parameters(Options)
    called.__signature__ = inspect.Signature([*every.values()])  # type: ignore[attr-defined]
    called.__annotations__ = {name: one.annotation for name, one in every.items()}
    return called


@app.command(epilog="Example:  octavo compare eras --data input.txt --seconds 60 --pairs blimp.zip")
@with_options
def compare(
    comparison: Annotated[str, typer.Argument(help="A comparison's name (eras) or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as many as you like")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this model; repeatable.")] = None,
    *,
    options: Options,
) -> None:
    """Train many models on the same text with the same budget, and compare bits per byte.

    Every training is kept: run again, only what is new or changed is trained. Writes table.md, results.json and
    drawings against tokens, FLOPs, seconds, parameters and state bytes.
    """
    from octavo.stop import StopSignal

    with StopSignal(options.max_time) as stop:  # before the imports, which take seconds
        from octavo.comparing.settings import Comparison

        loaded = Comparison.load(comparison, overrides or [])
        options.perform(options.onto(loaded, options.budget()), stop, tuple(only or ()))
