"""What the console says while long work runs: stage headings, a progress line, samples, a summary.

On a terminal the progress line is redrawn in place, at most ten times a second. Elsewhere (a pipe, a
file, CI) it becomes one plain line per interval. Nothing here uses a thread or hides the cursor, so
forked workers are safe and a killed run leaves the terminal as it was.

    console = Console()
    with console.stage("pretrain", 4, 6), console.bar(3000, "step") as bar:
        bar.update(1, loss=3.21, tokens_per_second=12_000.0)
        console.sample("and then ...", prompt="Once upon", step=100)
    console.summary({"bits-per-byte": "1.43"})
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TextIO

from octavo.report import words

if TYPE_CHECKING:
    from rich.text import Text

Mode = Literal["auto", "live", "plain", "quiet"]

INDENT = "    "
SAMPLE_LINES = 10
REDRAW_SECONDS = 0.1

# How a figure given to `Bar.update` is written, in the order of showing; unknown names come after.
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", lambda value: f"{value:.3f}"),
    "bits_per_byte": ("bits/byte", lambda value: f"{value:.3f}"),
    "grad_norm": ("grad", lambda value: f"{value:.2f}" if abs(value) < 1000 else f"{value:.1e}"),
    "lr": ("lr", lambda value: f"{value:.2e}"),
    "mfu": ("MFU", lambda value: words.percent(value, 1 if value < 0.1 else 0)),
    "max_load": ("busiest expert", lambda value: f"{value:.2f}x"),
    "dropped": ("dropped", lambda value: words.percent(value, 1)),
    "loss.balance": ("balance loss", lambda value: f"{value:.4f}"),
    "loss.router_z": ("router z", lambda value: f"{value:.4f}"),
}


class Progress:
    """Work done, its rate and the time left; no output.

    The rate is a mean over time in which the past fades with a time constant of a quarter of the time
    spent (at least 10 seconds): pauses that recur (validation, checkpoints) are counted, one slow
    moment does not make the estimate jump. The first update only starts the clock, because the first
    step of a run also compiles and fills caches.

    Args:
        total: units of work in all, None if not known.
        unit: what one unit is, in the singular: "step", "document", "token", "byte".
        done: units that an earlier, interrupted run has already finished; they never count as speed.
        clock: seconds from any fixed moment.
    """

    def __init__(
        self, total: int | None, unit: str, *, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.unit, self.done = total, unit, done
        self._clock = clock
        self._start = self._last = clock()
        self._started = False
        self._units = self._seconds = 0.0

    def update(self, n: int = 1) -> None:
        """Count ``n`` more units as done."""
        now = self._clock()
        passed, self._last = now - self._last, now
        self.done += n
        if not self._started:
            self._started = True
            return
        keep = math.exp(-passed / max(10.0, (now - self._start) / 4))
        self._units = self._units * keep + n
        self._seconds = self._seconds * keep + passed

    @property
    def elapsed(self) -> float:
        """Seconds since this object was made."""
        return self._clock() - self._start

    @property
    def rate(self) -> float | None:
        """Units a second, None before it can be known."""
        return self._units / self._seconds if self._seconds > 0 and self._units > 0 else None

    @property
    def fraction(self) -> float | None:
        """Share of the work that is done, 0 to 1, None without a total."""
        return None if self.total is None else min(1.0, self.done / self.total) if self.total > 0 else 1.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end, None before there is a rate or without a total."""
        if self.total is None:
            return None
        if self.done >= self.total:
            return 0.0
        return (self.total - self.done) / self.rate if self.rate else None


