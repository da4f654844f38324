"""The parts of the report page; each is "" when the run has nothing for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from octavo.report import plots, words
from octavo.report.folder import TRAINING, Run, dig, objects
from octavo.report.html import Html, join, pairs, section, table, tag
from octavo.report.metrics import number

TITLES = {"pretrain": "Pretraining", "tune": "Tuning"}
STAGE_WORK = {
    "data": "read, clean and split the text",
    "tokenizer": "learn the vocabulary, turn text into tokens",
    "count": "count what follows what",
    "pretrain": "learn from raw text",
    "tune": "learn to answer",
    "eval": "score on what it never saw",
}
SAMPLE_CHARACTERS = 600
ANSWER_CHARACTERS = 300
SPANS = 220
PIECES = 24


def answers(run: Run) -> Html:
    """Questions, what the model said, and whether it was right."""
    examples = objects(dig(run.scores, "answers", "examples"))
    written = objects(dig(run.scores, "pairs", "examples"))
    examples += [{**pair, "question": pair.get("source"), "answer": pair.get("target", "")} for pair in written]
    turns = []
    for example in examples:
        right = example.get("right") is True
        mark = tag("span", "✓ right" if right else "✗ wrong", class_="mark right" if right else "mark wrong")
        said = str(example.get("given") or "")
        expected = None if right else tag("small", "expected: ", tag("q", _cut(str(example.get("answer", "")), 160)))
        turns.append(
            tag(
                "div",
                tag("p", _cut(str(example.get("question", "")), ANSWER_CHARACTERS), class_="asked"),
                tag("p", _cut(said, ANSWER_CHARACTERS) if said.strip() else tag("em", "(nothing)"), class_="said"),
                tag("p", mark, expected, class_="verdict"),
                class_="turn",
            )
        )
    asked = number(dig(run.scores, "answers", "questions"))
    asked = number(dig(run.scores, "pairs", "pairs")) if written else asked
    lead = "Questions in words it was not tuned on, answered greedily."
    lead = "Sources it has not seen, and what it wrote for them greedily." if written else lead
    if asked is not None:
        lead += f" The first {len(turns)} of {words.exact(int(asked))} asked, not a selection."
    return section("Answers", tag("div", *turns, class_="chat") if turns else Html(""), lead=lead)


def scores(run: Run) -> Html:
    """The model next to its n-gram baselines, and the answers by kind."""
    model = dig(run.scores, "model")
    bits = number(dig(model, "bits_per_byte"))
    parts = []
    if bits is not None:
        orders = run.orders()
        rows = [("this model", model)] + [(_order(order), figures) for order, figures in orders.items()]
        longest = max(float(figures["bits_per_byte"]) for _, figures in rows)
        cells = []
        for name, figures in rows:
            own = float(figures["bits_per_byte"])
            bar = tag(
                "span", class_="bar own" if figures is model else "bar", style=f"width:{100 * own / longest:.1f}%"
            )
            gap = "" if figures is model else f"{bits - own:+.3f}".replace("-", "−")
            cells.append(
                (
                    tag("strong", name) if figures is model else name,
                    tag("span", bar, class_="track"),
                    f"{own:.3f}",
                    gap,
                    _shown(figures, "perplexity_per_token", lambda v: f"{v:.1f}"),
                    _shown(figures, "token_accuracy", lambda v: words.percent(v, 1)),
                )
            )
        head = ("predictor", "", "bits per byte", "model minus it", "perplexity per token", "next token right")
        parts.append(table(head, cells, numbers=(2, 3, 4, 5), class_="scores"))
        parts.append(tag("p", _scored_on(run), class_="remark"))
    kinds = dig(run.scores, "answers", "kinds")
    if isinstance(kinds, dict) and number(dig(run.scores, "answers", "exact_match")) is not None:
        rows = [(name, figures) for name, figures in kinds.items() if isinstance(figures, dict)]
        cells = [_answer_row(str(name), figures) for name, figures in rows]
        cells.append(_answer_row("all questions", run.scores["answers"]))
        head = ("kind of question", "asked", "right", "95 % interval", "commonest answer", "stopped by itself")
        parts.append(tag("h3", "Answers by kind"))
        parts.append(table(head, cells, numbers=(1, 2, 3, 4, 5)))
    return section("Scores", *parts, lead="On text and questions that were held out. Lower bits per byte are better.")


def _scored_on(run: Run) -> str:
    told = []
    n_bytes, n_documents = (number(dig(run.scores, "model", name)) for name in ("bytes", "documents"))
    if n_bytes is not None and n_documents is not None:
        told.append(f"Scored on {words.size(n_bytes)} in {words.exact(int(n_documents))} held-out documents.")
    kind, learned = dig(run.scores, "baseline", "kind"), number(dig(run.scores, "baseline", "trained_on", "tokens"))
    if isinstance(kind, str) and learned is not None:
        whole = dig(run.scores, "baseline", "trained_on", "all_of_the_training_text") is True
        told.append(
            f"The n-grams ({kind}) counted {words.exact(int(learned))} tokens, "
            + ("exactly the text the model was trained on." if whole else "a part of the model's training text.")
        )
    if run.path.joinpath("tune").is_dir():
        told.append("The text is scored with the model as it was before tuning.")
    return " ".join(told)


def _order(order: int) -> str:
    return {1: "single tokens", 2: "bigram", 3: "trigram"}.get(order, f"{order}-gram")


def _answer_row(name: str, figures: Mapping[str, Any]) -> tuple[object, ...]:
    shares = [_shown(figures, n, lambda v: words.percent(v, 1)) for n in ("exact_match", "majority_exact_match")]
    stopped = _shown(figures, "stopped_by_itself", lambda v: words.percent(v, 1))
    asked = _shown(figures, "questions", lambda v: words.exact(int(v)))
    return (name, asked, shares[0], interval(figures), shares[1], stopped)


def interval(figures: Any) -> str:
    """The 95% interval of a share of right answers, "" if unknown."""
    low, high = (number(dig(figures, "interval_95", i)) for i in (0, 1))
    return f"{words.percent(low)} to {words.percent(high)}" if low is not None and high is not None else ""


def curves(drawn: Mapping[str, Sequence[plots.Plot]]) -> Html:
    """The drawings of each training stage."""
    parts = []
    for stage, several in drawn.items():
        if several:
            parts.append(tag("h3", TITLES[stage]))
            parts.append(tag("div", *(tag("figure", Html(plot.svg)) for plot in several), class_="plots"))
    return section("Curves", *parts)


def samples(run: Run) -> Html:
    """What the model wrote at points of its training."""
    parts = []
    for stage in TRAINING:
        rows = [row for row in run.training[stage].samples if isinstance(row.get("text"), str)]
        if not rows:
            continue
        by_prompt: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_prompt.setdefault(str(row.get("prompt") or ""), []).append(row)
        blocks = []
        for prompt, several in by_prompt.items():
            items = [
                tag(
                    "li", tag("span", f"step {row['step']:,.0f}", class_="step"), _continued(stage, prompt, row["text"])
                )
                for row in _spread(several, 6)
            ]
            asked = tag("p", tag("span", "asked" if stage == "tune" else "begun with", class_="label"), f" {prompt}")
            blocks.append(tag("div", asked, tag("ol", *items), class_="samples"))
        parts += [tag("h3", TITLES[stage]), *blocks]
    return section("Samples through training", *parts, lead="The same beginnings, continued greedily as it learned.")


def _continued(stage: str, prompt: str, text: str) -> Html:
    said = _cut(text.strip() if stage == "tune" else text, SAMPLE_CHARACTERS)
    said = said if text.strip() else tag("em", " (nothing)")
    return tag("p", None if stage == "tune" else tag("span", prompt, class_="prompt"), said)


def _spread(rows: Sequence[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """At most ``n`` of ``rows``, evenly, with the first and the last."""
    if len(rows) <= n:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (n - 1))] for i in range(n)]


def _work(run: Run, stage: str) -> str:
    learnt = {"labelled": "learn the classes", "tagged": "learn the tags", "pairs": "learn to write for a source"}
    return learnt.get(run.told or "", STAGE_WORK[stage]) if stage == "tune" else STAGE_WORK.get(stage, "")


def timeline(run: Run) -> Html:
    """Each stage with its seconds, as bars of one scale."""
    known = [(stage, seconds) for stage in run.planned() if (seconds := run.seconds(stage)) is not None]
    longest = max((seconds for _, seconds in known), default=0.0)
    rows = []
    for stage, seconds in known:
        open_ = "" if stage in run.stages else " so far"
        bar = tag("span", class_="bar own", style=f"width:{100 * seconds / longest if longest else 0:.1f}%")
        rows.append(
            (
                tag("span", tag("strong", stage), tag("small", _work(run, stage)), class_="stage"),
                tag("span", bar, class_="track"),
                words.duration(seconds) + open_,
            )
        )
    return section("What happened", table((), rows, numbers=(2,), class_="timeline") if rows else Html(""))


def data(run: Run) -> Html:
    """What was read, what stayed, what went and why."""
    report = run.data
    if number(report.get("documents")) is None:
        return Html("")
    rows: list[tuple[object, object]] = []
    sources = report.get("sources")
    if isinstance(sources, list):
        rows.append(("sources", ", ".join(map(str, sources))))
    for label, prefix in (("read", ""), ("kept", "kept_")):
        rows.append((label, _amount(report, f"{prefix}documents", f"{prefix}bytes")))
    for split, label in (("train", "to learn from"), ("valid", "held out")):
        counts = dig(report, "splits", split)
        if number(dig(counts, "documents")) is not None:
            tokens = number(run.shards[split].get("n_tokens"))
            more = f", {words.exact(int(tokens))} tokens" if tokens is not None else ""
            rows.append((label, _amount(counts, "documents", "bytes") + more))
    if number(report.get("repaired")):
        rows.append(("Unicode repaired", f"{report['repaired']:,} documents"))
    removed = report.get("removed")
    removed = removed if isinstance(removed, dict) else {}
    reasons = [
        (str(k).replace("_", " "), v) for k, v in removed.items() if isinstance(v, dict) and number(v.get("documents"))
    ]
    reasons.sort(key=lambda item: -item[1]["documents"])
    return section("Data", pairs(rows), *(_removed(reason, entry) for reason, entry in reasons))


def _removed(reason: str, entry: Mapping[str, Any]) -> Html:
    items = []
    for example in objects(entry.get("examples")):
        place = f"{example.get('source', '')}:{example['line']}" if example.get("line") else example.get("source", "")
        detail = f" ({example['detail']})" if example.get("detail") else ""
        excerpt = str(example.get("excerpt") or "")
        items.append(tag("li", tag("small", f"{place}{detail}"), tag("p", _cut(excerpt, 240)) if excerpt else None))
    summary = tag("summary", tag("strong", reason), f"  left out {_amount(entry, 'documents', 'bytes')}")
    return tag("details", summary, tag("ul", *items, class_="excerpts"))


def _amount(counts: Mapping[str, Any], documents: str, n_bytes: str) -> str:
    n, size = number(counts.get(documents)), number(counts.get(n_bytes))
    told = f"{n:,.0f} document{'s' * (n != 1)}" if n is not None else ""
    return ", ".join(filter(None, (told, words.size(size) if size is not None else "")))


def tokenizer(run: Run) -> Html:
    """The vocabulary, and how it cuts text."""
    made = run.tokenizer
    if made is None:
        return Html("")
    kind = dig(run.recipe, "tokenizer", "kind")
    rows: list[tuple[object, object]] = [("kind", kind)] if isinstance(kind, str) else []
    rows.append(("vocabulary", f"{words.exact(made.vocab_size)} tokens"))
    tokens, n_bytes, n = (number(run.shards["train"].get(k)) for k in ("n_tokens", "n_bytes", "n_documents"))
    if tokens is not None and n_bytes is not None and n is not None and tokens > 2 * n:
        rows.append(("bytes per token", f"{n_bytes / (tokens - 2 * n):.2f} on the training text"))
    parts = [pairs(rows)]
    text = _last_text(run)
    if text:
        ids = made.encode(words.printable(text))[:SPANS]
        parts.append(tag("h3", "How it cuts text"))
        parts.append(tag("p", *(_span(made.token_bytes(id), i) for i, id in enumerate(ids)), class_="tokens"))
    longest = sorted(_pieces(made), key=lambda piece: (-len(piece), piece))[:PIECES]
    if longest:
        parts.append(tag("h3", "Longest tokens"))
        parts.append(tag("p", *(_span(piece.encode(), i) for i, piece in enumerate(longest)), class_="tokens apart"))
    return section("Tokenizer", *parts)


def _last_text(run: Run) -> str:
    for stage in TRAINING:
        for row in reversed(run.training[stage].samples):
            if isinstance(row.get("text"), str) and row["text"].strip():
                return str(row.get("prompt") or "") + (" " if stage == "tune" else "") + row["text"]
    return ""


def _pieces(made: Any) -> Iterator[str]:
    for id in range(made.vocab_size):
        raw = made.token_bytes(id)
        try:
            piece = raw.decode()
        except UnicodeDecodeError:
            continue
        if any(char.isalnum() for char in piece):
            yield piece


def _span(raw: bytes, i: int) -> Html:
    try:
        shown = raw.decode()
    except UnicodeDecodeError:
        shown = f"⟨{raw.hex(' ').upper()}⟩"
    breaks = Html("<br>") if shown.endswith("\n") else None
    shown = shown.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "\u00a0")
    # The zero-width space lets a browser break the line between two tokens.
    return join((tag("span", shown, class_=f"token t{i % 5}"), Html("&#8203;"), breaks))


def model(run: Run) -> Html:
    """Configuration and size."""
    rows: list[tuple[object, object]] = []
    if run.parameters is not None:
        rows.append(("parameters", words.exact(run.parameters)))
    for stage in reversed(TRAINING):
        flops = number(dig(run.stages, stage, "train_flops_per_token"))
        if flops is not None:
            rows.append(("operations per trained token", f"{words.count(flops)} FLOP"))
            break
    for name, shown in (("entries", words.exact), ("bytes", words.size)):
        if (value := number(dig(run.stages, "count", name))) is not None:
            rows.append(({"entries": "n-grams", "bytes": "arrays on disk"}[name], shown(int(value))))
    if run.state_bytes is not None:
        rows.append(("decode state of a full context", words.size(run.state_bytes)))
    for stage in TRAINING:
        mfu = [value for row in run.training[stage].train if (value := number(row.get("mfu"))) is not None]
        if mfu:
            rows.append((f"MFU, {TITLES[stage].lower()}, median", words.percent(median(mfu), 1)))
    # A recipe gives null to what the model works out by itself; what is off would only hide what is on.
    settings = [(key, value) for key, value in flat(run.recipe.get("model")) if value or value == []]
    rows += [(tag("code", key), shown_value(value)) for key, value in settings]
    more = tag("p", "Settings that are off are not listed.", class_="remark") if settings else None
    return section("Model", pairs(rows), more) if rows else Html("")


def machine(run: Run) -> Html:
    """Versions and machine, and the whole recipe."""
    rows = [(key, shown_value(value)) for key, value in run.environment.items() if value not in (None, [], "")]
    if run.peak_memory is not None:
        rows.append(("peak memory", words.size(run.peak_memory)))
    parts = [pairs(rows)] if rows else []
    recipe = list(flat({key: value for key, value in run.recipe.items() if key != "model"}))
    if recipe:
        listing = pairs([(tag("code", key), shown_value(value)) for key, value in recipe])
        parts.append(tag("details", tag("summary", "All settings of this run"), listing))
    return section("Environment", *parts)


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{key}.{i}")
    elif key:
        yield key, value


def shown_value(value: object) -> str:
    """A setting as people read it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return words.exact(value) if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _shown(figures: Any, name: str, show: Any) -> str:
    value = number(dig(figures, name))
    return "" if value is None else show(value)


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else text[:n].rstrip() + " …"
