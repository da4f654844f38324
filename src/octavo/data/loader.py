"""Batches as a function of the step.

The order of rows is a keyed permutation of (seed, source, epoch, index), the choice among sources a fixed schedule:
``batch(step)`` can be asked for at any step, in any process, for any rank. The state of a loader is the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from octavo.data.pack import FIELDS, Batch, Packed, StreamRows
from octavo.data.permutation import permute
from octavo.data.shards import Shards
from octavo.errors import ConfigError

Array = np.ndarray[Any, Any]

PERIOD = 1 << 14


class Schedule:
    """Which source gives row 0, 1, 2, ...: in every prefix each source is within one row of its share.

    Whole numbers that add up to at most 16,384 are kept exactly, and the schedule repeats after as many rows. Other
    shares are rounded to multiples of 1 / 16,384, at least one of them each.

    Args:
        weights: positive, need not add up to 1.

    Source: Tijdeman 1980 (The chairman assignment problem).
    """

    def __init__(self, weights: Sequence[float]):
        k = len(weights)
        if not k or k > PERIOD // 2 or not all(0 < w < float("inf") for w in weights):
            raise ConfigError(f"mixture weights {list(weights)} must be positive numbers", fix="leave the source out")
        self.n_sources = k
        exact = np.array(weights, dtype=np.float64)
        if exact.sum() > PERIOD or (exact != np.floor(exact)).any():
            exact *= PERIOD / exact.sum()
        self.period = round(exact.sum()) if k > 1 else 1
        quotas = np.maximum(np.floor(exact).astype(np.int64), 1) if k > 1 else np.ones(1, dtype=np.int64)
        while missing := self.period - int(quotas.sum()):
            by_need = np.argsort(quotas - exact if missing > 0 else -quotas, kind="stable")
            quotas[by_need[: abs(missing)]] += 1 if missing > 0 else -1
        self.quotas: Array = quotas
        self._fill()

    def _fill(self) -> None:
        """``chosen[t]``: the source of row t of a period; ``before[t]``: rows of that source before it."""
        quotas = self.quotas.tolist()
        chosen, before = [0] * self.period, [0] * self.period
        given = [0] * self.n_sources
        # A source may go once it is due by 1/(2k-2) of a row; of those the one goes that would be the first to be due
        # by more than 1 - 1/(2k-2). In whole numbers of 1/((2k-2) period) rows, so that it is exact.
        scale = max(2 * self.n_sources - 2, 1)
        row = self.period * scale
        due = [0] * self.n_sources
        for t in range(self.period):
            best, best_slack = -1, 0
            for i, quota in enumerate(quotas):
                due[i] += quota * scale
                if due[i] >= self.period:
                    slack = row - self.period - due[i]
                    if best < 0 or slack * quotas[best] < best_slack * quota:
                        best, best_slack = i, slack
            due[best] -= row
            chosen[t], before[t] = best, given[best]
            given[best] += 1
        self.chosen: Array = np.array(chosen)
        self.before: Array = np.array(before)

    def source_rows(self, numbers: Array) -> tuple[Array, Array]:
        """For rows of the mixture: their source, and which of that source's rows it is."""
        periods, t = np.divmod(numbers, self.period)
        source = self.chosen[t]
        return source, periods * self.quotas[source] + self.before[t]


