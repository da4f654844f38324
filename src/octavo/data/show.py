"""What training reads, made visible: the rows of a step token by token, as text for a terminal or as a page.

The rows are the loader's own batch; where each document lies is the packing's own account of it. Nothing is
packed, rendered or masked here a second time.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from octavo.data import prepare
from octavo.data.pack import Batch, Packed, Piece
from octavo.report import html, words
from octavo.report.html import Html, tag

if TYPE_CHECKING:
    from rich.text import Text

    from octavo.tokenizer import Tokenizer

State = Literal["trained", "read", "unseen"]

# How each state is marked where there are no colours, and its style where there are.
MARKS: dict[State, tuple[str, str]] = {"trained": ("⟦", "⟧"), "read": ("", ""), "unseen": ("⟪", "⟫")}
STYLES: dict[State, str] = {"trained": "bold green", "read": "", "unseen": "red strike"}
SPECIAL_MARKS = "«", "»"
MEANINGS: dict[State, str] = {
    "trained": "a target of the loss",
    "read": "the model sees it, the loss does not",
    "unseen": "cut off, or last and no target",
}
UNSEEN_SHOWN = 64
_SIGNS = str.maketrans({"\t": "⇥", "\r": "␍"})


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a row: ``slot`` is -1 where it is in none (the last target, or cut off)."""

    id: int
    raw: bytes
    state: State
    special: str = ""
    slot: int = -1
    position: int = -1


