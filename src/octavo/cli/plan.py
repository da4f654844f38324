"""``octavo plan``: what a training will take on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.run import Overrides

if TYPE_CHECKING:
    from octavo.plan import Plan

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Example:  octavo plan pretrain model.d_model=768 model.n_layers=12     octavo plan mine.yaml --json"
)
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a YAML file.")],
    overrides: Overrides = None,
    stage: Annotated[str, typer.Option(help="pretrain or tune. Default: the first that the recipe has.")] = "",
    write: Annotated[Path | None, typer.Option(help="Write the recipe with the choices made here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Forecast memory, speed and time of a training, in about 20 seconds, and say what to change if it does not fit.

    Tries out number formats and threads and some real steps; nothing is read or written. Leaves with 6 if the
    training does not fit into the memory.
    """
    from octavo.config import Recipe
    from octavo.errors import ConfigError, ResourceError
    from octavo.feed import stages
    from octavo.files import write_atomic
    from octavo.plan import plan as forecast

    loaded = Recipe.load(recipe, overrides or [])
    if write is not None and write.exists():
        raise ConfigError(f"{write} is there already", fix="give another name to --write")
    names = stages(loaded)
    if not names:
        raise ConfigError(f"{recipe} trains nothing", fix="plan a recipe with a train or tune section")
    made = forecast(loaded, stage or names[0])
    if as_json:
        typer.echo(json.dumps(_facts(made), indent=1))
    else:
        typer.echo("\n".join(lines(made)))
    if not made.fits:
        fix = made.fixes[0][0] if made.fixes else "a smaller model or shorter rows"
        raise ResourceError(
            f"{recipe} needs {_gb(made.memory.total)} of memory and {_gb(made.available)} are free",
            fix=fix,
            kept="nothing was started",
        )
    if write is not None:
        import yaml

        section = "train" if made.stage == "pretrain" else "tune"
        plain = loaded.plain()
        plain[section] = plain[section] | made.choices()
        Recipe.parse(plain, recipe)
        write_atomic(write, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
        if not as_json:
            typer.echo(f"written    {write}")


def _gb(n: float) -> str:
    return f"{n / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _parts(made: Plan) -> dict[str, int]:
    memory = made.memory
    return {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "moments": memory.moments,
        "activations": memory.activations,
    }


def lines(made: Plan) -> list[str]:
    """The forecast for people."""
    parts = ", ".join(f"{name} {_gb(n)}" for name, n in _parts(made).items())
    rows = [
        ("model", f"{made.parameters / 1e6:.1f} M parameters"),
        ("step", f"{made.step_tokens:,} tokens in micro-batches of {made.micro_batch_rows} rows of {made.seq_len}"),
        ("memory", f"{_gb(made.memory.total)} of {_gb(made.available)} free ({parts})"),
    ]
    if made.fits:
        peaks = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in made.peaks.items())
        rows += [
            ("chosen", f"{made.precision}, {made.threads} threads, compile {made.compile} (products: {peaks})"),
            ("speed", f"{made.tokens_per_second:,.0f} tokens/s"),
            ("time", f"{_duration(made.seconds)} for {made.steps:,} steps, {made.steps * made.step_tokens:,} tokens"),
        ]
    rows += [("would fit", f"{words}: {_gb(n)}; it costs {price}") for words, n, price in made.fixes]
    return [f"{name:10} {value}" for name, value in rows]


def _facts(made: Plan) -> dict[str, Any]:
    return {
        "stage": made.stage,
        "fits": made.fits,
        "parameters": made.parameters,
        "steps": made.steps,
        "step_tokens": made.step_tokens,
        "bytes": _parts(made) | {"total": made.memory.total, "available": made.available},
        "tokens_per_second": made.tokens_per_second,
        "seconds": made.seconds,
        **made.choices(),
        "peaks": made.peaks,
        "fixes": [{"change": words, "bytes": n, "costs": price} for words, n, price in made.fixes],
    }
