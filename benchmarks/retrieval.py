"""Search by words against search by vectors, and a model with a memory against the same without, on one real text.

    python benchmarks/retrieval.py text.rst.gz --encoder FOLDER > figures.json

The text is reStructuredText (.gz too), such as the sources of Python's documentation. Nothing is made up for it:

- search: of every section with a title of its own the title and the first sentence are taken out and asked for; what
  is looked for is what is left of the section, among that of all others. Both ways search the same passages.
- memory (kNN-LM): the sections on C functions, which repeat their phrases, are shuffled and halved. A small model is
  trained on the first half, which is also what it remembers; a tenth of the other half chooses the temperature, the
  rest is scored with each share and number of neighbours.

``--only search`` and ``--only memory`` run one of the two.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import octavo
from octavo.eval.answers import wilson
from octavo.nn.contracts import Inputs
from octavo.retrieval.index import Bm25, Dense, Index
from octavo.retrieval.knn import KnnPredictor, remember

SEED = 1
NEIGHBOURS = (4, 32, 256)
UNDERLINE = re.compile(r"""^([=\-~^"*+#])\1{2,}\s*$""")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`:*])")


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Title and body of every section: a line over a line of signs that is as long."""
    lines = text.splitlines()
    heads = [
        i
        for i in range(len(lines) - 1)
        if lines[i].strip() and not lines[i][0].isspace() and UNDERLINE.match(lines[i + 1])
        and len(lines[i + 1].rstrip()) >= len(lines[i].rstrip()) and not UNDERLINE.match(lines[i])
    ]  # fmt: skip
    for i, after in zip(heads, [*heads[1:], len(lines)], strict=True):
        body = lines[i + 2 : after]
        while body and (UNDERLINE.match(body[-1]) or not body[-1].strip()):  # the line over the next title
            body.pop()
        yield lines[i].strip(), "\n".join(body)


def asked_for(text: str, size: int) -> tuple[list[str], list[str], list[str]]:
    """Titles, first sentences and the passages they were taken out of, at most ``size`` characters each."""
    found: dict[str, list[tuple[str, str]]] = {}
    for title, body in sections(text):
        paragraphs = re.split(r"\n\s*\n", body)
        prose = [i for i, p in enumerate(paragraphs) if re.match(r"[A-Z]", p)]
        if not prose:
            continue
        first, *rest = SENTENCE.split(" ".join(paragraphs[prose[0]].split()), maxsplit=1)
        left = "\n\n".join([*rest, *paragraphs[prose[0] + 1 :]]).strip()[:size]
        if len(first.split()) >= 6 and len(left) >= 200:
            found.setdefault(title, []).append((first, left))
    once = {title: rows[0] for title, rows in found.items() if len(rows) == 1}
    return list(once), [first for first, _ in once.values()], [left for _, left in once.values()]


def timed(work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    began = time.process_time()
    return work(*args), time.process_time() - began


def ranks(index: Index, questions: list[str]) -> np.ndarray:
    """The place at which each question's own passage was found, from 0; 99 for one that was not among the first 5."""
    found = ([i for i, _ in index.search(question, 5)] for question in questions)
    return np.array([near.index(own) if own in near else 99 for own, near in enumerate(found)])


def search(text: str, encoder: Path, most: int, size: int) -> dict[str, Any]:
    titles, firsts, passages = asked_for(text, size)
    keep = sorted(np.random.default_rng(SEED).permutation(len(titles))[:most])
    titles, firsts, passages = ([some[i] for i in keep] for some in (titles, firsts, passages))
    lm = octavo.load(encoder)
    by_words, words_seconds = timed(Bm25, Bm25.Config(), passages)
    vectors, vectors_seconds = timed(lm.embed, passages)
    ways = {"bm25": by_words, "dense": Dense(vectors, lm.embed)}
    made: dict[str, Any] = {
        "passages": len(passages),
        "index_cpu_seconds": {"bm25": round(words_seconds, 2), "dense": round(vectors_seconds, 1)},
    }
    for kind, questions in (("title", titles), ("first sentence", firsts)):
        places = {}
        for name, index in ways.items():
            places[name], seconds = timed(ranks, index, questions)
            figures: dict[str, Any] = {"question_cpu_ms": round(1000 * seconds / len(questions), 1)}
            for k in (1, 5):
                right = int((places[name] < k).sum())
                low, high = wilson(right, len(questions))
                figures[f"recall@{k}"] = round(right / len(questions), 4)
                figures[f"recall@{k}_interval_95"] = [round(low, 4), round(high, 4)]
            made[f"{kind}, {name}"] = figures
        first = {name: found == 0 for name, found in places.items()}
        made[f"{kind}, first alone"] = {
            "bm25": int((first["bm25"] & ~first["dense"]).sum()),
            "dense": int((first["dense"] & ~first["bm25"]).sum()),
        }
    return made


@torch.no_grad()
def looked_up(mixed: KnnPredictor, documents: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Of every token but the first of each piece: the model's probability; its neighbours, and who of them says it."""
    found: dict[str, list[torch.Tensor]] = {"own": [], "distances": [], "says": []}
    for document in documents:
        for start in range(0, len(document) - 1, mixed.max_seq_len):
            piece = torch.from_numpy(document[start : start + mixed.max_seq_len + 1].astype(np.int64))
            made = mixed.model(Inputs(piece[None, :-1]), needs=("logits", "hidden"))
            near, which = mixed.neighbours(made.hidden[0].float())
            found["own"].append(made.logits[0].float().softmax(-1).gather(-1, piece[1:, None])[:, 0])
            found["distances"].append(near)
            found["says"].append(mixed.values[which] == piece[1:, None])
    return {name: torch.cat(parts) for name, parts in found.items()}


def perplexity(seen: dict[str, torch.Tensor], k: int, weight: float, temperature: float) -> float:
    """That of ``KnnPredictor`` with these settings, of what was looked up once for all of them."""
    shares = (-seen["distances"][:, :k] / temperature).softmax(-1)
    remembered = (shares * seen["says"][:, :k]).sum(-1)
    return math.exp(-float((weight * remembered + (1 - weight) * seen["own"]).log().mean()))


def memory(text: str, steps: int, scored: int) -> dict[str, Any]:
    texts = [f"{title}\n\n{body}" for title, body in sections(text) if ".. c:function::" in body]
    texts = [texts[i] for i in np.random.default_rng(SEED).permutation(len(texts))]
    first, second = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").mkdir()
        for i, one in enumerate(first):
            (Path(folder) / "text" / f"{i:04d}.txt").write_text(one, encoding="utf-8")
        settings = [
            f"data.sources=[{{path: {folder}/text}}]", "tokenizer.vocab_size=1024", "model.d_model=128",
            "model.n_layers=3", "model.blocks.block.mixer.n_heads=2", f"train.steps={steps}", "train.threads=1",
            f"train.valid_every={max(1, steps // 2)}", f"train.save_every={steps}", f"train.sample_every={steps}",
            "tune=null", "eval=null",
        ]  # fmt: skip
        # In a process of its own: training keeps freed memory, which is of no use to tensors of ever other sizes.
        run = [sys.executable, "-m", "octavo", "run", "quickstart", "--out", f"{folder}/run", *settings]
        subprocess.run(run, check=True, stdout=sys.stderr)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = spent.ru_utime + spent.ru_stime
        lm = octavo.load(Path(folder) / "run")
    known, asked = lm.tokenizer.encode_batch(first), lm.tokenizer.encode_batch(second)
    tenth = max(1, len(asked) // 10)
    keys, values = remember(lm.network, known)
    mixed = KnnPredictor(lm.network, keys, values, k=max(NEIGHBOURS))
    chosen_by, seen = looked_up(mixed, asked[:tenth]), looked_up(mixed, asked[tenth : tenth + scored])
    scale = float(keys.var(0).sum())  # the mean squared distance from the middle
    temperatures = [scale * share for share in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)]
    temperature = min(temperatures, key=lambda t: perplexity(chosen_by, 32, 0.25, t))
    return {
        "sections": {"trained on and remembered": len(first), "scored": len(asked[tenth : tenth + scored])},
        "tokens": {"remembered": len(values), "scored": len(seen["own"])},
        "parameters": sum(p.numel() for p in lm.network.parameters()),
        "train_cpu_seconds": round(seconds),
        "temperature": round(temperature, 3),
        "temperature_of_the_spread": round(temperature / scale, 3),
        "perplexity": {
            "without": round(perplexity(seen, 1, 0.0, 1.0), 3),
            **{
                f"k = {k}, weight = {weight}": round(perplexity(seen, k, weight, temperature), 3)
                for k in NEIGHBOURS
                for weight in (0.1, 0.25, 0.5)
            },
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--encoder", type=Path, help="a sentence encoder; needed for the search")
    parser.add_argument("--passages", type=int, default=500, help="at most")
    parser.add_argument("--size", type=int, default=800, help="characters of a passage")
    parser.add_argument("--steps", type=int, default=100, help="of 4096 tokens, of the model with a memory")
    parser.add_argument("--scored", type=int, default=30, help="sections that are scored with the memory, at most")
    parser.add_argument("--only", choices=["search", "memory"])
    args = parser.parse_args()
    if args.only != "memory" and args.encoder is None:
        parser.error("--encoder FOLDER is needed for the search")
    torch.set_num_threads(1)
    raw = args.text.read_bytes()
    text = (gzip.decompress(raw) if args.text.suffix == ".gz" else raw).decode("utf-8")
    found: dict[str, Any] = {}
    if args.only != "memory":
        found["search"] = search(text, args.encoder, args.passages, args.size)
    if args.only != "search":
        found["memory"] = memory(text, args.steps, args.scored)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
