"""``octavo embed``: texts in, vectors out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.generate import Model
from octavo.errors import ConfigError, DataError

app = typer.Typer(rich_markup_mode="rich")
POOLINGS = ("mean", "first", "last")


@app.command()
def embed(
    model: Model,
    texts: Annotated[Path | None, typer.Argument(help="A file of texts, one a line, or .jsonl; none: stdin.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="vectors.npy, or .jsonl; none: JSON lines.")] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="What of a text is kept: mean, first or last token; default: as the model says, else mean."),
    ] = None,
    normalise: Annotated[bool, typer.Option("--normalise", help="Make all vectors one long.")] = False,
    column: Annotated[str, typer.Option(help="Of .jsonl, where the text stands.")] = "text",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longer texts lose their end.")] = None,
) -> None:
    """Turn texts into vectors, by an encoder or any other model: the last hidden states of their tokens, pooled.

    Vectors come in the order of the texts; .npy holds one matrix of float32.

    Example: [bold]octavo embed runs/encoder texts.txt --out vectors.npy --normalise[/bold]
    """
    if pooling is not None and pooling not in POOLINGS:
        raise ConfigError(f"--pooling {pooling} is not known", fix=f"use {', '.join(POOLINGS)}")
    if out is not None and out.suffix not in (".npy", ".jsonl"):
        raise ConfigError(f"--out {out} is neither .npy nor .jsonl", fix="name a file of one of the two")
    if texts is None and sys.stdin.isatty():
        raise ConfigError("there are no texts", fix="give a file, or pipe lines in")
    lines = read_texts(texts, column)

    import numpy as np

    import octavo
    from octavo.training.progress import Console

    lm = octavo.load(model)
    with Console().bar(len(lines), "text") as bar:
        shown = 0

        def progress(done: int) -> None:
            nonlocal shown
            bar.update(done - shown)
            shown = done

        chosen = {"pooling": pooling, "normalise": normalise or None, "max_tokens": max_tokens}
        settings = {key: value for key, value in chosen.items() if value is not None}
        vectors = lm.embed(lines, progress=progress, **settings)
    if out is not None and out.suffix == ".npy":
        np.save(out, vectors)
        return
    written = "".join(json.dumps({"vector": [round(float(x), 7) for x in row]}) + "\n" for row in vectors)
    if out is None:
        sys.stdout.write(written)
    else:
        out.write_text(written, encoding="utf-8")


def read_texts(path: Path | None, column: str) -> list[str]:
    """The lines of a file or of stdin, or of a .jsonl what stands in ``column``."""
    try:
        raw = path.read_text(encoding="utf-8") if path is not None else sys.stdin.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", fix="check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start}", fix="save it as UTF-8") from None
    lines = raw.splitlines() if path is None or path.suffix != ".jsonl" else []
    for number, line in enumerate(raw.split("\n") if path is not None and path.suffix == ".jsonl" else (), 1):
        if not line.strip():
            continue
        try:
            lines.append(json.loads(line)[column])
        except (ValueError, KeyError, TypeError, IndexError):
            raise DataError(f"no object with {column!r}", where=f"{path}:{number}", fix="name the column") from None
        if not isinstance(lines[-1], str):
            raise DataError(f"{column!r} is no text", where=f"{path}:{number}", fix="name another column")
    if not lines:
        raise DataError("there is no text", fix="give at least one line")
    return lines
