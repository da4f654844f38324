"""Several runs side by side on one page: curves, what was set differently, and what came of it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from octavo.errors import ConfigError
from octavo.files import write_atomic
from octavo.report import compare_plots, html, words
from octavo.report.folder import TRAINING, Run, dig
from octavo.report.html import Html, join, section, table, tag
from octavo.report.metrics import number, smooth
from octavo.report.page import STYLE, colours, is_run, refuse
from octavo.report.sections import TITLES, flat, shown_value

MAX_NAME = 60
SAMPLE_CHARACTERS = 400
SAMPLE_PROMPTS = 4
VALUE_CHARACTERS = 120
NOTHING = "\u2013"


@dataclass(frozen=True)
class Side:
    """One of the runs: ``label`` tells it from the others."""

    run: Run
    label: str
    number: int


def build(run_folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page that compares several runs; returns its path.

    Args:
        out: the page; by default ``comparison-with-OTHERS.html`` in the folder of the first run.

    Raises:
        ConfigError: a folder is no run, is given twice, there are too many, or the page would replace a file that
            Octavo did not write.
    """
    sides = open_sides(run_folders)
    page = Path(out) if out is not None else sides[0].run.path / default_name(sides)
    html.check_ours(page)
    write_atomic(page, render(sides))
    return page


def open_sides(run_folders: Sequence[str | os.PathLike[str]]) -> list[Side]:
    """The runs with labels that differ: the recipes' names, else the folders', else the paths."""
    paths = [Path(folder) for folder in run_folders]
    for path in paths:
        if not is_run(path):
            raise refuse(path)
    real = [path.resolve() for path in paths]
    for i, path in enumerate(real):
        if path in real[:i]:
            raise ConfigError(f"{paths[i]} is given twice", fix="give every run once")
    if len(paths) > compare_plots.MAX_RUNS:
        raise ConfigError(
            f"{len(paths)} runs are too many for one drawing", fix=f"give at most {compare_plots.MAX_RUNS}"
        )
    runs = [Run(path) for path in paths]
    choices = [[run.name for run in runs], [path.name for path in real], [str(path) for path in paths]]
    labels = next((names for names in choices if len(set(names)) == len(names)), [str(path) for path in real])
    return [Side(run, words.printable(label), i) for i, (run, label) in enumerate(zip(runs, labels, strict=True))]


def default_name(sides: Sequence[Side]) -> str:
    """The file that compares the first run with the others; other runs, another file."""
    paths = [side.run.path.resolve() for side in sides[1:]]
    names = "-and-".join(re.sub(r"[^\w.-]+", "_", path.name) for path in paths)
    if len(names.encode()) > MAX_NAME:
        kept = names.encode()[:MAX_NAME].decode(errors="ignore")
        names = f"{kept}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    return f"comparison-with-{names}.html"


def render(sides: Sequence[Side]) -> str:
    """The page's text."""
    parts = [_figures(sides), _settings(sides), _curves(sides), _samples(sides), _environment(sides), _runs(sides)]
    titles = [part.partition("<h2>")[2].partition("</h2>")[0] for part in parts if part]
    links = [tag("a", Html(title), href=f"#{html.slug(title)}") for title in titles]
    style = colours() + STYLE.read_text(encoding="utf-8") + STYLE.with_name("compare.css").read_text(encoding="utf-8")
    return html.document(
        f"{' and '.join(side.label for side in sides)} · Octavo",
        style,
        tag(
            "header",
            tag("p", "Octavo runs side by side", class_="kicker"),
            tag("h1", f"{len(sides)} runs"),
            legend(sides),
        ),
        tag("main", _caution(sides), _unfinished(sides), tag("nav", *links), *parts),
        tag("footer", "Written by Octavo. Every figure comes from the files of these runs."),
    )


def legend(sides: Sequence[Side]) -> Html:
    """Whose line is whose."""
    return tag("ul", *(tag("li", _mark(side), " ", tag("span", side.label)) for side in sides), class_="legend")


def _mark(side: Side) -> Html:
    """The line a run is drawn with."""
    colour, dashes = compare_plots.line_of(side.number)
    stroke = {
        "stroke": f"var(--plot-{colour})",
        "stroke-width": "2.5",
        "stroke-dasharray": " ".join(f"{1.5 * dash:g}" for dash in dashes) or None,
    }
    line = tag("line", x1=0, y1=5, x2=34, y2=5, **stroke)
    return tag("svg", line, viewBox="0 0 34 10", class_="mark-line", **{"aria-hidden": "true"})


