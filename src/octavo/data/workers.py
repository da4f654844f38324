"""Work spread over processes, with results in the order of the tasks whatever the number of processes.

The processes are started by name (``python -m``) and not by forking or by ``multiprocessing``'s spawn, so that a
caller needs no ``if __name__ == "__main__"`` guard, inherits no locks, and may itself have threads. Each has its own
socket: when this process is killed, all of them read an end of file and leave.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from typing import Any

from octavo.errors import ResourceError

AHEAD = 2  # finished results a worker may be ahead of the oldest unfinished task


def cpu_count() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    def __init__(self, threads: int = 1) -> None:
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": str(threads),
            "FASTOKENS_BPE_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
        }
        command = [sys.executable, "-m", "octavo.data.workers", str(theirs.fileno())]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, close_fds=True
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.task = -1

    def send(self, task: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.task = task
        try:
            self.connection.send((function, arguments))
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None

    def receive(self) -> Any:
        try:
            error, result, trace = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if error is not None:
            error.add_note(f"in a worker process:\n{trace}")
            raise error
        return result

    def _died(self) -> ResourceError:
        code = self.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"left with exit code {code}"
        if code == -signal.SIGKILL:
            how += f", likely out of memory ({_peak_of_children()})"
        return ResourceError(f"a data worker process {how}", fix="use fewer workers", kept="every finished part")

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def _peak_of_children() -> str:
    """``peak 21.0 of 24.0 GiB``, of the largest child so far."""
    import resource  # not on native Windows, which is refused earlier

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"peak {peak / 2**30:.1f} of {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def elsewhere(function: Callable[..., Any], *arguments: Any, check: Callable[[], None], threads: int = 1) -> Any:
    """``function(*arguments)`` in a process of its own, which is ended if ``check`` raises: for calls into libraries
    that hear no signal.

    Args:
        function: as for ``ordered_map``.
        check: asked again and again while it runs.

    Raises:
        ResourceError: the process died.
    """
    worker = _Worker(threads)
    try:
        worker.send(0, function, arguments)
        while not wait([worker.connection], 0.05):
            check()
        return worker.receive()
    finally:
        worker.stop()


def ordered_map(
    function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], workers: int | None = None
) -> Iterator[Any]:
    """``function(*task)`` for every task, in order, with a bounded number of tasks and results in memory.

    Args:
        function: a function at the top of a module of the package, because workers import it by name.
        tasks: the arguments; taken as they are needed.
        workers: processes; as many as there are processors by default, and none (work is done here) for 1 or
            where there is a single task.

    Raises:
        ResourceError: a worker died.
    """
    workers = cpu_count() if workers is None else workers
    tasks = iter(tasks)
    head = list(islice(tasks, 2))
    tasks = chain(head, tasks)
    if workers <= 1 or len(head) < 2:
        for task in tasks:
            yield function(*task)
        return
    pool: list[_Worker] = []
    try:
        yield from _spread(function, tasks, workers, pool)
    finally:
        for worker in pool:
            worker.stop()


def _spread(
    function: Callable[..., Any], tasks: Iterator[tuple[Any, ...]], workers: int, pool: list[_Worker]
) -> Iterator[Any]:
    idle: deque[_Worker] = deque()
    busy: dict[Connection, _Worker] = {}
    done: dict[int, Any] = {}
    sent = given = 0
    exhausted = False
    while True:
        while not exhausted and sent - given < workers * (1 + AHEAD) and (idle or len(pool) < workers):
            task = next(tasks, None)
            if task is None:
                exhausted = True
                break
            if not idle:
                pool.append(_Worker())
                idle.append(pool[-1])
            worker = idle.popleft()
            worker.send(sent, function, task)
            busy[worker.connection] = worker
            sent += 1
        if given in done:
            yield done.pop(given)
            given += 1
        elif busy:
            for connection in wait(list(busy)):
                worker = busy.pop(connection)  # type: ignore[arg-type]
                done[worker.task] = worker.receive()
                idle.append(worker)
        else:
            return


def serve(descriptor: int) -> None:
    """The life of a worker process: answer tasks until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            function, arguments = connection.recv()
            try:
                answer = (None, function(*arguments), "")
            except Exception as error:
                answer = (error, None, traceback.format_exc())
            connection.send(answer)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
