"""A comparison for people: a table, and bits per byte drawn against what was spent and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo.comparing.result import Interval, Row
from octavo.comparing.settings import Comparison
from octavo.files import write_atomic, write_json
from octavo.report import plots, words

NOTHING = "-"
LINES = ("blue", "orange", "green", "purple", "gold", "ink")
MARKS = ("o-", "s-", "^-", "D--", "v--", "x--", "P:")
HEADINGS = ("model", "bits per byte", "pairs right", "tokens", "FLOPs", "CPU time", "parameters", "state")


@dataclass(frozen=True)
class Against:
    """One drawing: bits per byte against a figure, as curves of training or as points at the end."""

    name: str
    label: str
    of: Callable[[Row, float], float]  # a row and the tokens at a point of its curve
    curve: bool


DRAWINGS = (
    Against("tokens", "tokens trained on", lambda row, tokens: tokens, True),
    Against("flops", "training FLOPs", lambda row, tokens: row.mean("train_flops") * tokens / row.mean("tokens"), True),
    Against("seconds", "CPU seconds", lambda row, tokens: row.mean("seconds") * tokens / row.mean("tokens"), True),
    Against("parameters", "parameters, or n-grams stored", lambda row, _: row.mean("entries"), False),
    Against("state", "bytes of decoding state", lambda row, _: row.mean("state_bytes"), False),
)


def interval(value: Interval, form: str = ".3f") -> str:
    """``1.234 ± 0.012``, or the figure alone of a single seed."""
    return f"{value.mean:{form}}" + (f" ± {value.half:{form}}" if value.half is not None else "")


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, headings first; a column that no model has is left out."""
    table: list[list[str]] = [list(HEADINGS)]
    for row in rows:
        pairs = row.pairs
        flops = row.mean("train_flops")
        table.append(
            [
                row.model,
                interval(row.bits),
                f"{pairs[0]:.1%} ({pairs[1]:.1%} to {pairs[2]:.1%})" if pairs else NOTHING,
                words.count(row.mean("tokens")),
                f"{flops:.2e}" if flops else NOTHING,
                words.duration(row.mean("seconds")),
                words.count(row.mean("entries")),
                words.size(row.mean("state_bytes")),
            ]
        )
    empty = [i for i in range(len(HEADINGS)) if all(line[i] == NOTHING for line in table[1:])]
    return [[cell for i, cell in enumerate(line) if i not in empty] for line in table]


def lines(rows: Sequence[Row]) -> list[str]:
    """The table for a terminal."""
    table = cells(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def markdown(rows: Sequence[Row]) -> str:
    """The table for a page."""
    first, *others = cells(rows)
    rule = ["---", *("--:" for _ in first[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (first, rule, *others)) + "\n"


def write(rows: Sequence[Row], comparison: Comparison, folder: Path) -> list[Path]:
    """Write table.md, results.json and the drawings into ``folder``; returns their paths."""
    paths = [folder / "table.md", folder / "results.json"]
    write_atomic(paths[0], markdown(rows))
    write_json(
        paths[1],
        {
            "name": comparison.name,
            "budget": comparison.budget.model_dump(mode="json", exclude_none=True),
            "seeds": comparison.seeds,
            "models": [row.plain() for row in rows],
        },
    )
    for drawing in DRAWINGS:
        if points := _points(drawing, rows):
            path = folder / f"{drawing.name}.png"
            _draw(drawing, points, path)
            paths.append(path)
    return paths


def _points(drawing: Against, rows: Sequence[Row]) -> list[tuple[Row, list[tuple[float, float]]]]:
    """What is drawn of each model: where it can be drawn at all (zero has no place on a logarithmic axis)."""
    found = []
    for row in rows:
        end = [(row.mean("tokens"), row.bits.mean)]
        curve = (row.curve or end) if drawing.curve else end
        placed = [(drawing.of(row, tokens), bits) for tokens, bits in curve]
        if placed := [(x, bits) for x, bits in placed if x > 0]:
            found.append((row, placed))
    return found


def _draw(drawing: Against, points: list[tuple[Row, list[tuple[float, float]]]], path: Path) -> None:
    with plots.figure(f"Bits per byte against {drawing.label}", drawing.label) as (figure, axes):
        figure.set_size_inches(7.2, 4.6)
        ends = []
        for i, (row, curve) in enumerate(points):
            colour = plots.COLOURS[LINES[i % len(LINES)]]
            x, y = zip(*curve, strict=True)
            axes.plot(x, y, MARKS[i % len(MARKS)], color=colour, markersize=3.4, linewidth=1.1)
            ends.append((f"{row.model} {row.bits.mean:.3f}", y[-1], colour, (x[-1], y[-1])))
        axes.set_xscale("log")
        axes.set_ylabel("bits per byte, held-out text")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        bits = sorted(y for _, y, _, _ in ends)
        low, high = bits[0], max(bits[-1], bits[0] + 0.1)
        # What knows nothing would press all others flat: the range ends where nine of ten models are.
        high = min(high, bits[int(0.9 * (len(bits) - 1))] * 1.25)
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
        axes.set_ylim(low, high)
        shown = [end for end in ends if end[1] <= high]
        heights = plots.apart([(y - low) / (high - low) for _, y, _, _ in shown], 0.038)
        for (label, _, colour, at), height in zip(shown, heights, strict=True):
            axes.annotate(
                label, at, (1.02, height), textcoords="axes fraction", va="center", color=colour, fontsize=7,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.5, "shrinkB": 2},
            )  # fmt: skip
        write_atomic(path, plots.png_of(figure))
