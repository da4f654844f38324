"""R18: a run sees each row once an epoch, in an order that no stop, rank or moment of asking changes.

A machine of random moves plays a training: it takes steps, is killed and begun anew in another process's place, asks
ahead, asks for what was, and splits steps among ranks. What it was given is held against sets counted here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from boxed import SCALE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from octavo.data import prepare
from octavo.data.loader import Loader
from octavo.data.pack import Packed, StreamRows, WholeRows
from octavo.data.prepare import DataConfig, clean_documents
from octavo.data.shards import Shards

MACHINES = 200 * SCALE
QUIET = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def write_shards(folder: Path, lengths: list[int], parts: int) -> Shards:
    """Documents of those lengths in which no token occurs twice, in ``parts`` files."""
    folder.mkdir(parents=True)
    bounds = np.linspace(0, len(lengths), parts + 1).astype(int)
    files, described, first = [], [], 1
    for number, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:])):
        mine = lengths[start:stop]
        tokens = np.arange(first, first + sum(mine), dtype=np.uint32)
        first += sum(mine)
        table = np.array([(n, n) for n in mine], dtype=np.int64).reshape(-1, 2)
        for name, array in (("tokens", tokens), ("documents", table)):
            path = folder / f"{name}-{number:05d}.npy"
            np.save(path, array)
            data = path.read_bytes()
            files.append({"name": path.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        described.append({"n_documents": len(mine), "n_tokens": sum(mine)})
    manifest: dict[str, Any] = {
        "format": 1, "fingerprint": f"{lengths}", "dtype": "uint32", "vocab_hash": "x", "vocab_size": first + 1,
        "special": {"pad": 0, "bos": None, "eos": None}, "n_documents": len(lengths), "n_tokens": sum(lengths),
        "n_bytes": sum(lengths), "max_id": first - 1, "sources": [{"path": "a", "documents": len(lengths)}],
        "parts": described, "files": files,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Shards.open(folder)


class Training(RuleBasedStateMachine):
    """A run over one or two data sets."""

    folder: Path
    made = 0

    @initialize(
        kind=st.sampled_from(["stream", "whole", "both", "two"]),
        lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12),
        seq_len=st.integers(2, 12),
        rows=st.none() | st.integers(1, 12),
        seed=st.integers(0, 2**63 - 1),
        parts=st.integers(1, 3),
    )
    def begin(self, kind, lengths, seq_len, rows, seed, parts):
        Training.made += 1
        self.kind, self.lengths, self.seq_len, self.n_rows_asked, self.seed = kind, lengths, seq_len, rows, seed
        self.place = self.folder / f"{Training.made}"
        write_shards(self.place, lengths, parts)
        self.loader = self.process()
        self.rows = self.loader.rows
        self.given: dict[int, dict[str, np.ndarray]] = {}
        self.step = 0

    def process(self) -> Loader:
        """All that a new process makes, from the files on."""
        sets: list[Packed] = []
        if self.kind != "whole":
            sets.append(StreamRows(Shards.open(self.place, verify=False), self.seq_len, seed=self.seed % 7))
        if self.kind != "stream":
            first, samples = 100_000, []
            for length in self.lengths:
                samples.append((list(range(first, first + length)), [0] + [1] * (length - 1)))
                first += length
            sets.append(WholeRows(samples, self.seq_len))
        weights = [1, 3] if self.kind == "two" else None
        return Loader(sets, self.n_rows_asked, seed=self.seed, weights=weights)

    @rule()
    def take_a_step(self):
        batch = self.loader.batch(self.step)
        if self.step in self.given:
            self.same(batch, self.given[self.step])
        self.given[self.step] = batch
        self.step += 1

    @precondition(lambda self: self.step)
    @rule()
    def be_killed_and_begun_anew(self):
        before = self.loader.fingerprint
        self.loader = self.process()
        assert self.loader.fingerprint == before

    @precondition(lambda self: self.step)
    @rule(data=st.data())
    def go_back_to_an_older_checkpoint(self, data):
        self.loader = self.process()
        self.step = data.draw(st.integers(0, self.step))

    @rule(ahead=st.integers(0, 3))
    def ask_ahead(self, ahead):
        self.loader.prefetch(self.step + ahead)

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def split_among_ranks(self, data):
        step = data.draw(st.sampled_from(sorted(self.given)))
        world = data.draw(st.sampled_from([n for n in range(1, self.rows + 1) if self.rows % n == 0]))
        parts = [self.loader.batch(step, rank, world) for rank in range(world)]
        self.same({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, self.given[step])

    @staticmethod
    def same(one, other):
        assert one.keys() == other.keys()
        for name in one:
            assert np.array_equal(one[name], other[name]), name

    @invariant()
    def each_target_is_seen_as_often_as_the_next(self):
        """After any number of rows, all targets of a data set were seen equally often, but for the epoch under way."""
        if not getattr(self, "given", None) or sorted(self.given) != list(range(len(self.given))):
            return
        source, epoch, row = self.loader.order(0, len(self.given) * self.rows)
        seen: dict[tuple[int, int], Counter[int]] = {}
        places: dict[tuple[int, int], set[int]] = {}
        for step, batch in self.given.items():
            for i in range(self.rows):
                number = step * self.rows + i
                key = int(source[number]), int(epoch[number])
                assert row[number] not in places.setdefault(key, set()), "a row twice in an epoch"
                places[key].add(int(row[number]))
                targets = batch["targets"][i][batch["loss_mask"][i].astype(bool)]
                seen.setdefault(key, Counter()).update(targets.tolist())
                before = batch["tokens"][i][batch["loss_mask"][i].astype(bool)]
                assert (targets == before + 1).all(), "a target is not the token after"
        for (number, e), counts in seen.items():
            dataset = self.loader.datasets[number]
            assert max(counts.values(), default=1) == 1, "a target twice in an epoch"
            if len(places[number, e]) == dataset.n_rows:
                assert set(counts) == self.all_targets(number), "a whole epoch without some target"

    def all_targets(self, number: int) -> set[int]:
        """Every token but the first of a document; of a sample, as far as a row reaches."""
        whole = self.kind == "whole" or (self.kind in ("both", "two") and number == 1)
        found, first = set(), 100_000 if whole else 1
        for length in self.lengths:
            kept = min(length, self.seq_len + 1) if whole else length
            found |= set(range(first + 1, first + kept))
            first += length
        return found


def test_no_row_is_lost_or_doubled_whatever_happens(tmp_path, record):
    Training.folder, Training.made, failures = tmp_path, 0, []
    try:
        run_state_machine_as_test(Training, settings=settings(max_examples=MACHINES, stateful_step_count=20, **QUIET))
    except AssertionError as error:
        failures = [str(error)[:500]]
    record("R18", Training.made, failures, seed="derandomized")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_documents_are_the_same_for_any_number_of_workers_and_interruptions(workers, tmp_path, monkeypatch, record):
    """The order begins with the documents: a preparation that stops after each segment ends in the same bytes."""
    monkeypatch.setattr(prepare, "SEGMENT_ITEMS", 30)
    monkeypatch.setattr(prepare, "BATCH_ITEMS", 7)
    rows = [
        json.dumps({"text": f"document {i} tells of {i * 7919 % 97} things and no more than that"}) for i in range(150)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    config = DataConfig.model_validate({"sources": str(tmp_path / "a.jsonl"), "split": {"held_out": 0.1}})
    clean_documents(config, tmp_path / "whole", workers=1)

    class Killed(Exception):
        pass

    stops = 0
    while True:
        done = 0

        def progress(stage: str, now: int, total: int) -> None:
            nonlocal done
            done += 1
            if done == 5:  # a few batches further each time
                raise Killed

        try:
            clean_documents(config, tmp_path / "parts", workers=workers, progress=progress)
            break
        except Killed:
            stops += 1
            assert stops < 60, "it never comes to an end"
    names = sorted(path.name for path in (tmp_path / "whole" / "documents").iterdir())
    differ = [
        name for name in names
        if (tmp_path / "whole/documents" / name).read_bytes() != (tmp_path / "parts/documents" / name).read_bytes()
    ]  # fmt: skip
    assert stops >= 3 and len(names) > 3
    record("R18", stops, [f"{workers} workers, {stops} stops: {name} differs" for name in differ], workers=workers)
