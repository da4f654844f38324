"""``octavo data``: read, clean and tokenise text, and look at what came of it."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.text import Text

    from octavo.config import Recipe
    from octavo.data.check import Finding
    from octavo.data.prepare import DataConfig, Progress
    from octavo.tokenizer import Tokenizer

app = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="Read, clean, check and pack text; show what a step sees.\n\n"
    "Example: octavo data prepare python-stdlib --out data   ·   octavo data check runs/quickstart",
)


RunOrRecipe = Annotated[
    list[str], typer.Argument(metavar="RUN|RECIPE", help="A run; or a recipe, then `section.key=value` overrides.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes. Default: one for each processor.")]


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
    workers: Workers = None,
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
def show(
    words: RunOrRecipe,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch to show.")] = 4,
    stage: Annotated[str | None, typer.Option(help="pretrain or tune. Default: the first there is.")] = None,
    split: Annotated[str, typer.Option(help="train, or valid: what every validation looks at.")] = "train",
    step: Annotated[int, typer.Option(min=0, help="0 is the first, which metrics.jsonl has as step 1.")] = 0,
    ids: Annotated[bool, typer.Option("--ids", help="Every token by itself, with its id.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page instead: one file that opens anywhere.")] = None,
    workers: Workers = None,
) -> None:
    """Show exactly what the model sees in a step: rows, document borders, what is trained, what is cut off.

    The rows are those of the training itself. A recipe that was not run is first prepared in a temporary folder.

    Examples: [bold]octavo data show runs/quickstart --stage tune --step 99[/bold]   ·
    [bold]octavo data show my.yaml train.seq_len=128 --html rows.html[/bold]
    """
    from octavo import feed
    from octavo.data import show as shown
    from octavo.files import write_atomic
    from octavo.report.html import check_ours

    if split not in ("train", "valid"):
        raise ConfigError(f"there is no split {split!r}", fix="use train or valid")
    if html is not None:
        check_ours(html)
    with _opened(words, workers) as (recipe, folder):
        stage = stage or next(iter(feed.stages(recipe)), "pretrain")
        with warnings.catch_warnings(record=True) as told:
            found = feed.look(recipe, folder, stage, split=split, step=step, n=rows)
        for line in dict.fromkeys([*feed.changed(recipe, folder), *(str(warning.message) for warning in told)]):
            typer.echo(f"warning: {line}", err=True)
    title = f"{recipe.name}: {stage}" + ", held out" * (split == "valid")
    if html is not None:
        page = shown.to_html(found.rows, found.noun, title=title, lead=found.lead, with_ids=ids)
        write_atomic(html, page)
        typer.echo(f"{title}, {found.lead}\npage  {html}")
    elif _in_colour():
        _print_rich(shown.to_rich(found.rows, found.noun, with_ids=ids), f"{title}, {found.lead}")
    else:
        typer.echo(f"{title}, {found.lead}\n{shown.to_plain(found.rows, found.noun, with_ids=ids)}", nl=False)


@app.command()
def check(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|RECIPE|FILES",
            help="A run; a recipe, then overrides; or files, folders and patterns of texts and conversations.",
        ),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="For files: a tokenizer or model folder, to look at tokens.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="For files: tokens in a row.")] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="For files: what must not stand in them too.")] = None,
    text_field: Annotated[str | None, typer.Option(help="For files: field with the text.")] = None,
    encoding: Annotated[str | None, typer.Option(help="For files: encoding of the texts.")] = None,
    max_documents: Annotated[int, typer.Option(min=1, help="Look at no more documents than this.")] = 20_000,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    workers: Workers = None,
) -> None:
    """Say whether the data would spoil a training: duplicates, encoding, leaks, prompts, is the stop token trained?

    Leaves with 0 where nothing would, also with warnings, and with 3 where something would. Nothing is changed.

    Examples: [bold]octavo data check runs/quickstart[/bold]   ·
    [bold]octavo data check chat.jsonl --tokenizer runs/quickstart --seq-len 256[/bold]
    """
    from octavo import feed
    from octavo.data import check_files

    for_files = {"--tokenizer": tokenizer, "--seq-len": seq_len, "--held-out": held_out, "--text-field": text_field,
                 "--encoding": encoding}  # fmt: skip
    with warnings.catch_warnings():  # what they say is among the findings
        warnings.simplefilter("ignore")
        if _is_run_or_recipe(words[0]):
            if given := [name for name, value in for_files.items() if value is not None]:
                raise ConfigError(f"{given[0]} is for files", fix="leave it out: a run or recipe says it")
            with _opened(words, workers, quiet=json) as (recipe, folder):
                found = list(feed.check(recipe, folder, limit=max_documents))
        else:
            found = list(check_files.files(
                words, held_out=held_out or (), tokenizer=_tokenizer(tokenizer), seq_len=seq_len, limit=max_documents,
                settings={k: v for k, v in (("text_field", text_field), ("encoding", encoding)) if v is not None},
            ))  # fmt: skip
    typer.echo(check_files.as_json(words, found) if json else _verdicts(found))
    failed = [(part, finding) for part, finding in found if finding.verdict == "fail"]
    if failed:
        names = ", ".join(f"{part}: {finding.name}" for part, finding in failed)
        raise DataError(
            f"these data would spoil a training ({names})", fix=failed[0][1].fix, kept="nothing was changed"
        )


def _verdicts(found: Sequence[tuple[str, Finding]]) -> str:
    """A line for each finding, under the part of the data it is about."""
    from octavo.report.words import printable

    colours = {"ok": "green", "warn": "yellow", "fail": "red"} if _in_colour() else {}
    width = max((len(finding.name) for _, finding in found), default=0)
    out, part = [], None
    for place, finding in found:
        if place != part:
            out += ["", place] if out else [place]
            part = place
        mark = typer.style(f"{finding.verdict:<4}", fg=colours.get(finding.verdict), bold=True if colours else None)
        fix = f". Fix: {finding.fix}" if finding.fix and finding.verdict != "ok" else ""
        out.append(f"  {mark}  {finding.name:<{width}}  {printable(finding.text + fix)}")
        out += [f"        {printable(example)}" for example in finding.examples if finding.verdict != "ok"]
    counts = Counter(finding.verdict for _, finding in found)
    total = ", ".join(f"{counts[name]} {name}" for name in ("ok", "warn", "fail"))
    return "\n".join([*out, "", f"verdict: {total}"])


def _tokenizer(path: Path | None) -> Tokenizer | None:
    from octavo.tokenizer import Tokenizer

    inner = [path / name for name in ("tokenizer", "model", "base")] if path is not None else []  # of a run
    found = next((p for p in inner if (p / "tokenizer.json").is_file()), path)
    return None if found is None else Tokenizer.load(found)


def _is_run_or_recipe(word: str) -> bool:
    from octavo.config import names

    path = Path(word)
    return (
        (path / "recipe.yaml").is_file() or path.suffix in (".yaml", ".yml") or (word in names() and not path.exists())
    )


def _in_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _print_rich(lines: list[Text], title: str) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(title, style="bold", overflow="fold")
    for line in lines:
        console.print(line, overflow="fold")


@contextmanager
def _opened(words: list[str], workers: int | None = None, *, quiet: bool = False) -> Iterator[tuple[Recipe, Path]]:
    """A run's recipe and folder; or a recipe, and a temporary folder in which its data are prepared.

    Raises:
        ConfigError: it is neither, or a run was given overrides.
    """
    from octavo import pipeline
    from octavo.config import Recipe
    from octavo.run import RunFolder
    from octavo.stop import StopSignal
    from octavo.training.progress import Console

    name, *overrides = words
    if Path(name).is_dir():
        run = RunFolder(name)
        plain = run.read_recipe()
        if plain is None:
            raise ConfigError(f"{name} is not a run folder", fix="give the folder of a run, or a recipe")
        if overrides:
            raise ConfigError(f"override {overrides[0]!r}: a run is what it is", fix="give its recipe instead")
        yield Recipe.parse(plain, str(run.recipe_path)), run.path
        return
    recipe = Recipe.load(name, overrides)
    with tempfile.TemporaryDirectory(prefix="octavo-data-") as scratch:
        console = Console("quiet" if quiet else "auto")
        console.note(f"preparing the data of {recipe.name} in a temporary folder (`octavo run` would keep them)")
        job = pipeline.Job(recipe, RunFolder(scratch), console, StopSignal(), workers)
        pipeline.read_documents(job)
        pipeline.tokenise(job)
        yield recipe, Path(scratch)


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
