"""Named moments at which a test ends this process or makes the disk fail; nothing happens unless it is asked for.

    OCTAVO_FAILPOINT=save.rename:1:kill octavo run quickstart
    OCTAVO_FAILPOINT=save.fsync:2:eio,save.fsync:3:eio octavo run quickstart

``name:nth:action`` strikes when the moment ``name`` is reached for the nth time (from 1). Actions: ``kill``
(SIGKILL), ``raise`` (an exception no code expects), ``eio`` and ``enospc`` (the operating system's errors).
"""

from __future__ import annotations

import errno
import os
import signal

from octavo.errors import ConfigError, did_you_mean

# Each is the moment before what it names, in the order of a save, of the rotation after it, and of a start.
NAMES = (
    "save.begin",
    "save.mkdir",
    "save.file",
    "save.bytes",
    "save.fsync",
    "save.state",
    "save.manifest",
    "save.fsync_folder",
    "save.verify",
    "save.replace",
    "save.rename",
    "save.fsync_parent",
    "rotate.begin",
    "rotate.rename",
    "remove.file",
    "remove.folder",
    "recover.leftover",
    "recover.fsync",
    "recover.rename",
    "recover.damaged",
)
ACTIONS = ("kill", "raise", "eio", "enospc")

_armed: dict[tuple[str, int], str] = {}
reached: dict[str, int] = {}  # how often each was, while anything is armed


def failpoint(name: str) -> None:
    """The moment ``name``; costs a look at an empty table."""
    if _armed:
        _strike(name)


def arm(text: str) -> None:
    """Set what strikes from here on, as the environment variable does; an empty text: nothing.

    Raises:
        ConfigError: not of the form ``name:nth:action``, or a name or action that does not exist.
    """
    armed = {}
    for item in filter(None, text.split(",")):
        name, nth, action = (*item.split(":"), "", "")[:3]
        where = f"OCTAVO_FAILPOINT={text}"
        if name not in NAMES:
            raise ConfigError(f"no failpoint {name!r}", where=where, fix=did_you_mean(name, NAMES))
        if not nth.isdecimal() or int(nth) < 1 or action not in ACTIONS or item.count(":") != 2:
            raise ConfigError(
                f"{item!r} is not name:nth:action", where=where, fix=f"nth from 1, action one of {', '.join(ACTIONS)}"
            )
        armed[name, int(nth)] = action
    _armed.clear()
    _armed.update(armed)
    reached.clear()


def _strike(name: str) -> None:
    reached[name] = nth = reached.get(name, 0) + 1
    action = _armed.get((name, nth))
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise RuntimeError(f"failpoint {name}")
    elif action is not None:
        number = errno.EIO if action == "eio" else errno.ENOSPC
        raise OSError(number, os.strerror(number))


arm(os.environ.get("OCTAVO_FAILPOINT", ""))