# ---- what came of it ----


@dataclass(frozen=True)
class Figure:
    """A row of the table of figures.

    Args:
        name: what it is.
        of: its value in a run, None where it is unknown.
        show: as people read it.
        better: -1 where less is better, 1 where more is, 0 where neither is.
        relative: differences are shares of the first run's value.
        needs: what must be equal in two runs before it can be compared: the ``text``, or all that a stage of
            training reads and how it is cut into tokens (``pretrain``, ``tune``); "" for nothing.
    """

    name: str
    of: Callable[[Run], float | None]
    show: Callable[[float], str]
    better: int = 0
    relative: bool = False
    needs: str = ""


def _exact(value: float) -> str:
    return words.exact(int(value))


def _percent(value: float) -> str:
    return words.percent(value, 1)


def _three(value: float) -> str:
    return f"{value:.3f}"


def _last(stage: str, column: str) -> Callable[[Run], float | None]:
    return lambda run: run.training[stage].last(column)


def _training_loss(stage: str) -> Callable[[Run], float | None]:
    """The mean over the end of the curve: a single step says little."""

    def of(run: Run) -> float | None:
        losses = [value for row in run.training[stage].train if (value := number(row.get("loss"))) is not None]
        return float(smooth(losses)[-1]) if losses else None

    return of


def _end(losses: list[float]) -> float:
    return losses[-1]


def _held_out(stage: str, choose: Callable[[list[float]], float]) -> Callable[[Run], float | None]:
    def of(run: Run) -> float | None:
        losses = [value for row in run.training[stage].valid if (value := number(row.get("loss"))) is not None]
        return choose(losses) if losses else None

    return of


def _median(stage: str, column: str) -> Callable[[Run], float | None]:
    def of(run: Run) -> float | None:
        values = [value for row in run.training[stage].train if (value := number(row.get(column))) is not None]
        return median(values) if values else None

    return of


def _all_seconds(run: Run) -> float | None:
    times = [value for stage in run.planned() if (value := run.seconds(stage)) is not None]
    return sum(times) if times else None


def _stage_figures(stage: str) -> list[Figure]:
    title = TITLES[stage].lower()
    return [
        Figure(f"{title}: steps", lambda run: number(dig(run.training[stage].train, -1, "step")), _exact),
        Figure(f"{title}: tokens seen", _last(stage, "tokens_seen"), words.count, relative=True),
        Figure(f"{title}: training loss at the end", _training_loss(stage), _three, -1, needs=stage),
        Figure(f"{title}: held-out loss at the end", _held_out(stage, _end), _three, -1, needs=stage),
        Figure(f"{title}: lowest held-out loss", _held_out(stage, min), _three, -1, needs=stage),
        Figure(f"{title}: tokens a second, median", _median(stage, "tokens_per_second"), words.count, 1, True),
        Figure(f"{title}: share of the peak, median", _median(stage, "mfu"), _percent, 1),
        Figure(f"{title}: training time", lambda run: run.training[stage].seconds, words.duration, -1, True),
    ]


FIGURES = (
    Figure("bits per byte, held-out text", Run.bits_per_byte, _three, -1, needs="text"),
    Figure("answers right", lambda run: number(dig(run.scores, "answers", "exact_match")), _percent, 1),
    Figure("parameters", lambda run: run.parameters, words.count, relative=True),
    Figure("vocabulary", lambda run: number(dig(run.stages, "tokenizer", "vocab_size")), _exact),
    *_stage_figures("pretrain"),
    *_stage_figures("tune"),
    Figure("all stages", _all_seconds, words.duration, -1, True),
    Figure("peak memory", lambda run: run.peak_memory, words.size, -1, True),
)  # fmt: skip


def figures(sides: Sequence[Side]) -> list[tuple[Figure, list[float | None]]]:
    """The figures that at least one run has."""
    rows = [(figure, [figure.of(side.run) for side in sides]) for figure in FIGURES]
    return [(figure, values) for figure, values in rows if any(value is not None for value in values)]


