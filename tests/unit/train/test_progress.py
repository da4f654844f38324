"""Rates and times against a clock set by hand; what is written, read back as text and on a small terminal."""

import io
import re
from typing import Any

import pytest

from octavo.training import progress
from octavo.training.progress import Console, Progress


class Clock:
    """A clock that goes on only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def console(mode: Any = "plain", width: int = 100, **more: Any) -> tuple[Console, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return Console(mode, stream=out, width=width, clock=clock, **more), out, clock


def screen(written: str) -> list[str]:
    """The rows of a terminal after ``written``: the few movements the console uses, nothing else allowed."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif part.endswith("A") and part[0] == "\x1b":
            row -= int(part[2:-1])
            assert row >= 0
        elif part == "\x1b[K":
            rows[row] = rows[row][:column]
        elif part == "\x1b[J":
            rows[row] = rows[row][:column]
            del rows[row + 1 :]
        elif part[0] == "\x1b":
            assert part.endswith("m"), f"{part!r} is not a colour"
        else:
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
            column += len(part)
    return rows


def test_the_first_update_is_not_counted_as_speed():
    clock = Clock()
    work = Progress(100, "step", clock=clock)
    clock.now += 60  # compiling
    work.update()
    assert work.rate is None and work.seconds_left is None
    for _ in range(10):
        clock.now += 2
        work.update()
    assert work.rate == pytest.approx(0.5)
    assert work.seconds_left == pytest.approx(89 * 2)
    assert work.fraction == 0.11


def test_a_resumed_run_counts_only_its_own_speed():
    clock = Clock()
    work = Progress(1000, "step", done=900, clock=clock)
    work.update()
    clock.now += 10
    work.update(9)
    assert work.done == 910
    assert work.seconds_left == pytest.approx(100)


def test_the_estimate_follows_a_change_without_jumping():
    clock = Clock()
    work = Progress(10_000, "step", clock=clock)
    for _ in range(101):
        clock.now += 1
        work.update()
    before = work.rate
    clock.now += 5  # one slow step
    work.update()
    assert before == pytest.approx(1)
    assert work.rate == pytest.approx(1, rel=0.2)
    for _ in range(200):
        clock.now += 2  # twice as slow from now on
        work.update()
    assert work.rate == pytest.approx(0.5, rel=0.1)


def test_no_total_no_time_left_and_too_much_work_is_all_of_it():
    clock = Clock()
    work = Progress(None, "document", clock=clock)
    work.update(5)
    assert work.fraction is None and work.seconds_left is None
    over = Progress(3, "step", clock=clock)
    over.update(5)
    assert over.fraction == 1.0 and over.seconds_left == 0.0
    assert Progress(0, "step").fraction == 1.0


def test_plain_lines_come_once_an_interval_and_at_the_end():
    talk, out, clock = console(interval_seconds=10)
    with talk.bar(60, "step") as bar:
        for _ in range(60):
            clock.now += 1
            bar.update(1, loss=3.21987, grad_norm=0.5, lr=6e-4, mfu=0.384, tokens_per_second=12_345.0)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("    1/60 steps | 1% | time left ?")
    assert lines[1] == (
        "    11/60 steps | 18% | 49 s left | 12.3k tokens/s | loss 3.220 | grad 0.50 | lr 6.00e-04 | MFU 38%"
    )
    assert lines[-1].startswith("    60/60 steps | 1m 00s | 12.3k tokens/s | loss 3.220")
    assert len(lines) == 7
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


def test_a_plain_line_is_not_cut_at_the_width():
    talk, out, _ = console(width=40)
    with talk.bar(60, "step", "pretrain") as bar:
        bar.update(1, loss=1.0, grad_norm=1.0, lr=1e-3, mfu=0.5, extra_figure=3.0)
    assert out.getvalue().splitlines()[0].endswith("extra_figure 3")


