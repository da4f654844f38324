"""Curves of several runs in one drawing, over steps, over tokens and over time.

A run keeps its colour and its dashes in all drawings, so that they can be told apart without seeing colours; whose
line is whose stands once, beside the drawings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.report import words
from octavo.report.metrics import Metrics, points, smooth, thin
from octavo.report.plots import COLOURS, figure, short_count, svg_of

LINES = ("blue", "orange", "green", "purple", "gold", "ink")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.2, 1.6), (7, 2, 1.2, 2))
MAX_RUNS = 12  # so many pairs of a colour and a dash there are
POINTS = 200

Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Axis:
    """What the curves are drawn over: its name in the page, its label, and the values at steps."""

    name: str
    label: str
    choice: str
    at: Callable[[Metrics, np.ndarray], np.ndarray]
    show: Callable[[float, object], str] = short_count


AXES = (
    Axis("tokens", "tokens seen", "tokens seen", lambda m, steps: m.tokens_at(steps)),
    Axis("step", "step", "step", lambda m, steps: steps.astype(float)),
    Axis(
        "time",
        "training time, without looking in and saving",
        "training time",
        lambda m, steps: m.seconds_at(steps),
        lambda seconds, _: words.duration(seconds).replace(".0 s", " s"),
    ),
)


@dataclass(frozen=True)
class Kind:
    """A figure that is drawn: from which rows, and how."""

    name: str
    title: str
    label: str
    rows: str
    column: str
    smooth: bool = False
    marked: bool = False
    from_zero: bool = False
    falls: bool = False  # from far above all the rest: the first values are left out of the range


KINDS = (
    Kind("loss", "Training loss, smoothed", "nats per token", "train", "loss", smooth=True, falls=True),
    Kind("held-out", "Loss on held-out rows", "nats per token", "valid", "loss", marked=True, falls=True),
    Kind("bits", "Bits per byte, held-out text", "bits per byte", "valid", "bits_per_byte", marked=True, falls=True),
    Kind("throughput", "Throughput, smoothed", "tokens per second", "train", "tokens_per_second", smooth=True,
         from_zero=True),
    Kind("norm", "Gradient norm, smoothed", "norm before clipping", "train", "grad_norm", smooth=True),
    Kind("rate", "Learning rate", "learning rate", "train", "lr", from_zero=True),
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One figure over one axis."""

    kind: str
    axis: str
    title: str
    svg: str


def line_of(i: int) -> tuple[str, tuple[float, ...]]:
    """The colour's name and the dashes of the run with this number."""
    return LINES[i % len(LINES)], DASHES[i % len(DASHES)]


def draw(stage: str, runs: Sequence[Metrics]) -> list[Drawing]:
    """Every figure that at least one of the runs has, over every axis that it can be drawn over."""
    out = []
    for kind in KINDS:
        for axis in AXES:
            curves = [_curve(metrics, kind, axis) for metrics in runs]
            if any(len(x) > 1 for x, _ in curves) or (kind.marked and any(len(x) for x, _ in curves)):
                out.append(_draw(f"{stage}-{kind.name}-{axis.name}", kind, axis, curves))
    return out


def _curve(metrics: Metrics, kind: Kind, axis: Axis) -> Curve:
    steps, values = points(getattr(metrics, kind.rows), "step", kind.column)
    x = axis.at(metrics, steps)
    if kind.smooth and len(values):
        values = smooth(values)
    known = np.isfinite(x)
    return thin(x[known], values[known], at_most=POINTS)  # type: ignore[return-value]


def _draw(name: str, kind: Kind, axis: Axis, curves: Sequence[Curve]) -> Drawing:
    with figure(kind.title, axis.label) as (made, axes):
        for i, (x, y) in enumerate(curves):
            colour, dashes = line_of(i)
            style: dict[str, Any] = {"color": COLOURS[colour], "linestyle": (0, dashes) if dashes else "-"}
            if kind.marked:
                style |= {"marker": "o", "markersize": 3.0}
            # The first run lies on top: it is what the others are compared with.
            axes.plot(x, y, linewidth=1.4, zorder=3 + len(curves) - i, **style)
        axes.set_ylabel(kind.label)
        axes.xaxis.set_major_formatter(axis.show)
        large = kind.column == "tokens_per_second"
        axes.yaxis.set_major_formatter(short_count if large else lambda value, _: f"{value:g}")
        if kind.from_zero:
            axes.set_ylim(bottom=0)
        elif kind.falls:
            _leave_out_the_fall(axes, curves)
        axes.margins(x=0.01)
        return Drawing(kind.name, axis.name, kind.title, svg_of(made, name, f"{kind.title}, over {axis.choice}"))


def _leave_out_the_fall(axes: Any, curves: Sequence[Curve]) -> None:
    """The first steps stand far above the rest and would press everything else flat."""
    values = [y for _, y in curves if len(y)]
    low = min(float(y.min()) for y in values)
    # From a twentieth of each curve on; of a curve with few points, all but the first.
    high = max(float(y[max(1, len(y) // 20) :].max(initial=y[-1])) for y in values)
    if high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
