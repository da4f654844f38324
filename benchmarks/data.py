"""Rates of the data path on one core: encoding, removal of near duplicates, batches. Process CPU clock, interleaved.

    python benchmarks/data.py                                    the standard library's own text
    python benchmarks/data.py docs.txt.gz poems/                 other texts (any source of `octavo data prepare`)
    python benchmarks/data.py --tokenizer gpt2/ --only encode    a tokenizer of your own beside the trained ones
    python benchmarks/data.py --only near loader --rounds 9

A rate is the median over the rounds, with the lowest and highest. Encoding is timed on text the encoder has not
seen (first) and once more (again: words are remembered), and `tokenizers` on a part of it in the same round; the
ids are compared on all of the text. The exit code is 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# One core: before anything starts threads.
THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS")
os.environ.update(dict.fromkeys(THREADS, "1"))

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from train import processor  # noqa: E402

from octavo.data import sources  # noqa: E402
from octavo.data.clean import CleanConfig  # noqa: E402
from octavo.data.duplicates import NearDuplicatesConfig, NearIndex, signature  # noqa: E402
from octavo.data.loader import Loader  # noqa: E402
from octavo.data.pack import Packed, StreamRows, WholeRows  # noqa: E402
from octavo.data.prepare import DataConfig, clean_documents  # noqa: E402
from octavo.data.shards import Shards  # noqa: E402
from octavo.tokenizer import ByteBPE, Tokenizer, train  # noqa: E402

PARTS = ("encode", "near", "loader")
REFERENCE_BYTES = 1_500_000  # of the text, what `tokenizers` encodes in a round
STEPS = {"P26 on two of these cores": 4.0, "a machine ten times faster": 0.3}  # seconds


class Times:
    """Seconds of one thing, a value a round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def add(self, work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> Any:
        start = clock()
        result = work()
        self.seconds.append(clock() - start)
        return result

    def rate(self, size: float) -> str:
        rates = [size / s for s in self.seconds]
        return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"

    def each(self, unit: float = 1.0, digits: int = 2) -> str:
        values = [s / unit for s in self.seconds]
        return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for n, row in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if n == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)


