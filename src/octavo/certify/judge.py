"""What a backend said against the yardstick: equal or not, aspect by aspect, with the first difference in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from octavo.certify.prompts import Prompt
from octavo.certify.reference import Reference

Aspect = Literal["weights", "template", "ids", "log-probabilities", "greedy text", "stop"]
ASPECTS: tuple[Aspect, ...] = ("weights", "template", "ids", "log-probabilities", "greedy text", "stop")


@dataclass(frozen=True)
class Check:
    """One aspect: whether it is equal, in a few words how far, and what the first difference is."""

    equal: bool
    figure: str
    difference: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass
class Finding:
    """What came of one backend. ``skipped`` says why it was not asked."""

    name: str
    skipped: str = ""
    version: str = ""
    checks: dict[Aspect, Check] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return all(check.equal for check in self.checks.values())


@dataclass
class Said:
    """What a backend gave for every prompt; None: it was not asked for that.

    scores: ln p of the last tokens of prompt and reference text, as many as there are. texts: its own greedy ones.
    """

    rendered: list[str | None] | None = None
    ids: list[list[int] | None] | None = None
    scores: list[np.ndarray] | None = None
    texts: list[list[int]] | None = None
    stop_ids: frozenset[int] | None = None


def judge(reference: Reference, prompts: Sequence[Prompt], said: Said, tolerance: float) -> dict[Aspect, Check]:
    """Every aspect that was asked for."""
    checks: dict[Aspect, Check] = {}
    if said.rendered is not None and any(prompt.rendered is not None for prompt in prompts):
        checks["template"] = same([p.rendered for p in prompts], said.rendered, "rendered")
    if said.ids is not None:
        wanted = [p.ids if theirs is not None else None for p, theirs in zip(prompts, said.ids, strict=True)]
        checks["ids"] = same(wanted, said.ids, "read as")
    if said.scores is not None:
        checks["log-probabilities"] = judge_scores(reference.scores, said.scores, tolerance)
    if said.texts is not None:
        checks["greedy text"] = _texts(reference, said.texts, tolerance)
    if said.texts is not None or said.stop_ids is not None:
        checks["stop"] = _stops(reference, said)
    return checks


def same(wanted: Sequence[Any], got: Sequence[Any], verb: str) -> Check:
    """Exactly equal, prompt by prompt; None is not asked."""
    asked = [i for i, one in enumerate(wanted) if one is not None]
    wrong = [i for i in asked if wanted[i] != got[i]]
    difference = f"prompt {wrong[0]} is {verb} {_short(got[wrong[0]], wanted[wrong[0]])}" if wrong else ""
    return Check(not wrong, f"{len(asked) - len(wrong)} of {len(asked)}", difference, {"wrong": wrong})


def _short(got: Any, wanted: Any) -> str:
    """The places where two texts, or lists of ids, part."""
    at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    start = max(0, at - 8)
    return f"{got[start : at + 16]!r} for {wanted[start : at + 16]!r} (from {start})"


def judge_scores(wanted: Sequence[np.ndarray], got: Sequence[np.ndarray], tolerance: float) -> Check:
    differences = [np.abs(w[len(w) - len(g) :] - g) for w, g in zip(wanted, got, strict=True)]
    finite = all(bool(np.isfinite(d).all()) for d in differences)
    worst = max((float(d.max()) for d in differences if len(d)), default=0.0) if finite else float("nan")
    mean = float(np.concatenate(differences).mean()) if finite and any(map(len, differences)) else worst
    n = sum(map(len, differences))
    difference = ""
    if not (equal := worst <= tolerance):
        prompt = next(i for i, d in enumerate(differences) if len(d) and not float(d.max()) <= tolerance)
        difference = f"ln p differs by {worst:.2g}, more than {tolerance:g}; prompt {prompt} is the first where it does"
    values = {"largest": worst, "mean": mean, "tolerance": tolerance, "tokens": n}
    return Check(equal, f"{worst:.1e}" if finite else "not a number", difference, values)


def _texts(reference: Reference, texts: Sequence[list[int]], tolerance: float) -> Check:
    """The same tokens up to the shorter one's end, or up to two that are equally good within the tolerance."""
    wrong, ties, difference = [], [], ""
    for i, (wanted, got) in enumerate(zip(reference.texts, texts, strict=True)):
        at = parting(wanted, got)
        if at is None:
            continue
        gap = reference.gap(i, at, got[at]) if got[at] < reference.n_tokens else float("inf")
        if gap <= 2 * tolerance:
            ties.append({"prompt": i, "token": at, "gap": gap})
            continue
        wrong.append(i)
        difference = difference or f"prompt {i}, token {at}: {got[at]} for {wanted[at]}, {gap:.2g} less likely"
    n = len(texts)
    figure = f"{n - len(wrong)} of {n}" + (f", {len(ties)} tied" if ties else "")
    return Check(not wrong, figure, difference, {"wrong": wrong, "ties": ties})


def parting(wanted: Sequence[int], got: Sequence[int]) -> int | None:
    """Where two texts have different tokens; None where one is how the other begins."""
    return next((at for at, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), None)


def _stops(reference: Reference, said: Said) -> Check:
    """The same tokens end a text, and equal texts ended at the same place."""
    if said.stop_ids is not None and said.stop_ids != reference.stop_ids:
        ours, theirs = sorted(reference.stop_ids), sorted(said.stop_ids)
        return Check(False, "other ids", f"a text ends at {theirs or 'no token'}, here at {ours or 'no token'}",
                     {"stop_ids": theirs})  # fmt: skip
    pairs = zip(reference.texts, said.texts or reference.texts, strict=True)
    wrong = [i for i, (a, b) in enumerate(pairs) if parting(a, b) is None and len(a) != len(b)]
    ended = sum(bool(text) and text[-1] in reference.stop_ids for text in reference.texts)
    difference = ""
    if wrong:
        i = wrong[0]
        ours, theirs = len(reference.texts[i]), len((said.texts or [])[i])
        difference = f"prompt {i}: the text ended after {theirs} tokens, here after {ours}"
    return Check(not wrong, f"{ended} ended" if not wrong else f"{len(wrong)} elsewhere", difference,
                 {"wrong": wrong, "ended": ended})  # fmt: skip
