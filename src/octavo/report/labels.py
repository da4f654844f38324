"""What an encoder's or a classifier's scores look like on the page: hidden tokens, classes of texts, tags of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.report import words
from octavo.report.folder import Run, dig
from octavo.report.html import Html, pairs, section, table, tag
from octavo.report.metrics import number

SHOWN_CLASSES = 14  # in the table of who was taken for whom: what fits a page
DARKEST = 60  # percent of the colour, so that figures on it can be read


def hidden(run: Run) -> Html:
    """How many hidden tokens, or tokens of mended text, are foretold."""
    parts = []
    for name, title in (("masked", "Hidden tokens"), ("mended", "Mended text")):
        figures = dig(run.scores, name)
        share = number(dig(figures, "accuracy"))
        if share is None:
            continue
        rows: list[tuple[object, object]] = [("foretold exactly", words.percent(share, 1))]
        rows += [("95 % interval", told)] if (told := between(figures)) else []
        for key, said, shown in (
            ("tokens", "held-out tokens asked for", lambda v: words.exact(int(v))),
            ("nats_per_token", "nats per token", lambda v: f"{v:.3f}"),
        ):
            if (value := number(dig(figures, key))) is not None:
                rows.append((said, shown(value)))
        lead = "Tokens of held-out text that the model did not see. Rows are drawn again for the interval."
        parts.append(section(title, pairs(rows), lead=lead))
    return Html("".join(parts))


def classes(run: Run) -> Html:
    """Classes of held-out texts, against always saying the commonest."""
    figures = dig(run.scores, "classes")
    n = number(dig(figures, "texts"))
    if n is None:
        return Html("")
    lead = f"{words.exact(int(n))} texts that were held out."
    if (error := number(dig(figures, "mean_squared_error"))) is not None:
        rows: list[tuple[object, object]] = [("mean squared error", f"{error:.4f}")]
        edges = [number(dig(figures, "interval_95", i)) for i in (0, 1)]
        rows += [("95 % interval", " to ".join(f"{edge:.4f}" for edge in edges if edge is not None))]
        return section("Classes", pairs(rows), lead=lead)
    return section("Classes", _against_commonest(figures, "texts right"), _confusion(figures), lead=lead)


def tags(run: Run) -> Html:
    """Tags of held-out words, and whole spans of them."""
    figures = dig(run.scores, "tags")
    n, n_words = (number(dig(figures, key)) for key in ("sentences", "words"))
    if n is None or n_words is None:
        return Html("")
    parts = [_against_commonest(figures, "words right")]
    if (f1 := number(dig(figures, "spans", "f1"))) is not None:
        types = dig(figures, "types")
        rows = [_span_row(str(name), of_type) for name, of_type in (types if isinstance(types, dict) else {}).items()]
        rows.append(_span_row("all spans", dig(figures, "spans")))
        edges = [number(dig(figures, "spans", "f1_interval_95", i)) for i in (0, 1)]
        told = f" F1 {f1:.3f}, 95% interval {edges[0]:.3f} to {edges[1]:.3f}." if None not in edges else ""
        parts.append(tag("h3", "Spans"))
        parts.append(table(("type", "given", "said", "precision", "recall", "F1"), rows, numbers=(1, 2, 3, 4, 5)))
        note = f"Right are spans whose first and last word and type are all right, as CoNLL counts them.{told}"
        parts.append(tag("p", note, class_="remark"))
    parts.append(_confusion(figures))
    lead = f"{words.exact(int(n_words))} words of {words.exact(int(n))} sentences that were held out."
    return section("Tags", *parts, lead=lead)


def facts(run: Run) -> list[tuple[str, str, str]]:
    """The headline figures: name, value, remark."""
    found = []
    for kind, said, commonest in (
        ("masked", "hidden tokens right", ""),
        ("mended", "mending tokens right", ""),
        ("classes", "texts right", "class"),
        ("tags", "words right", "tag"),
    ):
        figures = dig(run.scores, kind)
        share, majority = number(dig(figures, "accuracy")), number(dig(figures, "majority_accuracy"))
        if share is None:
            continue
        told = [f"95% interval {interval}"] if (interval := between(figures)) else []
        told += [f"always the commonest {commonest}: {words.percent(majority, 1)}"] if majority is not None else []
        asked = number(dig(figures, "tokens"))
        told += [f"of {words.exact(int(asked))} held out"] if asked is not None else []
        found.append((said, words.percent(share, 1), "; ".join(told)))
    if (f1 := number(dig(run.scores, "tags", "spans", "f1"))) is not None:
        edges = [number(dig(run.scores, "tags", "spans", "f1_interval_95", i)) for i in (0, 1)]
        told = f"95% interval {edges[0]:.3f} to {edges[1]:.3f}" if None not in edges else ""
        found.append(("span F1", f"{f1:.3f}", told))
    return found


def between(figures: Any) -> str:
    """The 95% interval of a share, "" if unknown."""
    low, high = (number(dig(figures, "interval_95", i)) for i in (0, 1))
    return f"{words.percent(low, 1)} to {words.percent(high, 1)}" if low is not None and high is not None else ""


def _against_commonest(figures: Mapping[str, Any], said: str) -> Html:
    share, majority = number(dig(figures, "accuracy")), number(dig(figures, "majority_accuracy"))
    f1 = number(dig(figures, "macro_f1"))
    edges = [number(dig(figures, "macro_f1_interval_95", i)) for i in (0, 1)]
    of_f1 = f"{edges[0]:.3f} to {edges[1]:.3f}" if None not in edges else ""
    rows: list[tuple[object, ...]] = [
        (
            tag("strong", "this model"),
            "" if share is None else words.percent(share, 1),
            between(figures),
            "" if f1 is None else f"{f1:.3f}",
            of_f1,
        )
    ]
    if majority is not None:
        rows.append(("always the commonest", words.percent(majority, 1), "", "", ""))
    head = ("", said, "95 % interval", "macro F1", "95 % interval")
    return table(head, rows, numbers=(1, 2, 3, 4))


def _span_row(name: str, figures: Any) -> tuple[object, ...]:
    counts = [number(dig(figures, key)) for key in ("given", "said")]
    shares = [number(dig(figures, key)) for key in ("precision", "recall", "f1")]
    return (
        name,
        *("" if value is None else words.exact(int(value)) for value in counts),
        *("" if value is None else f"{value:.3f}" for value in shares),
    )


def _confusion(figures: Mapping[str, Any]) -> Html:
    """Rows are what is given, columns what was said; the shade is the share of the row."""
    names, given = dig(figures, "classes"), dig(figures, "confusion")
    counts = _square(given, names)
    if not counts:
        return Html("")
    order = sorted(range(len(counts)), key=lambda i: (-sum(counts[i]), i))[:SHOWN_CLASSES]
    order = sorted(order)
    rows = []
    for i in order:
        total = max(1, sum(counts[i]))
        cells = [
            tag("span", words.exact(counts[i][j]), class_="share" + " same" * (i == j),
                style=f"--share:{DARKEST * counts[i][j] / total:.0f}%")
            for j in order
        ]  # fmt: skip
        rows.append((tag("strong", str(names[i])), *cells))
    left = len(counts) - len(order)
    more = f" The {len(order)} commonest of {len(counts)} are shown." if left else ""
    note = f"Each row is what a label says, each column what the model said.{more}"
    head = ("given, said", *(str(names[j]) for j in order))
    numbers = tuple(range(1, len(order) + 1))
    drawn = table(head, rows, numbers=numbers, class_="confusion")
    return Html("".join((tag("h3", "What is taken for what"), drawn, tag("p", note, class_="remark"))))


def _square(given: Any, names: Any) -> Sequence[Sequence[int]]:
    """The table if it is one of whole numbers, a row and a column for each name; else nothing."""
    if not isinstance(given, list) or not isinstance(names, list) or len(given) != len(names):
        return []
    for row in given:
        if not isinstance(row, list) or len(row) != len(names) or any(number(value) is None for value in row):
            return []
    return [[int(value) for value in row] for row in given]
