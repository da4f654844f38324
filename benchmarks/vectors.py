"""word2vec beside gensim: the same text, settings and number of passes, turn about.

    python benchmarks/vectors.py TEXT --gensim PYTHON                     one thread, processor time
    python benchmarks/vectors.py TEXT --gensim PYTHON --threads 2         two threads, the clock on the wall

TEXT has one sentence a line, words separated by spaces; PYTHON is an interpreter that has gensim. Only training is
measured: both sides have read the text and counted its words before. Words a second are words of the vocabulary in the
text, those left out by sub-sampling included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__)


def ours(text: Path, s: argparse.Namespace) -> dict[str, float]:
    from octavo.vectors import Training, VectorsConfig, corpus

    read = corpus.read([text.read_text(encoding="utf-8")], split="spaces", min_count=5)
    config = VectorsConfig(
        kind=s.kind, loss=s.loss, dim=s.dim, epochs=s.epochs, threads=s.threads, split="spaces", backend="native"
    )
    training = Training(read, config)
    cpu, wall = time.process_time(), time.perf_counter()
    while not training.done:
        training.step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"words": float(len(read.tokens) * s.epochs), "cpu": cpu, "wall": wall, "vocabulary": len(read.words)}


def gensims(text: Path, s: argparse.Namespace) -> dict[str, float]:
    from gensim.models import Word2Vec  # type: ignore[import-not-found]

    lines = [line.split() for line in text.read_text(encoding="utf-8").split("\n")]
    hs = int(s.loss == "hierarchical")
    model = Word2Vec(
        vector_size=s.dim, window=5, min_count=5, sg=int(s.kind == "skipgram"), hs=hs, negative=0 if hs else 5,
        sample=1e-3, alpha=0.025, min_alpha=1e-4, workers=s.threads, epochs=s.epochs, seed=1,
    )  # fmt: skip
    model.build_vocab(lines)
    words = sum(model.wv.get_vecattr(word, "count") for word in model.wv.index_to_key)
    cpu, wall = time.process_time(), time.perf_counter()
    model.train(lines, total_examples=model.corpus_count, epochs=s.epochs)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"words": float(words * s.epochs), "cpu": cpu, "wall": wall, "vocabulary": len(model.wv)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--gensim", default="", help="a Python that has gensim")
    parser.add_argument("--kind", default="skipgram", choices=("skipgram", "cbow"))
    parser.add_argument("--loss", default="negative", choices=("negative", "hierarchical"))
    parser.add_argument("--dim", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("ours", "gensim"), help=argparse.SUPPRESS)
    s = parser.parse_args()
    if s.side:
        print(json.dumps((ours if s.side == "ours" else gensims)(s.text, s)))
        return
    clock = "cpu" if s.threads == 1 else "wall"
    rates: dict[str, list[float]] = {"ours": [], "gensim": []}
    last: dict[str, Any] = {}
    for _ in range(s.rounds):
        for side in rates if s.gensim else ("ours",):
            python = sys.executable if side == "ours" else s.gensim
            env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            command = [python, str(HERE), *sys.argv[1:], "--side", side]
            done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
            last[side] = json.loads(done.stdout.splitlines()[-1])
            rates[side].append(last[side]["words"] / last[side][clock])
    for side, found in rates.items():
        if found:
            print(
                f"{side:7} {statistics.median(found) / 1e3:8.0f} thousand words/s ({clock}; {min(found) / 1e3:.0f} to "
                f"{max(found) / 1e3:.0f}), {last[side]['words']:,.0f} words, {last[side]['vocabulary']:,} different"
            )
    if rates["gensim"]:
        print(f"ours / gensim: {statistics.median(rates['ours']) / statistics.median(rates['gensim']):.2f}")


if __name__ == "__main__":
    main()