def machine() -> str:
    found = []
    for package in ("numpy", "tokenizers", "fastokens", "rensa"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    return f"{processor()}, {os.cpu_count()} cores, {load}; Python {platform.python_version()}, {', '.join(found)}"


def documents(path: str, limit: int) -> list[str]:
    source: dict[str, Any] = {"path": path}
    if path != sources.STDLIB:
        source["document_bytes"] = 4096
    found, size = [], 0
    for document in sources.read([sources.SourceConfig.model_validate(source)]):
        found.append(document.text)
        size += len(document.text.encode())
        if size >= limit:
            break
    return found


def n_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


# ---- encoding


def encoding(texts: dict[str, list[str]], folders: list[str], rounds: int) -> bool:
    """Print the table of rates; whether all ids are those of `tokenizers`."""
    every = [text for found in texts.values() for text in found]
    made = {f"byte_bpe {size}": train(ByteBPE(vocab_size=size), every) for size in (8192, 32768)}
    made |= {Path(folder).name: Tokenizer.load(folder) for folder in folders}
    cases = [(name, source) for name in made for source in texts]
    first, again, usual = ({case: Times() for case in cases} for _ in range(3))
    part = {source: _part(found) for source, found in texts.items()}
    for _ in range(rounds):
        for name, source in cases:
            tokenizer = Tokenizer.load(folder) if (folder := _folder(name, folders)) else _anew(made[name])
            assert tokenizer.encoder  # looked for and made
            copies = [text[:1] + text[1:] for text in texts[source]]  # str keeps its UTF-8 once it was asked for
            first[name, source].add(lambda: tokenizer.encode_batch(copies))  # noqa: B023
            again[name, source].add(lambda: tokenizer.encode_batch(copies))  # noqa: B023
            usual[name, source].add(lambda: tokenizer._encode_all(part[source]))  # noqa: B023
    rows, differ = [], 0
    for name, source in cases:
        ours, theirs = made[name].encode_batch(texts[source]), made[name]._encode_all(texts[source])
        wrong = sum(not np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        differ += wrong
        size, share = n_bytes(texts[source]) / 1e6, n_bytes(part[source]) / 1e6
        ratio = statistics.median(
            (size / a) / (share / b)
            for a, b in zip(first[name, source].seconds, usual[name, source].seconds, strict=True)
        )
        per_token = size * 1e6 / sum(map(len, ours))
        same = "all" if not wrong else f"{wrong} texts differ"
        rates = [first[name, source].rate(size), again[name, source].rate(size), usual[name, source].rate(share)]
        rows.append([name, source, f"{size:.1f}", f"{per_token:.2f}", *rates, f"{ratio:.0f}", same])
    print("Encoding, MB/s of UTF-8 on one core")
    table("tokenizer,text,MB,bytes a token,first,again,tokenizers,ratio,same ids".split(","), rows)
    for name, tokenizer in made.items():
        print(f"{name}: {tokenizer.encoder}")
    print()
    return not differ


def _folder(name: str, folders: list[str]) -> str | None:
    return next((folder for folder in folders if Path(folder).name == name), None)


def _anew(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(tokenizer.to_json(), special=tokenizer.special_text)


def _part(texts: list[str]) -> list[str]:
    """Texts from all over, of about ``REFERENCE_BYTES``."""
    step = max(1, n_bytes(texts) // REFERENCE_BYTES)
    return texts[::step]


# ---- near duplicates


def planted(texts: list[str], n: int, size: int) -> tuple[list[str], int]:
    """``n`` documents of ``size`` bytes, in lines from all over; each tenth is another with two words changed."""
    rng = random.Random(0)
    lines = list(dict.fromkeys(line for text in texts for line in text.split("\n") if len(line) > 20))
    found: list[str] = []
    for i in range(n):
        if i % 10 == 9:
            words = rng.choice(found).split(" ")
            for _ in range(2):
                words[rng.randrange(len(words))] = "altered"
            found.append(" ".join(words))
        else:
            chosen, length = [], 0
            while length < size:
                chosen.append(rng.choice(lines))
                length += len(chosen[-1].encode()) + 1
            found.append("\n".join(chosen))
    return found, n // 10


def near(texts: list[str], rounds: int, n: int = 10_000, size: int = 2_000) -> bool:
    found, copies = planted(texts, n, size)
    config = NearDuplicatesConfig()
    kinds = ("signatures, one core", "look-ups, one core", "all of it, one core")
    times: dict[str, Times] = {kind: Times() for kind in kinds}
    walls, both = {1: Times(), 2: Times()}, {1: Times(), 2: Times()}
    manifests = set()
    only = CleanConfig(repair_unicode=False, exact_duplicates=False, filters=None, near_duplicates=config)
    removed: list[int] = []

    def look_up(marks: list[Any]) -> list[int]:
        index, gone = NearIndex(config), []
        for number, each in enumerate(marks):
            if index.find(each) is None:
                index.add(each)
            else:
                gone.append(number)
        return gone

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "documents.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8")
        data = DataConfig.model_validate(
            {"sources": [str(source)], "clean": only.model_dump(), "split": {"held_out": 0}}
        )
        for number in range(rounds):
            marks = times[kinds[0]].add(lambda: [signature(text, config) for text in found])
            removed = times[kinds[1]].add(lambda: look_up(marks))  # noqa: B023
            times[kinds[2]].seconds.append(times[kinds[0]].seconds[-1] + times[kinds[1]].seconds[-1])
            for workers, wall in walls.items():
                out = Path(folder) / f"out-{number}-{workers}"
                start = _cpu()
                wall.add(lambda: clean_documents(data, out, workers=workers), time.perf_counter)  # noqa: B023
                both[workers].seconds.append(_cpu() - start)
                files = json.loads((out / "documents/manifest.json").read_text())["files"]
                manifests.add(json.dumps([file["sha256"] for file in files]))
    right = sum(number % 10 == 9 for number in removed)
    print(f"Near duplicates: {n:,} documents, {n_bytes(found) / 1e6:.1f} MB")
    print(f"removed: {right:,} of {copies:,} planted copies, {len(removed) - right:,} others")
    rows = [[kind, "CPU", times[kind].each()] for kind in kinds]
    for workers in walls:
        what = f"read, remove, write: {workers} process{'es' if workers > 1 else ''}"
        rows += [[what, "wall", walls[workers].each()], [what, "CPU of all", both[workers].each()]]
    table(["what", "clock", "seconds"], rows)
    print(f"the same bytes whatever the number of processes: {'yes' if len(manifests) == 1 else 'NO'}\n")
    return len(manifests) == 1


def _cpu() -> float:
    """CPU seconds of this process and of those it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# ---- batches


def shards(folder: Path, n_tokens: int, mean: int = 600) -> Shards:
    """Made-up shards: documents of random length, tokens of a vocabulary of 6,400."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.exponential(mean, n_tokens // mean).astype(np.int64), 4)
    folder.mkdir()
    np.save(folder / "tokens-00000.npy", rng.integers(5, 6400, int(lengths.sum()), dtype=np.uint16))
    np.save(folder / "documents-00000.npy", np.stack([lengths, 4 * lengths], axis=1))
    n = {"n_documents": len(lengths), "n_tokens": int(lengths.sum())}
    files = [{"name": f.name, "size": f.stat().st_size, "sha256": ""} for f in sorted(folder.iterdir())]
    manifest = {
        "format": 1, "fingerprint": folder.name, "dtype": "uint16", "vocab_hash": "", "vocab_size": 6400, **n,
        "special": {"pad": 0, "bos": 1, "eos": 2}, "n_bytes": 4 * n["n_tokens"], "max_id": 6399, "parts": [n],
        "sources": [{"path": "made-up", "documents": n["n_documents"]}], "files": files,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Shards.open(folder, verify=False)


def conversations(n: int) -> Iterator[tuple[Any, Any]]:
    rng = np.random.default_rng(1)
    for length in np.clip(rng.lognormal(4.8, 0.7, n).astype(int), 8, 800):
        yield rng.integers(5, 6400, length), rng.random(length) < 0.6


def batches(rounds: int, batch_rows: int = 16, seq_len: int = 512, steps: int = 100) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sizes = (1_000_000, 10_000_000, 100_000_000)
        stored = {n: shards(Path(folder) / f"{n}", n) for n in sizes}
        chats = WholeRows(conversations(20_000), seq_len)
        makers: dict[str, Callable[[], tuple[list[Packed], list[float] | None]]] = {
            f"text, {n // 10**6} M tokens": lambda n=n: ([StreamRows(stored[n], seq_len)], None) for n in sizes
        }
        makers["conversations, 20,000"] = lambda: ([chats], None)
        makers["1 conversations : 3 text"] = lambda: ([chats, StreamRows(stored[sizes[1]], seq_len)], [1.0, 3.0])
        each, start = ({name: Times() for name in makers} for _ in range(2))
        for number in range(rounds):
            for name, make in makers.items():

                def begin() -> Loader:
                    datasets, weights = make()  # noqa: B023
                    loader = Loader(datasets, batch_rows, seed=number, weights=weights)  # noqa: B023
                    loader.batch(0)
                    return loader

                loader = start[name].add(begin)
                each[name].add(lambda: [loader.batch(step) for step in range(1, steps + 1)])  # noqa: B023
    print(f"Batches of {batch_rows} rows of {seq_len} slots, CPU time; share of a step of which nothing is hidden")
    rows = []
    for name in makers:
        per_batch = statistics.median(each[name].seconds) / steps
        shares = [f"{per_batch / seconds:.3%}" for seconds in STEPS.values()]
        rows.append([name, each[name].each(steps / 1e3), start[name].each(1e-3, 1), *shares])
    steps_named = [f"of {seconds:g} s ({who})" for who, seconds in STEPS.items()]
    table(["rows from", "ms a batch", "ms to the first", *steps_named], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", default=[sources.STDLIB], help="files or folders of text")
    parser.add_argument("--tokenizer", action="append", default=[], metavar="DIR", help="another tokenizer's folder")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="which parts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=12, help="at most this much of each text")
    args = parser.parse_args()
    print(machine(), end="\n\n", flush=True)
    texts = {
        path if path == sources.STDLIB else Path(path).name: documents(path, int(args.megabytes * 1e6))
        for path in (args.texts if {"encode", "near"} & set(args.only) else [])
    }
    good = True
    if "encode" in args.only:
        good &= encoding(texts, args.tokenizer, args.rounds)
    if "near" in args.only:
        good &= near([text for found in texts.values() for text in found], args.rounds)
    if "loader" in args.only:
        batches(args.rounds)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
