import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from octavo.data.workers import ordered_map
from octavo.errors import DataError, OctavoError, ResourceError


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_tasks(workers):
    waits = [0.05 if i % 4 == 0 else 0.0 for i in range(12)]
    assert list(ordered_map(time.sleep, [(s,) for s in waits], workers)) == [None] * 12
    assert list(ordered_map(math.sqrt, ((i * i,) for i in range(50)), workers)) == list(range(50))


def test_tasks_are_taken_as_they_are_needed():
    taken = []

    def tasks():
        for i in range(1000):
            taken.append(i)
            yield (i,)

    results = ordered_map(abs, tasks(), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(taken) <= 3 + 2 * 3
    results.close()


def test_an_error_in_a_worker_is_raised_here_with_its_type():
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(divmod, [(1, 1), (1, 0), (1, 2)], 2))
    with pytest.raises(OctavoError) as caught:
        list(
            ordered_map(
                exec, [("pass",), ("from octavo.errors import *; raise DataError('x', fix='y', where='f:1')",)], 2
            )
        )
    assert isinstance(caught.value, DataError) and str(caught.value) == "error[DATA]: x (f:1). Fix: y."


def test_a_killed_worker_is_named_as_such():
    with pytest.raises(ResourceError, match="killed by signal 9"):
        list(ordered_map(exec, [("import os; os.kill(os.getpid(), 9)",)] * 2, 2))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_leave_when_the_parent_is_killed():
    script = """
    import os, time
    from octavo.data.workers import ordered_map
    results = ordered_map(os.getpid, ((),) * 1000, 2)
    print(*{next(results) for _ in range(20)}, flush=True)
    time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    children = parent.stdout.readline().split()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert children
    deadline = time.monotonic() + 20
    while any(_is_worker(pid) for pid in children):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


def _is_worker(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"octavo.data.workers" in file.read()
    except OSError:
        return False


def test_no_guard_is_needed_around_a_callers_script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("from octavo.data.workers import ordered_map\nprint(list(ordered_map(abs, [(-1,), (-2,)], 2)))\n")
    assert subprocess.run([sys.executable, str(path)], capture_output=True, text=True).stdout == "[1, 2]\n"
