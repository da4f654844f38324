"""The report of a run: one HTML file that opens anywhere, offline, and shows only what the run has."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from octavo.errors import ConfigError
from octavo.files import write_atomic
from octavo.report import html, labels, plots, sections, words
from octavo.report.folder import LABELLED, TRAINING, Run, dig
from octavo.report.html import Html, tag
from octavo.report.metrics import number
from octavo.report.next_step import try_command

STYLE = Path(__file__).with_name("style.css")
NO_BREAK = "\u2011"  # a hyphen that keeps "6-gram" on one line


def build(run_folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into a run folder, finished or not; returns the page's path.

    Parts that the run has no data for are left out. Text from the model or the data is escaped, and the page
    forbids scripts and any connection.

    Args:
        out: write the page there instead, and no plots.

    Raises:
        ConfigError: there is no run in this folder, or ``out`` is a file that Octavo did not write.
    """
    folder = Path(run_folder)
    if not is_run(folder):
        raise refuse(folder)
    if out is not None:
        html.check_ours(out)
    run = Run(folder)
    drawn = {
        s: plots.draw(m, stage=s, baselines=run.baselines()) for s, m in run.training.items() if m.train or m.valid
    }
    if drawn and out is None:
        plots.write([plot for several in drawn.values() for plot in several], folder / "plots")
    page = folder / "report.html" if out is None else Path(out)
    write_atomic(page, render(run, drawn))
    return page


def is_run(folder: Path) -> bool:
    """Whether this folder holds a run, however far it came."""
    return any((folder / name).exists() for name in ("recipe.yaml", "stages.json", *TRAINING))


def refuse(folder: Path) -> ConfigError:
    """The refusal of a folder that holds no run."""
    return ConfigError(f"{folder} is not a run folder", fix="give the folder of a run, such as runs/quickstart")


def render(run: Run, drawn: dict[str, list[plots.Plot]]) -> str:
    """The page's text."""
    parts = [
        sections.answers(run),
        sections.scores(run),
        labels.classes(run),
        labels.tags(run),
        labels.hidden(run),
        sections.curves(drawn),
        sections.samples(run),
        sections.timeline(run),
        sections.data(run),
        sections.tokenizer(run),
        sections.model(run),
        _go_on(run),
        sections.machine(run),
    ]
    titles = [part.partition("<h2>")[2].partition("</h2>")[0] for part in parts if part]
    links = [tag("a", Html(title), href=f"#{html.slug(title)}") for title in titles]
    return html.document(
        f"{run.name} · Octavo",
        colours() + STYLE.read_text(encoding="utf-8"),
        tag("header", tag("p", "Octavo run report", class_="kicker"), tag("h1", run.name), _sentence(run)),
        tag("main", _unfinished(run), _headline(run), tag("nav", *links) if links else None, *parts),
        tag("footer", "Written by Octavo. Every figure comes from the files of this run."),
    )


def facts(run: Run) -> list[tuple[str, str, str]]:
    """The headline figures that are known: name, value, remark."""
    found: list[tuple[str, str, str]] = []
    if run.parameters is not None:
        found.append(("parameters", words.count(run.parameters), f"{words.exact(run.parameters)} exactly"))
    if (entries := number(dig(run.stages, "count", "entries"))) is not None:
        found.append(("n-grams", words.count(entries), f"{words.exact(int(entries))} exactly"))
    seen = run.training["pretrain"].last("tokens_seen")
    if seen is not None:
        epochs = number(dig(run.stages, "pretrain", "epochs"))
        found.append(("tokens seen", words.count(seen), "" if epochs is None else f"{epochs:.2f} passes over the text"))
    times = [value for stage in run.planned() if (value := run.seconds(stage)) is not None]
    if times:
        found.append(("time", words.duration(sum(times)), "all stages so far" if _open_stages(run) else "all stages"))
    bits = run.bits_per_byte()
    if bits is not None:
        against = ", ".join(f"{name} {value:.3f}" for name, value in run.baselines().items())
        found.append(("bits per byte", f"{bits:.3f}", against or "held-out text; lower is better"))
    found += labels.facts(run)
    written, chrf = (number(dig(run.scores, "pairs", key)) for key in ("exact_match", "chrf"))
    if written is not None:
        interval = sections.interval(dig(run.scores, "pairs"))
        found.append(("pairs right", words.percent(written, 1), f"95% interval {interval}" if interval else ""))
    if chrf is not None:
        found.append(("chrF", f"{100 * chrf:.1f}", "letters shared with the targets, of 100"))
    right = number(dig(run.scores, "answers", "exact_match"))
    if right is not None:
        majority = number(dig(run.scores, "answers", "majority_exact_match"))
        interval = sections.interval(dig(run.scores, "answers"))
        told = [f"95% interval {interval}"] if interval else []
        told += [] if majority is None else [f"always the commonest answer: {words.percent(majority, 1)}"]
        found.append(("answers right", words.percent(right, 1), "; ".join(told)))
    stopped = number(dig(run.scores, "answers", "stopped_by_itself"))
    if stopped is not None:
        asked = number(dig(run.scores, "answers", "questions"))
        told = "" if asked is None else f"of {words.exact(int(asked))} answers"
        found.append(("stop by themselves", words.percent(stopped, 1), told))
    return found