@pytest.mark.parametrize("width", [30, 60, 100])
def test_the_live_line_fits_the_terminal_and_leaves_one_copy(width):
    talk, out, clock = console("live", width)
    with talk.stage("pretrain", 4, 6), talk.bar(3000, "step") as bar:
        for _ in range(3000):
            clock.now += 0.2
            bar.update(1, loss=3.2, grad_norm=0.5, lr=6e-4, mfu=0.38, tokens_per_second=12_345.0)
            rows = screen(out.getvalue()) if bar.progress.done % 997 == 0 else []
            assert all(len(row) < width for row in rows)
        talk.note("saved")
    rows = [row for row in screen(out.getvalue()) if row]
    assert rows[0] == "4/6 pretrain"
    assert [row for row in rows if "3,000/3,000 steps" in row] == rows[2:3]
    assert rows[1] == "    saved"
    assert rows[3].startswith("    loss 3.200")
    assert rows[4] == "    ✓ 10m 00s" and len(rows) == 5


def test_the_live_line_is_drawn_at_most_ten_times_a_second():
    talk, out, clock = console("live")
    with talk.bar(1000, "step") as bar:
        for _ in range(1000):
            clock.now += 0.001
            bar.update()
    assert out.getvalue().count("left") <= 12
    assert "\x1b[?25" not in out.getvalue()  # the cursor is never hidden: a killed run must not keep it


def test_two_bars_and_lines_above_them():
    talk, out, clock = console("live", 80)
    first, second = talk.bar(10, "document", "read"), talk.bar(None, "byte", "write")
    for _ in range(3):
        clock.now += 1
        first.update()
        second.update(4096)
        talk.note(f"line {first.progress.done}")
    rows = [row.strip() for row in screen(out.getvalue()) if row]
    assert rows[:3] == ["line 1", "line 2", "line 3"]
    assert rows[3].startswith("read") and rows[4].startswith("write") and len(rows) == 5
    assert "4.0 KiB/s" in rows[4]


def test_a_stage_that_fails_says_so_and_closes_its_bars():
    talk, out, _ = console()
    with pytest.raises(KeyError), talk.stage("data", 1, 6, "read"):
        bar = talk.bar(5, "document")
        raise KeyError("x")
    assert bar.closed
    assert talk.stages == [("data", 0.0, "stopped")]
    assert "1/6 data  read" in out.getvalue() and "stopped" in out.getvalue()


def test_validation_says_when_it_is_the_best_of_its_stage():
    talk, out, _ = console()
    with talk.stage("pretrain", 1, 2):
        for step, bits in ((100, 2.0), (200, 1.5), (300, float("nan")), (400, 1.6)):
            talk.valid(step, loss=bits * 2, bits_per_byte=bits)
    with talk.stage("tune", 2, 2):
        talk.valid(10, loss=5.0)
    lines = [line for line in out.getvalue().splitlines() if "valid" in line]
    assert [line.endswith("best so far") for line in lines] == [False, True, False, False, False]
    assert lines[1].strip() == "valid  step 200  loss 3.000  bits/byte 1.500  best so far"


def test_samples_are_indented_cut_and_cannot_steer_the_terminal():
    talk, out, _ = console("live", 60)
    talk.sample(" upon\x1b[2J\x07 [red]a[/red]\rtime\u202e" + "\nline" * 30, prompt="Once", step=7)
    rows = screen(out.getvalue())
    assert rows[0] == "    sample  step 7"
    assert rows[1] == "    │ Once upon␛[2J␇ [red]a[/red]␍time\ufffd"
    assert rows[-2] == "    │ (21 more lines)"
    assert all(row.startswith("    │ ") for row in rows[1:-1])


def test_wide_characters_are_counted_by_their_width():
    talk, out, _ = console("plain", 60)
    talk.sample("春眠不觉晓处处闻啼鸟" * 8)
    from rich.cells import cell_len

    assert max(cell_len(line) for line in out.getvalue().splitlines()) <= 60
    assert "".join(line[6:] for line in out.getvalue().splitlines()) == "春眠不觉晓处处闻啼鸟" * 8


