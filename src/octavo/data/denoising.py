"""Rows whose text is damaged, as a source, and what mends it, as a target: T5's spans, BART's infilling; and prefixes.

What happens to a row is a function of the seed, the pass and the row's number, on every machine and after every stop.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.data.pack import Batch, Packed, PackReport, Piece
from octavo.errors import ConfigError
from octavo.tokenizer.special import SENTINEL

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]
ENDS = tuple(".!?。！？…\n")


def sentinels(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The ids that stand for spans, in their order: T5's own tokens, else the model's rows beyond the tokenizer.

    Raises:
        ConfigError: there are neither.
    """
    place = {token: i for i, token in enumerate(tokenizer.tokens)}
    found: list[int] = []
    while (own := place.get(SENTINEL.format(len(found)))) is not None:
        found.append(own)
    found = found or list(range(tokenizer.vocab_size, vocab_size))
    if not found:
        raise ConfigError(
            "spans need ids of their own, and the tokenizer has no <extra_id_0>",
            fix=f"set model.vocab_size to {tokenizer.vocab_size + 100}: 100 rows beyond the tokenizer's",
        )
    return found


def segments(rng: np.random.Generator, total: int, parts: int) -> Array:
    """``total`` as a sum of ``parts`` numbers of at least one, every way equally likely: (parts,)."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupt_spans(
    rng: np.random.Generator, ids: Array, sentinels: list[int], probability: float, mean_span: float
) -> tuple[Array, Array]:
    """Source and target: spans of ``ids`` (n,) give way to one sentinel each, and follow theirs in the target.

    A share ``probability`` of all tokens is taken, in spans of ``mean_span`` on average; the text begins with a token
    that stays, and ends with a span. Source: Raffel et al. 2020, section 3.1.4; lengths as in its code.
    """
    n = len(ids)
    n_noise = min(max(round(n * probability), 1), n - 1)
    n_spans = min(max(round(n_noise / mean_span), 1), n - n_noise, len(sentinels))
    noise, kept = segments(rng, n_noise, n_spans), segments(rng, n - n_noise, n_spans)
    source, target, at = [], [], 0
    for sentinel, stays, goes in zip(sentinels, kept, noise, strict=False):
        source += [*ids[at : at + stays], sentinel]
        target += [sentinel, *ids[at + stays : at + stays + goes]]
        at += stays + goes
    return np.array(source, np.int64), np.array(target, np.int64)


def infill(rng: np.random.Generator, ids: Array, mask: int, probability: float, mean_span: float) -> Array:
    """``ids`` (n,) with spans replaced by one ``mask`` each, until a share ``probability`` is gone.

    Lengths are Poisson numbers: a span of length 0 is a mask put between two tokens. Source: Lewis et al. 2020,
    section 2.2 (text infilling).
    """
    n, gone = len(ids), 0
    wanted = round(n * probability)
    spans: list[tuple[int, int]] = []
    free = np.ones(n, bool)  # where a span may lie: none lies in or next to another
    while gone < wanted and free.any():
        length = min(int(rng.poisson(mean_span)), wanted - gone)
        starts = np.flatnonzero(_runs(free) >= max(length, 1))
        if not len(starts):
            length, starts = 1, np.flatnonzero(free)
        start = int(rng.choice(starts))
        spans.append((start, length))
        free[max(0, start - 1) : start + max(length, 1) + 1] = False
        gone += length
    out, at = list[int](), 0
    for start, length in sorted(spans):
        out += [*ids[at:start].tolist(), mask]
        at = start + length
    return np.array([*out, *ids[at:].tolist()], np.int64)


def _runs(free: Array) -> Array:
    """How many free places in a row begin at each, (n,)."""
    ends = np.flatnonzero(~np.append(free, False))
    order = np.arange(len(free))
    return ends[np.searchsorted(ends, order)] - order


def permute_sentences(rng: np.random.Generator, ids: Array, ends: Array) -> Array:
    """``ids`` (n,) with its sentences in another order; ``ends`` (V,) says which tokens end one (Lewis et al. 2020)."""
    parts = np.split(ids, np.flatnonzero(ends[ids[:-1]]) + 1)
    return np.concatenate([parts[i] for i in rng.permutation(len(parts))])


class DenoisedRows(Packed):
    """What spans and infilling have in common: every row of ``packed`` is one text, damaged and whole."""

    def __init__(self, packed: Packed, tokenizer: Tokenizer, start: int, seed: int, told: tuple[Any, ...]):
        if tokenizer.special.eos is None:
            raise ConfigError("the tokenizer has no token that ends a text", fix="use one that has")
        self.packed, self.n_rows, self.seed = packed, packed.n_rows, seed
        self.start, self.eos, self.pad = start, tokenizer.special.eos, tokenizer.special.pad or 0
        told = (type(self).__name__, packed.fingerprint, tokenizer.hash, start, seed, *told)
        self.fingerprint = hashlib.sha256(repr(told).encode()).hexdigest()
        self.seq_len = self.source_len = packed.seq_len + 1

    @abstractmethod
    def damage(self, rng: np.random.Generator, ids: Array) -> tuple[Array, Array]:
        """Source and target of a text of at least two tokens, without the tokens that begin and end them."""

    def rows(self, epoch: int, index: Array) -> Batch:
        given = self.packed.rows(epoch, index)
        n = len(index)
        source, source_valid = np.full((n, self.source_len), self.pad, np.int64), np.zeros((n, self.source_len), bool)
        targets, valid = np.full((n, self.seq_len), self.pad, np.int64), np.zeros((n, self.seq_len), bool)
        for row, number in enumerate(index):
            ids = given["tokens"][row][given["valid"][row]]
            rng = np.random.default_rng([self.seed, epoch, int(number)])
            parts = self.damage(rng, ids) if len(ids) > 1 else (ids, ids)
            for part, place, ok in zip(parts, (source, targets), (source_valid, valid), strict=True):
                whole = [*part[: place.shape[1] - 1], self.eos]
                place[row, : len(whole)], ok[row, : len(whole)] = whole, True
        tokens = np.where(valid, np.pad(targets, ((0, 0), (1, 0)), constant_values=self.start)[:, :-1], self.pad)
        return {
            "tokens": tokens,
            "targets": targets,
            "loss_mask": valid.copy(),
            "doc_ids": np.where(valid, 0, -1),
            "positions": np.where(valid, np.arange(self.seq_len), 0),
            "valid": valid,
            "source": source,
            "source_valid": source_valid,
        }

    def pieces(self, epoch: int, number: int) -> list[Piece]:
        return self.packed.pieces(epoch, number)

    def report(self) -> PackReport:
        return self.packed.report()


class SpanRows(DenoisedRows):
    """T5's: the target is what the sentinels stand for, so that it is short. See ``corrupt_spans``."""

    def __init__(
        self, packed: Packed, tokenizer: Tokenizer, start: int, vocab_size: int, *, probability: float = 0.15,
        mean_span: float = 3.0, seed: int = 0,
    ):  # fmt: skip
        super().__init__(packed, tokenizer, start, seed, (vocab_size, probability, mean_span))
        self.sentinels, self.probability, self.mean_span = sentinels(tokenizer, vocab_size), probability, mean_span
        L = packed.seq_len
        n_noise = max(round(L * probability), 1)
        self.seq_len = n_noise + max(round(n_noise / mean_span), 1) + 1
        self.source_len = L + 1

    def damage(self, rng: np.random.Generator, ids: Array) -> tuple[Array, Array]:
        return corrupt_spans(rng, ids, self.sentinels, self.probability, self.mean_span)


