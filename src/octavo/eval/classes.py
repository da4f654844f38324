"""How well classes are said, and hidden tokens foretold: figures of held-out texts with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
SHOWN_CLASSES = 100  # of more there is no table of who was taken for whom


def interval(
    figure: Callable[[np.ndarray, np.ndarray], float], given: np.ndarray, said: np.ndarray, seed: int = 0
) -> list[float]:
    """The middle 95 % of ``figure`` over texts drawn again, as many with replacement (Efron 1979)."""
    generator = np.random.default_rng(seed)
    drawn = (generator.integers(len(given), size=len(given)) for _ in range(RESAMPLES))
    return [float(edge) for edge in np.quantile([figure(given[i], said[i]) for i in drawn], [0.025, 0.975])]


def accuracy(given: np.ndarray, said: np.ndarray) -> float:
    """The share of texts, (N,) or with every class (N, C), that are said exactly."""
    same = given == said
    return float((same if same.ndim == 1 else same.all(1)).mean())


def macro_f1(given: np.ndarray, said: np.ndarray) -> float:
    """The mean of F1 over the classes that are there or are said; (N,) class numbers or (N, C) of 0 and 1."""
    if given.ndim == 1:
        n = int(max(given.max(), said.max())) + 1
        both = np.bincount(given[given == said], minlength=n)
        there, named = np.bincount(given, minlength=n), np.bincount(said, minlength=n)
    else:
        both, there, named = (given & said).sum(0), given.sum(0), said.sum(0)
    seen = there + named > 0
    return float((2 * both[seen] / (there + named)[seen]).mean()) if seen.any() else 1.0


def confusion(given: np.ndarray, said: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """How often each class (row) was said to be each (column), where there are not too many to read."""
    n = len(names)
    if n > SHOWN_CLASSES:
        return {}
    return {"confusion": np.bincount(given * n + said, minlength=n * n).reshape(n, n).tolist()}


def judge(given: np.ndarray, scores: np.ndarray, names: Sequence[str], problem: str) -> dict[str, Any]:
    """The figures of a head of classes.

    Args:
        given: (N,) class numbers, or (N, C).
        scores: (N, C), what the head gave.
        names: of the classes.
        problem: single_label, multi_label or regression.
    """
    about = {"texts": len(given), "classes": list(names), "problem": problem}
    if problem == "regression":
        errors = ((scores - given) ** 2).mean(1)
        same = lambda g, s: float(((s - g) ** 2).mean())  # noqa: E731
        return {**about, "mean_squared_error": float(errors.mean()), "interval_95": interval(same, given, scores)}
    if problem == "multi_label":
        said, told = (scores > 0).astype(np.int64), given.astype(np.int64)
        majority = float((told == (told.mean(0) > 0.5)).all(1).mean())
    else:
        said, told = scores.argmax(1), given
        majority = float(np.bincount(told).max() / len(told))
    return {
        **about,
        "accuracy": accuracy(told, said),
        "interval_95": interval(accuracy, told, said),
        "macro_f1": macro_f1(told, said),
        "macro_f1_interval_95": interval(macro_f1, told, said),
        "majority_accuracy": majority,
        **(confusion(told, said, names) if problem == "single_label" else {}),
    }


def judge_masked(parts: Iterable[np.ndarray]) -> dict[str, Any]:
    """Of hidden tokens: ``parts`` (rows, 3) are the sum of nats, how many and how many right, of each row."""
    rows = np.concatenate(list(parts))
    nats, n, right = (float(column) for column in rows.sum(0))
    share = lambda some, _: float(some[:, 2].sum() / max(1.0, some[:, 1].sum()))  # noqa: E731
    figures = {"tokens": int(n), "nats_per_token": nats / max(1, n), "accuracy": right / max(1, n)}
    return {**figures, "interval_95": interval(share, rows, rows)}


def between(figures: dict[str, Any], name: str = "interval_95") -> str:
    """An interval of shares in words."""
    low, high = figures[name]
    return f"{low:.1%} to {high:.1%}"


def lines(result: dict[str, Any]) -> dict[str, str]:
    """What a person reads first of all figures that are not of plain text, by name."""
    found: dict[str, str] = {}
    for name, said in (("masked", "hidden tokens right"), ("mended", "mending tokens right")):
        if right := result.get(name):
            found[said] = (
                f"{right['accuracy']:.1%}   ({between(right)}; {right['tokens']:,} tokens, "
                f"{right['nats_per_token']:.3f} nats each)"
            )
    if written := result.get("pairs"):
        low, high = written["interval_95"]
        found["pairs right"] = f"{written['exact_match']:.1%}   ({low:.1%} to {high:.1%}; {written['pairs']:,} pairs)"
        found["chrF"] = f"{100 * written['chrf']:.1f}"
    if judged := result.get("classes"):
        low, high = judged["interval_95"]
        if "accuracy" in judged:
            found["texts right"] = (
                f"{judged['accuracy']:.1%}   ({low:.1%} to {high:.1%}; {judged['texts']:,} texts; "
                f"commonest class {judged['majority_accuracy']:.1%})"
            )
            low, high = judged["macro_f1_interval_95"]
            found["macro F1"] = f"{judged['macro_f1']:.3f}   ({low:.3f} to {high:.3f})"
        else:
            found["mean squared error"] = f"{judged['mean_squared_error']:.4f}   ({low:.4f} to {high:.4f})"
    if tagged := result.get("tags"):
        found["words right"] = (
            f"{tagged['accuracy']:.1%}   ({between(tagged)}; {tagged['words']:,} words of {tagged['sentences']:,} "
            f"sentences; commonest tag {tagged['majority_accuracy']:.1%})"
        )
        if of_spans := tagged.get("spans"):
            low, high = of_spans["f1_interval_95"]
            found["span F1"] = (
                f"{of_spans['f1']:.3f}   ({low:.3f} to {high:.3f}; precision {of_spans['precision']:.3f}, "
                f"recall {of_spans['recall']:.3f})"
            )
        else:
            found["macro F1 of tags"] = f"{tagged['macro_f1']:.3f}"
    return found