def test_quiet_says_warnings_only():
    talk, out, _ = console("quiet")
    with talk.stage("data", 1, 1), talk.bar(3, "step") as bar:
        bar.update(3)
        talk.note("x")
        talk.sample("x")
        talk.valid(1, loss=1.0)
        talk.warn("no C++ compiler")
    talk.kept("tokenizer", 2, 2)
    talk.summary({"x": "y"})
    assert out.getvalue() == "    warning: no C++ compiler\n"


def test_summary_has_every_stage_the_whole_and_the_figures():
    talk, out, clock = console()
    for name, seconds in (("data", 10), ("pretrain", 90)):
        with talk.stage(name, 1, 3):
            clock.now += seconds
    talk.kept("tokenizer", 3, 3)
    out.truncate(0)
    talk.summary({"bits-per-byte": "1.43"})
    rows = [line.split() for line in out.getvalue().strip("\0\n ").splitlines()]
    assert ["data", "10", "s", "━━"] in rows and ["pretrain", "1m", "30s", "━" * 20] in rows
    assert ["tokenizer", "kept"] in rows and ["in", "all", "1m", "40s"] in rows
    assert rows[-1] == ["bits-per-byte", "1.43"]


def test_auto_is_live_only_on_a_terminal_outside_ci(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Console(stream=Terminal()).mode == "live"
    assert Console(stream=io.StringIO()).mode == "plain"
    monkeypatch.setenv("TERM", "dumb")
    assert Console(stream=Terminal()).mode == "plain"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("CI", "1")
    assert Console(stream=Terminal()).mode == "plain"


def test_a_stream_that_knows_only_ascii_gets_ascii():
    raw = io.BytesIO()
    talk = Console("plain", stream=io.TextIOWrapper(raw, encoding="ascii"), width=60)
    with talk.stage("data", 1, 1):
        talk.sample("春 text")
    talk.summary({"a": "b"})
    assert raw.getvalue().decode("ascii").count("| ? text") == 1


def test_a_terminal_that_goes_away_does_not_end_the_work():
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(5, "Input/output error")

    talk = Console("live", stream=Gone(), width=80)
    with talk.stage("pretrain", 1, 1), talk.bar(3, "step") as bar:
        for _ in range(3):
            bar.update()
        talk.warn("still here")
    assert bar.progress.done == 3 and talk.mode == "quiet"


def test_figures_of_any_kind_are_shown_and_taken_back():
    talk, _, _ = console()
    bar = talk.bar(10, "step")
    bar.update(1, loss=float("nan"), grad_norm=12_345.0, mfu=0.0123, reward=0.25)
    assert bar.parts()[1] == ["loss nan", "grad 1.2e+04", "MFU 1.2%", "reward 0.25"]
    bar.update(1, mfu=None, reward=None)
    assert bar.parts()[1] == ["loss nan", "grad 1.2e+04"]


@pytest.mark.parametrize(
    ("unit", "rate", "text"),
    [("step", 12.0, "12 steps/s"), ("step", 0.25, "4.0 s/step"), ("entry", 2.0, "2 entries/s")],
)
def test_rates_are_read_the_right_way_round(unit, rate, text):
    assert progress._rate(rate, unit) == text


def test_no_thread_is_started():
    import threading

    before = threading.active_count()
    talk, _, _ = console("live")
    with talk.bar(3, "step") as bar:
        bar.update()
        assert threading.active_count() == before


def test_a_warning_that_names_its_kind_is_not_called_one_twice():
    stream = io.StringIO()
    console = Console("plain", stream=stream, width=100)
    console.warn("warning[CHECKPOINT]: step 3 is damaged")
    console.warn("slower")
    assert stream.getvalue().split("\n")[:2] == ["    warning[CHECKPOINT]: step 3 is damaged", "    warning: slower"]
