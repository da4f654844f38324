"""``octavo store``: passages that a model can look up, changed without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from octavo.retrieval.index import Embed
    from octavo.retrieval.store import Passage, Store, StoreConfig

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make, change and search a store of passages that `octavo chat --store` and `octavo serve --store` look up."
    "\n\nExample: octavo store build facts notes/*.md     octavo store search facts 'When was it founded?'",
)

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="The folder of the store.")]
Texts = Annotated[list[Path], typer.Argument(metavar="TEXT", help="Text files, or JSONL with a text in each line.")]
Size = Annotated[int, typer.Option(min=20, help="Characters of a passage, at most about.")]


@app.command()
def build(
    store: Folder,
    texts: Texts,
    model: Annotated[
        str | None, typer.Option(help="Search by vectors of this model (a run or folder) instead of by words.")
    ] = None,
    size: Size = 800,
) -> None:
    """Make a new store of texts, cut into passages.

    Examples: [bold]octavo store build facts notes.md[/bold]   ·   [bold]octavo store build facts notes.md --model
    runs/encoder[/bold]
    """
    from octavo.retrieval.store import Store

    read = _passages(texts, size)  # before the folder is made
    embed = Encoder(model) if model else None
    made = Store.create(store, _config(store, model), embed)
    made.add(read)
    typer.echo(f"{store}: {_counted(len(made.passages))}")
    _tell_cut(embed, made.passages)


@app.command()
def add(store: Folder, texts: Texts, size: Size = 800) -> None:
    """Add texts to a store.

    Example: [bold]octavo store add facts news.md[/bold]
    """
    read = _passages(texts, size)
    opened = open_store(store)
    made = opened.add(read)
    typer.echo(f"{store}: {_counted(len(made))} more, {len(opened.passages):,} in all")
    _tell_cut(opened.embed, made)


@app.command()
def remove(
    store: Folder,
    source: Annotated[str | None, typer.Option(help="All passages of this file, as it was given.")] = None,
    ids: Annotated[list[int] | None, typer.Option("--id", help="The passage of this number; repeatable.")] = None,
) -> None:
    """Take passages out of a store.

    Example: [bold]octavo store remove facts --source news.md[/bold]   ·   [bold]octavo store remove facts --id 7[/bold]
    """
    from octavo.errors import ConfigError

    if source is None and not ids:
        raise ConfigError("nothing to remove is named", fix="give --source FILE or --id N")
    opened = open_store(store)
    n = opened.remove(ids=ids or (), source=source)
    if not n:
        raise ConfigError("the store has no such passage", fix="see the numbers with `octavo store search`")
    typer.echo(f"{store}: {n:,} passages removed, {len(opened.passages):,} left")


@app.command()
def index(
    store: Folder,
    model: Annotated[str | None, typer.Option(help="Search by vectors of this model; without: by words.")] = None,
) -> None:
    """Search a store in another way from now on, or by another model or one that has moved. No passage changes.

    Example: [bold]octavo store index facts --model runs/encoder[/bold]   ·   [bold]octavo store index facts[/bold]
    """
    from octavo.retrieval.store import Store

    embed = Encoder(model) if model else None
    opened = Store.open(store, embed, check=False)
    opened.index_by(_config(store, model), embed)
    typer.echo(f"{store}: {len(opened.passages):,} passages, by {f'vectors of {model}' if model else 'words'}")
    _tell_cut(embed, opened.passages)


@app.command()
def search(
    store: Folder,
    query: Annotated[str, typer.Argument(help="What is looked for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="At most so many passages.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the passages that fit best.

    Example: [bold]octavo store search facts "When was it founded?" -k 5[/bold]
    """
    from dataclasses import asdict

    from octavo.report.words import printable

    hits = open_store(store).search(query, k)
    if as_json:
        typer.echo(json.dumps({"hits": [{**asdict(hit.passage), "score": hit.score} for hit in hits]}, indent=1))
        return
    for hit in hits:
        typer.echo(printable(f"{hit.score:7.3f}  #{hit.passage.id}  {hit.passage.source}\n{hit.passage.text}\n"))
    if not hits:
        typer.echo("nothing fits")


