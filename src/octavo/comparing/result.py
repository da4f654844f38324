"""What one training of a comparison came to, and what several seeds say together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from octavo.data.prepare import read_json
from octavo.eval.answers import wilson
from octavo.files import write_json

FORMAT = 1
# Two-sided 95 % points of Student's t by degrees of freedom; beyond the table the next smaller one, which is wider.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 14: 2.145, 29: 2.045}


@dataclass(frozen=True)
class Result:
    """One model trained with one seed.

    fingerprint: of everything that decided it. tokens: trained on (counted, for a model that counts). entries:
    what is stored: parameters, or n-grams. seconds: processor time of the steps. curve: (tokens, bits per byte)
    while it trained, on validation rows; bits_per_byte: at the end, on whole documents. pairs: right and all.
    """

    fingerprint: str
    model: str
    seed: int
    bits_per_byte: float
    bytes: int
    tokens: int
    entries: int
    state_bytes: int
    train_flops: float
    seconds: float
    steps: int = 0
    trained: bool = True
    pairs: tuple[float, int] | None = None
    curve: tuple[tuple[int, float], ...] = field(default=())

    def save(self, path: Path) -> None:
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Result | None:
        """The result in a file if it was made from the same; None otherwise."""
        try:
            found = read_json(path)
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            return None
        if found.get("fingerprint") != fingerprint:
            return None
        curve = tuple((int(tokens), float(bits)) for tokens, bits in found.pop("curve"))
        pairs = found.pop("pairs")
        return cls(**found, curve=curve, pairs=tuple(pairs) if pairs else None)


@dataclass(frozen=True)
class Interval:
    """A mean and how far off it may be: half the width of a 95 % interval, None of a single value."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's t over seeds."""
        if len(values) < 2:
            return cls(fmean(values), None)
        df = max(n for n in T95 if n <= len(values) - 1)
        return cls(fmean(values), T95[df] * stdev(values) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Row:
    """A model of the table: its seeds together."""

    model: str
    results: tuple[Result, ...]

    @property
    def bits(self) -> Interval:
        return Interval.of([result.bits_per_byte for result in self.results])

    @property
    def pairs(self) -> tuple[float, float, float] | None:
        """Share of minimal pairs put right, averaged over seeds, and the interval that the number of pairs gives."""
        asked = [result.pairs for result in self.results if result.pairs]
        if not asked:
            return None
        share = fmean(right / n for right, n in asked)
        low, high = wilson(round(share * asked[0][1]), asked[0][1])
        return share, low, high

    def mean(self, name: str) -> float:
        """The mean of a figure over seeds."""
        return fmean(getattr(result, name) for result in self.results)

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Tokens and bits per byte while it trained, the mean over seeds."""
        n = min(len(result.curve) for result in self.results)
        points = zip(*(result.curve[:n] for result in self.results), strict=True)
        return [(fmean(p[0] for p in point), fmean(p[1] for p in point)) for point in points]

    def plain(self) -> dict[str, Any]:
        """Ready for JSON."""
        bits = self.bits
        names = ("tokens", "train_flops", "seconds", "entries", "state_bytes")
        return {
            "model": self.model,
            "seeds": [result.seed for result in self.results],
            "bits_per_byte": bits.mean,
            "half_interval_95": bits.half,
            "minimal_pairs": self.pairs,
            **{name: self.mean(name) for name in names},
            "curve": self.curve,
            "results": [asdict(result) for result in self.results],
        }
