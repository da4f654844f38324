"""Rows of equal length out of documents or samples, such that no token sees or predicts another document.

Every packing gives, for a row of ``seq_len`` slots: ``tokens``, ``targets`` (the token after each), ``loss_mask``
(true where the target belongs to the same document and is to be learnt), ``doc_ids`` (0, 1, ... within the row, -1 in
padding), ``positions`` (0, 1, ... from where the document, or the piece of it in this row, begins) and ``valid``
(false in padding). A packing does not order its rows: that is the loader's work.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from octavo.data.permutation import permute
from octavo.data.shards import Shards
from octavo.errors import DataError

Array = np.ndarray[Any, Any]
Ids = Sequence[int] | Array
Batch = dict[str, Array]

FIELDS = ("tokens", "targets", "loss_mask", "doc_ids", "positions", "valid")


@dataclass(frozen=True)
class PackReport:
    """What packing made of the text.

    Args:
        rows: rows in an epoch.
        slots: rows x seq_len.
        targets: slots that are learnt from.
        padded_share: of the slots, those that hold nothing.
        samples: documents or samples.
        truncated: samples that were cut off at seq_len (their end is never seen).
        split: documents that lie across rows (every token is still learnt, with less context).
        dropped: samples with nothing to learn from.
    """

    rows: int
    slots: int
    targets: int
    padded_share: float
    samples: int
    truncated: int = 0
    split: int = 0
    dropped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As written to a run's report."""
        return asdict(self)

    def __str__(self) -> str:
        out = f"{self.rows:,} rows, {self.targets:,} targets, {self.padded_share:.1%} padding, {self.samples:,} samples"
        for name, count in (("truncated", self.truncated), ("split", self.split), ("dropped", self.dropped)):
            if count:
                out += f", {name} {count:,} ({count / max(self.samples, 1):.1%})"
        return out


class Piece(NamedTuple):
    """Where a document or sample, or a part of it, lies in a row.

    Args:
        start, slots: the first slot and how many.
        tokens: ``slots``, or one more where the last token is only a target.
        number: of the document in the shards, or of the sample as given.
        offset: which of its tokens is in the first slot.
        length: all its tokens, of a sample those that were given.
    """

    start: int
    slots: int
    tokens: int
    number: int
    offset: int
    length: int


class Packed(ABC):
    """Rows of ``seq_len`` slots: ``n_rows`` in every epoch."""

    n_rows: int
    seq_len: int
    fingerprint: str
    in_place = False  # whether a target is that of its own slot, not the token after

    @abstractmethod
    def rows(self, epoch: int, index: Array) -> Batch:
        """The rows of that number in that epoch: arrays (len(index), seq_len) by the names in ``FIELDS``."""

    @abstractmethod
    def pieces(self, epoch: int, number: int) -> list[Piece]:
        """What lies in a row, in order."""

    @abstractmethod
    def report(self) -> PackReport:
        """What became of the documents."""


def _empty(n: int, length: int, pad: int) -> tuple[Array, Array, Array]:
    """Tokens, document ids (-1: padding) and positions of ``n`` rows."""
    shape = (n, length)
    return np.full(shape, pad, np.int64), np.full(shape, -1, np.int64), np.zeros(shape, np.int64)


