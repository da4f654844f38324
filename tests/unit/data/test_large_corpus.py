"""What a batch costs does not grow with the corpus: counted, not timed (benchmarks/data.py has the times)."""

import json
import tracemalloc

import numpy as np
import pytest

from octavo.data.loader import Loader, pretraining_loader
from octavo.data.pack import StreamRows
from octavo.data.shards import Shards

SEQ_LEN, ROWS = 512, 16


def corpus(folder, n_tokens, *, per_document=500, parts=2) -> Shards:
    """Shards of that many tokens, as files with holes: they take next to no space, and no time to write."""
    folder.mkdir()
    each = n_tokens // parts
    described, files = [], []
    for part in range(parts):
        tokens = folder / f"tokens-{part:05d}.npy"
        stored = np.lib.format.open_memmap(tokens, "w+", np.uint16, (each,))
        stored[-1] = 7 + part
        stored.flush()
        del stored
        sizes = np.full((each // per_document, 2), per_document, np.int64)
        np.save(folder / f"documents-{part:05d}.npy", sizes)
        described.append({"n_documents": len(sizes), "n_tokens": each})
        files += [tokens, folder / f"documents-{part:05d}.npy"]
    manifest = {
        "format": 1,
        "fingerprint": f"{n_tokens}",
        "dtype": "uint16",
        "vocab_hash": "",
        "vocab_size": 6400,
        "special": {"pad": 0, "bos": 1, "eos": 2},
        "n_documents": sum(d["n_documents"] for d in described),
        "n_tokens": n_tokens,
        "n_bytes": n_tokens,
        "max_id": 8,
        "sources": [{"path": "a", "documents": each // per_document}, {"path": "b", "documents": each // per_document}],
        "parts": described,
        "files": [{"name": f.name, "size": f.stat().st_size, "sha256": ""} for f in files],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Shards.open(folder, verify=False)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    return [corpus(folder / f"{n}", n) for n in (1_000_000, 100_000_000)]


class Counted(Shards):
    """Shards that note what is read of them."""

    def __init__(self, shards):
        self.__dict__ = shards.__dict__
        self.read: list[int] = []

    def stream(self, start, stop):
        self.read.append(stop - start)
        return super().stream(start, stop)


def test_the_tokens_stay_on_disk(corpora):
    for shards in corpora:
        assert isinstance(shards._part(0), np.memmap) and isinstance(shards._part(1), np.memmap)
        assert not shards._part(0).flags.writeable
    tracemalloc.start()
    try:
        large = Shards.open(corpora[1].folder, verify=False)
        Loader(StreamRows(large, SEQ_LEN), ROWS).batch(0)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 100 * large.n_documents  # a few numbers for each document
    assert peak < 0.2 * 2 * large.n_tokens


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_a_batch_reads_its_own_tokens_only(corpora, weights):
    for shards in corpora:
        counted = Counted(shards)
        loader = pretraining_loader(counted, SEQ_LEN, ROWS, seed=3, weights=weights)
        far = 50 * int(loader.steps_per_epoch) + 3
        for step in (0, 1, far, far + 1, 2):  # also fifty epochs away, without those between
            counted.read.clear()
            batch = loader.batch(step)
            assert batch["tokens"].shape == (ROWS, SEQ_LEN)
            assert sum(counted.read) <= ROWS * (SEQ_LEN + 1)
            assert len(counted.read) <= ROWS * (SEQ_LEN // 500 + 3)


def test_a_batch_takes_the_same_memory_from_any_corpus(corpora):
    peaks = []
    for shards in corpora:
        loader = pretraining_loader(shards, SEQ_LEN, ROWS, seed=3)
        loader.batch(0)
        tracemalloc.start()
        try:
            for step in range(1, 6):
                loader.batch(step)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert max(peaks) < 4 << 20 and peaks[1] < 1.5 * peaks[0]
