"""``octavo classify``: texts in, their classes out, or the tag of each of their words."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.embed import read_texts
from octavo.cli.generate import Model
from octavo.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from octavo.models.heads import ClassesConfig

app = typer.Typer(rich_markup_mode="rich")


@app.command()
def classify(
    model: Model,
    texts: Annotated[Path | None, typer.Argument(help="A file of texts, one a line, or .jsonl; none: stdin.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=".jsonl, or of tags .conll; none: JSON lines.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Of .jsonl, where the text is (text), or the words (tokens).")
    ] = None,
    pair_column: Annotated[str, typer.Option(help="Of .jsonl, where the second text of a pair stands.")] = "text_b",
    characters: Annotated[
        bool, typer.Option("--characters", help="Tags: every character is a word (Chinese).")
    ] = False,
    pieces: Annotated[str, typer.Option(help="Tags: the token of a word that is asked: first or last.")] = "first",
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Longer texts lose their end; of tags, are cut up.")
    ] = None,
) -> None:
    """Say the classes of texts, by any model that was tuned on labels, or the tag of each word.

    What comes out is a line of JSON for each text: its class and the share of every class; or its words and their tags.
    Words are what stands between blanks, or the list in a .jsonl.

    Example: [bold]octavo classify runs/classifier new.txt[/bold]   ·
    [bold]echo "Anna lives in Oslo" | octavo classify runs/names[/bold]
    """
    if pieces not in ("first", "last"):
        raise ConfigError(f"--pieces {pieces} is not known", fix="use first or last, as in training")
    if out is not None and out.suffix not in (".jsonl", ".conll"):
        raise ConfigError(f"--out {out} is neither .jsonl nor .conll", fix="name a file of one of the two")
    if texts is None and sys.stdin.isatty():
        raise ConfigError("there are no texts", fix="give a file, or pipe lines in")

    import octavo
    from octavo.training.progress import Console

    lm = octavo.load(model)
    head: ClassesConfig | None = getattr(lm.network.config, "classes", None)
    if head is None:
        raise ConfigError(f"{model} has no head of classes", fix="tune one: octavo run classifier model.path=MODEL")
    if out is not None and out.suffix == ".conll" and head.over != "token":
        raise ConfigError("--out .conll is for tags of words, and the model says classes", fix="name a .jsonl")
    rows = _rows(texts, column or ("tokens" if head.over == "token" else "text"), words=head.over == "token")
    with Console().bar(len(rows), "text") as bar:
        shown = 0

        def progress(done: int) -> None:
            nonlocal shown
            bar.update(done - shown)
            shown = done

        if head.over == "token":
            sentences = [_words(row[0], characters) for row in rows]
            how: dict[str, Any] = {"separator": "" if characters else " ", "pieces": pieces}
            tags = lm.tag(sentences, max_tokens=max_tokens, progress=progress, **how)
            found = [{"tokens": words, "tags": said} for words, said in zip(sentences, tags, strict=True)]
        else:
            firsts = [str(text) for text, _ in rows]
            seconds = [row.get(pair_column) for _, row in rows]
            told = sum(second is not None for second in seconds)
            if told not in (0, len(rows)):
                raise DataError(f"{told} of {len(rows)} rows have {pair_column!r}", fix="give it to all or to none")
            pairs = [str(second) for second in seconds] if told else None
            scores = lm.classify(firsts, pairs, max_tokens=max_tokens, progress=progress)
            found = [{"text": text, **said(row, head)} for text, row in zip(firsts, scores, strict=True)]
    if out is not None and out.suffix == ".conll":
        columns = ("".join(f"{w}\t{t}\n" for w, t in zip(row["tokens"], row["tags"], strict=True)) for row in found)
        out.write_text("\n".join(columns), encoding="utf-8")
        return
    written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    if out is None:
        sys.stdout.write(written)
    else:
        out.write_text(written, encoding="utf-8")


def said(scores: np.ndarray, head: ClassesConfig) -> dict[str, Any]:
    """What the scores (C,) of a text mean: its class with every share, all its classes, or numbers."""
    import numpy as np

    names = head.labels or tuple(f"LABEL_{i}" for i in range(head.n))
    values = scores.astype(np.float64)
    if head.problem == "regression":
        return {"values": {name: round(float(x), 6) for name, x in zip(names, values, strict=True)}}
    if head.problem == "multi_label":
        shares = 1 / (1 + np.exp(-values))
        found: dict[str, Any] = {"labels": [name for name, x in zip(names, values, strict=True) if x > 0]}
    else:
        shares = np.exp(values - values.max())
        shares /= shares.sum()
        found = {"label": names[int(values.argmax())]}
    return {**found, "shares": {name: round(float(x), 6) for name, x in zip(names, shares, strict=True)}}


def _words(given: str | list[str], characters: bool) -> list[str]:
    if isinstance(given, list):
        return given
    return [char for char in given if not char.isspace()] if characters else given.split()


def _rows(path: Path | None, column: str, *, words: bool) -> list[tuple[Any, Mapping[str, Any]]]:
    """What is asked about, with the whole row it stands in."""
    from octavo.data.chat_formats import BadRow
    from octavo.data.chat_rows import SUFFIXES, rows

    if path is None or not path.name.removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES):
        return [(line, {}) for line in read_texts(path, column)]
    found = []
    for line, row in rows(path):
        given = row.get(column) if isinstance(row, Mapping) else None
        listed = isinstance(given, list) and all(isinstance(word, str) and word for word in given)
        if not (isinstance(given, str) or (words and listed)):
            why = str(row) if isinstance(row, BadRow) else f"no object with a text {column!r}"
            raise DataError(why, where=f"{path}:{line}", fix="correct it, or name it with --column")
        assert isinstance(row, Mapping)
        found.append((given, row))
    if not found:
        raise DataError("there is no text", fix="give at least one line")
    return found