class InfilledRows(DenoisedRows):
    """BART's: sentences in another order, spans behind masks; the target is the whole text. See ``infill``."""

    def __init__(
        self, packed: Packed, tokenizer: Tokenizer, start: int, *, probability: float = 0.3, mean_span: float = 3.0,
        permute: bool = True, seed: int = 0,
    ):  # fmt: skip
        super().__init__(packed, tokenizer, start, seed, (probability, mean_span, permute))
        if tokenizer.special.mask is None:
            raise ConfigError("the tokenizer has no mask token", fix="use a tokenizer that has one, or train one here")
        self.mask, self.permute = tokenizer.special.mask, permute
        self.probability, self.mean_span = probability, mean_span
        self.source_len = 2 * packed.seq_len + 1  # masks of nothing are tokens too
        texts = (b"" if i in tokenizer.special_ids else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))
        self.ends = np.array([text.decode("utf-8", "replace").rstrip(" ").endswith(ENDS) for text in texts], bool)
        self.ends[self.eos] = True

    def damage(self, rng: np.random.Generator, ids: Array) -> tuple[Array, Array]:
        moved = permute_sentences(rng, ids, self.ends) if self.permute else ids
        return infill(rng, moved, self.mask, self.probability, self.mean_span), ids


class PrefixRows(Packed):
    """``packed`` with ``prefix`` beside it: the first tokens of each document in a row, which are not learnt from."""

    def __init__(self, packed: Packed, *, seed: int = 0):
        self.packed, self.n_rows, self.seq_len, self.seed = packed, packed.n_rows, packed.seq_len, seed
        self.fingerprint = hashlib.sha256(f"prefix {packed.fingerprint} {seed}".encode()).hexdigest()

    def rows(self, epoch: int, index: Array) -> Batch:
        batch = dict(self.packed.rows(epoch, index))
        prefix, learnt = np.zeros(batch["valid"].shape, bool), batch["loss_mask"].copy()
        for row, number in enumerate(index):
            rng = np.random.default_rng([self.seed, epoch, int(number)])
            for piece in self.packed.pieces(epoch, int(number)):
                n = int(rng.integers(0, piece.slots))
                prefix[row, piece.start : piece.start + n] = True
                learnt[row, piece.start : piece.start + max(n - 1, 0)] = False  # their targets are in the prefix
        return {**batch, "prefix": prefix, "loss_mask": learnt}

    def pieces(self, epoch: int, number: int) -> list[Piece]:
        return self.packed.pieces(epoch, number)

    def report(self) -> PackReport:
        return self.packed.report()
