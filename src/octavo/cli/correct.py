"""``octavo correct``: the text behind a noisy signal, typed letters or pinyin, by a counted model of text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from octavo.channel.contract import Channel
    from octavo.channel.language import CharacterModel

app = typer.Typer(rich_markup_mode="rich")

CHANNELS = ("typing", "pinyin")
BEFORE = 200  # characters of what was corrected already that the next line is read after


@app.command()
def correct(
    text: Annotated[str | None, typer.Argument(help="What was typed; - or none: standard input, line by line.")] = None,
    model: Annotated[Path | None, typer.Option(help="The run or folder of an n-gram over characters or bytes.")] = None,
    channel: Annotated[str, typer.Option(help="typing: slips of the finger. pinyin: Chinese as syllables.")] = "typing",
    table: Annotated[
        Path | None, typer.Option(help="pinyin: lines of a syllable, a tab and its characters (and how often each).")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Learn the channel from lines of what was typed, a tab, what was meant.")
    ] = None,
    alphabet: Annotated[
        str | None, typer.Option(help="typing: the letters that are mistaken. Default: those that the model knows.")
    ] = None,
    rates: Annotated[
        str, typer.Option(help="typing: how often, such as insert=0.01,delete=0.01,substitute=0.02,transpose=0.01.")
    ] = "",
    beam: Annotated[int, typer.Option(min=0, help="Contexts that live on at each letter; 0 for all: exact.")] = 32,
    n: Annotated[int, typer.Option("--n", min=1, max=100, help="Show so many readings of a line, with ln p.")] = 1,
    weight: Annotated[float, typer.Option(min=0, help="Of the language model; 0 hears the channel alone.")] = 1.0,
    rescore: Annotated[
        Path | None, typer.Option(help="Order the readings of the search by this model, of any kind.")
    ] = None,
) -> None:
    """Correct typing errors, or turn pinyin into Chinese: the likeliest text behind what was typed.

    Searches for the text with the largest p(text) · p(typed | text); lines are read one after the other, each
    after those before it. Any alphabet will do: the model has to be counted with tokenizer.kind character or byte.

    Examples: [bold]octavo correct "teh quick borwn fox" --model runs/letters[/bold]   ·
    [bold]octavo correct --model runs/hanzi --channel pinyin --table pinyin.tsv < typed.txt[/bold]
    """
    if model is None:
        raise ConfigError("there is no model to tell likely texts", fix="give the run of an n-gram with --model")
    if channel not in CHANNELS:
        raise ConfigError(f"there is no channel {channel!r}", fix=did_you_mean(channel, CHANNELS, thing="channel"))
    misplaced = {"--table": table} if channel == "typing" else {"--alphabet": alphabet, "--rates": rates}
    for option, value in misplaced.items():
        if value:
            raise ConfigError(f"{option} is no setting of the channel {channel}", fix="leave it out")
    given = read_rates(rates)
    if text is None and sys.stdin.isatty():
        raise ConfigError("there is nothing to correct", fix='give a text: octavo correct "teh" --model RUN')

    from octavo.channel.decode import decode
    from octavo.channel.decode import rescore as order_by
    from octavo.channel.language import CharacterModel
    from octavo.language_model import load

    lm = load(model)
    words = CharacterModel(lm.model, lm.tokenizer)  # type: ignore[arg-type] - refuses what was not counted
    heard = typist(words, alphabet, given, pairs) if channel == "typing" else pinyin(table, pairs)
    judge = load(rescore) if rescore is not None else None
    search = max(n, 10 if judge is not None else 1)
    before = ""
    for line in _lines(text):
        body = line.rstrip("\n")
        found = decode(
            words, heard, body, beam=beam or None, n_best=search, weight=weight, before=before[-BEFORE:]
        ) if body else []  # fmt: skip
        if judge is not None and found:
            known = before[-BEFORE:]
            found = order_by(
                found, lambda texts, known=known: judge.log_probs([known + t for t in texts]), weight=weight
            )
        best = found[0].text if found else ""
        before += best + "\n"
        if n == 1:
            sys.stdout.write(best + line[len(body) :])
        for reading in found[:n] if n > 1 else ():
            sys.stdout.write(f"{reading.log_prob:.2f}\t{reading.text}\n")
        sys.stdout.flush()
    if text is not None and n == 1:
        sys.stdout.write("\n")


def _lines(text: str | None) -> Iterator[str]:
    if text in (None, "-"):
        yield from sys.stdin
    else:
        yield from str(text).splitlines(keepends=True) or [""]


def read_rates(text: str) -> dict[str, Any]:
    """The rates in a list like ``insert=0.01,delete=0.02``."""
    from octavo.channel.edits import RATES

    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name not in RATES:
            raise ConfigError(f"there is no rate {name!r}", fix=did_you_mean(name, RATES, thing="rate"))
        try:
            found[name] = float(value)
        except ValueError:
            raise ConfigError(f"--rates {part!r} is not a number", fix=f"write {name}=0.01") from None
    return found


def typist(words: CharacterModel, alphabet: str | None, rates: dict[str, Any], pairs: Path | None) -> Channel:
    """The channel of typing: letters that the model can spell, rates as given or learnt."""
    from octavo.channel.edits import EditChannel

    shown = _pairs(pairs)
    letters = alphabet
    if letters is None:
        known = {words.tokenizer.token_bytes(i).decode("utf-8", errors="ignore") for i in range(words.model.vocab_size)}
        known |= {letter for pair in shown for text in pair for letter in text}
        letters = " '" + "".join(sorted(letter for letter in known if len(letter) == 1 and letter.isalpha()))
    letters = "".join(dict.fromkeys(letter for letter in letters if words.knows(letter)))
    made = EditChannel(letters, **rates)
    return made.learn(shown) if shown else made


def pinyin(table: Path | None, pairs: Path | None) -> Channel:
    """The channel of pinyin: a table, aligned pairs, or both."""
    from octavo.channel.pinyin import PinyinChannel

    shown = _pairs(pairs)
    if table is not None:
        made = PinyinChannel.read(_text(table).splitlines(), str(table))
        return made.learn(shown) if shown else made
    if not shown:
        raise ConfigError("pinyin needs to know which characters it may stand for", fix="give --table or --pairs")
    return PinyinChannel.of_pairs(shown)


def _pairs(path: Path | None) -> list[tuple[str, str]]:
    from octavo.channel.edits import read_pairs

    return [] if path is None else read_pairs(_text(path).splitlines(), str(path))


def _text(path: Path) -> str:
    from octavo.errors import DataError

    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", fix="check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte at {error.start:,}", fix="save it as UTF-8") from None
