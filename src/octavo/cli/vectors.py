"""``octavo vectors``: train, near, analogy, convert, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.errors import ConfigError, ConfigErrors, DataError

if TYPE_CHECKING:
    from octavo.vectors.query import Vectors

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Train word vectors (word2vec), ask for neighbours and analogies, convert their files.\n\n"
    "Example: octavo vectors train my/*.txt --out words.vec",
)

File = Annotated[Path, typer.Argument(help="A file of word vectors: .vec, word2vec's .bin, or GloVe's .txt.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Read only so many words from the beginning.")]
From = Annotated[str | None, typer.Option("--from", help="vec, glove or bin; by default told from the file.")]
Number = Annotated[int, typer.Option("--n", min=1, help="Answers to show.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _format(name: str | None) -> Any:
    if name not in (None, "vec", "glove", "bin"):
        raise ConfigError(f"{name!r} is no format of word vectors", fix="use vec, glove or bin")
    return name


def _new(path: Path) -> Path:
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists, and nothing is overwritten", fix="give another name")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"the folder {path.absolute().parent} does not exist", fix="make it first")
    return path


@app.command()
def train(
    sources: Annotated[list[str], typer.Argument(help="Files, folders, patterns, or python-stdlib.")],
    out: Annotated[Path, typer.Option(help="The file to write: NAME.vec (text) or NAME.bin.")],
    kind: Annotated[str, typer.Option(help="skipgram or cbow.")] = "skipgram",
    loss: Annotated[str, typer.Option(help="negative (samples) or hierarchical (softmax).")] = "negative",
    dim: Annotated[int, typer.Option(help="Numbers a word.")] = 100,
    window: Annotated[int, typer.Option(help="Neighbours on each side, at most.")] = 5,
    negative: Annotated[int, typer.Option(help="Wrong words for each right one.")] = 5,
    sample: Annotated[float, typer.Option(help="Words more frequent than this are thinned out; 0: none.")] = 1e-3,
    min_count: Annotated[int, typer.Option(help="Rarer words are left out.")] = 5,
    max_words: Annotated[int | None, typer.Option(help="Only the most frequent words.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the text.")] = 5,
    lr: Annotated[float, typer.Option(help="Learning rate at the beginning.")] = 0.025,
    seed: Annotated[int, typer.Option(help="The same seed and one thread give the same bits.")] = 1,
    threads: Annotated[int, typer.Option(help="More than 1 is faster, but not repeatable.")] = 1,
    split: Annotated[str, typer.Option(help="words, spaces, characters, or a tokenizer's folder.")] = "words",
    lower: Annotated[bool, typer.Option(help="Make the text lower-case.")] = False,
    unit: Annotated[str, typer.Option(help="No window reaches beyond a line, or a document.")] = "line",
    backend: Annotated[str, typer.Option(help="auto, native or plain.")] = "auto",
    max_time: Annotated[str | None, typer.Option(help="Stop after this long, such as 50m; resumable.")] = None,
) -> None:
    """Train word vectors on text. A stopped training goes on when the same command is given again.

    Examples: [bold]octavo vectors train python-stdlib --out words.vec --lower[/bold]   ·
    [bold]octavo vectors train poems.txt --out chars.vec --split characters --min-count 2[/bold]
    """
    from pydantic import ValidationError

    from octavo.data import sources as data_sources
    from octavo.files import fsync_path
    from octavo.stop import StopSignal
    from octavo.training.progress import Console
    from octavo.vectors import corpus, formats
    from octavo.vectors import train as train_vectors
    from octavo.vectors.config import VectorsConfig

    try:
        config = VectorsConfig.model_validate(
            {
                "kind": kind, "loss": loss, "dim": dim, "window": window, "negative": negative, "sample": sample,
                "min_count": min_count, "max_words": max_words, "epochs": epochs, "lr": lr, "lr_end": min(1e-4, lr),
                "seed": seed, "threads": threads, "split": split, "lower": lower, "unit": unit, "backend": backend,
            }
        )  # fmt: skip
    except ValidationError as error:
        raise ConfigErrors(_refusal(found) for found in error.errors()) from None
    formats.format_of(_new(out))
    console = Console()
    given = [data_sources.SourceConfig.model_validate(source) for source in sources]
    fingerprint, tokenizer = data_sources.fingerprint(given), None
    if split not in corpus.SPLITS:
        tokenizer = _tokenizer(split)
        fingerprint += tokenizer.hash
    stop = StopSignal(max_time, notify=console.warn)
    with stop, stop.at_once(), console.bar(None, "character", "reading") as bar:
        text = corpus.read(
            (document.text for document in data_sources.read(given)),  # type: ignore[arg-type]
            split=tokenizer or split, lower=lower, unit=unit, min_count=min_count, max_words=max_words,
            progress=bar.update,
        )  # fmt: skip
    console.note(
        f"{len(text.tokens):,} words, {len(text.words):,} different; {text.left_out:,} too rare; "
        f"{kind}, {loss}, {dim} numbers a word"
    )
    unfinished = out.with_name(f"{out.name}.unfinished")
    with console.bar(len(text.tokens) * epochs, "word", "training") as bar:
        vectors = train_vectors(
            text, config, stop=stop, unfinished=unfinished, fingerprint=fingerprint, notice=console.warn,
            progress=lambda n, loss: bar.update(n, loss=loss),
        )  # fmt: skip
    formats.write(vectors, _new(out))
    unfinished.unlink(missing_ok=True)
    fsync_path(out.absolute().parent)
    typer.echo(f"{len(vectors):,} words of {vectors.dim} numbers -> {out}")


def _refusal(found: Any) -> ConfigError:
    name = ".".join(str(part) for part in found["loc"])
    if not name:
        return ConfigError(str(found["ctx"]["error"]), fix="change one of them")
    option = f"--{name.replace('_', '-')}"
    return ConfigError(f"{option} {found['input']}: {found['msg'][0].lower()}{found['msg'][1:]}", fix="change it")


def _tokenizer(split: str) -> Any:
    from octavo.cli.tokenizer import _load

    if not Path(split).exists():
        raise ConfigError(
            f"--split {split} is no way of splitting, and no tokenizer is there",
            fix="use words, spaces, characters, or a tokenizer's folder",
        )
    return _load(Path(split))


def _read(path: Path, limit: int | None = None, format: str | None = None) -> Vectors:
    from octavo.vectors import formats

    return formats.read(path, _format(format), limit=limit)


def _show(answers: list[tuple[str, float]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([[word, round(score, 6)] for word, score in answers], ensure_ascii=False))
        return
    for word, score in answers:
        typer.echo(f"{score:7.4f}  {word}")


@app.command()
def near(
    file: File,
    word: Annotated[str, typer.Argument(help="A word of the file.")],
    n: Number = 10,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Print the words whose vectors point most nearly the same way, with the cosine.

    Example: [bold]octavo vectors near words.vec king[/bold]
    """
    _show(_read(file, limit).near(word, n), as_json)


