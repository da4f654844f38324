"""``octavo data``: read, clean and tokenise text, and look at what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from octavo.data.prepare import DataConfig, Progress

app = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="Read, clean and pack text into shards.\n\nExample: octavo data prepare python-stdlib --out data",
)


@app.callback()
def data() -> None:
    """Read, clean and tokenise text into shards."""


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|PATH...",
            help="Files, folders, patterns or `python-stdlib`; or one recipe, then `data.key=value` overrides.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data"),
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder: also write token shards.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one for each processor.")] = None,
    held_out: Annotated[
        float | None, typer.Option(min=0, help="Share (0.01) or number (50) of documents to hold out.")
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Field with the text in .jsonl and .parquet.")] = None,
    document_bytes: Annotated[int | None, typer.Option(help="Cut longer texts at blank lines.")] = None,
    on_bad_row: Annotated[str | None, typer.Option(help="error, or skip (listed in rejected.jsonl).")] = None,
    encoding: Annotated[str | None, typer.Option(help="Encoding of the files (gb18030, latin-1 ...).")] = None,
) -> None:
    """Read and clean text, remove duplicates, hold some out; with a tokenizer, write shards.

    Run it again after an interruption: it goes on where it was.

    Example: [bold]octavo data prepare 'books/**/*.txt' --out corpus --tokenizer runs/quickstart/tokenizer[/bold]
    """
    from octavo.data.prepare import clean_documents
    from octavo.data.shards import write_shards

    given = {
        "text_field": text_field,
        "document_bytes": document_bytes,
        "on_bad_row": on_bad_row,
        "encoding": encoding,
    }
    config = _config(sources, {name: value for name, value in given.items() if value is not None}, held_out)
    with _bars() as progress:
        report = clean_documents(config, out, workers=workers, progress=progress)
        typer.echo(str(report))
        if tokenizer is not None:
            for split in (name for name, counts in report.splits.items() if counts["documents"]):
                shards = write_shards(out, split, tokenizer, workers=workers, progress=progress)
                typer.echo(f"{split}: {shards.n_tokens:,} tokens in {shards.folder}")


def _config(words: list[str], given: dict[str, Any], held_out: float | None) -> DataConfig:
    from octavo.config import Recipe, names
    from octavo.data.prepare import DataConfig

    paths = [word for word in words if "=" not in word or Path(word).exists()]
    overrides = [word for word in words if word not in paths]
    is_recipe = len(paths) == 1 and (Path(paths[0]).suffix in (".yaml", ".yml") or paths[0] in names())
    if is_recipe and not Path(paths[0]).is_dir():
        found = Recipe.load(paths[0], overrides).data
        if found is None:
            raise ConfigError(f"recipe {paths[0]} has no data section", fix="add `data: {sources: [PATH]}`")
    elif overrides:
        raise ConfigError(f"override {overrides[0]!r} without a recipe", fix="give a recipe first, or use the options")
    else:
        return _changed(DataConfig.model_validate({"sources": paths}), given, held_out)
    return _changed(found, given, held_out)


def _changed(config: DataConfig, given: dict[str, Any], held_out: float | None) -> DataConfig:
    """``config`` with the options of the command line.

    Raises:
        ConfigErrors: an option is not what it should be.
    """
    from octavo.config import Recipe

    raw = config.model_dump()
    raw["sources"] = [{**source, **given} for source in raw["sources"]]
    if held_out is not None:
        raw["split"]["held_out"] = int(held_out) if held_out >= 1 else held_out
    checked = Recipe.parse({"data": raw, "train": {}}, "command line").data
    return checked or config


@contextmanager
def _bars() -> Iterator[Progress]:
    """One progress line a stage."""
    from octavo.training.progress import Bar, Console

    console = Console()
    open_bars: dict[str, Bar] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in open_bars:
            for bar in open_bars.values():
                bar.close()
            open_bars[stage] = console.bar(total or None, "byte", stage)
        bar = open_bars[stage]
        bar.update(done - bar.progress.done)

    try:
        yield progress
    finally:
        for bar in open_bars.values():
            bar.close()


@app.command()
def stats(
    folder: Annotated[Path, typer.Argument(help="What `data prepare --out` wrote, a run, or one folder of shards.")],
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Also say how rows of this length would be packed.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Check the hash of every file.")] = True,
) -> None:
    """Say what is in prepared data, and whether it is whole.

    Example: [bold]octavo data stats runs/quickstart --seq-len 256[/bold]
    """
    from octavo.data.pack import StreamRows
    from octavo.data.prepare import read_json
    from octavo.data.report import Report
    from octavo.data.shards import Shards

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", fix="give what `octavo data prepare --out` wrote")
    if (folder / "data").is_dir():
        folder = folder / "data"
    report = read_json(folder / "report.json")
    if report is not None:
        typer.echo(str(Report.from_dict(report)))
    found = [f for f in (folder, folder / "train", folder / "valid") if (f / "manifest.json").is_file()]
    if report is None and not found:
        raise DataError(f"no prepared data in {folder}", fix="give what `octavo data prepare --out` wrote")
    for place in found:
        shards = Shards.open(place, verify=verify)
        lengths = shards.offsets[1:] - shards.offsets[:-1]
        typer.echo(
            f"{place}: {shards.n_documents:,} documents, {shards.n_tokens:,} tokens "
            f"(median {int(sorted(lengths.tolist())[len(lengths) // 2]):,}, longest {int(lengths.max()):,}), "
            f"{shards.n_bytes / shards.n_tokens:.2f} bytes a token, vocabulary {shards.vocab_size:,} "
            f"({shards.vocab_hash[:12]}), {'verified' if verify else 'sizes checked'}"
        )
        if seq_len is not None:
            typer.echo(f"  packed at {seq_len}: {StreamRows(shards, seq_len).report()}")