class Loader:
    """Rows of packed data sets, ordered and mixed.

    Rows are numbered 0, 1, 2, ... without end. A source gives each of its rows once in an epoch of its own, in an
    order of that epoch; a batch may lie across epochs.

    Args:
        datasets: one or several, of the same seq_len.
        rows: rows in a step over all ranks: 1 for per-sample updates, ``None`` for all rows of a pass (full batch).
        seed: of the order.
        weights: share of the rows from each data set; by default as their sizes, so that a pass of one data set,
            or of several of at most 16,384 rows together, has each row once.
        shuffle: without it the rows come in their own order (for scoring).
    """

    def __init__(
        self,
        datasets: Packed | Sequence[Packed],
        rows: int | None,
        *,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
    ):
        self.datasets = [datasets] if isinstance(datasets, Packed) else list(datasets)
        lengths = {d.seq_len for d in self.datasets}
        if len(lengths) != 1:
            raise ConfigError(f"data sets with rows of {sorted(lengths)} slots cannot be mixed", fix="use one seq_len")
        if rows is not None and rows < 1:
            raise ConfigError(f"rows in a step = {rows} must be at least 1", fix="use 1 for per-sample updates")
        if weights is not None and len(weights) != len(self.datasets):
            raise ConfigError(f"{len(weights)} weights for {len(self.datasets)} data sets", fix="give one for each")
        self.seq_len = lengths.pop()
        self.n_rows = sum(d.n_rows for d in self.datasets)
        self.rows = self.n_rows if rows is None else rows
        self.seed, self.shuffle = seed, shuffle
        self.schedule = Schedule(weights or [d.n_rows for d in self.datasets])
        described = [d.fingerprint for d in self.datasets] + [self.schedule.quotas.tolist(), self.rows, seed, shuffle]
        self.fingerprint = hashlib.sha256(repr(described).encode()).hexdigest()
        self._ahead: tuple[tuple[int, int, int], Future[Batch]] | None = None
        self._thread: ThreadPoolExecutor | None = None

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which as many rows are given as all data sets have together."""
        return self.n_rows / self.rows

    def order(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """For rows ``start`` to ``stop`` of the mixture: data set, epoch of that data set, row in it."""
        source, nth = self.schedule.source_rows(np.arange(start, stop))
        epoch, row = np.zeros_like(nth), np.zeros_like(nth)
        for i, dataset in enumerate(self.datasets):
            mine = np.flatnonzero(source == i)
            epoch[mine], at = np.divmod(nth[mine], dataset.n_rows)
            row[mine] = at
            for e in np.unique(epoch[mine]) if self.shuffle else ():
                here = mine[epoch[mine] == e]
                row[here] = permute(row[here], dataset.n_rows, self.seed, 2, i, int(e))
        return source, epoch, row

    def _make(self, step: int, rank: int, world: int) -> Batch:
        share = self.rows // world
        start = step * self.rows + rank * share
        source, epoch, row = self.order(start, start + share)
        batch: Batch = {}
        for i, dataset in enumerate(self.datasets):
            for e in np.unique(epoch[source == i]):
                here = np.flatnonzero((source == i) & (epoch == e))
                for name, values in dataset.rows(int(e), row[here]).items():
                    if name not in batch:
                        batch[name] = np.empty((share, *values.shape[1:]), values.dtype)
                    batch[name][here] = values
        return {name: batch[name] for name in (*FIELDS, *(name for name in batch if name not in FIELDS))}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of a step (0-based) that belong to a rank: a pure function of its arguments.

        The batches of all ranks, one under another, are the batch of one process.

        Raises:
            ConfigError: the rows of a step cannot be divided among the ranks.
        """
        if step < 0 or not 0 <= rank < world:
            raise ConfigError(
                f"step {step}, rank {rank} of {world} does not exist", fix="count both from 0, ranks below their number"
            )
        if self.rows % world:
            fits = ", ".join(str(d) for d in range(1, min(self.rows, 4096) + 1) if self.rows % d == 0)
            raise ConfigError(
                f"{self.rows} rows in a step cannot be divided among {world} ranks", fix=f"use {fits} ranks"
            )
        key = (step, rank, world)
        ahead, self._ahead = self._ahead, None
        # Also a batch nobody wants is waited for: packings cache per epoch and are used by one thread at a time.
        made = ahead[1].result() if ahead is not None else None
        return made if made is not None and ahead is not None and ahead[0] == key else self._make(*key)

    def places(self, step: int, n: int) -> list[tuple[Packed, int, int]]:
        """Of the first ``n`` rows of a step (of all ranks): data set, epoch and number in it."""
        start = step * self.rows
        source, epoch, row = self.order(start, start + min(n, self.rows))
        return [(self.datasets[s], int(e), int(r)) for s, e, r in zip(source, epoch, row, strict=True)]

    def prefetch(self, step: int, rank: int = 0, world: int = 1) -> None:
        """Begin to make a batch in the background; the next call of ``batch`` takes it if it is that one."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="octavo-loader")
        if self._ahead is not None:
            self._ahead[1].result()
        self._ahead = ((step, rank, world), self._thread.submit(self._make, step, rank, world))


def sweep(dataset: Packed, rows: int, *, epoch: int = 0) -> Iterator[Batch]:
    """Every row of a data set once, in its own order, ``rows`` at a time (the last batch may have fewer)."""
    for start in range(0, dataset.n_rows, rows):
        yield dataset.rows(epoch, np.arange(start, min(start + rows, dataset.n_rows)))


def pretraining_loader(
    shards: Shards,
    seq_len: int,
    rows: int | None,
    *,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    changed: Callable[[Packed], Packed] = lambda packed: packed,
) -> Loader:
    """The loader of a run: the documents of all sources together, or a mixture where sources have weights.

    Args:
        weights: one for each source of the shards: how often its documents are seen relative to the others.
            If all are equal the documents of all sources share rows.
        changed: makes of a packing of documents what is trained on (masked rows).
    """
    ranges = [documents for _, documents in shards.source_ranges()]
    if weights is None or len(set(weights)) <= 1:
        return Loader(changed(StreamRows(shards, seq_len, seed=seed)), rows, seed=seed)
    if len(weights) != len(ranges):
        raise ConfigError(f"{len(weights)} weights for {len(ranges)} sources of {shards.folder}", fix="prepare again")
    kept = [(r, w) for r, w in zip(ranges, weights, strict=True) if len(r)]
    datasets = [changed(StreamRows(shards, seq_len, documents=r, seed=seed)) for r, _ in kept]
    shares = [w * d.n_rows for d, (_, w) in zip(datasets, kept, strict=True)]
    return Loader(datasets, rows, seed=seed, weights=shares)
