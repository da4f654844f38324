"""``octavo pull``: a model from a hub or a mirror, into a folder where every verb finds it by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode="rich")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="ORG/NAME[@REVISION]", help="The repository.")],
    to: Annotated[Path | None, typer.Option(help="Folder to fetch into. Default: ~/.cache/octavo/models.")] = None,
) -> None:
    """Fetch a model: safetensors, configuration, tokenizer and chat template, each compared with the hub's hash.

    Run it again after an interruption: it goes on where it was. HF_ENDPOINT names a mirror, HF_TOKEN a token.

    Example: [bold]octavo pull HuggingFaceTB/SmolLM2-135M-Instruct[/bold]   ·   then [bold]octavo chat …[/bold] with it
    """
    from octavo.hub.pull import pull as fetch
    from octavo.training.progress import Bar, Console

    console = Console()
    bars: list[Bar] = []

    def progress(come: int, total: int) -> None:
        if not bars:
            bars.append(console.bar(total, "byte", name, done=come))
        bars[0].update(max(0, come - bars[0].progress.done))

    try:
        folder = fetch(name, to, progress)
    finally:
        for bar in bars:
            bar.close()
    typer.echo(str(folder))