@dataclass(frozen=True, slots=True)
class Part:
    """A document or conversation, or the part of it that lies in a row.

    Args:
        piece: where it lies.
        tokens: those in the row and, of what was cut off, the first ones.
        cut: how many tokens were cut off at the end.
        origin: where it comes from, "" if unknown.
        side: source or target, of a model that reads one and writes the other.
    """

    piece: Piece
    tokens: list[Token]
    cut: int = 0
    origin: str = ""
    side: str = ""

    @property
    def trained(self) -> int:
        """Tokens that are targets of the loss."""
        return sum(token.state == "trained" for token in self.tokens)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a batch: its number there, which row of which epoch of its data set it is, and what lies in it."""

    number: int
    epoch: int
    index: int
    parts: list[Part]
    slots: int
    padding: int

    @property
    def trained(self) -> int:
        """Tokens that are targets of the loss."""
        return sum(part.trained for part in self.parts)


class Told(NamedTuple):
    """What is known of a document or conversation beyond its row: where it is from, and all its tokens."""

    origin: str = ""
    ids: Sequence[int] = ()


Tell = Callable[[int], Told]
"""Tells about a document or sample by its number."""


# ---- from a batch to rows ----


def rows_of(
    batch: Batch, places: Iterable[tuple[Packed, int, int]], tokenizer: Tokenizer, tell: Tell = lambda _: Told()
) -> list[Row]:
    """The rows of a batch.

    Args:
        batch: arrays (B, T) by the names in ``pack.FIELDS``.
        places: of each row to be shown its packing, the epoch and its number there.
        tell: tells about documents or samples by their number.
    """
    rows = []
    for number, (packed, epoch, index) in enumerate(places):
        arrays = {name: values[number] for name, values in batch.items()}
        pieces = [piece for piece in packed.pieces(epoch, index) if piece.slots]
        if "source" in arrays:
            parts = _source_and_target(arrays, pieces[0].number, tokenizer, tell)
        elif packed.in_place:
            parts = [_masked(arrays, piece, tokenizer, tell) for piece in pieces]
        else:
            parts = [_part(arrays, piece, tokenizer, tell) for piece in pieces]
        slots = len(arrays["tokens"])
        rows.append(Row(number, epoch, index, parts, slots, slots - int(arrays["valid"].sum())))
    return rows


def _part(row: Batch, piece: Piece, tokenizer: Tokenizer, tell: Tell) -> Part:
    here = slice(piece.start, piece.start + piece.slots)
    ids = row["tokens"][here].tolist()
    positions = row["positions"][here].tolist()
    # A token is trained where it is the target of the slot before it.
    learnt = [False, *(row["loss_mask"][here] != 0).tolist()]
    tokens = [
        _token(tokenizer, id, "trained" if learnt[k] else "read", piece.start + k, positions[k])
        for k, id in enumerate(ids)
    ]
    if piece.tokens > piece.slots:
        last = int(row["targets"][piece.start + piece.slots - 1])
        tokens.append(_token(tokenizer, last, "trained" if learnt[-1] else "unseen"))
    told = tell(piece.number)
    rest = list(told.ids[piece.offset + piece.tokens :])
    tokens += [_token(tokenizer, int(id), "unseen") for id in rest[:UNSEEN_SHOWN]]
    return Part(piece, tokens, len(rest), told.origin)


def _source_and_target(row: Batch, number: int, tokenizer: Tokenizer, tell: Tell) -> list[Part]:
    """What is read whole and what is written for it, in rows of an encoder-decoder.

    Args:
        number: of the pair, or of the first document of the row that was damaged.
    """
    read, written = int(row["source_valid"].sum()), int(row["valid"].sum())
    source = {"tokens": row["source"], "targets": row["source"], "positions": np.arange(len(row["source"]))}
    source["loss_mask"] = np.zeros(len(row["source"]))
    origin = Told(tell(number).origin)
    parts = [
        _part(source, Piece(0, read, read, number, 0, read), tokenizer, lambda _: origin),
        _part(row, Piece(0, written, written + 1, number, 0, written + 1), tokenizer, lambda _: Told()),
    ]
    return [replace(part, side=side) for part, side in zip(parts, ("source", "target"), strict=True)]


def _masked(row: Batch, piece: Piece, tokenizer: Tokenizer, tell: Tell) -> Part:
    """Targets in their own slots: what is asked for stands behind what the model sees, ``<|mask|>|word``."""
    tokens = []
    for slot in range(piece.start, piece.start + piece.slots):
        seen, aim, learnt = (int(row[name][slot]) for name in ("tokens", "targets", "loss_mask"))
        token = _token(tokenizer, seen, "trained" if learnt else "read", slot, int(row["positions"][slot]))
        if learnt:
            here, asked = (shown_bytes(tokenizer.token_bytes(id), "␣") for id in (seen, aim))
            token = replace(token, special=f"{token.special or here}|{asked}")
        tokens.append(token)
    return Part(piece, tokens, 0, tell(piece.number).origin)


def _token(tokenizer: Tokenizer, id: int, state: State, slot: int = -1, position: int = -1) -> Token:
    special = (tokenizer.tokens[id] or "") if id in tokenizer.special_ids else ""
    return Token(id, tokenizer.token_bytes(id), state, special, slot, position)


def origins(data: Path, split: str, numbers: Iterable[int]) -> dict[int, str]:
    """Where the documents of ``split`` with these numbers come from (``file:line``), as far as ``data`` knows.

    Args:
        data: the folder in which documents were prepared.
    """
    found: dict[int, str] = {}
    wanted = sorted(set(numbers))
    if not (data / "documents" / "manifest.json").is_file():
        return found
    first = 0
    for path, held in prepare.segments(data)[1]:
        n = int((held == (split == "valid")).sum())
        here = [number for number in wanted if first <= number < first + n]
        if here:
            documents = islice(prepare.part_documents(path, held, split), here[-1] - first + 1)
            for number, document in enumerate(documents, first):
                if number in here:
                    found[number] = f"{document.source}:{document.line}" if document.line else document.source
        first += n
    return found


# ---- from tokens to text ----


class Span(NamedTuple):
    """Tokens that can only be shown together (the pieces of one character), or a single one."""

    text: str
    tokens: Sequence[Token]

    @property
    def state(self) -> State:
        return self.tokens[0].state

    @property
    def special(self) -> bool:
        return bool(self.tokens[0].special)


def spans(tokens: Sequence[Token]) -> Iterator[Span]:
    """The tokens in order; bytes that form no whole character here are shown as ``⟨E4 BD⟩``."""
    waiting: list[Token] = []
    for token in tokens:
        if waiting and (token.special or waiting[-1].state != token.state):
            yield _span(waiting)
            waiting = []
        waiting.append(token)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(t.raw for t in waiting))
        if token.special or not decoder.getstate()[0]:  # the last character is complete
            yield _span(waiting)
            waiting = []
    if waiting:
        yield _span(waiting)


def _span(tokens: Sequence[Token]) -> Span:
    return Span(tokens[0].special or shown_bytes(b"".join(token.raw for token in tokens)), tokens)


def shown_bytes(raw: bytes, space: str = " ") -> str:
    """The whole characters among bytes (their blanks as ``space``), and the other bytes as ``⟨E4 BD⟩``."""
    parts: list[tuple[bool, str]] = []
    while raw:
        try:
            parts.append((True, raw.decode()))
            break
        except UnicodeDecodeError as error:
            parts.append((True, raw[: error.start].decode()))
            parts.append((False, raw[error.start : error.end].hex(" ").upper()))
            raw = raw[error.end :]
    out = ""
    for whole, some in groupby((part for part in parts if part[1]), key=lambda part: part[0]):
        if whole:
            out += "".join(words.printable(text).replace(" ", space) for _, text in some)
        else:
            out += f"⟨{' '.join(text for _, text in some)}⟩"
    return out or "∅"


class Bit(NamedTuple):
    """A stretch of a line in one style; ``aside`` is what stands beside the text (an id)."""

    text: str
    state: State
    special: bool = False
    aside: bool = False


def lines(tokens: Sequence[Token], *, with_ids: bool = False) -> list[list[Bit]]:
    """The tokens as lines, which end where the text's do; with ids every token stands for itself."""
    out: list[list[Bit]] = [[]]
    for span in spans(tokens):
        if not with_ids:
            bits = [Bit(span.text, span.state, span.special)]
        else:
            bits = [bit for k in range(len(span.tokens)) for bit in _with_id(span, k)]
        for bit in bits:
            *ended, rest = bit.text.split("\n")
            for text in ended:
                sign = "" if bit.aside else "⏎"
                out[-1].append(bit._replace(text=f"{text.translate(_SIGNS)}{sign}"))
                out.append([])
            if rest:
                out[-1].append(bit._replace(text=rest.translate(_SIGNS)))
    return [line for line in out if line]


