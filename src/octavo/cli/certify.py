"""``octavo certify``: does what serves a model say what was trained?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from octavo.errors import CheckpointError

app = typer.Typer(rich_markup_mode="rich")


@app.command()
def certify(
    model: Annotated[Path, typer.Argument(help="A run, a model folder, a pulled org/name, or a GGUF file.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text, one prompt a line, or JSON lines with `prompt` or `messages`. Default: some here."),
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", "--n", min=1, help="How many prompts. Default: 16, or all of the file.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of each greedy text.")] = 32,
    weights: Annotated[
        list[str] | None, typer.Option(help="Also on small weights: int8, int4 ...; may be given again.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="engine, transformers, llama-cpp; may be given again. Default: all that are installed."),
    ] = None,
    exported: Annotated[
        list[Path] | None,
        typer.Option(help="A folder or GGUF file made of this model, asked in place of one made now."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the result goes. Default: certificate.json with the model.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is stored.")] = False,
) -> int:
    """Compare what a model says in training, in the engine (paged, native, quantised), in transformers and llama.cpp.

    Prompts as they are rendered, their ids, log-probabilities, greedy texts and where they stop. The result is stored
    with the model. Exit code 4 if something that should be equal is not.

    Example: [bold]octavo certify runs/quickstart[/bold]   ·   [bold]octavo certify my-model --weights int8
    --exported my-model.gguf[/bold]
    """
    from octavo.certify import certificate

    certificate.require(against or ())
    made = certificate.certify(
        model,
        prompts=prompts,
        n=n,
        n_new=tokens,
        weights=weights or (),
        against=against or certificate.BACKENDS,
        exported=exported or (),
        on_progress=_progress,
    )
    _progress("")
    place = certificate.store(made, model, out)
    if as_json:
        typer.echo(json.dumps(made.plain(), indent=2, ensure_ascii=False))
    else:
        for line in certificate.table(made):
            typer.echo(line)
        verdict = "equal" if made.equal else "NOT equal"
        typer.echo(f"{model}: {verdict}, {made.prompts} prompts, up to {made.new_tokens} new tokens; stored in {place}")
    return 0 if made.equal else CheckpointError.exit_code


def _progress(text: str) -> None:
    """One line that is overwritten, for people only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
