"""Drawings of mixtures of experts: how even the layers' loads became, who was read how often, what was dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from octavo.report.metrics import Metrics, Row, number, points, smooth, thin

FULL_COLOUR = 2.0  # times the mean load
MAX_NAMED = 6  # layers with a line each in the legend
LAST = 0.25  # of the logged steps, which the loads are summed over


def layers_of(metrics: Metrics, name: str) -> list[str]:
    """The depths for which ``moe.NAME.DEPTH`` was logged, first layer first."""
    prefix = f"moe.{name}."
    found = {key.removeprefix(prefix) for row in metrics.train for key in row if key.startswith(prefix)}
    return sorted((depth for depth in found if depth.isdecimal()), key=int)


def loads(metrics: Metrics) -> tuple[list[str], np.ndarray]:
    """Depths and an array (layers, experts): each expert's load over the mean of its layer, at the end of training."""
    depths = layers_of(metrics, "load")
    rows = metrics.train[-max(1, round(LAST * len(metrics.train))) :]
    found = {depth: _sum(rows, f"moe.load.{depth}") for depth in depths}
    kept = [depth for depth in depths if found[depth] is not None]
    width = max((len(found[depth]) for depth in kept), default=0)  # type: ignore[arg-type]
    table = np.full((len(kept), width), np.nan)
    for i, depth in enumerate(kept):
        load = np.array(found[depth])
        table[i, : len(load)] = load / max(load.mean(), 1e-9)
    return kept, table


def _sum(rows: list[Row], name: str) -> np.ndarray | None:
    """The counts of a layer added up over rows; None where they are not counts of the same experts."""
    found = [row[name] for row in rows if isinstance(row.get(name), list)]
    known = [[number(value) for value in counts] for counts in found]
    if not known or any(len(counts) != len(known[0]) or not counts or None in counts for counts in known):
        return None
    return np.array(known, dtype=float).sum(0)


def by_layer(name: str, label: str, even: float = 0.0) -> Callable[[Any, Metrics, list[str]], bool]:
    """A painter of ``moe.NAME.DEPTH`` over training, a line for each layer."""

    def paint(axes: Any, metrics: Metrics, colours: list[str]) -> bool:
        depths, drawn = layers_of(metrics, name), 0
        for i, depth in enumerate(depths):
            steps, values = points(metrics.train, "step", f"moe.{name}.{depth}")
            x, y = thin(metrics.tokens_at(steps), smooth(values))
            axes.plot(x, y, color=colours[i % len(colours)], linewidth=1.1, label=f"layer {depth}")
            drawn = max(drawn, len(x))
        axes.set_ylabel(label)
        if drawn > 1:
            axes.set_ylim(bottom=even)
        if 0 < len(depths) <= MAX_NAMED:
            axes.legend(loc="upper right")
        return drawn > 1

    return paint


def load_map(axes: Any, metrics: Metrics, colours: list[str]) -> bool:
    """A square for each expert of each layer, the fuller the more it was read."""
    from matplotlib.patches import Rectangle

    depths, table = loads(metrics)
    for (row, expert), load in np.ndenumerate(table):
        if np.isfinite(load):
            shade = float(np.clip(load / FULL_COLOUR, 0.03, 1.0))
            axes.add_patch(Rectangle((expert - 0.46, row - 0.42), 0.92, 0.84, facecolor=colours[0], alpha=shade))
    if not table.size:
        return False
    axes.set_xlim(-0.6, table.shape[1] - 0.4)
    axes.set_ylim(table.shape[0] - 0.4, -0.6)
    axes.set_xticks(range(0, table.shape[1], max(1, -(-table.shape[1] // 8))))
    axes.set_yticks(range(len(depths)), depths)
    axes.grid(False)
    axes.set_ylabel("layer")
    axes.set_xlabel(f"expert; full colour is {FULL_COLOUR:g} times the mean load")
    return True
