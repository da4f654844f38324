"""Reading back what a run wrote down line by line: metrics, samples, stages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def read_lines(path: str | Path) -> list[Row]:
    """The objects of a JSON Lines file, in order; [] when there is no such file.

    A line that is not a whole JSON object (the last one of a killed run, or one still being written)
    is passed over.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError:
        return []
    rows = []
    for line in raw.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:  # half a line, or bytes that are no text
            continue
        if isinstance(value, dict):
            rows.append(value)
    return rows


@dataclass(frozen=True)
class Metrics:
    """The logged steps of one training stage, ascending by step; samples in the order they were drawn."""

    train: list[Row] = field(default_factory=list)
    valid: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.train or self.valid)

    def last(self, name: str) -> float | None:
        """The newest finite training value of ``name``, None if there is none."""
        return next((v for row in reversed(self.train) if (v := number(row.get(name))) is not None), None)

    @property
    def seconds(self) -> float | None:
        """Training seconds of the stage, as far as they were logged: each row has those since the row before it."""
        known = [value for row in self.train if (value := number(row.get("seconds"))) is not None]
        return sum(known) if known else None

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Tokens seen at each of ``steps``, between logged steps by a straight line; steps if unknown."""
        known, tokens = points(self.train, "step", "tokens_seen")
        if len(known) == 0:
            return steps.astype(float)
        # Every stage begins with no token seen, and steps past the last logged one keep its pace.
        known, tokens = np.append(0.0, known), np.append(0.0, tokens)
        beyond = np.maximum(steps - known[-1], 0.0) * (tokens[-1] / max(known[-1], 1.0))
        return np.interp(steps, known, tokens) + beyond

    def seconds_at(self, steps: np.ndarray) -> np.ndarray:
        """Training seconds spent up to each of ``steps``, as `tokens_at`; NaN if none were logged.

        Validation, samples and saving are not among them.
        """
        known, seconds = points(self.train, "step", "seconds")
        if len(known) == 0:
            return np.full(len(steps), np.nan)
        known, seconds = np.append(0.0, known), np.append(0.0, np.cumsum(seconds))
        beyond = np.maximum(steps - known[-1], 0.0) * (seconds[-1] / max(known[-1], 1.0))
        return np.interp(steps, known, seconds) + beyond

    @property
    def has_tokens(self) -> bool:
        """Whether the number of tokens seen was logged."""
        return self.last("tokens_seen") is not None


def read(path: str | Path) -> Metrics:
    """Read a ``metrics.jsonl``.

    Of two rows for one step the later wins.
    """
    train: dict[float, Row] = {}
    valid: dict[float, Row] = {}
    samples = []
    for row in read_lines(path):
        step, kind = number(row.get("step")), row.get("kind")
        if step is None:
            continue
        if kind == "sample":
            samples.append(row)
        elif kind in ("train", "valid"):
            (train if kind == "train" else valid)[step] = row
    return Metrics([train[step] for step in sorted(train)], [valid[step] for step in sorted(valid)], samples)


def number(value: object) -> float | None:
    """``value`` as a finite float, None for anything else (NaN, null, text, a boolean)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer too large for a float
        return None


def points(rows: Iterable[Mapping[str, Any]], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The (n,) float arrays of ``x`` and ``y`` over the rows where both are finite."""
    pairs = [(a, b) for row in rows if (a := number(row.get(x))) is not None and (b := number(row.get(y))) is not None]
    array = np.array(pairs, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def smooth(values: Sequence[float] | np.ndarray, half_width: int | None = None) -> np.ndarray:
    """Mean over a window centred on each value, so that the curve does not lag behind the steep beginning.

    The window reaches ``half_width`` values (an 80th of all by default, at least 3) to both sides, but never
    further than a third of the way back to the start.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    index = np.arange(n)
    reach = np.minimum(max(3, n // 80) if half_width is None else half_width, index // 3)
    total = np.append(0.0, np.cumsum(values))
    low, high = index - reach, np.minimum(index + reach + 1, n)
    return (total[high] - total[low]) / (high - low)


def thin(x: np.ndarray, *columns: np.ndarray, at_most: int = 400) -> tuple[np.ndarray, ...]:
    """Every k-th point so that at most ``at_most`` remain, first and last always among them."""
    if len(x) <= at_most:
        return (x, *columns)
    keep = np.unique(np.linspace(0, len(x) - 1, at_most).round().astype(int))
    return tuple(column[keep] for column in (x, *columns))
