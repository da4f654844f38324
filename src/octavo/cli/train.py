"""``octavo train``: the pretraining part of a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from octavo.cli.run import Allow, MaxTime, Out, Overrides, Quiet, Workers, perform, show_next

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  octavo train pretrain 'data.sources=[\"my/**/*.txt\"]' model.n_layers=6 --out runs/mine")
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a YAML file; its tune section is not run.")],
    overrides: Overrides = None,
    out: Out = None,
    max_time: MaxTime = None,
    allow_change: Allow = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Pretrain a model on text: data, tokenizer, training, scores, report."""
    folder = perform(recipe, overrides, out, max_time, allow_change, workers, quiet, sections=("train", "eval"))
    show_next(folder)
