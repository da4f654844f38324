"""``octavo ngram``: train, score, ARPA files, coverage."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.errors import ConfigError, ConfigErrors, DataError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="N-gram models: counts, smoothing, perplexity, ARPA files.\n\n"
    "Example: octavo ngram train my.txt --out lm   ·   octavo ngram score lm new.txt",
)

Texts = Annotated[list[Path], typer.Argument(help="Text files; a line is a document.")]
Units = Annotated[str, typer.Option(help="What a token is: words, characters, bytes, or the folder of a tokenizer.")]
Memory = Annotated[
    str | None, typer.Option(help="Bound of what is allocated while counting (512M, 2G); the rest lies in files.")
]
UNITS = ("words", "characters", "bytes")


@app.command()
def train(
    texts: Texts,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    order: Annotated[int, typer.Option(min=1, max=16, help="Length of the longest n-gram.")] = 5,
    smoothing: Annotated[
        str,
        typer.Option(
            help="modified_kneser_ney, kneser_ney, katz, interpolated, stupid_backoff, add_k, mle; or infinigram."
        ),
    ] = "modified_kneser_ney",
    units: Units = "words",
    held_out: Annotated[Path | None, typer.Option(help="Text on which interpolated learns its weights.")] = None,
    memory: Memory = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of the smoothing: KEY=VALUE.")] = None,
) -> None:
    """Count a text and write a model.

    Examples: [bold]octavo ngram train my.txt --out lm --order 3[/bold]   ·
    [bold]octavo ngram train my.txt --out lm --smoothing add_k --set k=0.1 --units characters[/bold]
    """
    from octavo.ngrams import InfiniGram, NGram, NGramCounts
    from octavo.ngrams.counting import TokenStream
    from octavo.ngrams.scratch import Scratch

    bound = _bytes(memory)
    reader = _Reader.of(units)
    scratch = Scratch(bound)
    if smoothing == "infinigram":
        config = _settings(InfiniGram.Config, smoothing, {}, set_)
        pieces = list(reader.pieces(texts, grow=True))
        documents = (part for piece in pieces for part in _documents(*piece))
        model: Any = InfiniGram.fit(config, documents, reader.vocab_size)
        model.save(out)
        said = f"{len(model.text):,} tokens"
    else:
        fixed = {"order": order, "memory_bytes": bound, "never": reader.never}
        config = _settings(NGram.Config, smoothing, fixed, set_)
        stream = TokenStream(scratch)
        for piece in reader.pieces(texts, grow=True):
            stream.append(*piece)
        counts = NGramCounts.from_stream(stream, reader.vocab_size, order)
        aside = None
        if held_out is not None:
            aside = [part for piece in reader.pieces([held_out]) for part in _documents(*piece)]
        model = NGram.of_counts(config, counts, aside)
        model.save(out)
        said = f"{counts.n_tokens:,} tokens; n-grams of 1..{order}: " + ", ".join(f"{len(k):,}" for k in model.keys)
        fallback = model.said.get("fallback_orders")
        if fallback:
            said += f"; too little text for the discounts of order {', '.join(map(str, fallback))}: 0.5, 1 and 1.5 used"
    reader.save(out)
    typer.echo(f"{said} -> {out}")


@app.command()
def score(
    model: Annotated[Path, typer.Argument(help="A folder of `octavo ngram train`, or an ARPA file.")],
    texts: Texts,
    lines: Annotated[bool, typer.Option("--lines", help="Also print log10 p and unknown tokens of each line.")] = False,
) -> None:
    """Print the perplexity of a text, with and without unknown tokens, as KenLM's query does.

    Examples: [bold]octavo ngram score lm new.txt[/bold]   ·   [bold]octavo ngram score lm.arpa new.txt --lines[/bold]
    """
    import numpy as np

    loaded, reader = _load(model)
    total = of_known = 0.0
    n = n_unknown = 0
    for tokens, starts in reader.pieces(texts):
        offsets = np.append(starts, len(tokens))
        nats = loaded.log_probs(tokens, offsets)
        first = np.zeros(len(tokens), bool)
        first[starts] = True
        unknown = tokens[~first] == reader.unknown
        total += float(nats.sum())
        of_known += float(nats[~unknown].sum())
        n, n_unknown = n + len(nats), n_unknown + int(unknown.sum())
        if lines:
            ends = offsets - np.arange(len(offsets))
            for a, b in zip(ends[:-1].tolist(), ends[1:].tolist()):
                typer.echo(f"Total: {nats[a:b].sum() / math.log(10):.6g} OOV: {int(unknown[a:b].sum())}")
    if not n:
        raise DataError("the text has nothing to score", fix="give a text with at least one line")
    if not loaded.normalised:
        typer.echo(f"Scores of {loaded.config.smoothing.kind} are not probabilities: no perplexity, only a rank.")
    typer.echo(f"Perplexity including OOVs:\t{_perplexity(total, n):.8g}")
    typer.echo(f"Perplexity excluding OOVs:\t{_perplexity(of_known, n - n_unknown):.8g}")
    typer.echo(f"OOVs:\t{n_unknown}")
    typer.echo(f"Tokens:\t{n}")


@app.command()
def arpa(
    source: Annotated[Path, typer.Argument(help="A model folder, or an ARPA file.")],
    out: Annotated[Path, typer.Argument(help="The ARPA file to write, or the model folder.")],
    units: Annotated[str, typer.Option(help="What the words of the file are: words, characters, bytes.")] = "words",
) -> None:
    """Write a model as an ARPA file, or read one into a model folder.

    Examples: [bold]octavo ngram arpa lm lm.arpa[/bold]   ·   [bold]octavo ngram arpa lm.arpa lm[/bold]
    """
    from octavo.ngrams import InfiniGram, write_arpa
    from octavo.ngrams.text import Vocabulary

    loaded, reader = _load(source)
    if source.is_dir():
        if isinstance(loaded, InfiniGram):
            raise ConfigError("a model of unbounded order has no ARPA form", fix="train one with --order")
        write_arpa(loaded, reader.names, out)
    else:
        if units not in UNITS:
            raise ConfigError(f"--units {units}", fix=did_you_mean(units, UNITS, thing="unit"))
        loaded.save(out)
        _Reader(Vocabulary(units, reader.names)).save(out)  # type: ignore[arg-type]
    typer.echo(f"{sum(len(keys) for keys in loaded.keys):,} n-grams -> {out}")


@app.command()
def coverage(
    texts: Texts,
    held_out: Annotated[Path, typer.Option(help="The new text.")],
    order: Annotated[int, typer.Option(min=1, max=16, help="Count n-grams up to this length.")] = 7,
    units: Units = "words",
    memory: Memory = None,
) -> None:
    """Print how many n-grams of a new text the training text has, against n.

    Example: [bold]octavo ngram coverage train.txt --held-out new.txt --order 7[/bold]
    """
    import numpy as np

    from octavo.ngrams import NGramCounts
    from octavo.ngrams.counting import TokenStream
    from octavo.ngrams.coverage import coverage as measure
    from octavo.ngrams.scratch import Scratch

    reader = _Reader.of(units)
    stream = TokenStream(Scratch(_bytes(memory)))
    for piece in reader.pieces(texts, grow=True):
        stream.append(*piece)
    counts = NGramCounts.from_stream(stream, reader.vocab_size, order)
    documents = [part for piece in reader.pieces([held_out]) for part in _documents(*piece)]
    if not documents:
        raise DataError(f"{held_out} is empty", fix="give a text with at least one line")
    offsets = np.cumsum([0, *(len(document) for document in documents)])
    typer.echo("  n   n-grams      seen   distinct      seen   context seen")
    for row in measure(counts, np.concatenate(documents), offsets):
        share = row.distinct_seen / max(1, row.distinct)
        typer.echo(
            f"{row.order:3d} {row.n:9d} {row.share:8.2%}  {row.distinct:9d} {share:8.2%}"
            f"      {row.contexts_seen / max(1, row.n):8.2%}"
        )


class _Reader:
    """Text files as ids, with a vocabulary of ours or a tokenizer."""

    def __init__(self, vocabulary: Any):
        self.vocabulary = vocabulary
        self.ours = hasattr(vocabulary, "units")

    @classmethod
    def of(cls, units: str) -> _Reader:
        from octavo.ngrams.text import Vocabulary
        from octavo.tokenizer import Tokenizer

        if units in UNITS:
            return cls(Vocabulary(units))  # type: ignore[arg-type]
        if not Path(units).exists():
            raise ConfigError(f"--units {units} is neither a unit nor a tokenizer", fix=did_you_mean(units, UNITS))
        return cls(Tokenizer.load(units))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary) if self.ours else self.vocabulary.vocab_size

    @property
    def never(self) -> int | None:
        return self.vocabulary.bos if self.ours else self.vocabulary.special.bos

    @property
    def unknown(self) -> int:
        if self.ours:
            return self.vocabulary.unk
        unk = getattr(self.vocabulary.special, "unk", None)
        return -1 if unk is None else unk

    @property
    def names(self) -> list[str]:
        """A word for every id, without white space."""
        if self.ours:
            return self.vocabulary.names
        special = self.vocabulary.special
        names = [self.vocabulary.token_text(id) for id in range(self.vocab_size)]
        for name, id in (("<unk>", self.unknown), ("<s>", special.bos), ("</s>", special.eos)):
            if id is not None and id >= 0:
                names[id] = name
        names = ["".join(c if c.isprintable() and not c.isspace() else f"<0x{ord(c):02X}>" for c in n) for n in names]
        seen: set[str] = set()
        for id, name in enumerate(names):
            names[id] = name if name and name not in seen else f"{name}<{id}>"
            seen.add(names[id])
        return names

    def pieces(self, texts: list[Path], *, grow: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        import numpy as np

        from octavo.ngrams.counting import flatten
        from octavo.ngrams.text import encode_files, read_lines

        missing = next((path for path in texts if not path.is_file()), None)
        if missing is not None:
            raise DataError(f"{missing} is no file", fix="give text files")
        if self.ours:
            yield from encode_files(self.vocabulary, texts, grow=grow)
            return
        special = self.vocabulary.special
        before = [np.array([i], np.int32) for i in (special.bos,) if i is not None]
        after = [np.array([i], np.int32) for i in (special.eos,) if i is not None]
        for lines in read_lines(texts):
            try:
                encoded = self.vocabulary.encode_batch(lines.decode("utf-8").split("\n")[:-1])
            except UnicodeDecodeError as error:
                raise DataError(f"the text is not UTF-8: {error}", fix="convert it first, with iconv") from None
            tokens, offsets = flatten([np.concatenate([*before, ids, *after]) for ids in encoded])
            yield tokens, offsets[:-1]

    def save(self, folder: Path) -> None:
        from octavo.ngrams.text import save_vocabulary

        if self.ours:
            save_vocabulary(self.vocabulary, folder)
        else:
            self.vocabulary.save(folder / "tokenizer")


def _documents(tokens: np.ndarray, starts: np.ndarray) -> Iterator[np.ndarray]:
    ends = [*starts[1:].tolist(), len(tokens)]
    return (tokens[a:b] for a, b in zip(starts.tolist(), ends))


def _load(path: Path) -> tuple[Any, _Reader]:
    from octavo.ngrams import load, read_arpa
    from octavo.ngrams.text import Vocabulary, load_vocabulary
    from octavo.tokenizer import Tokenizer

    if not path.is_dir():
        model, names = read_arpa(path)
        return model, _Reader(Vocabulary("words", names))
    model = load(path)
    if (path / "tokenizer").is_dir():
        return model, _Reader(Tokenizer.load(path / "tokenizer"))
    return model, _Reader(load_vocabulary(path, model.vocab_size))


def _perplexity(nats: float, n: int) -> float:
    """exp of the mean of -ln p: the minus sign is part of it."""
    if not n:
        return math.nan
    return math.exp(-nats / n) if nats / n > -700 else math.inf


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)([KMG]?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"--memory {text} is no size", fix="write for example 512M or 2G")
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2].upper()]


def _settings(config: Any, kind: str, fixed: dict[str, Any], set_: list[str] | None) -> Any:
    """The configuration of the options, or the refusal in our form."""
    import yaml
    from pydantic import ValidationError

    from octavo.ngrams.backing_off import SMOOTHINGS

    kinds = [name for name in (*SMOOTHINGS, "infinigram") if name != "arpa"]
    if kind not in kinds:
        raise ConfigError(f"there is no smoothing {kind!r}", fix=did_you_mean(kind, kinds, thing="smoothing"))
    given: dict[str, Any] = {}
    for item in set_ or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r} is not KEY=VALUE", fix="write for example --set k=0.1")
        given[key] = yaml.safe_load(value)
    settings = given if kind == "infinigram" else {**fixed, "smoothing": {"kind": kind, **given}}
    try:
        return config.model_validate(settings)
    except ValidationError as error:
        raise ConfigErrors(
            ConfigError(f"{'.'.join(map(str, found['loc']))}: {found['msg']}", fix="see `octavo ngram train --help`")
            for found in error.errors()
        ) from None