@app.command()
def analogy(
    file: File,
    words: Annotated[list[str] | None, typer.Argument(help="A B C: A is to B as C is to what?")] = None,
    questions: Annotated[Path | None, typer.Option(help="A file of analogies, one `a b c d` a line.")] = None,
    method: Annotated[str, typer.Option(help="add (3CosAdd) or mul (3CosMul).")] = "add",
    n: Number = 10,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Complete an analogy, or count how many of a file of analogies are completed right.

    Examples: [bold]octavo vectors analogy words.vec man king woman[/bold]   ·
    [bold]octavo vectors analogy words.vec --questions questions-words.txt --method mul[/bold]
    """
    from octavo.vectors import query

    if method not in ("add", "mul"):
        raise ConfigError(f"--method {method} is not known", fix="use add or mul")
    if (len(words or ()) == 3) == (questions is not None) or (words and questions):
        raise ConfigError("an analogy needs three words, or --questions FILE", fix="write for example: man king woman")
    vectors = _read(file, limit)
    if questions is None:
        a, b, c = words or ("", "", "")
        _show(vectors.analogy(a, b, c, n, method), as_json)  # type: ignore[arg-type]
        return
    try:
        lines = questions.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{questions} is not UTF-8 at byte {error.start:,}", fix="convert it with iconv") from None
    found = []
    for name, asked in query.questions(lines, str(questions)):
        right, known = vectors.answer(asked, method)
        found.append({"section": name, "right": right, "asked": known, "unknown": len(asked) - known})
    sums = {key: sum(row[key] for row in found) for key in ("right", "asked", "unknown")}
    found.append({"section": "in all", **sums})
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    for row in found:
        share = f"{row['right'] / row['asked']:6.1%}" if row["asked"] else "     -"
        typer.echo(f"{share}  {row['section']}: {row['right']} of {row['asked']}, {row['unknown']} with unknown words")


@app.command()
def convert(
    source: File,
    target: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
    to: Annotated[str | None, typer.Option(help="vec, glove or bin; by default from the name.")] = None,
    from_: From = None,
    limit: Limit = None,
) -> None:
    """Write word vectors in another format, with the same bits.

    Example: [bold]octavo vectors convert glove.6B.100d.txt glove.vec --limit 50000[/bold]
    """
    from octavo.vectors import formats

    wanted = _format(to) or formats.format_of(target)
    vectors = _read(source, limit, from_)
    formats.write(vectors, _new(target), wanted)
    typer.echo(f"{len(vectors):,} words of {vectors.dim} numbers -> {target} ({wanted})")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A run, or a model's folder or file.")],
    target: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
    to: Annotated[str | None, typer.Option(help="vec, glove or bin; by default from the name.")] = None,
) -> None:
    """Write the token embedding of a model as word vectors, words spelt as in its vocabulary.

    Example: [bold]octavo vectors export runs/quickstart tokens.vec[/bold]
    """
    from octavo import language_model
    from octavo.vectors import formats
    from octavo.vectors.embedding import export as rows_of

    wanted = _format(to) or formats.format_of(target)
    _new(target)
    lm = language_model.load(model)
    vectors, left_out = rows_of(lm.network, lm.tokenizer)
    formats.write(vectors, target, wanted)
    more = f"; {left_out:,} tokens with white space in their spelling are left out" if left_out else ""
    typer.echo(f"{len(vectors):,} words of {vectors.dim} numbers -> {target} ({wanted}){more}")
