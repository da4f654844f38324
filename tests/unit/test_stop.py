"""Ctrl-C, SIGTERM and the time limit."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from octavo.errors import ConfigError, StopRequested
from octavo.stop import StopSignal, parse_duration

CHILD = """
import hashlib, multiprocessing, os, sys, time
from octavo.stop import StopSignal
context = multiprocessing.get_context("fork")
worker = context.Process(target=time.sleep, args=(600,), daemon=True)
with StopSignal() as stop:
    worker.start()
    print("ready", flush=True)
    if sys.argv[1] == "inside":  # one call of a minute, in which Python hears nothing
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
    while True:
        if stop.requested and sys.argv[1] == "polite":
            worker.kill()
            sys.exit(75)
        time.sleep(0.01)
"""


@pytest.mark.parametrize(
    "text, seconds",
    [("90s", 90), ("50m", 3000), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("45", 45), (45, 45), ("1D", 86400)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "m", "50 minutes", "-5m", "0s", "5m3", "h2", "nan", float("nan"), float("inf"), 0]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ConfigError, match="not a length of time"):
        parse_duration(text)


def test_the_time_limit_is_asked_of_the_clock():
    now = [100.0]
    with StopSignal("50m", clock=lambda: now[0]) as stop:
        assert not stop.requested and stop.seconds_left == 3000
        now[0] += 2999.9
        assert not stop.requested and stop.reason == ""
        now[0] += 0.2
        assert stop.requested and stop.reason == "the time limit of 50m is reached" and stop.seconds_left == 0


def test_a_request_that_is_old_is_overdue():
    now = [100.0]
    limited = StopSignal("50m", clock=lambda: now[0])
    now[0] += 3003
    assert limited.requested and not limited.overdue
    now[0] += 2
    assert limited.overdue
    with pytest.raises(StopRequested, match="the time limit of 50m is reached, while reading") as caught:
        limited.check("while reading")
    assert caught.value.exit_code == 75
    with StopSignal(notify=lambda _: None, clock=lambda: now[0]) as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and not stop.overdue
        now[0] += 3.9
        os.kill(os.getpid(), signal.SIGTERM)  # asking again does not begin the wait anew
        now[0] += 0.2
        assert stop.overdue
    assert not StopSignal().overdue


def test_what_leaves_nothing_half_done_is_broken_off_at_once():
    reached = []
    with StopSignal(notify=lambda _: None) as stop:
        with pytest.raises(StopRequested, match="SIGTERM"), stop.at_once():
            reached.append("in")
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append("after")
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # cleaning up is not broken off
                reached.append("cleaned")
        with pytest.raises(StopRequested), stop.at_once():
            reached.append("again")
        os.kill(os.getpid(), signal.SIGTERM)
    assert reached == ["in", "cleaned"]


def test_a_signal_sets_the_flag_and_the_old_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    lines: list[str] = []
    now = [0.0]
    with StopSignal(notify=lines.append, clock=lambda: now[0]) as stop:
        assert not stop.requested and stop.seconds_left == float("inf")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.reason == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "Ctrl-C"
        now[0] = 5.1  # too late to be the second of a pair
        os.kill(os.getpid(), signal.SIGINT)
    assert len(lines) == 3 and lines[0].startswith("SIGTERM: stopping after this step")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_notice_that_cannot_be_printed_does_not_end_the_run(capfd):
    def reentered(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    with StopSignal(notify=reentered) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert "SIGTERM: stopping after this step" in capfd.readouterr().err


def test_outside_the_main_thread_only_the_time_limit_works():
    seen = []

    def work():
        with StopSignal("1h") as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def arrived(process: int, number: int) -> None:
    """Wait until a signal does not wait any more; where the system does not say, for a moment."""
    status = Path(f"/proc/{process}/status")
    if not status.exists():
        time.sleep(0.2)
        return
    while any(int(mask, 16) >> (number - 1) & 1 for mask in re.findall(r"(?:Sig|Shd)Pnd:\s*(\w+)", status.read_text())):
        time.sleep(0.01)


@pytest.mark.parametrize(
    "manner, signals, code",
    [
        ("polite", [signal.SIGINT], 75),
        ("polite", [signal.SIGTERM], 75),
        ("deaf", [signal.SIGINT, signal.SIGINT], 130),
        ("deaf", [signal.SIGTERM, signal.SIGINT, signal.SIGINT], 130),
        ("inside", [signal.SIGINT, signal.SIGINT], 130),
    ],
)
def test_first_and_second_signal_of_a_process(manner, signals, code):
    child = subprocess.Popen([sys.executable, "-c", CHILD, manner], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout and child.stderr
    assert child.stdout.readline() == b"ready\n"
    try:
        for count, number in enumerate(signals, start=1):
            child.send_signal(number)
            if manner == "inside":
                arrived(child.pid, number)  # no notice comes; a second one while this one waits would be lost
                continue
            while count < len(signals) and b"stopping after this step" not in child.stderr.readline():
                pass
        assert child.wait(timeout=60) == code
    finally:
        child.kill()
    # A worker that lives on would hold the other end of this pipe for ten minutes.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(child.stdout.read).result(timeout=60) == b""
    child.stdout.close(), child.stderr.close()
