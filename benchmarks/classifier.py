"""An encoder trained here with hidden tokens, then on labels, against TF-IDF with logistic regression.

    python benchmarks/classifier.py pos.txt neg.txt > figures.json

The files hold a text a line (.gz too), one file for each class. Doubles are dropped, a fifth is held out, and both
are given the same texts and are asked the same; intervals are bootstrap's. The encoder reads nothing but the texts
that both are trained on: its vocabulary and its first training (masked language model) come from these too.
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import octavo
from octavo.eval.classes import accuracy, interval, macro_f1

HELD_OUT, SEED = 0.2, 1


def texts(path: Path) -> list[str]:
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    lines = (" ".join(line.split()) for line in raw.decode("utf-8", "replace").splitlines())
    return list(dict.fromkeys(line for line in lines if len(line) > 3))


def split(files: list[Path]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Texts with the number of their file, to train on and held out; what stands in several files is dropped."""
    of_each = [texts(path) for path in files]
    every = [(text, k) for k, some in enumerate(of_each) for text in some]
    times: dict[str, int] = {}
    for text, _ in every:
        times[text] = times.get(text, 0) + 1
    rows = [row for row in every if times[row[0]] == 1]
    order = np.random.default_rng(SEED).permutation(len(rows))
    n = int(len(rows) * HELD_OUT)
    return [rows[i] for i in order[n:]], [rows[i] for i in order[:n]]


def figures(given: np.ndarray, said: np.ndarray, seconds: float) -> dict[str, Any]:
    return {
        "accuracy": accuracy(given, said),
        "interval_95": interval(accuracy, given, said),
        "macro_f1": macro_f1(given, said),
        "cpu_seconds": round(seconds, 1),
    }


def logistic(train: list[tuple[str, int]], test: list[tuple[str, int]]) -> np.ndarray:
    """TF-IDF of pieces of one to three characters, and logistic regression: the usual strong baseline for Chinese."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    model.fit([text for text, _ in train], [label for _, label in train])
    return np.asarray(model.predict([text for text, _ in test]))


def write(path: Path, rows: list[tuple[str, int]]) -> None:
    path.write_text("".join(json.dumps({"text": t, "label": str(k)}, ensure_ascii=False) + "\n" for t, k in rows))


def encoder(
    train: list[tuple[str, int]], test: list[tuple[str, int]], folder: Path, pretrain: int, tune: int
) -> np.ndarray:
    write(folder / "train.jsonl", train)
    write(folder / "test.jsonl", test)
    (folder / "text").mkdir()
    for start in range(0, len(train), 50):  # documents of some reviews, an empty line between
        (folder / "text" / f"{start:06d}.txt").write_text("\n\n".join(text for text, _ in train[start : start + 50]))
    first = [
        f"data.sources=[{{path: {folder}/text, document_bytes: 400}}]", "tokenizer.vocab_size=4096",
        "model.d_model=128", "model.n_layers=3", "model.max_seq_len=128", "model.blocks.block.mixer.n_heads=2",
        f"train.steps={pretrain}", "train.micro_batch_rows=16", "train.threads=1",
        f"train.valid_every={max(1, pretrain // 2)}", f"train.save_every={pretrain}", "train.schedule.warmup=10",
        "eval=null",
    ]  # fmt: skip
    octavo.train("encoder", first, out=folder / "encoder")
    second = [
        f"model.path={folder}/encoder", f"tune.data.paths=[{folder}/train.jsonl]", "tune.held_out=0.02",
        f"tune.steps={tune}", "tune.threads=1", f"tune.save_every={tune}", "tune.schedule.warmup=10",
        "tune.data.pooling=mean", "tune.optimizer.lr=0.001", "eval=null",
    ]  # fmt: skip
    octavo.train("classifier", second, out=folder / "classifier")
    lm = octavo.load(folder / "classifier")
    scores = lm.classify([text for text, _ in test], max_tokens=128)
    return scores.argmax(1)


def timed(work: Any, *args: Any) -> tuple[np.ndarray, float]:
    began = time.process_time()
    return work(*args), time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs=2, type=Path)
    parser.add_argument("--pretrain", type=int, default=350, help="steps of 4096 tokens")
    parser.add_argument("--tune", type=int, default=450, help="steps of 4096 tokens")
    args = parser.parse_args()
    train, test = split(args.files)
    given = np.array([label for _, label in test])
    found: dict[str, Any] = {"texts": {"train": len(train), "test": len(test)}}
    said, seconds = timed(logistic, train, test)
    found["tf-idf, logistic regression"] = figures(given, said, seconds)
    with tempfile.TemporaryDirectory() as folder:
        own, seconds = timed(encoder, train, test, Path(folder), args.pretrain, args.tune)
    found["encoder"] = figures(given, own, seconds)
    right = np.stack([own == given, said == given], 1).astype(int)
    gap = lambda g, s: float(s[:, 0].mean() - s[:, 1].mean())  # noqa: E731
    found["encoder minus baseline"] = {"accuracy": gap(right, right), "interval_95": interval(gap, right, right)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