class StreamRows(Packed):
    """Pretraining rows: documents one after another, cut every ``seq_len`` tokens.

    A row and the next share one token (the last target of the one is the first input of the other), so in every
    epoch each token of each document but its first is a target exactly once. In every epoch the documents follow
    each other in another order, so the cuts fall elsewhere.

    Args:
        shards: the tokens.
        seq_len: slots in a row.
        documents: a range of the documents; all by default.
        seed: of the order.
        shuffle: without it the documents stay in the order of the shards, in every epoch.
    """

    def __init__(
        self, shards: Shards, seq_len: int, *, documents: range | None = None, seed: int = 0, shuffle: bool = True
    ):
        self.shards, self.seq_len, self.seed, self.shuffle = shards, seq_len, seed, shuffle
        self.documents = range(shards.n_documents) if documents is None else documents
        self.lengths = np.diff(shards.offsets)[self.documents.start : self.documents.stop]
        self.n_tokens = int(self.lengths.sum())
        if self.n_tokens < 2:
            raise DataError(f"{shards.folder} has {self.n_tokens} tokens, too few for a row", fix="give more text")
        self.n_rows = -(-(self.n_tokens - 1) // seq_len)
        self.pad = shards.special["pad"] or 0
        described = f"stream {shards.fingerprint} {self.documents} {seq_len} {seed} {shuffle}"
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()
        self._orders: dict[int, tuple[Array, Array]] = {}

    def _order(self, epoch: int) -> tuple[Array, Array]:
        """Documents of an epoch in order, and where each starts in its stream (with the end of the last)."""
        found = self._orders.get(epoch)
        if found is None:
            n = len(self.documents)
            order = permute(np.arange(n), n, self.seed, 1, epoch) if self.shuffle else np.arange(n)
            starts = np.concatenate([[0], np.cumsum(self.lengths[order])])
            found = (order + self.documents.start, starts)
            kept = list(self._orders.items())[-1:]  # a batch may lie across two epochs
            self._orders = {**dict(kept), epoch: found}
        return found

    def rows(self, epoch: int, index: Array) -> Batch:
        tokens, ids, positions = _empty(len(index), self.seq_len + 1, self.pad)
        for row, number in enumerate(index):
            for local, piece in enumerate(self.pieces(epoch, int(number))):
                here = slice(piece.start, piece.start + piece.tokens)
                tokens[row, here] = self.read(piece)
                ids[row, here] = local
                positions[row, here] = np.arange(piece.tokens)
        same = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "loss_mask": same,
            "doc_ids": ids[:, :-1],
            "positions": positions[:, :-1],
            "valid": ids[:, :-1] >= 0,
        }

    def read(self, piece: Piece) -> Array:
        """The tokens of a piece."""
        start = int(self.shards.offsets[piece.number]) + piece.offset
        return self.shards.stream(start, start + piece.tokens)

    def pieces(self, epoch: int, number: int) -> list[Piece]:
        order, starts = self._order(epoch)
        begin = number * self.seq_len
        end = min(begin + self.seq_len + 1, self.n_tokens)
        at, place, found = begin, int(np.searchsorted(starts, begin, side="right")) - 1, list[Piece]()
        while at < end:
            first, last = int(starts[place]), int(starts[place + 1])
            stop = min(last, end)
            if stop > at:
                slots = min(stop, begin + self.seq_len) - at
                found.append(Piece(at - begin, slots, stop - at, int(order[place]), at - first, last - first))
            at, place = stop, place + 1
        return found

    def report(self) -> PackReport:
        slots = self.n_rows * self.seq_len
        _, starts = self._order(0)
        ends = np.maximum(starts[1:] - 2, starts[:-1])  # the last token of a document is only a target
        split = int((starts[:-1] // self.seq_len != ends // self.seq_len).sum())
        targets = int((self.lengths - 1).clip(min=0).sum())
        padded = max(0.0, 1 - self.n_tokens / slots)
        return PackReport(self.n_rows, slots, targets, padded, len(self.documents), split=split)


class WholeRows(Packed):
    """Rows of whole samples (conversations): never cut but at ``seq_len``, placed best-fit, longest first.

    Args:
        samples: pairs of token ids and a mask of the same length that is 1 where the token is to be learnt.
        seq_len: slots in a row; a sample fills one slot less than it has tokens, because its last is only a target.
        pad: id in empty slots.
    """

    def __init__(
        self, samples: Iterable[tuple[Sequence[int] | Array, Sequence[int] | Array]], seq_len: int, *, pad: int = 0
    ):
        self.seq_len, self.pad = seq_len, pad
        tokens: list[Array] = []
        masks: list[Array] = []
        self._samples = self._truncated = self._dropped = 0
        self._given: list[tuple[int, int]] = []  # number and length of each that is kept
        digest = hashlib.sha256(f"whole {seq_len} {pad}".encode())
        for ids, mask in samples:
            if len(ids) != len(mask):
                what = f"sample {self._samples} has {len(ids)} tokens and {len(mask)} mask values"
                raise DataError(what, fix="give one mask value for each token")
            self._samples += 1
            kept = np.asarray(ids[: seq_len + 1], dtype=np.uint32)
            learnt = np.asarray(mask[: seq_len + 1], dtype=bool)
            self._truncated += len(ids) > seq_len + 1
            if not learnt[1:].any():
                self._dropped += 1
                continue
            self._given.append((self._samples - 1, len(ids)))
            tokens.append(kept)
            masks.append(learnt)
            digest.update(len(kept).to_bytes(8, "little") + kept.tobytes() + learnt.tobytes())
        if not tokens:
            raise DataError(
                f"none of {self._samples:,} samples has a token to learn from",
                fix="check the chat template and the roles of the data, or use a larger seq_len",
            )
        self.fingerprint = digest.hexdigest()
        self._tokens, self._masks = np.concatenate(tokens), np.concatenate(masks)
        self._offsets = np.concatenate([[0], np.cumsum([len(t) for t in tokens])]).astype(np.int64)
        self._rows = best_fit([len(t) - 1 for t in tokens], seq_len)
        self.n_rows = len(self._rows)

    def rows(self, epoch: int, index: Array) -> Batch:
        tokens, ids, positions = _empty(len(index), self.seq_len, self.pad)
        targets = np.full_like(tokens, self.pad)
        learnt = np.zeros(tokens.shape, bool)
        for row, number in enumerate(index):
            at = 0
            for local, sample in enumerate(self._rows[int(number)]):
                start, stop = int(self._offsets[sample]), int(self._offsets[sample + 1])
                here = slice(at, at + stop - start - 1)
                tokens[row, here] = self._tokens[start : stop - 1]
                targets[row, here] = self._tokens[start + 1 : stop]
                learnt[row, here] = self._masks[start + 1 : stop]
                ids[row, here] = local
                positions[row, here] = np.arange(stop - start - 1)
                at = here.stop
        return {
            "tokens": tokens,
            "targets": targets,
            "loss_mask": learnt,
            "doc_ids": ids,
            "positions": positions,
            "valid": ids >= 0,
        }

    def pieces(self, epoch: int, number: int) -> list[Piece]:
        at, found = 0, list[Piece]()
        for sample in self._rows[number]:
            tokens = int(self._offsets[sample + 1] - self._offsets[sample])
            given, length = self._given[sample]
            found.append(Piece(at, tokens - 1, tokens, given, 0, length))
            at += tokens - 1
        return found

    def report(self) -> PackReport:
        slots = self.n_rows * self.seq_len
        used = len(self._tokens) - (len(self._offsets) - 1)
        starts = self._offsets[:-1]
        targets = int(self._masks.sum() - self._masks[starts].sum())
        padded = 1 - used / slots
        return PackReport(
            self.n_rows, slots, targets, padded, self._samples, truncated=self._truncated, dropped=self._dropped
        )


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of at most ``capacity`` by best-fit decreasing: each item goes where it leaves the least room.

    Returns:
        The numbers of the items in each bin. Equal lengths keep their order, so the outcome is always the same.

    Source: Johnson 1973, as used for packing by Ding et al. 2024 (Fewer Truncations Improve Language Modeling).
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where a bin has room r
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
            bins[number].append(item)
        else:
            room, number = capacity, len(bins)
            bins.append([item])
        by_room[room - length].append(number)
        rooms |= 1 << (room - length)
    return bins
