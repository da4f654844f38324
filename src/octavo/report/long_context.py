"""The measurements of ``octavo longcontext`` as a table for people and as a drawing."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from octavo.files import write_atomic
from octavo.report import plots, words

MARKS = ("-", "--", ":")


def rows(result: dict[str, Any], name: str) -> Iterator[tuple[str, list[Any]]]:
    """Each method with its figures by length."""
    for method in result["methods"]:
        yield method, [cell[name] for cell in result["cells"] if cell["method"] == method]


def lines(result: dict[str, Any]) -> list[str]:
    """The table: one part for each figure, a method a line, a length a column."""
    plan = result["plan"]
    parts: list[tuple[str, str, Callable[[Any], str]]] = [
        (f"perplexity of the last {plan['scored']} tokens, {plan['texts']} texts", "perplexity", _number),
        (f"passkey found, {plan['trials']} trials (chance {result['chance']:.1%})", "passkey", lambda x: f"{x:.0%}"),
        ("state of one row", "state_bytes", words.size),
        ("of it, read only where chosen", "apart_bytes", words.size),
        ("seconds to read a text", "seconds", _number),
    ]
    width = max(len(method) for method in result["methods"])
    found = []
    for title, name, form in parts:
        table = [(method, figures) for method, figures in rows(result, name) if any(f is not None for f in figures)]
        if name == "apart_bytes":
            table = [(method, figures) for method, figures in table if any(figures)]
        if not table:
            continue
        found += ["", title, " " * width + "".join(f"{n:>12,}" for n in plan["lengths"])]
        for method, figures in table:
            found.append(f"{method:<{width}}" + "".join(f"{'-' if f is None else form(f):>12}" for f in figures))
    why = {cell["method"]: cell["why"] for cell in result["cells"] if cell["why"]}
    found += [""] * bool(why) + [f"{method} is not measured everywhere: {reason}" for method, reason in why.items()]
    return found[1:]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write perplexity against length, a line a method; the ending of ``path`` says png or svg."""
    colours = [colour for name, colour in plots.COLOURS.items() if name not in ("grid", "faint", "muted")]
    with plots.figure("Perplexity against length", "tokens") as (figure, axes):
        for i, (method, figures) in enumerate(rows(result, "perplexity")):
            known = [(n, f) for n, f in zip(result["plan"]["lengths"], figures, strict=True) if f is not None]
            if known:
                style = {"color": colours[i % len(colours)], "linestyle": MARKS[i // len(colours) % len(MARKS)]}
                axes.plot(*zip(*known, strict=True), label=method, linewidth=1.3, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(result["plan"]["lengths"])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axes.set_ylabel("perplexity")
        axes.tick_params(which="minor", labelsize=6)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6.5)
        figure.set_size_inches(5.6, 3.2)
        kind = path.suffix.removeprefix(".")
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else {})
    write_atomic(path, out.getvalue())
