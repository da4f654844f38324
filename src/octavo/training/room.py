"""How much memory there is for this process, and words for when there is no more."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from octavo.errors import ResourceError

MESSAGES = ("can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory", "bad_alloc")


def available_bytes() -> int:
    """The most this process may hold, what it holds already included: free memory, its control group's limit, and
    its own limit (ulimit -v), whichever is least."""
    own = held_bytes()
    rooms = [own + free for free in (_free_memory(), _control_group_room(), _address_room()) if free is not None]
    return min(rooms, default=sys.maxsize)


def held_bytes() -> int:
    """Resident memory of this process, 0 where that is not known."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _free_memory() -> int | None:
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        found = re.search(r"^MemAvailable: +(\d+) kB", file.read(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    with contextlib.suppress(OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _control_group_room(groups: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int | None:
    """Bytes left in the tightest control group this process is in, of either version; None without a limit."""
    try:
        lines = [line.split(":", 2) for line in Path(groups).read_text().splitlines()]
    except OSError:
        return None
    rooms: list[int] = []
    for _, controllers, path in lines:
        if controllers not in ("", "memory"):
            continue
        base = Path(root) / controllers
        limit, usage = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        place = base / path.lstrip("/")
        # Inside a container the path may be the host's: what is mounted at the root is then its own group.
        for folder in (*(f for f in (place, *place.parents) if f.is_relative_to(base)), base):
            with contextlib.suppress(OSError, ValueError):
                most = int((folder / limit).read_text())
                rooms.append(most - int((folder / usage).read_text()) + _given_back(folder))
    limited = [room for room in rooms if room < 1 << 60]
    return max(0, min(limited)) if limited else None


def _given_back(folder: Path) -> int:
    """Of what a group uses, the part that is only a cache of files."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def _address_room() -> int | None:
    import resource  # not on native Windows, which is refused earlier

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
        return max(0, limit - int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    return limit


def gib(size: int) -> str:
    """``21.3 GiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory left: Python's own, or torch's in its many words."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in MESSAGES)


@contextlib.contextmanager
def told_when_it_runs_out(
    where: str, fix: str, kept: Callable[[], str] = lambda: "all finished stages"
) -> Iterator[None]:
    """Turn running out of memory into one line.

    Raises:
        ResourceError: it ran out inside.
    """
    import resource  # not on native Windows, which is refused earlier

    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not ran_out(error):
            raise
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        held = f"this process held {gib(peak)} at most"
        raise ResourceError(f"memory ran out {where}: {held}", fix=fix, kept=kept()) from error
