"""From ids back to bytes: one table per tokenizer, exact for tokens that are not valid UTF-8 by themselves.

A tokenizer.json describes decoding as a chain of steps over token strings. The chain is run once per token, for
the first place in a text and for all later ones (where a leading space is kept), so that decoding is a table
look-up and streaming is linear.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, AnyStr

from octavo.errors import CheckpointError

MAX_STEPS = 32  # of a decoder; those in use have at most six
MAX_TABLE_BYTES = 64 << 20  # of all tokens together
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
# WordPiece's cleanup acts on each token with its leading space (order matters; as in the `tokenizers` library).
_CLEANUP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


@cache
def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else 256 and up.

    Source: GPT-2, encoder.py, ``bytes_to_unicode``.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return dict(sorted(table.items()))


@cache
def _alphabet_bytes() -> dict[str, int]:
    return {char: byte for byte, char in byte_alphabet().items()}


def unmap_bytes(token: str) -> bytes:
    """The bytes behind a byte-level token; a token with any other character (an added one) is its own text."""
    table = _alphabet_bytes()
    try:
        return bytes(table[char] for char in token)
    except KeyError:
        return token.encode("utf-8")


class ByteTable:
    """The bytes of every id.

    Args:
        tokens: token string of each id, None where an id is unused.
        decoder: the ``decoder`` entry of the tokenizer.json.
        special: ids that carry no text.
        added: contents of added tokens that are not special: they are their own text.
    """

    def __init__(
        self, tokens: Sequence[str | None], decoder: Mapping[str, Any] | None, special: set[int], added: set[str]
    ):
        self.special = frozenset(special)
        self.contents = [(token or "").encode("utf-8") for token in tokens]
        steps = _steps(decoder)
        if len(steps) > MAX_STEPS:
            raise CheckpointError(f"the decoder in tokenizer.json has {len(steps)} steps", fix="use another tokenizer")
        self.first: list[bytes] = []
        self.rest: list[bytes] = []
        size = 0
        for i, token in enumerate(tokens):
            if token is None or i in special:
                first = rest = b""
            elif token in added and steps and steps[0]["type"] == "ByteLevel":
                first = rest = token.encode("utf-8")
            else:
                first, rest = _run(steps, token, True), _run(steps, token, False)
            self.first.append(first)
            self.rest.append(rest)
            size += len(first) + len(rest)
            if size > MAX_TABLE_BYTES:
                what = f"the tokens in tokenizer.json stand for more than {MAX_TABLE_BYTES >> 20} MiB of text"
                raise CheckpointError(what, fix="use another tokenizer")

    def join(self, ids: Sequence[int], *, skip_special: bool = True) -> bytes:
        """The bytes of a whole text. Special ids give nothing, or their name if ``skip_special`` is false."""
        out: list[bytes] = []
        rest, special = self.rest, self.special
        started = False
        for i in ids:
            if i in special:
                if not skip_special:
                    out.append(self.contents[i])
                    started = True
                continue
            out.append(rest[i] if started else self.first[i])
            started = True
        return b"".join(out)


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return [{"type": "Spaces"}]
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


def _strip(text: AnyStr, mark: AnyStr, times: int) -> AnyStr:
    """``text`` without ``mark`` at its beginning, up to ``times`` times."""
    while times > 0 and mark and text.startswith(mark):
        text, times = text[len(mark) :], times - 1
    return text


def _run(steps: Sequence[Mapping[str, Any]], token: str, first: bool) -> bytes:
    text: str = token
    raw: bytes | None = None
    for step in steps:
        kind = step["type"]
        if kind == "Fuse":
            continue
        if raw is not None:
            if kind == "Strip" and first:
                raw = _strip(raw, step["content"].encode("utf-8"), step["start"])
            continue
        if kind == "ByteLevel":
            raw = unmap_bytes(text)
        elif kind == "ByteFallback":
            if match := _BYTE_TOKEN.match(text):
                raw = bytes([int(match[1], 16)])
        elif kind == "Metaspace":
            drop = first and step.get("prepend_scheme", "always") != "never"
            text = text.replace(step["replacement"], "" if drop else " ")
        elif kind == "Replace":
            if "String" not in step["pattern"]:
                raise CheckpointError(
                    "decoder Replace with a regular expression is not supported", fix="use a tokenizer with a plain one"
                )
            text = text.replace(step["pattern"]["String"], step["content"])
            if len(text) > MAX_TABLE_BYTES:  # a chain of them can double it at every step
                raise CheckpointError(f"a token in tokenizer.json stands for {len(text):,} characters", fix="repair it")
        elif kind == "Strip":
            text = _strip(text, step["content"], step["start"]) if first else text
        elif kind == "WordPiece":
            prefix = step["prefix"]
            if not first:
                text = text[len(prefix) :] if text.startswith(prefix) else " " + text
            for old, new in _CLEANUP if step.get("cleanup", True) else ():
                text = text.replace(old, new)
        elif kind == "Spaces":
            text = text if first else " " + text
        else:
            raise CheckpointError(f"decoder {kind!r} in tokenizer.json is not supported", fix="use another tokenizer")
    return text.encode("utf-8") if raw is None else raw


class StreamDecoder:
    """Text as ids arrive: each ``push`` returns the whole characters that became certain, often none.

    The concatenation of all pushes and the final ``flush`` equals ``decode`` of all ids. Every byte is looked at
    once, whatever the length of the text.
    """

    def __init__(self, table: ByteTable, *, skip_special: bool = True):
        self._table, self._skip = table, skip_special
        self._started = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Take one id; return the new text, without any unfinished character."""
        if id in self._table.special:
            if self._skip:
                return ""
            piece = self._table.contents[id]
        else:
            piece = self._table.rest[id] if self._started else self._table.first[id]
        self._started = True
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """The end of the text: what was unfinished comes out as U+FFFD."""
        return self._utf8.decode(b"", final=True)
