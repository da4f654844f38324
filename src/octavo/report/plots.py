"""Curves of a run: PNG files for people, inline SVG for the page, both from one drawing.

Colours are the Okabe-Ito set, which colour-blind readers can tell apart. In the SVG every colour becomes a
CSS variable of the page, so that the same drawing works on light and dark ground.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from octavo.files import write_atomic
from octavo.report import experts, words
from octavo.report.metrics import Metrics, points, smooth, thin

# Names of the page's CSS variables and their values on light ground; all different, because the SVG is
# recoloured by value.
COLOURS = {
    "ink": "#2b2926",
    "muted": "#6f6a63",
    "grid": "#e4e0d8",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "purple": "#aa4f85",
    "gold": "#8a6900",
    "faint": "#a9cfe6",
}
PAPER = "#fffefb"
EXPERTS = ("blue", "orange", "green", "purple", "gold", "muted")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.7,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Plot:
    """One drawn figure: ``svg`` for the page (no scripts, colours as CSS variables), ``png`` for a file."""

    name: str
    title: str
    svg: str
    png: bytes


def draw(metrics: Metrics, *, stage: str, baselines: Mapping[str, float] | None = None) -> list[Plot]:
    """Every curve that the metrics of one stage have data for.

    Args:
        metrics: the logged steps.
        stage: "pretrain" or "tune"; the plots' names begin with it.
        baselines: bits-per-byte of other predictors on the same text, drawn as level lines.
    """
    curves = (
        ("loss", "Loss", _loss),
        ("bits-per-byte", "Bits per byte, held-out text", lambda axes, m: _bits(axes, m, baselines or {})),
        ("learning-rate", "Learning rate", lambda axes, m: _line(axes, m, "lr", "learning rate", "green")),
        ("gradient-norm", "Gradient norm", _gradient),
        ("throughput", "Throughput", _throughput),
        ("experts", "Experts: busiest over the mean", _of_experts(experts.by_layer("max_load", "load / mean", 1.0))),
        ("expert-loads", "Experts: load at the end", _of_experts(experts.load_map)),
        ("expert-drops", "Experts: choices dropped", _of_experts(experts.by_layer("dropped", "share of choices"))),
    )
    plots = []
    for name, title, paint in curves:
        with figure(title, "tokens seen" if metrics.has_tokens else "step") as (drawn, axes):
            if paint(axes, metrics):
                axes.margins(x=0.01)
                full = f"{stage}-{name}"
                plots.append(Plot(full, title, svg_of(drawn, full, title), png_of(drawn)))
    return plots


def write(plots: list[Plot], folder: str | Path) -> list[Path]:
    """Write ``NAME.png`` of each plot into ``folder`` (made if missing) and return the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        write_atomic(folder / f"{plot.name}.png", plot.png)
    return [folder / f"{plot.name}.png" for plot in plots]


def _loss(axes: Any, metrics: Metrics) -> bool:
    steps, losses = points(metrics.train, "step", "loss")
    x, raw, mean = thin(metrics.tokens_at(steps), losses, smooth(losses))
    if len(x):
        axes.plot(x, raw, color=COLOURS["faint"], linewidth=0.8, label="train, single steps")
        axes.plot(x, mean, color=COLOURS["blue"], label="train, smoothed")
    steps, held = points(metrics.valid, "step", "loss")
    if len(steps):
        axes.plot(metrics.tokens_at(steps), held, "o-", color=COLOURS["orange"], markersize=3.2, label="held-out")
    axes.set_ylabel("loss (nats per token)")
    if len(losses) > 20:
        # The first steps stand far above the rest and would press everything else flat.
        low, high = min([*mean, *held]), max([*mean[1:], *held])
        axes.set_ylim(low - 0.06 * (high - low) - 1e-6, high + 0.06 * (high - low) + 1e-6)
    if len(losses) or len(held):
        axes.legend(loc="upper right")
    return bool(len(losses) or len(held))


