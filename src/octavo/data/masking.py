"""Rows for a masked language model: some tokens are hidden or replaced, and asked for where they stood.

What happens to a token is a function of the seed, its document and its place there, and for dynamic masking of the
pass: the same text is masked anew in each pass (Liu et al. 2019, section 4.1), the same way on every machine and
after every stop, however rows are cut.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.data.pack import Batch, Packed, PackReport, Piece
from octavo.data.permutation import mix
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]
CHOOSE, CHANGE, REPLACE = 1, 2, 3  # what a number is drawn for


class MaskedRows(Packed):
    """``packed``, with a share ``probability`` of its tokens chosen: they alone are targets, each in its own slot.

    Of the chosen a share ``mask`` becomes the mask token, a share ``random`` another token drawn from all that are
    not special, the rest stays as it is (Devlin et al. 2019, section 3.1: 15 %, of which 80, 10 and 10 %). Special
    tokens and padding are never chosen.

    Args:
        packed: rows of documents.
        tokenizer: has a mask token.
        static: every pass masks a document the same way.
        whole_words: a word is chosen whole, all its tokens or none.
        seed: of the choice.
    """

    in_place = True

    def __init__(
        self,
        packed: Packed,
        tokenizer: Tokenizer,
        *,
        probability: float = 0.15,
        mask: float = 0.8,
        random: float = 0.1,
        static: bool = False,
        whole_words: bool = False,
        seed: int = 0,
    ):
        if tokenizer.special.mask is None:
            raise ConfigError("the tokenizer has no mask token", fix="use a tokenizer that has one, or train one here")
        self.packed, self.seq_len, self.n_rows, self.seed = packed, packed.seq_len, packed.n_rows, seed
        self.probability, self.mask, self.random, self.static = probability, mask, random, static
        self.mask_id = tokenizer.special.mask
        usual = [i not in tokenizer.special_ids and token is not None for i, token in enumerate(tokenizer.tokens)]
        self.usual = np.array(usual, bool)
        self.replacements = np.flatnonzero(self.usual)
        self.words = Words(tokenizer) if whole_words else None
        told = (packed.fingerprint, tokenizer.hash, probability, mask, random, static, whole_words, seed)
        self.fingerprint = hashlib.sha256(repr(told).encode()).hexdigest()

    def rows(self, epoch: int, index: Array) -> Batch:
        batch = self.packed.rows(epoch, index)
        tokens, valid = batch["tokens"], batch["valid"]
        places = np.zeros(tokens.shape, np.uint64)  # document and place in it: a name for every token of the text
        for row, number in enumerate(index):
            for piece in self.packed.pieces(epoch, int(number)):
                here = np.arange(piece.offset, piece.offset + piece.slots, dtype=np.uint64)
                places[row, piece.start : piece.start + piece.slots] = (np.uint64(piece.number) << np.uint64(32)) + here
        salt = 0 if self.static else epoch + 1
        units = places if self.words is None else self.words.begin(tokens, batch["doc_ids"], places)
        chosen = (self._draw(units, salt, CHOOSE) < self.probability) & valid & self.usual[tokens]
        change = self._draw(places, salt, CHANGE)
        hidden = chosen & (change < self.mask)
        other = chosen & ~hidden & (change < self.mask + self.random)
        drawn = (self._draw(places, salt, REPLACE) * len(self.replacements)).astype(np.int64)
        seen = np.where(hidden, self.mask_id, np.where(other, self.replacements[drawn], tokens))
        return {**batch, "tokens": seen, "targets": tokens, "loss_mask": chosen}

    def _draw(self, names: Array, salt: int, what: int) -> Array:
        """A number in [0, 1) for every name."""
        key = mix(np.array([self.seed & (2**64 - 1)], np.uint64)) ^ np.uint64((salt << 8) + what)
        return (mix(mix(names) ^ mix(key)) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def pieces(self, epoch: int, number: int) -> list[Piece]:
        # The token after a row's last is no target here.
        return [piece._replace(tokens=piece.slots) for piece in self.packed.pieces(epoch, number)]

    def report(self) -> PackReport:
        return self.packed.report()


class Words:
    """Which tokens go on with the word of the token before them.

    WordPiece marks them with ``##``. Elsewhere a token of letters or digits goes on where the one before ended with
    one; where words are not set apart by spaces (Chinese, Japanese) every token is a word.
    """

    def __init__(self, tokenizer: Tokenizer):
        special = tokenizer.special_ids
        pieces = any((token or "").startswith("##") for token in tokenizer.tokens)
        texts = [
            "" if i in special else tokenizer.token_bytes(i).decode("utf-8", "replace")
            for i in range(tokenizer.vocab_size)
        ]
        marked = [(token or "").startswith("##") for token in tokenizer.tokens]
        self.goes_on = np.array(marked if pieces else [_spelt(text[:1]) for text in texts], bool)
        self.open_end = np.array([True] * len(texts) if pieces else [_spelt(text[-1:]) for text in texts], bool)

    def begin(self, tokens: Array, doc_ids: Array, names: Array) -> Array:
        """The name of the first token of each token's word, as far as it is in this row."""
        same = doc_ids[:, 1:] == doc_ids[:, :-1]
        on = self.goes_on[tokens[:, 1:]] & self.open_end[tokens[:, :-1]] & same
        order = np.arange(tokens.shape[1])
        starts = np.where(np.pad(on, ((0, 0), (1, 0))), 0, order)
        return np.take_along_axis(names, np.maximum.accumulate(starts, 1), 1)


def _spelt(char: str) -> bool:
    """Whether a character belongs to words that spaces set apart."""
    return char.isalnum() and not "\u2e80" <= char <= "\ud7ff"
