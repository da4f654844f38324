"""Stopping on request: Ctrl-C, SIGTERM and the time limit become one question that loops ask.

    with StopSignal("50m") as stop:
        for batch in source:
            ...
            if stop.requested:
                save(); raise StopRequested(stop.reason, ...)

The first request lets the step finish, so that it is saved and the run exits 75. Work that leaves nothing half
done may be broken off where it stands (``at_once``), and a step that takes too long is given up (``overdue``). A
second Ctrl-C within five seconds ends the process at once, also while it is inside a long call; files are written
aside and renamed, so none is left half-written.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from octavo.errors import ConfigError, StopRequested

SECOND_WITHIN_SECONDS = 5.0
PATIENCE_SECONDS = 4.0
EXIT_AT_ONCE = 130
UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str | float) -> float:
    """Seconds of ``90``, ``"90s"``, ``"50m"``, ``"2h"``, ``"1h30m"`` or ``"1.5h"``.

    Raises:
        ConfigError: it is none of these, or not more than zero.
    """
    seconds = 0.0
    if isinstance(text, str):
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text.strip().lower())
        if "".join(number + unit for number, unit in parts) == text.strip().lower():
            seconds = sum(float(number) * UNIT_SECONDS[unit] for number, unit in parts)
        elif re.fullmatch(r"\d+(\.\d+)?", text.strip()):
            seconds = float(text)
    else:
        seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{text!r} is not a length of time", fix="write it like 90s, 50m, 2h or 1h30m")
    return seconds


class StopSignal:
    """Asks a run to stop; install it with ``with``, poll ``requested`` in every loop that can be long.

    Outside the main thread, where Python allows no signal handlers, only the time limit works.

    Args:
        max_time: the time limit from now, as ``parse_duration`` reads it; None for none.
        notify: is given one line for the user when a signal arrives; the default writes to stderr. It may be changed.
        clock: seconds from any fixed moment.
    """

    def __init__(
        self,
        max_time: str | float | None = None,
        *,
        notify: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._clock = clock
        self.notify = notify or _to_stderr
        self._limit = max_time
        self._deadline = None if max_time is None else clock() + parse_duration(max_time)
        self._signal = ""
        self._asked_at: float | None = None
        self._interrupted_at: float | None = None
        self._at_once = False
        self._previous: dict[int, Any] = {}
        self._watcher: _Watcher | None = None

    @property
    def requested(self) -> bool:
        """Whether to stop at the next place where nothing is lost."""
        return bool(self.reason)

    @property
    def reason(self) -> str:
        """Why, in words for the last line of the run; empty while there is none."""
        if self._signal:
            return self._signal
        if self._deadline is not None and self._clock() >= self._deadline:
            return f"the time limit of {self._limit} is reached"
        return ""

    @property
    def seconds_left(self) -> float:
        """Until the time limit; infinite without one, 0 after it."""
        return float("inf") if self._deadline is None else max(0.0, self._deadline - self._clock())

    @property
    def overdue(self) -> bool:
        """Whether the request is so old that a step should rather be given up than finished."""
        asked = self._asked_at if self._asked_at is not None else self._deadline
        return asked is not None and self._clock() - asked >= PATIENCE_SECONDS

    def check(self, where: str = "") -> None:
        """For work that is done again on resume.

        Raises:
            StopRequested: it was asked to stop.
        """
        if self.requested:
            raise StopRequested(f"{self.reason}{where and ', '}{where}")

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises StopRequested wherever the main thread is: for long work that leaves nothing
        half done."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
            if self._clock is time.monotonic:  # a clock of somebody else's is asked in the main thread alone
                self._watcher = _Watcher()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
        for number, previous in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self._asked_at is None:
            self._asked_at = now
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at <= SECOND_WITHIN_SECONDS:
                _end_now()
            self._interrupted_at = now
        self._signal = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        line = f"{self._signal}: stopping after this step. Ctrl-C within 5 seconds stops at once."
        try:
            self.notify(line)
        except RuntimeError:  # it writes to the buffered stream whose write this signal interrupted
            _to_stderr(line)
        if self._at_once:
            self._at_once = False  # once: what cleans up after it is not broken off
            raise StopRequested(self._signal)


class _Watcher:
    """A thread that hears of signals at once, also while the main thread is inside a call that takes long.

    Python runs a signal's handler between two instructions of the main thread; a backward pass is one instruction.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="octavo-signals", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        interrupted_at: float | None = None
        while numbers := self._reader.recv(64):
            for _ in range(numbers.count(signal.SIGINT)):
                now = time.monotonic()
                if interrupted_at is not None and now - interrupted_at <= SECOND_WITHIN_SECONDS:
                    _end_now()
                interrupted_at = now

    def close(self) -> None:
        signal.set_wakeup_fd(self._previous)
        self._writer.close()
        self._thread.join()
        self._reader.close()


def _hear_no_more() -> None:
    """In a forked child: its signals are not those of the process that watches."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_hear_no_more)


def _to_stderr(line: str) -> None:
    # print() may be what the signal interrupted, and it cannot be entered twice.
    os.write(2, f"\n{line}\n".encode())


def _end_now() -> None:
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()
    os._exit(EXIT_AT_ONCE)