def _bits(axes: Any, metrics: Metrics, baselines: Mapping[str, float]) -> bool:
    steps, bits = points(metrics.valid, "step", "bits_per_byte")
    if not len(steps):
        return False
    axes.plot(metrics.tokens_at(steps), bits, "o-", color=COLOURS["orange"], markersize=3.2, zorder=3)
    colours = ("purple", "green", "blue", "muted")
    labels = [("this model", float(bits[-1]), COLOURS["orange"])]
    for i, (name, level) in enumerate(sorted(baselines.items(), key=lambda item: -item[1])):
        labels.append((name, level, COLOURS[colours[i % len(colours)]]))
        axes.axhline(level, color=labels[-1][2], linestyle=(0, (4, 3)), linewidth=1.1)
    levels = [*bits, *baselines.values()]
    low, high = min(levels), max([bits[0] if len(bits) < 4 else bits[1], *baselines.values()])
    low, high = low - 0.08 * (high - low) - 0.02, high + 0.08 * (high - low) + 0.02
    axes.set_ylim(low, high)
    axes.set_ylabel("bits per byte")
    heights = apart([(level - low) / (high - low) for _, level, _ in labels], 0.085)
    for (name, level, colour), height in zip(labels, heights, strict=True):
        axes.text(
            1.02, height, f"{name} {level:.3f}", transform=axes.transAxes, va="center", color=colour, fontsize=7.5
        )
    return True


def apart(heights: list[float], gap: float) -> list[float]:
    """``heights`` moved as little as keeps the labels at them ``gap`` apart, in the same order."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    over = max(0.0, max(placed) - 1.0)
    return [height - over for height in placed]


def _line(axes: Any, metrics: Metrics, name: str, label: str, colour: str) -> bool:
    steps, values = points(metrics.train, "step", name)
    x, y = thin(metrics.tokens_at(steps), values)
    axes.plot(x, y, color=COLOURS[colour])
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)
    return len(x) > 1


def _gradient(axes: Any, metrics: Metrics) -> bool:
    steps, norms = points(metrics.train, "step", "grad_norm")
    x, raw, mean = thin(metrics.tokens_at(steps), norms, smooth(norms))
    axes.plot(x, raw, color=COLOURS["faint"], linewidth=0.8)
    axes.plot(x, mean, color=COLOURS["blue"])
    axes.set_ylabel("norm before clipping")
    if len(norms) and norms.min() > 0 and norms.max() / np.median(norms) > 8:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    return len(x) > 1


def _throughput(axes: Any, metrics: Metrics) -> bool:
    steps, rates = points(metrics.train, "step", "tokens_per_second")
    x, y = thin(metrics.tokens_at(steps), rates)
    axes.plot(x, y, color=COLOURS["purple"], linewidth=1.1)
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter(short_count)
    axes.set_ylim(bottom=0)
    return len(x) > 1


def _of_experts(paint: Callable[[Any, Metrics, list[str]], bool]) -> Callable[[Any, Metrics], bool]:
    return lambda axes, metrics: paint(axes, metrics, [COLOURS[name] for name in EXPERTS])


@contextmanager
def figure(title: str, x_label: str) -> Iterator[tuple[Any, Any]]:
    """A figure with one pair of axes in our style."""
    # The object interface with an Agg canvas: no display, no global state of pyplot.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(4.4, 2.75), layout="constrained")
        FigureCanvasAgg(made)
        axes = made.subplots()
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_formatter(short_count)
        yield made, axes


def short_count(value: float, _: object = None) -> str:
    """A tick's number without the noughts that `words.count` fills up with: ``1.5M``, ``10k``."""
    text = words.count(value)
    number = text.rstrip("kMGT")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + text[len(number) :]


def png_of(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=180)
    return out.getvalue()


def svg_of(figure: Any, name: str, title: str) -> str:
    """A figure as SVG for our pages: no scripts, colours as CSS variables, ids that begin with ``name``."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # Left out: metadata with outside addresses, and a style sheet that would reach the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', svg, count=1)
    # Several drawings share one page: names that nothing points at go, the others get the drawing's own.
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--plot-{variable})")
    return re.sub(r"\s*\n\s*", "\n", svg)