def open_store(folder: Path) -> Store:
    """The store of a folder, with the model that embeds if it has one."""
    from octavo.errors import ConfigError
    from octavo.retrieval.store import Store, model_of

    model = model_of(folder)
    try:
        embed = Encoder(model) if model else None
    except ConfigError as error:
        fix = f"put it back, or octavo store index {folder} --model MODEL"
        raise ConfigError(f"the store {folder} is searched with a model: {error.what}", fix=fix) from None
    return Store.open(folder, embed)


def looking_up(folder: Path | None, k: int) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None:
    """What puts ``k`` passages of a store before the last question of a conversation; None without a store.

    A store that was changed meanwhile is read anew.
    """
    if folder is None:
        return None
    from octavo.retrieval.answering import looked_up

    held = open_store(folder)
    seen = (folder / "store.json").stat().st_mtime_ns

    def look_up(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        nonlocal held, seen
        if (now := (folder / "store.json").stat().st_mtime_ns) != seen:
            held, seen = open_store(folder), now
        return looked_up(held, messages, k)[0]

    return look_up


class Encoder:
    """What turns texts into vectors: the embeddings of a run or a model folder.

    Raises:
        ConfigError: the model is not there, or makes none.
    """

    def __init__(self, model: str):
        import octavo
        from octavo.errors import ConfigError
        from octavo.models.encoder_decoder import EncoderDecoder

        self.lm = octavo.load(model)
        if isinstance(self.lm.network, EncoderDecoder):
            raise ConfigError(f"{model} is an encoder-decoder, which has no vectors of texts", fix="use an encoder")
        said = self.lm.sentences.max_tokens if self.lm.sentences is not None else None
        self.limit = min(said or self.lm.max_seq_len, self.lm.max_seq_len)  # tokens of a text that are read

    def n_cut(self, texts: Sequence[str]) -> int:
        """How many texts are longer than what is read of them."""
        special = self.lm.tokenizer.special
        room = self.limit - (special.first is not None) - (special.last is not None)
        return sum(len(ids) > room for ids in self.lm.tokenizer.encode_batch(list(texts)))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        from octavo.training.progress import Console

        if len(texts) == 1:  # a question
            return self.lm.embed(texts)
        with Console().bar(len(texts), "passage") as bar:
            shown = 0

            def progress(done: int) -> None:
                nonlocal shown
                bar.update(done - shown)
                shown = done

            return self.lm.embed(texts, progress=progress)


def _config(store: Path, model: str | None) -> StoreConfig:
    from octavo.retrieval.index import Dense
    from octavo.retrieval.store import StoreConfig, named_from

    return StoreConfig(index=Dense.Config(model=named_from(store, model))) if model else StoreConfig()


def _tell_cut(embed: Embed | None, passages: Sequence[Passage]) -> None:
    if isinstance(embed, Encoder) and (n := embed.n_cut([passage.text for passage in passages])):
        typer.echo(
            f"{n:,} of them are longer than the {embed.limit} tokens that the model reads: "
            "their ends are not compared (--size makes shorter ones)",
            err=True,
        )


def _passages(files: list[Path], size: int) -> list[tuple[str, str]]:
    """(passage, file) of every file."""
    from octavo.errors import DataError
    from octavo.retrieval.store import cut

    found: list[tuple[str, str]] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}", fix="check the path") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text at byte {error.start:,}", fix="save it as UTF-8") from None
        if file.suffix == ".jsonl":
            texts = [_text_of(line, file, n) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        else:
            texts = [text]
        found += [(passage, str(file)) for one in texts for passage in cut(one, size)]
    if not found:
        raise DataError("the files have no text", fix="give files with text")
    return found


def _text_of(line: str, file: Path, number: int) -> str:
    from octavo.errors import DataError

    try:
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            return row["text"]
    except ValueError:
        pass
    raise DataError(f"{file}:{number} has no text", fix='a line is {"text": ...}')


def _counted(n: int) -> str:
    return f"{n:,} passage{'' if n == 1 else 's'}"
