"""What the tokenizer algorithms do, step by step, and where the notes this project follows say something else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from octavo.tokenizer import bpe, unigram

SENTENCE = "The cat drank the milk because it was hungry"
# The notes' vocabulary for "hello world", with the end of text they append.
HELLO = {"he": 101, "llo": 102, "wor": 104, "ld": 105, " ": 100}
HELLO_EOS = 200


def show(symbols: tuple[str, ...]) -> str:
    """Symbols with a dot between them and spaces made visible."""
    return "·".join(symbol.replace(" ", "␣") for symbol in symbols)


def trace_bpe(text: str, *, n_merges: int = 20) -> Iterator[str]:
    """BPE training on one text taken as a single word, a line per merge."""
    yield f"start     {show(tuple(text))}"
    k = 0
    for k, step in enumerate(bpe.train_steps({text: 1}, n_merges, min_frequency=2), 1):
        a, b = (repr(part) for part in step.pair)
        ties = f", first of {len(step.ties) + 1} pairs as frequent" if step.ties else ""
        yield f"merge {k:<3} ({a}, {b}) occurs {step.count} times{ties}"
        yield f"          {show(step.words[0][0])}"
    yield "end       " + ("no pair occurs twice" if k < n_merges else f"after {n_merges} merges")


def compare_note() -> Iterator[str]:
    """The notes' account of BPE on their sentence beside what happens (E18)."""
    counts = bpe.pair_counts([(tuple(SENTENCE), 1)])
    top = max(counts, key=lambda pair: counts[pair])
    yield "The notes say: ('t', 'h') is the most frequent pair, and it is merged in 'The' and 'the'."
    yield (
        f"In truth: ('t', 'h') occurs {counts['t', 'h']} time ('The' begins with 'T', which is another character); "
        f"{top} occurs {counts[top]} times, after 'The', 'the' and 'because', and is merged first."
    )
    yield "The notes say: in the end every word is one token."
    last = tuple(SENTENCE)
    for step in bpe.train_steps({SENTENCE: 1}, 1000, min_frequency=2):
        last = step.words[0][0]
    yield f"In truth: when no pair occurs twice, merging stops at {len(last)} symbols: {show(last)}"


def longest_match(text: str, vocab: Mapping[str, int]) -> list[str]:
    """Pieces of ``vocab`` that spell ``text``, the longest that fits first at each place."""
    out, i = [], 0
    while i < len(text):
        piece = max((p for p in vocab if text.startswith(p, i)), key=len, default="")
        if not piece:
            raise ValueError(f"no piece of the vocabulary fits at character {i}")
        out.append(piece)
        i += len(piece)
    return out


def compare_hello() -> Iterator[str]:
    """The notes' split of "hello world" beside the one their vocabulary gives (E22)."""
    pieces = longest_match("hello world", HELLO)
    ids = [HELLO[piece] for piece in pieces] + [HELLO_EOS]
    yield "The notes say: he-l-lo wor-l-d, with ids 101, 102, 100, 104, 105, 200."
    yield "But 'l', 'lo' and 'd' are not in their vocabulary (he, llo, wor, ld, space)."
    yield f"In truth: {show(tuple(pieces))} and the end of text, with ids {', '.join(map(str, ids))}."


def trace_unigram(text: str, *, size: int = 8) -> Iterator[str]:
    """Unigram training on one text: the seed, EM steps with their likelihood, prunings, and the best splits."""
    words = {word: text.split().count(word) for word in text.split()}
    scores: dict[str, float] = {}
    for step in unigram.train_steps(words, size, max_chars=8):
        scores = step.scores
        if step.action == "em":
            yield f"EM        log-likelihood {step.log_likelihood:.6f}, {len(scores)} pieces"
        elif step.action == "prune":
            gone = ", ".join(f"{piece} ({loss:.4f})" for piece, loss in step.removed[:6])
            more = f" and {len(step.removed) - 6} more" if len(step.removed) > 6 else ""
            yield f"prune     {gone}{more}"
        else:
            yield f"seed      {', '.join(sorted(scores, key=lambda p: (-len(p), p))[:12])} ... ({len(scores)} pieces)"
    for word in words:
        for path, score in unigram.n_best(word, scores, 3):
            yield f"split     {show(path)}  p = {math.exp(score):.6g}"


def compare_ababc() -> Iterator[str]:
    """The notes' Unigram example: V = {ab, c} gives ababc the likelihood 4/27."""
    scores = {"ab": math.log(2 / 3), "c": math.log(1 / 3)}
    path, score = unigram.viterbi("ababc", scores)
    yield f"ababc with p(ab) = 2/3, p(c) = 1/3: {show(path)}, p = {math.exp(score):.6f} = 4/27"
    counts, _ = unigram.expected_counts({"ababc": 1}, scores)
    again = {piece: round(math.exp(value), 6) for piece, value in unigram.maximise(counts).items()}
    yield f"one EM step leaves it where it is: {again}"
