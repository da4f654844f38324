"""How well words are tagged: accuracy, and spans as the CoNLL shared tasks count them, with bootstrap intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from octavo.eval.classes import confusion, interval, macro_f1

OUTSIDE = "O"
# Begin, inside, end, single; M(iddle), L(ast) and U(nit) are what other schemes call the same.
MEANINGS = {"B": "B", "I": "I", "E": "E", "S": "S", "M": "I", "L": "E", "U": "S"}

Span = tuple[str, int, int]


def are_spans(names: Sequence[str]) -> bool:
    """Whether these tags say spans: each is O or one of the letters of ``MEANINGS``, perhaps with -TYPE behind."""
    kinds = [name.partition("-")[0] for name in names if name != OUTSIDE]
    return any(kind in ("B", "I", "S", "U") for kind in kinds) and all(kind in MEANINGS for kind in kinds)


def spans(tags: Sequence[str]) -> list[Span]:
    """The (type, first word, word after the last) that the tags of one sentence say.

    As ``conlleval`` of CoNLL-2000 (Tjong Kim Sang and Buchholz) reads them: a span begins at B and at S, and also where
    an I or E stands after O, after an E or S, or after another type; it ends before whatever begins or is none of it.
    IOB1, IOB2 and IOBES are so read by one rule.
    """
    found: list[Span] = []
    before, type_before, start = OUTSIDE, "", 0
    for i, tag in enumerate([*tags, OUTSIDE]):
        name, _, type_ = tag.partition("-")
        kind = OUTSIDE if tag == OUTSIDE else MEANINGS[name]
        goes_on = kind in ("I", "E") and before in ("B", "I") and type_ == type_before
        if before != OUTSIDE and not goes_on:
            found.append((type_before, start, i))
        if kind != OUTSIDE and not goes_on:
            start = i
        before, type_before = kind, type_
    return found


def _f1(counts: np.ndarray) -> float:
    """Of rows of (right, said, given); nothing said and nothing given is 0, as in conlleval."""
    right, said, given = counts.sum(0)
    return float(2 * right / (said + given)) if said + given else 0.0


def _figures(counts: np.ndarray) -> dict[str, Any]:
    right, said, given = (int(n) for n in counts.sum(0))
    return {
        "precision": right / said if said else 0.0,
        "recall": right / given if given else 0.0,
        "f1": _f1(counts),
        "given": given,
        "said": said,
        "right": right,
    }


def judge_tags(given: Sequence[Sequence[int]], said: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, Any]:
    """The figures of tagged sentences; intervals are of sentences drawn again.

    Args:
        given, said: of each sentence the numbers of its words' tags.
        names: of the tags.
    """
    both = list(zip(given, said, strict=True))
    sums = np.array([(sum(a == b for a, b in zip(g, s, strict=True)), len(g)) for g, s in both])
    all_given, all_said = (np.concatenate([np.asarray(tags, np.int64) for tags in some]) for some in (given, said))
    share = lambda a, _: float(a[:, 0].sum() / max(1, a[:, 1].sum()))  # noqa: E731
    found: dict[str, Any] = {
        "sentences": len(given),
        "words": len(all_given),
        "classes": list(names),
        "accuracy": share(sums, sums),
        "interval_95": interval(share, sums, sums),
        "majority_accuracy": float(np.bincount(all_given).max() / len(all_given)),
        "macro_f1": macro_f1(all_given, all_said),
        **confusion(all_given, all_said, names),
    }
    if not are_spans(names):
        return found
    of_each: dict[str, list[tuple[int, int, int]]] = {}
    counts = []
    for g, s in both:
        there, told = (set(spans([names[i] for i in tags])) for tags in (g, s))
        counts.append((len(there & told), len(told), len(there)))
        right, said_of, given_of = (Counter(span[0] for span in some) for some in (there & told, told, there))
        for type_ in given_of | said_of:
            of_each.setdefault(type_, []).append((right[type_], said_of[type_], given_of[type_]))
    table = np.array(counts)
    return found | {
        "spans": _figures(table) | {"f1_interval_95": interval(lambda a, _: _f1(a), table, table)},
        "types": {type_: _figures(np.array(of_each[type_])) for type_ in sorted(of_each)},
    }
