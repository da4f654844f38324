import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from octavo.data.loader import Loader, Schedule, pretraining_loader, sweep
from octavo.data.pack import FIELDS, Packed, PackReport, Piece
from octavo.data.permutation import permute
from octavo.errors import ConfigError


class Numbered(Packed):
    """Rows that say who they are: (data set, epoch, row) in their first three slots."""

    def __init__(self, name, n_rows):
        self.name, self.n_rows, self.seq_len, self.fingerprint = name, n_rows, 3, f"{name}:{n_rows}"

    def rows(self, epoch, index):
        tokens = np.stack([np.full(len(index), self.name), np.full(len(index), epoch), index], axis=1)
        return dict.fromkeys(FIELDS, tokens)

    def pieces(self, epoch, number):
        return [Piece(0, 3, 3, number, 0, 3)]

    def report(self):
        return PackReport(self.n_rows, 3 * self.n_rows, 3 * self.n_rows, 0.0, self.n_rows)


def rows_of(loader, start, stop, world=1):
    parts = [loader.batch(s, rank, world)["tokens"] for s in range(start, stop) for rank in range(world)]
    return [tuple(row) for part in parts for row in part.tolist()]


# ---- the permutation ----


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_the_permutation_is_one(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


def test_the_permutation_is_the_same_for_a_part_and_differs_by_key():
    whole = permute(np.arange(10_000), 10_000, 5, 0)
    assert (permute(np.array([[7], [9999]]), 10_000, 5, 0) == whole[[[7], [9999]]]).all()
    for key in ((5, 1), (6, 0), (5,), (0, 5)):
        assert (permute(np.arange(10_000), 10_000, *key) == whole).mean() < 0.01
    assert permute(np.arange(3), 2**40, 1).max() < 2**40
    with pytest.raises(IndexError):
        permute(np.array([4]), 4, 1)


def test_the_permutation_looks_random():
    n = 1 << 12
    moved = np.stack([permute(np.arange(n), n, seed) for seed in range(64)])
    # Where index 0 goes, over many keys, is spread over all n; neighbours do not stay neighbours.
    spread = np.histogram(moved, bins=16, range=(0, n))[0]
    assert spread.min() == spread.max()
    assert len(np.unique(moved[:, 0])) > 60
    assert np.abs(np.corrcoef(moved[:, :-1].ravel(), moved[:, 1:].ravel())[0, 1]) < 0.02
    assert (np.abs(np.diff(moved)) == 1).mean() < 0.002


# ---- the schedule of a mixture ----


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.floats(0.01, 100), st.integers(1, 500)), min_size=1, max_size=7))
def test_in_every_prefix_each_source_is_within_one_row_of_its_share(weights):
    schedule = Schedule(weights)
    assert schedule.quotas.sum() == schedule.period
    source, nth = schedule.source_rows(np.arange(2 * schedule.period + 100))
    share = schedule.quotas / schedule.period
    for i in range(len(weights)):
        count = np.cumsum(source == i)
        assert np.abs(count - share[i] * np.arange(1, len(source) + 1)).max() < 1
        assert np.array_equal(nth[source == i], np.arange((source == i).sum()))
    asked = np.array(weights) / sum(weights)
    assert np.abs(share - asked).max() <= max(1, len(weights) - 1) / 2**14


def test_whole_weights_are_kept_exactly():
    assert Schedule([3, 1, 2]).quotas.tolist() == [3, 1, 2]
    assert Schedule([3, 1, 2]).period == 6
    for bad in ([], [0, 1], [float("inf")], [-1]):
        with pytest.raises(ConfigError):
            Schedule(bad)