class Bar:
    """One progress line on a `Console`; made by `Console.bar`, closed by ``with`` or `close`."""

    def __init__(self, console: Console, label: str, progress: Progress) -> None:
        self.progress, self.label = progress, label
        self.figures: dict[str, float] = {}
        self.closed = False
        self._console = console
        self._shown = -math.inf

    def update(self, n: int = 1, **figures: float | None) -> None:
        """Count ``n`` more units as done and show ``figures``.

        Known figures are those of FIGURES (mfu and dropped are shares of one) and tokens_per_second,
        which is then shown as the rate. A figure stays until it is given again; None takes it away. Any
        other name is shown as it is.
        """
        self.progress.update(n)
        for name, value in figures.items():
            if value is None:
                self.figures.pop(name, None)
            else:
                self.figures[name] = float(value)
        now = self._console.clock()
        if now - self._shown >= self._console.interval_seconds:
            self._shown = now
            self._console.draw()

    def close(self) -> None:
        """Take the line off the terminal and leave its last state behind; again does nothing."""
        if not self.closed:
            self.closed = True
            self._console.drop(self)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def parts(self) -> tuple[list[str], list[str]]:
        """The texts of the line: (how far, how fast, time left) and (figures), most important first."""
        work = self.progress
        unit = work.unit if work.done == work.total == 1 else _plural(work.unit)
        far = f"{words.exact(work.done)} {unit}"
        if work.total is not None:
            far = f"{words.exact(work.done)}/{words.exact(work.total)} {unit}"
        head = [far]
        speed = self.figures.get("tokens_per_second")
        rate = f"{words.count(speed)} tokens/s" if speed is not None else ""
        if not rate and work.rate:
            rate = _rate(work.rate, work.unit)
        if self.closed:
            head += [words.duration(work.elapsed)] + [rate] * bool(rate)
        else:
            if work.total is not None:
                left = work.seconds_left
                head.append("time left ?" if left is None else f"{words.duration(left)} left")
            head += [rate] * bool(rate)
        named = [(label, show(self.figures[name])) for name, (label, show) in FIGURES.items() if name in self.figures]
        rest = [name for name in self.figures if name not in FIGURES and name != "tokens_per_second"]
        named += [(name, words.count(self.figures[name])) for name in rest]
        return head, [f"{label} {value}" for label, value in named]