def _headline(run: Run) -> Html | None:
    cards = [
        tag(
            "div",
            tag("dt", name),
            tag("dd", tag("strong", value), tag("small", remark.replace("-", NO_BREAK)) if remark else None),
        )
        for name, value, remark in facts(run)
    ]
    return tag("dl", *cards, class_="cards") if cards else None


def _sentence(run: Run) -> Html | None:
    """What this is, in one line, from what is known."""
    if run.parameters is None:
        return None
    masked = dig(run.recipe, "train", "objective", "kind") == "masked"
    how = ["trained to foretell hidden tokens" if masked else "pretrained from raw text"]
    how = how if "pretrain" in run.stages else []
    if "tune" in run.stages:
        what = {"pairs": "trained on pairs of texts", "labelled": "tuned on labelled texts", "tagged": "tuned on tags"}
        how.append(what.get(run.told or "", "tuned on conversations"))
    cpus, processor = number(run.environment.get("cpus")), run.environment.get("cpu")
    where = ""
    if cpus is not None and not run.environment.get("gpus"):
        where = f" on {cpus:.0f} CPU core{'s' * (cpus != 1)}" + (f" ({processor})" if processor else "")
    kind = "An encoder" if run.reads_both_ways else "A language model"
    what = f"{kind} of {words.count(run.parameters)} parameters"
    return tag("p", what + (", " + " and ".join(how) if how else "") + where + ".", class_="subtitle")


def _open_stages(run: Run) -> list[str]:
    return [stage for stage in run.planned() if stage not in run.stages]


def _unfinished(run: Run) -> Html | None:
    left = _open_stages(run)
    if not left:
        return None
    step = number(dig(run.training[left[0]].train, -1, "step")) if left[0] in TRAINING else None
    total = number(dig(run.recipe, "train" if left[0] == "pretrain" else "tune", "steps"))
    at = f", at step {step:,.0f}" + (f" of {total:,.0f}" if total is not None else "") if step is not None else ""
    return tag(
        "p",
        f"This run is not finished: {left[0]} is under way or was interrupted{at}. Go on with ",
        tag("code", f"octavo resume {shlex.quote(str(run.path))}"),
        class_="notice",
    )


def _go_on(run: Run) -> Html:
    where = shlex.quote(str(run.path))
    commands: list[tuple[str, str]] = []
    if _open_stages(run):
        commands.append((f"octavo resume {where}", "go on exactly where it stopped"))
    if run.model_path is not None:
        if run.writes_for_sources:
            commands.append((try_command(run), "what it writes for a source"))
            if run.told == "pairs":
                commands.append((f"octavo eval {where} --pairs more.jsonl", "score it on other pairs"))
        elif run.told in LABELLED:
            commands.append((f"octavo classify {where} texts.txt", "the class of each line, or the tag of each word"))
        elif run.reads_both_ways:
            commands.append((f"octavo embed {where} texts.txt --out vectors.npy", "a vector for each line"))
            classify = f"octavo run classifier model.path={where} 'tune.data.paths=[\"reviews.tsv\"]'"
            commands.append((classify, "teach it classes of texts"))
        else:
            if "tune" in run.stages:
                commands.append((f"octavo chat {where}", "talk to it in the terminal"))
            commands.append((f'octavo generate {where} "Once"', "let it continue a text"))
            commands.append((f"octavo serve {where}", "a web page for chat, and an OpenAI-compatible address"))
        if not (run.counted or run.writes_for_sources or run.reads_both_ways or run.told in LABELLED):
            commands.append((f"octavo tune {where} --data pairs.jsonl", "teach it your own questions and answers"))
    if not commands:
        return Html("")
    rows = [tag("div", tag("dt", tag("code", command)), tag("dd", what)) for command, what in commands]
    return html.section("Go on", tag("dl", *rows, class_="commands"))


def colours() -> str:
    """The drawings' colours on light ground; the style sheet has those for dark."""
    return ":root{" + "".join(f"--plot-{name}:{value};" for name, value in plots.COLOURS.items()) + "}\n"
