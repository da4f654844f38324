"""``octavo tune``: instruction tuning of a model that exists."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from octavo.cli.run import Allow, MaxTime, Out, Overrides, Quiet, perform, show_next

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  octavo tune runs/mine --data pairs.jsonl tune.steps=500 --out runs/tuned")
def tune(
    model: Annotated[str, typer.Argument(help="A run or a model folder.")],
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="JSONL or JSON conversations: Alpaca, ShareGPT, messages, or prompt and completion."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="The recipe whose tune section is used.")] = "sft",
    out: Out = None,
    max_time: MaxTime = None,
    allow_change: Allow = None,
    quiet: Quiet = False,
) -> None:
    """Tune a model on conversations; the loss is on the assistant's words alone."""
    from octavo.run import find_model

    brought = {"kind": "pretrained", "path": str(find_model(model))}
    given = [f"model={json.dumps(brought)}", "data=null", "train=null"]
    if data:
        given += ["tune.data.kind=chat", f"tune.data.paths={json.dumps(data)}"]
    folder = perform(recipe, [*given, *(overrides or [])], out, max_time, allow_change, None, quiet)
    show_next(folder)
