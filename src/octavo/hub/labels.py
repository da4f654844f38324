"""The words in which config.json names classes, for every family that has heads of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from octavo.hub.family import Family
from octavo.models.decoder import Decoder

PROBLEMS = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


def read_labels(family: Family, hf: Mapping[str, Any], over: Literal["sequence", "token"]) -> dict[str, Any]:
    """The classes' names or number, and what they mean."""
    named = hf.get("id2label") or {}
    n = len(named) or hf.get("num_labels") or 2
    names = [str(named[key]) for key in sorted(named, key=int)]
    told = {"n_classes": n} if names == _plain(len(names)) else {"labels": names}
    usual = "regression" if n == 1 and over == "sequence" else "single_label_classification"
    problem = hf.get("problem_type") or usual
    if problem not in PROBLEMS:
        raise family.refuse("problem_type", problem)
    return {**told, "problem": PROBLEMS[problem], "over": over}


def write_labels(config: Decoder.Config) -> dict[str, Any]:
    classes = config.classes
    if classes is None:
        return {}
    names = list(classes.labels or _plain(classes.n))
    problem = next(theirs for theirs, ours in PROBLEMS.items() if ours == classes.problem)
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": problem,
    }


def _plain(n: int) -> list[str]:
    """The names that transformers gives to classes without any."""
    return [f"LABEL_{i}" for i in range(n)]