def shared(sides: Sequence[Side]) -> list[set[str]]:
    """What of each run is as in the first (``tokens``, ``text``, ``pretrain``, ``tune``), as far as it is known."""
    out: list[set[str]] = []
    for side in sides:
        same = {"": True}
        for name, path in (("text", ("data", "source")), ("told", ("tune", "told"))):
            here, first = (dig(run.stages, *path) for run in (side.run, sides[0].run))
            same[name] = None in (here, first) or here == first
        here, first = (run.shards["train"].get("vocab_hash") for run in (side.run, sides[0].run))
        same["tokens"] = None in (here, first) or here == first
        here, first = (dig(run.recipe, "tune", "data") for run in (side.run, sides[0].run))
        same["pretrain"] = same["text"] and same["tokens"]
        same["tune"] = same["told"] and same["tokens"] and here == first
        out.append({name for name, equal in same.items() if equal})
    return out


def difference(figure: Figure, value: float | None, first: float | None, same: Collection[str]) -> str:
    """``value`` against that of the first run; "" where there is none or nothing to compare with.

    Args:
        same: what the two runs share (see ``shared``).
    """
    if value is None or first is None or value == first or figure.needs not in same:
        return ""
    if figure.relative:
        if first == 0:
            return ""
        share = value / first - 1
        # A share says less and less once it is several hundred per cent.
        text = f"{value / first:.2g}x" if share >= 2 else f"{100 * share:+.{1 if abs(share) < 0.1 else 0}f}%"
    else:
        gap = figure.show(abs(value - first)).replace("%", " points")
        text = ("+" if value > first else "-") + gap
    return text.replace("-", "−")


def _figures(sides: Sequence[Side]) -> Html:
    rows, same = [], shared(sides)
    for figure, values in figures(sides):
        known = {value for value in values if value is not None}
        best = None
        if figure.better and len(known) > 1 and all(figure.needs in one for one in same):
            best = max(known) if figure.better > 0 else min(known)
        cells: list[object] = [figure.name]
        for value, one in zip(values, same, strict=True):
            shown = NOTHING if value is None else figure.show(value)
            gap = difference(figure, value, values[0], one)
            marked = tag("strong", shown) if value is not None and value == best else shown
            cells.append(join((marked, tag("small", gap) if gap else None)))
        rows.append(cells)
    if not rows:
        return Html("")
    lead = f"Differences are to {sides[0].label}, where the two can be compared; bold is the best of its row."
    return section("Figures", _wide(sides, rows, numbers=True), lead=lead)


def _wide(sides: Sequence[Side], rows: Sequence[Sequence[object]], *, numbers: bool = False) -> Html:
    """A table with a column for each run; the first column stays in sight."""
    head: list[object] = ["", *(join((_mark(side), tag("span", side.label))) for side in sides)]
    columns = range(1, len(head)) if numbers else ()
    return table(head, rows, numbers=tuple(columns), class_="side")


# ---- what was different ----


