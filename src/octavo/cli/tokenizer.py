"""``octavo tokenizer``: train, encode, decode, inspect, trace."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.errors import ConfigError, ConfigErrors, DataError, did_you_mean

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Train, apply and inspect tokenizers.\n\nExample: octavo tokenizer train my/*.txt --out tok",
)

Where = Annotated[Path, typer.Argument(help="A tokenizer folder, a tokenizer.json, a model folder or a run.")]
TextArgument = Annotated[str, typer.Argument(help="The text; - reads it from standard input.")]


def _text(value: str) -> str:
    if value != "-":
        return value
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not UTF-8: byte 0x{error.object[error.start]:02X} at {error.start}",
            fix="convert it first, for example with iconv",
        ) from None


def _load(path: Path) -> Any:
    from octavo.tokenizer import Tokenizer

    for inner in ("tokenizer", "model", "base"):  # a run folder
        if path.is_dir() and not (path / "tokenizer.json").is_file() and (path / inner / "tokenizer.json").is_file():
            path = path / inner
    return Tokenizer.load(path)


def _refusal(kind: str, found: Any) -> ConfigError:
    """One finding of pydantic in our form."""
    from octavo.tokenizer import CONFIGS

    if found["type"].startswith("union_tag"):
        return ConfigError(f"there is no tokenizer kind {kind!r}", fix=did_you_mean(kind, CONFIGS, thing="kind"))
    where = ".".join(str(part) for part in found["loc"][1:]) or "settings"
    if found["type"] == "extra_forbidden":
        fields = [name for name in CONFIGS[kind].model_fields if name != "kind"]
        return ConfigError(f"{kind} has no setting {where!r}", fix=did_you_mean(where, fields, thing="setting"))
    return ConfigError(f"{where} = {found['input']!r}: {found['msg'][:1].lower()}{found['msg'][1:]}", fix="change it")


@app.command()
def train(
    sources: Annotated[
        list[str], typer.Argument(help="Files, folders, patterns, python-stdlib, or - for standard input.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    kind: Annotated[str, typer.Option(help="byte_bpe, bpe, unigram, wordpiece, word, character or byte.")] = "byte_bpe",
    vocab_size: Annotated[int | None, typer.Option(help="Number of ids, specials included.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A further setting of the kind: KEY=VALUE.")] = None,
) -> None:
    """Train a tokenizer on text and save it in the Hugging Face layout.

    Examples: [bold]octavo tokenizer train python-stdlib --out tok --vocab-size 4096[/bold]   ·
    [bold]octavo tokenizer train "books/**/*.txt" --out tok --set split=llama3[/bold]
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from octavo.data import sources as data_sources
    from octavo.tokenizer import TokenizerConfig
    from octavo.tokenizer import train as train_tokenizer

    settings: dict[str, Any] = {"kind": kind}
    if vocab_size is not None:
        settings["vocab_size"] = vocab_size
    for item in set_ or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r} is not KEY=VALUE", fix="write for example --set split=llama3")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {item!r}: the value is not YAML", fix="quote it") from None
    try:
        config = TypeAdapter(TokenizerConfig).validate_python(settings)
    except ValidationError as error:
        raise ConfigErrors(_refusal(kind, found) for found in error.errors()) from None
    texts = (document.text for document in data_sources.read(sources)) if sources != ["-"] else [_text("-")]
    tokenizer = train_tokenizer(config, texts)
    tokenizer.save(out)
    typer.echo(f"{tokenizer.vocab_size} ids -> {out}")


@app.command()
def encode(
    tokenizer: Where,
    text: TextArgument,
    parse_special: Annotated[bool, typer.Option(help="Let the text spell special tokens.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Print the ids of a text.

    Examples: [bold]octavo tokenizer encode tok "Hello, world"[/bold]   ·
    [bold]octavo tokenizer encode tok - < book.txt[/bold]
    """
    ids = _load(tokenizer).encode(_text(text), parse_special=parse_special)
    typer.echo(json.dumps(ids) if as_json else " ".join(map(str, ids)))


@app.command()
def decode(
    tokenizer: Where,
    ids: Annotated[list[str], typer.Argument(help="Ids, or - to read them from standard input.")],
    specials: Annotated[bool, typer.Option(help="Show special tokens by name.")] = False,
) -> None:
    """Print the text of ids.

    Examples: [bold]octavo tokenizer decode tok 72 101 108[/bold]   ·
    [bold]octavo tokenizer encode tok "Hello" | octavo tokenizer decode tok -[/bold]
    """
    words = " ".join(_text("-") if word == "-" else word for word in ids).replace(",", " ").strip("[] \n").split()
    bad = next((word for word in words if not (word.isascii() and word.isdigit()) or len(word) > 10), None)
    if bad is not None:
        raise ConfigError(f"{bad[:40]!r} is not a token id", fix="give whole numbers separated by spaces")
    typer.echo(_load(tokenizer).decode(map(int, words), skip_special=not specials))


@app.command()
def inspect(
    tokenizer: Where,
    text: TextArgument,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the coloured tokens.")] = None,
    parse_special: Annotated[bool, typer.Option(help="Let the text spell special tokens.")] = False,
) -> None:
    """Show a text with its tokens coloured, each with its id.

    Examples: [bold]octavo tokenizer inspect tok "Hello, world"[/bold]   ·
    [bold]octavo tokenizer inspect tok - --html tokens.html < book.txt[/bold]
    """
    from rich.console import Console

    from octavo.files import write_atomic
    from octavo.tokenizer.spans import spans, to_html, to_rich

    loaded = _load(tokenizer)
    items = spans(loaded, loaded.encode(_text(text), parse_special=parse_special))
    n_bytes = sum(len(span.raw) for span in items)
    console = Console(highlight=False)
    console.print(to_rich(items), soft_wrap=True)
    console.print(f"{len(items)} tokens, {n_bytes} bytes, {n_bytes / max(len(items), 1):.2f} bytes a token")
    if html is not None:
        write_atomic(html, to_html(items))
        console.print(f"page: {html}", markup=False)


@app.command()
def trace(
    text: Annotated[str, typer.Argument(help="The text to train on; - reads it; the notes' examples by default.")] = "",
    kind: Annotated[str, typer.Option(help="bpe or unigram.")] = "bpe",
    merges: Annotated[int, typer.Option(min=1, help="Merges to show at most (bpe).")] = 20,
    size: Annotated[int, typer.Option(min=1, help="Pieces to end with (unigram).")] = 8,
) -> None:
    """Show how BPE or Unigram learns from a text, step by step; without a text, the notes' own examples.

    Examples: [bold]octavo tokenizer trace[/bold]   ·
    [bold]octavo tokenizer trace "ababc ab abc" --kind unigram[/bold]
    """
    from octavo.tokenizer import trace as tracing

    if kind not in ("bpe", "unigram"):
        raise ConfigError(f"--kind {kind} has no trace", fix="use bpe or unigram")
    given = _text(text)
    if kind == "bpe":
        lines = [*tracing.trace_bpe(given or tracing.SENTENCE, n_merges=merges)]
        lines += [] if given else ["", *tracing.compare_note(), "", *tracing.compare_hello()]
    else:
        lines = [*tracing.trace_unigram(given or "ababc", size=size)]
        lines += [] if given else ["", *tracing.compare_ababc()]
    for line in lines:
        typer.echo(line)