def _with_id(span: Span, k: int) -> tuple[Bit, Bit]:
    """One token of a span with its id; the last of several pieces of a character also gives the character."""
    token = span.tokens[k]
    text = token.special or shown_bytes(token.raw, "␣")
    if len(span.tokens) > 1 and k == len(span.tokens) - 1:
        text += f"={span.text.strip()}"
    ended = "\n" * ("\n" in text)  # the line ends here as the text's does
    text = text.replace("\n", "⏎")
    return Bit(text, token.state, span.special), Bit(f":{token.id} {ended}", token.state, aside=True)


# ---- for a terminal ----


def about(row: Row) -> str:
    """The heading of a row."""
    padding = f", {row.padding} padding" if row.padding else ""
    return (
        f"row {row.number}  (row {row.index:,} of pass {row.epoch})   {row.slots} slots: "
        f"{len(row.parts)} {'part' if len(row.parts) == 1 else 'parts'}, {row.trained} tokens trained{padding}"
    )


def about_part(part: Part, noun: str) -> str:
    """The heading of a document or conversation in a row."""
    piece = part.piece
    last = piece.offset + piece.tokens
    name = f"{noun} {piece.number:,}" + (f" {part.side}" if part.side else "")
    told = [name + (f"  {words.printable(part.origin)}" if part.origin else "")]
    if piece.tokens == piece.length and not part.cut:
        told.append(f"whole, {piece.tokens:,} tokens")
    else:
        told.append(f"tokens {piece.offset:,} to {last - 1:,} of {max(piece.length, last + part.cut):,}")
        told += ["begins in another row"] * bool(piece.offset) + ["goes on in another row"] * (last < piece.length)
    told.append(f"positions 0 to {piece.slots - 1:,}")
    told += [f"{part.cut:,} tokens cut off, never seen"] if part.cut else []
    return ", ".join(told)


def to_plain(rows: Sequence[Row], noun: str, *, with_ids: bool = False) -> str:
    """The rows without colours: brackets say what is trained, special and cut off."""
    legend = "  ".join(f"{opened}{state}{closed}" for state, (opened, closed) in MARKS.items())
    out = [f"{legend}  {SPECIAL_MARKS[0]}special token{SPECIAL_MARKS[1]}  ⟨E4 BD⟩ bytes of a part of a character"]
    for row in rows:
        out += ["", about(row)]
        for part in row.parts:
            out.append(f"-- {about_part(part, noun)}")
            out += [f"   {_plain_line(line)}" for line in lines(part.tokens, with_ids=with_ids)]
            out += [f"   ... and {part.cut - UNSEEN_SHOWN:,} more"] * (part.cut > UNSEEN_SHOWN)
        out += [f"-- {row.padding} slots of padding"] * bool(row.padding)
    return "\n".join(out) + "\n"