class Console:
    """The one voice of a run.

    Args:
        mode: "auto" draws in place on a terminal and writes plain lines elsewhere (also when CI is set
            or TERM is dumb); "live" and "plain" force one; "quiet" writes warnings only.
        stream: where to write; standard error, so that standard output stays free for results.
        width: columns, None to ask the terminal.
        interval_seconds: time between two plain lines of one bar.
        clock: seconds from any fixed moment.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        *,
        stream: TextIO | None = None,
        width: int | None = None,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console as Rich

        out: TextIO = stream or sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - no terminal at all
        if mode == "auto":
            watched = out.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
            mode = "live" if watched else "plain"
        self.mode: Mode = mode
        self.clock = clock
        self.interval_seconds = REDRAW_SECONDS if mode == "live" else interval_seconds
        self.stages: list[tuple[str, float, str]] = []
        self._rich = Rich(
            file=io.StringIO(),
            width=width,
            highlight=False,
            markup=False,
            emoji=False,
            force_terminal=mode == "live",
            no_color=True if mode == "plain" else None,
        )
        self._stream, self._encoding = out, getattr(out, "encoding", None) or "utf-8"
        self._bars: list[Bar] = []
        self._drawn = 0
        self._best: float | None = None
        try:
            "━│✓".encode(self._encoding)
            self._unicode = True
        except UnicodeEncodeError:
            self._unicode = False

    # ---- the parts of a run

    @contextmanager
    def stage(self, name: str, i: int, n: int, detail: str = "") -> Iterator[None]:
        """Heading ``i/n name detail`` before, the time it took after; bars left open are closed."""
        began = self.clock()
        self._best = None
        self._print(
            (f"\n{i}/{n} ", "bold cyan"), (name, "bold"), (f"  {words.printable(detail)}" * bool(detail), "dim")
        )
        status = "stopped"
        try:
            yield
            status = "done"
        finally:
            for bar in list(self._bars):
                bar.close()
            seconds = self.clock() - began
            self.stages.append((name, seconds, status))
            mark = ("✓" if self._unicode else "done", "green") if status == "done" else ("stopped", "yellow")
            self._print((INDENT, ""), mark, (f" {words.duration(seconds)}", "dim"))

    def kept(self, name: str, i: int, n: int, detail: str = "finished earlier") -> None:
        """One line for a stage whose result is already in the run folder."""
        mark = "✓ " if self._unicode else ""
        self._print((f"\n{i}/{n} ", "bold cyan"), (name, "bold"), (f"  {mark}{words.printable(detail)}", "dim"))
        self.stages.append((name, 0.0, "kept"))

    def bar(self, total: int | None, unit: str, label: str = "", *, done: int = 0) -> Bar:
        """A progress line for ``total`` units of work, ``done`` of them finished by an earlier run."""
        bar = Bar(self, label, Progress(total, unit, done=done, clock=self.clock))
        self._bars.append(bar)
        return bar

    def note(self, text: str) -> None:
        """A remark, indented under the stage."""
        for line in words.printable(text).splitlines():
            self._print((INDENT + line, ""))

    def warn(self, text: str) -> None:
        """A remark that is shown in quiet mode too."""
        said = text.startswith(("warning[", "error["))  # it names its kind itself
        lead = ("", "") if said else ("warning: ", "bold yellow")
        self._print((INDENT, ""), lead, (words.printable(text), ""), always=True)

    def valid(self, step: int, **figures: float) -> None:
        """The line of a validation pass: loss, bits_per_byte; says when it is the best of the stage."""
        score = figures.get("bits_per_byte", figures.get("loss", math.nan))
        best = math.isfinite(score) and (self._best is None or score < self._best)
        texts = [f"{FIGURES[k][0] if k in FIGURES else k} {_figure(k, v)}" for k, v in figures.items()]
        self._print(
            (f"{INDENT}valid  ", "bold magenta"),
            (f"step {words.exact(step)}  ", "dim"),
            ("  ".join(texts), ""),
            ("  best so far" * (best and self._best is not None), "green"),
        )
        if best:
            self._best = score

    def sample(self, text: str, *, prompt: str = "", step: int | None = None) -> None:
        """Text from the model as an indented block, its prompt dimmed, long texts cut."""
        from rich.text import Text

        if self.mode == "quiet":
            return
        edge = f"{INDENT}{'│' if self._unicode else '|'} "
        width = max(20, self._rich.width - len(edge) - 1)
        body = Text.assemble((words.printable(prompt), "dim"), words.printable(text))
        rows = list(body.wrap(self._rich, width, tab_size=4, overflow="fold"))
        lines = []
        if step is not None:
            lines.append(Text.assemble((f"{INDENT}sample", "bold magenta"), (f"  step {words.exact(step)}", "dim")))
        lines += [Text.assemble((edge, "magenta"), row) for row in rows[:SAMPLE_LINES]]
        if len(rows) > SAMPLE_LINES:
            lines.append(Text.assemble((edge, "magenta"), (f"({len(rows) - SAMPLE_LINES} more lines)", "dim")))
        self._say(lines)

    def summary(self, figures: Mapping[str, str] | None = None, title: str = "Done") -> None:
        """The closing table: time per stage and in all, then ``figures`` (name to finished text)."""
        total = sum(seconds for _, seconds, _ in self.stages)
        rows = [(name, words.duration(s) if status == "done" else status) for name, s, status in self.stages]
        rows += [("in all", words.duration(total))] if len(rows) > 1 else []
        self._print((f"\n{title}", "bold"))
        named = [(words.printable(name), words.printable(text)) for name, text in (figures or {}).items()]
        width = max((len(name) for name, _ in rows + named), default=0)
        time_width = max((len(text) for _, text in rows), default=0)
        longest = max((seconds for _, seconds, _ in self.stages), default=0.0)
        for i, (name, text) in enumerate(rows):
            share = self.stages[i][1] / longest if i < len(self.stages) and longest > 0 else 0.0
            bar = ("━" if self._unicode else "=") * round(20 * share)
            self._print((f"{INDENT}{name:<{width}}  ", "dim"), (f"{text:>{time_width}}  ", ""), (bar, "cyan"))
        if rows and named:
            self._print(("", ""))
        for name, text in named:
            self._print((f"{INDENT}{name:<{width}}  ", "dim"), (text, "bold"))

    # ---- drawing

    def draw(self) -> None:
        """Show the newest state of the open bars now."""
        if self.mode == "plain" and self._bars:
            self._print((self._plain(self._bars[-1]), ""))
        elif self.mode == "live":
            self._say([])

    def drop(self, bar: Bar) -> None:
        """Remove a closed bar and write its last state as ordinary output."""
        from rich.text import Text

        self._bars.remove(bar)
        if self.mode != "quiet":
            self._say([Text(self._plain(bar))] if self.mode == "plain" else self._live(bar))

    def _print(self, *parts: tuple[str, str], always: bool = False) -> None:
        from rich.text import Text

        if self.mode != "quiet" or always:
            self._say([Text.assemble(*parts)])

    def _say(self, lines: list[Text]) -> None:
        # The old progress lines are overwritten, never blanked first, and everything goes out in one
        # write: so there is nothing to flicker.
        live = self.mode == "live"
        bars = [self._live(bar) for bar in self._bars] if live else []
        drawn = [line for bar in bars for line in bar]
        self._rich.file = page = io.StringIO()
        for line in lines:
            self._rich.print(line, soft_wrap=not live)
        for line in drawn:
            self._rich.print(line, no_wrap=True, overflow="crop")
        text = page.getvalue()
        if live:
            up = f"\x1b[{self._drawn}A" if self._drawn else ""
            text = "\r" + up + text.replace("\n", "\x1b[K\n") + "\x1b[J"
        self._drawn = len(drawn)
        try:
            self._stream.write(text.encode(self._encoding, "replace").decode(self._encoding))
            self._stream.flush()
        except (OSError, ValueError):
            self.mode = "quiet"  # the terminal is gone; hours of training must not end with it
            self._stream = open(os.devnull, "w")  # noqa: SIM115 - lives as long as the console

    def _plain(self, bar: Bar) -> str:
        head, figures = bar.parts()
        fraction = bar.progress.fraction
        if fraction is not None and not bar.closed:
            head.insert(1, words.percent(math.floor(fraction * 100) / 100))
        label = f"{words.printable(bar.label)} " if bar.label else ""
        return f"{INDENT}{label}{' | '.join(head + figures)}"

    def _live(self, bar: Bar) -> list[Text]:
        from rich.text import Text

        head, figures = bar.parts()
        room = self._rich.width - 1 - len(INDENT)
        label = f"{words.printable(bar.label)}  " if bar.label else ""
        while len(head) > 1 and len(label) + sum(len(part) + 2 for part in head) > room:
            head.pop()  # the rate goes first, then the time left
        told = "  ".join(head)
        first = Text(INDENT + label)
        fraction = bar.progress.fraction
        width = min(30, room - len(label) - len(told) - 2)
        if fraction is not None and not bar.closed and width >= 6:
            full, filled = ("━", "━") if self._unicode else ("=", "-")
            cells = int(width * fraction)
            first.append(full * cells, "cyan")
            first.append(filled * (width - cells), "bright_black")
            first.append("  ")
        first.append(told)
        while figures and sum(len(part) + 3 for part in figures) - 3 > room:
            figures.pop()
        return [first] + ([Text(INDENT + "   ".join(figures), "dim")] if figures else [])


def _figure(name: str, value: float) -> str:
    return FIGURES[name][1](value) if name in FIGURES else words.count(value)


def _plural(unit: str) -> str:
    return unit if unit.endswith("s") else f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s"


def _rate(per_second: float, unit: str) -> str:
    if unit == "byte":
        return f"{words.size(per_second)}/s"
    if per_second >= 1:
        return f"{words.count(per_second)} {_plural(unit)}/s"
    return f"{words.duration(1 / per_second)}/{unit}"
