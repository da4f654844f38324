"""Fill in the middle: documents of which the middle is told last, so that a causal model learns to fill gaps.

A document is cut at two places into prefix, middle and suffix and told in another order, with tokens that say what
follows: begin prefix hole suffix end middle (PSM: DeepSeek-Coder, Guo et al. 2024, section 3.1.2), or begin hole suffix
end prefix middle (SPM: Bavarian et al. 2022, section 3). The loss is the usual one over all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from octavo.data.pack import Piece, StreamRows
from octavo.data.permutation import mix

Array = np.ndarray[Any, Any]
CHOOSE, ORDER, FIRST, SECOND = 1, 2, 3, 4  # what a number is drawn for


class FimRows(StreamRows):
    """The rows of ``stream``, with a share ``rate`` of its documents told with the middle last, in SPM a share ``spm``.

    Whether a document is, in which order and where it is cut is a function of the seed and the document, the same in
    every pass and on every machine. Each part stays within its document, and what begins and ends a text (bos, eos)
    stays where it is. Cuts fall between tokens. A document that lies across rows is cut by them as any other.

    Args:
        stream: rows of documents.
        markers: the tokens begin, hole and end.
    """

    def __init__(self, stream: StreamRows, markers: tuple[int, int, int], *, rate: float = 0.5, spm: float = 0.0):
        super().__init__(
            stream.shards, stream.seq_len, documents=stream.documents, seed=stream.seed, shuffle=stream.shuffle
        )
        self.markers = markers
        numbers = np.arange(self.documents.start, self.documents.stop)
        self.chosen = self._draw(numbers, CHOOSE) < rate
        self.suffix_first = self._draw(numbers, ORDER) < spm
        self.places = np.stack([self._draw(numbers, FIRST), self._draw(numbers, SECOND)], 1)
        self.lengths = self.lengths + len(markers) * self.chosen
        self.n_tokens = int(self.lengths.sum())
        self.n_rows = -(-(self.n_tokens - 1) // self.seq_len)
        described = f"fim {stream.fingerprint} {markers} {rate} {spm}"
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    def read(self, piece: Piece) -> Array:
        if not self.chosen[piece.number - self.documents.start]:
            return super().read(piece)
        found, at = list[Array](), 0
        for part in self._told(piece.number):
            length = 1 if isinstance(part, int) else part[1] - part[0]
            start, stop = max(piece.offset - at, 0), min(piece.offset + piece.tokens - at, length)
            at += length
            if start < stop and isinstance(part, int):
                found.append(np.array([part]))
            elif start < stop and not isinstance(part, int):
                found.append(self.shards.stream(part[0] + start, part[0] + stop))
        return np.concatenate(found)

    def _told(self, number: int) -> Iterator[int | tuple[int, int]]:
        """A document in the order it is told in: markers, and ranges of the token stream."""
        start, stop = int(self.shards.offsets[number]), int(self.shards.offsets[number + 1])
        ends = (self.shards.special.get("bos"), self.shards.special.get("eos"))
        has = [end is not None and stop - start > 1 for end in ends]
        first = start + (has[0] and int(self.shards.stream(start, start + 1)[0]) == ends[0])
        last = stop - (has[1] and int(self.shards.stream(stop - 1, stop)[0]) == ends[1])
        here = number - self.documents.start
        a, b = sorted(first + int(place * (last - first + 1)) for place in self.places[here])
        begin, hole, end = self.markers
        yield (start, first)
        yield begin
        if self.suffix_first[here]:
            yield from (hole, (b, last), end, (first, a))
        else:
            yield from ((first, a), hole, (b, last), end)
        yield (a, b)
        yield (last, stop)

    def _draw(self, numbers: Array, what: int) -> Array:
        """A number in [0, 1) for every document."""
        key = mix(np.array([self.seed & (2**64 - 1)], np.uint64)) ^ np.uint64(what)
        return (mix(mix(numbers.astype(np.uint64)) ^ mix(key)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