def _plain_line(line: Sequence[Bit]) -> str:
    out = []
    for _, run in groupby(line, key=lambda bit: bit.state):
        run = list(run)
        opened, closed = MARKS[run[0].state]
        text = "".join(SPECIAL_MARKS[0] + bit.text + SPECIAL_MARKS[1] if bit.special else bit.text for bit in run)
        out.append(opened + text + closed)
    return "".join(out)


def to_rich(rows: Sequence[Row], noun: str, *, with_ids: bool = False) -> list[Text]:
    """The same with colours; each text is one line that may be wrapped."""
    from rich.text import Text

    legend = list(STYLES.items())
    out = [Text.assemble(*(part for item in legend for part in (item, "  ")), ("special token", "reverse"))]
    for row in rows:
        out += [Text(""), Text(about(row), style="bold cyan")]
        for part in row.parts:
            out.append(Text(f"── {about_part(part, noun)}", style="cyan"))
            for line in lines(part.tokens, with_ids=with_ids):
                out.append(Text.assemble(*((bit.text, _style(bit)) for bit in line)))
            out += [Text(f"... and {part.cut - UNSEEN_SHOWN:,} more", style="red")] * (part.cut > UNSEEN_SHOWN)
        out += [Text(f"── {row.padding} slots of padding", style="dim")] * bool(row.padding)
    return out


def _style(bit: Bit) -> str:
    return f"{STYLES[bit.state]}{' reverse' * bit.special}{' dim not bold' * bit.aside}".strip()


# ---- for a browser ----


def to_html(rows: Sequence[Row], noun: str, *, title: str, lead: str, with_ids: bool = False) -> str:
    """The same as a page of its own, in which every token says its id, place and bytes when pointed at."""
    style = "".join((Path(html.__file__).with_name(f"{name}.css")).read_text("utf-8") for name in ("style", "rows"))
    legend = [tag("li", tag("span", state, class_=f"k {state}"), f" {MEANINGS[state]}") for state in MARKS]
    legend.append(tag("li", tag("span", "<|eos|>", class_="k special"), " a special token; elsewhere it is text"))
    legend.append(tag("li", tag("span", "你", tag("sub", 3), class_="k"), " one character of three tokens"))
    legend.append(tag("li", tag("span", "⟨E4 BD⟩", class_="k"), " bytes whose character is cut apart here"))
    body = [tag("ul", *legend, class_="legend")]
    for row in rows:
        parts = [_html_part(part, noun, with_ids) for part in row.parts]
        parts += [tag("p", f"{row.padding} slots of padding", class_="padding")] if row.padding else []
        body.append(html.section(f"Row {row.number}", *parts, lead=about(row).partition("   ")[2]))
    head = tag(
        "header", tag("p", "What the model sees", class_="kicker"), tag("h1", title), tag("p", lead, class_="subtitle")
    )
    return html.document(f"{title} · Octavo", style, head, tag("main", *body))


def _html_part(part: Part, noun: str, with_ids: bool) -> Html:
    out: list[Html] = []
    for span in spans(part.tokens):
        first = span.tokens[0]
        told = "; ".join(_told(token) for token in span.tokens)
        shown = span.text.translate(_SIGNS).replace("\n", "⏎")
        ends = Html("<br>" * span.text.count("\n"))
        ids = tag("small", " ".join(str(token.id) for token in span.tokens)) if with_ids else None
        pieces = tag("sub", len(span.tokens)) if len(span.tokens) > 1 else None
        name = f"k {first.state}{' special' * span.special}"
        out += [tag("span", shown, pieces, ids, class_=name, title=told), ends or Html("&#8203;")]
    more = f"... and {part.cut - UNSEEN_SHOWN:,} more" if part.cut > UNSEEN_SHOWN else None
    return tag(
        "div", tag("p", about_part(part, noun), class_="place"), tag("p", *out, more, class_="text"), class_="part"
    )


def _told(token: Token) -> str:
    place = f"slot {token.slot}, position {token.position}" if token.slot >= 0 else "in no slot"
    return f"id {token.id}, {token.state}, {place}, bytes {token.raw.hex(' ').upper() or 'none'}"