def differing(values: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Dotted keys whose values are not equal in all of these, in the order in which they are met."""
    found = [dict(flat(value)) for value in values]
    rows: dict[str, list[str]] = {}
    for key in _in_order(key for one in found for key in one):
        exact = [repr(one[key]) if key in one else NOTHING for one in found]
        if len(set(exact)) > 1:
            shown = [shown_value(one[key]) if key in one else NOTHING for one in found]
            rows[key] = shown if len(set(shown)) == len(set(exact)) else exact
    return rows


def _in_order(keys: Iterable[str]) -> list[str]:
    """Dotted keys once each, as they are met, with those of one section together."""
    met: dict[tuple[str, ...], int] = {}

    def place(key: str) -> tuple[int, ...]:
        path = tuple(key.split("."))
        return tuple(met.setdefault(path[:n], len(met)) for n in range(1, len(path) + 1))

    places = {key: place(key) for key in dict.fromkeys(keys)}
    return sorted(places, key=places.__getitem__)


def _key(key: str) -> Html:
    """A dotted key that may be broken at its dots and underscores."""
    return tag("code", join(join((part, tag("wbr"))) for part in re.split(r"(?<=[._])", key)))


def _settings(sides: Sequence[Side]) -> Html:
    recipes = [{key: value for key, value in side.run.recipe.items() if key != "name"} for side in sides]
    rows = [[_key(key), *_against_first(row)] for key, row in differing(recipes).items()]
    if not rows:
        return section("Settings", tag("p", "All settings of these runs are equal."))
    equal = len({key for recipe in recipes for key, _ in flat(recipe)}) - len(rows)
    return section("Settings", _wide(sides, rows), lead=f"Those that differ; {equal} others are equal.")


def _environment(sides: Sequence[Side]) -> Html:
    environments = [side.run.environment for side in sides]
    rows = [[_key(key), *_against_first(row)] for key, row in differing(environments).items()]
    if not any(environments):
        return Html("")
    if not rows:
        return section("Environment", tag("p", "Machine and versions are equal."))
    return section("Environment", _wide(sides, rows), lead="What differs of machine and versions.")


def _against_first(values: Sequence[str]) -> list[Html]:
    """The cells of a row, those that are as in the first run set back."""
    cut = [text if len(text) <= VALUE_CHARACTERS else text[:VALUE_CHARACTERS].rstrip() + " …" for text in values]
    same = [False, *(value == values[0] for value in values[1:])]
    return [tag("span", text, class_="same" if equal else None) for text, equal in zip(cut, same, strict=True)]


def _caution(sides: Sequence[Side]) -> Html | None:
    """What cannot be compared although it stands side by side."""
    told, same = [], shared(sides)
    if not all("tokens" in one for one in same):
        told.append(
            "These runs have different tokenizers, so that a loss per token of one says nothing about another's; "
            "bits per byte can be compared."
        )
    if not all("text" in one for one in same):
        told.append("They did not read the same text, or did not hold out the same part of it: losses do not compare.")
    if differing([side.run.environment for side in sides]).keys() & {"cpu", "cpus", "threads", "gpus"}:
        told.append("They did not run on the same machine or threads: mind that when comparing speed.")
    return tag("p", " ".join(told), class_="notice") if told else None


def _unfinished(sides: Sequence[Side]) -> Html | None:
    names = [side.label for side in sides if any(stage not in side.run.stages for stage in side.run.planned())]
    if not names:
        return None
    many = "These runs are" if len(names) > 1 else "This run is"
    return tag("p", f"{many} not finished: {', '.join(names)}.", class_="notice")


# ---- curves and samples ----


def _curves(sides: Sequence[Side]) -> Html:
    parts: list[Html] = []
    for stage in TRAINING:
        drawn = compare_plots.draw(stage, [side.run.training[stage] for side in sides])
        if drawn:
            figures = [tag("figure", Html(one.svg), class_=f"over-{one.axis}") for one in drawn]
            parts += [tag("h3", TITLES[stage]), legend(sides), tag("div", *figures, class_="plots")]
    if not parts:
        return Html("")
    choices: list[Html] = []
    for i, axis in enumerate(compare_plots.AXES):
        checked = "checked" if i == 0 else None
        radio = tag("input", type="radio", name="axis", id=f"by-{axis.name}", checked=checked)
        choices.append(tag("label", radio, axis.choice))
    switch = tag("fieldset", tag("legend", "Drawn over"), *choices, class_="switch")
    return section("Curves", switch, *parts)


def _samples(sides: Sequence[Side]) -> Html:
    """The last that each run wrote, by what it was given to begin with."""
    parts = []
    for stage in TRAINING:
        last = [{str(r.get("prompt") or ""): r for r in side.run.training[stage].samples} for side in sides]
        prompts = [p for p in dict.fromkeys(p for one in last for p in one) if sum(p in one for one in last) > 1]
        for prompt in prompts[:SAMPLE_PROMPTS]:
            asked = tag("p", tag("span", "asked" if stage == "tune" else "begun with", class_="label"), f" {prompt}")
            cards = [_card(side, one[prompt]) for side, one in zip(sides, last, strict=True) if prompt in one]
            parts.append(tag("div", asked, tag("div", *cards, class_="cards-of-text")))
    return section("Last samples", *parts)


def _card(side: Side, row: dict[str, Any]) -> Html:
    text = str(row.get("text") or "").strip()
    step = number(row.get("step"))
    head = tag("p", _mark(side), " ", side.label, tag("small", f" step {step:,.0f}") if step is not None else None)
    said = text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS].rstrip() + " …"
    return tag("div", head, tag("p", said or tag("em", "(nothing)"), class_="said-last"))


def _runs(sides: Sequence[Side]) -> Html:
    rows = [(join((_mark(side), " ", side.label)), tag("code", str(side.run.path))) for side in sides]
    return section("Runs", html.pairs(rows))