# ---- the loader ----


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 17), st.integers(0, 99))
def test_no_row_is_lost_or_doubled_in_a_pass(sizes, rows, seed):
    loader = Loader([Numbered(i, n) for i, n in enumerate(sizes)], rows, seed=seed)
    total = sum(sizes)
    seen = rows_of(loader, 0, -(-3 * total // rows))
    for epoch in range(3):
        expected = [(i, epoch, row) for i, n in enumerate(sizes) for row in range(n)]
        assert sorted(seen[epoch * total : (epoch + 1) * total]) == expected


def test_full_batch_and_per_sample():
    full = Loader([Numbered(0, 5), Numbered(1, 7)], None)
    assert full.rows == 12 and full.steps_per_epoch == 1
    for step in range(3):
        expected = [(i, step, row) for i, n in enumerate((5, 7)) for row in range(n)]
        assert sorted(rows_of(full, step, step + 1)) == expected
    single = Loader(Numbered(0, 5), 1)
    assert sorted(rows_of(single, 0, 5)) == [(0, 0, r) for r in range(5)]


def test_every_epoch_has_an_order_of_its_own():
    loader = Loader(Numbered(0, 500), 500, seed=3)
    first, second = loader.batch(0)["tokens"][:, 2], loader.batch(1)["tokens"][:, 2]
    assert (first == second).mean() < 0.05 and (first == np.arange(500)).mean() < 0.05
    assert (first != Loader(Numbered(0, 500), 500, seed=4).batch(0)["tokens"][:, 2]).any()


class DataOrder(RuleBasedStateMachine):
    """A run that is stopped, resumed and moved to other numbers of ranks sees what an uninterrupted one sees."""

    @initialize(
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
        rows=st.sampled_from([4, 12]),
        seed=st.integers(0, 2**40),
        weighted=st.booleans(),
    )
    def start(self, sizes, rows, seed, weighted):
        self.make = lambda: Loader(
            [Numbered(i, n) for i, n in enumerate(sizes)],
            rows,
            seed=seed,
            weights=[0.3, 1.1, 2.7][: len(sizes)] if weighted else None,
        )
        self.loader, self.step, self.seen = self.make(), 0, []
        self.uninterrupted = rows_of(self.make(), 0, 48)

    @rule(world=st.sampled_from([1, 2, 4]), steps=st.integers(1, 4), ahead=st.booleans())
    def train(self, world, steps, ahead):
        for _ in range(steps):
            if ahead:
                self.loader.prefetch(self.step, 0, world)
            self.seen += rows_of(self.loader, self.step, self.step + 1, world)
            self.step += 1  # at most 12 x 4 of them

    @rule(back=st.integers(0, 3))
    def resume_from_a_checkpoint(self, back):
        self.loader = self.make()
        self.step = max(0, self.step - back)
        self.seen = self.seen[: self.step * self.loader.rows]

    @rule(step=st.integers(0, 50))
    def prefetch_what_is_not_wanted(self, step):
        self.loader.prefetch(step)

    @invariant()
    def same_as_uninterrupted(self):
        assert self.seen == self.uninterrupted[: self.step * self.loader.rows]


DataOrder.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
TestDataOrder = DataOrder.TestCase


def test_what_cannot_be_is_refused_with_the_divisors():
    loader = Loader(Numbered(0, 50), 12)
    with pytest.raises(ConfigError, match="use 1, 2, 3, 4, 6, 12 ranks"):
        loader.batch(0, 0, 5)
    for step, rank, world in ((-1, 0, 1), (0, 2, 2), (0, -1, 2)):
        with pytest.raises(ConfigError):
            loader.batch(step, rank, world)
    with pytest.raises(ConfigError):
        Loader(Numbered(0, 5), 0)
    with pytest.raises(ConfigError):
        Loader([Numbered(0, 5)], 1, weights=[1, 2])


def test_the_fingerprint_says_whether_the_order_is_the_same():
    base = Loader([Numbered(0, 5), Numbered(1, 7)], 4, seed=1).fingerprint
    assert Loader([Numbered(0, 5), Numbered(1, 7)], 4, seed=1).fingerprint == base
    assert Loader([Numbered(0, 5), Numbered(1, 8)], 4, seed=1).fingerprint != base
    assert Loader([Numbered(0, 5), Numbered(1, 7)], 5, seed=1).fingerprint != base
    assert Loader([Numbered(0, 5), Numbered(1, 7)], 4, seed=2).fingerprint != base
    assert Loader([Numbered(0, 5), Numbered(1, 7)], 4, seed=1, weights=[1, 1]).fingerprint != base


def test_a_sweep_sees_every_row_once_in_order():
    seen = [tuple(row) for batch in sweep(Numbered(3, 11), 4) for row in batch["tokens"].tolist()]
    assert seen == [(3, 0, row) for row in range(11)]
    ordered = Loader(Numbered(3, 11), 4, shuffle=False)
    assert rows_of(ordered, 0, 2) == [(3, 0, row) for row in range(8)]


def test_sources_with_weights_are_mixed_and_others_share_rows(tmp_path):
    from test_pack import MemoryShards

    shards = MemoryShards([10] * 20 + [10] * 60)
    shards.manifest = {"sources": [{"path": "a", "documents": 20}, {"path": "b", "documents": 60}]}
    together = pretraining_loader(shards, 5, 8, weights=[2, 2])
    assert len(together.datasets) == 1 and together.n_rows == 160
    mixed = pretraining_loader(shards, 5, 8, weights=[3, 1])  # three times 40 rows against one times 120
    tokens = np.concatenate([mixed.batch(s)["tokens"] for s in range(10)])
    assert (tokens < 1200).all(axis=1).sum() == 40
    with pytest.raises(ConfigError, match="3 weights for 2 sources"):
        pretraining_loader(shards, 5, 8, weights=[1, 2, 3])
