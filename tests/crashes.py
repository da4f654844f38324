"""What a disk may hold after a power cut: file operations are recorded, and replayed as a file system may keep them.

``Tape`` records what a process does to a folder. ``Disk`` makes from the recording every state that a crash may leave:

* ``killed(k)``: the process died after k operations; nothing it did is lost.
* ``journalled(k, j, tail)``: the power went after k operations. Names (files made, renamed, removed) come back in their
  order up to the jth, which is at or after the last fsync of anything; of data that no fsync covers, ``tail`` is left.
  So do ext4 and XFS.
* ``loose(k, keeps)``: only what an fsync of that very file or folder covers is sure; any of the other changes of names
  come back, in order only where they touch the same name. Weaker than any file system in common use.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Tree = dict[str, bytes | None]  # path -> content; None for a folder
TAILS = ("lost", "half", "zeros")


@dataclass(frozen=True)
class Operation:
    """One change: ``kind`` of ``path``, relative to the folder; "" is the folder itself."""

    kind: Literal["create", "mkdir", "write", "fsync", "rename", "remove"]
    path: str
    goal: str = ""
    data: bytes = b""


class Tape:
    """Records the file operations of this process below ``root`` while inside; nothing is forced to the real disk."""

    def __init__(self, root: Path):
        self.root = os.path.realpath(root)
        self.operations: list[Operation] = []
        self._open: dict[int, str] = {}

    def _inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        full = os.path.join(self._open.get(dir_fd, ""), os.fspath(path)) if dir_fd is not None else os.fspath(path)
        full = os.path.abspath(full)
        if full == self.root:
            return ""
        return os.path.relpath(full, self.root) if full.startswith(self.root + os.sep) else None

    def _note(self, kind: Any, path: str | None, goal: str | None = "", data: bytes = b"") -> None:
        if path is not None and goal is not None:
            self.operations.append(Operation(kind, path, goal, data))

    @contextlib.contextmanager
    def recording(self) -> Iterator[Tape]:
        names = ("open", "close", "write", "fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir")
        real = {name: getattr(os, name) for name in names}

        def opened(path, flags, mode=0o777, *, dir_fd=None):
            inside = self._inside(path, dir_fd)
            fresh = bool(flags & os.O_CREAT) and inside is not None and not os.path.lexists(self._full(inside))
            assert not flags & os.O_TRUNC or fresh or inside is None, "truncation is not modelled"
            descriptor = real["open"](path, flags, mode, dir_fd=dir_fd)
            if fresh:
                self._note("create", inside)
            if inside is not None:
                self._open[descriptor] = self._full(inside)
            return descriptor

        def close(descriptor):
            self._open.pop(descriptor, None)
            real["close"](descriptor)

        def write(descriptor, data):
            count = real["write"](descriptor, data)
            if descriptor in self._open:
                self._note("write", self._inside(self._open[descriptor]), data=bytes(data)[:count])
            return count

        def fsync(descriptor):
            if descriptor in self._open:
                self._note("fsync", self._inside(self._open[descriptor]))

        def mkdir(path, mode=0o777, *, dir_fd=None):
            real["mkdir"](path, mode, dir_fd=dir_fd)
            self._note("mkdir", self._inside(path, dir_fd))

        def rename(source, goal):
            real["rename"](source, goal)
            self._note("rename", self._inside(source), self._inside(goal))

        def removal(name):
            def remove(path, *, dir_fd=None):
                real[name](path, dir_fd=dir_fd)
                self._note("remove", self._inside(path, dir_fd))

            return remove

        fakes = {"open": opened, "close": close, "write": write, "fsync": fsync, "mkdir": mkdir}
        fakes |= {"rename": rename, "replace": rename} | {n: removal(n) for n in ("unlink", "remove", "rmdir")}
        for name, fake in fakes.items():
            setattr(os, name, fake)
        try:
            yield self
        finally:
            for name, function in real.items():
                setattr(os, name, function)

    def _full(self, inside: str) -> str:
        return os.path.join(self.root, inside) if inside else self.root


@dataclass
class _Event:
    """An operation in terms of things, not paths: what ``names`` say from here on, or data, or an fsync."""

    names: list[tuple[int, str, int | None]] = field(default_factory=list)  # folder, name, what it is (None: nothing)
    thing: int = -1
    data: bytes = b""
    is_fsync: bool = False


class Disk:
    """The states a crash may leave after a prefix of ``operations`` on a folder that held ``before``."""

    def __init__(self, before: Tree, operations: list[Operation]):
        self.n = len(operations)
        self._is_folder = {0: True}
        first = [Operation("mkdir" if data is None else "create", path) for path, data in sorted(before.items())]
        first += [Operation("write", path, data=data) for path, data in before.items() if data]
        self._entries: dict[tuple[int, str], int] = {}
        events = [self._event(operation) for operation in [*first, *operations]]
        self._before, self.events = events[: len(first)], events[len(first) :]

    def _at(self, path: str) -> int:
        here = 0
        for part in Path(path).parts:
            here = self._entries[here, part]
        return here

    def _place(self, path: str) -> tuple[int, str]:
        return self._at(os.path.dirname(path)), os.path.basename(path)

    def _event(self, operation: Operation) -> _Event:
        kind, path = operation.kind, operation.path
        if kind in ("write", "fsync"):
            return _Event(thing=self._at(path), data=operation.data, is_fsync=kind == "fsync")
        if kind == "rename":
            (folder, name), goal = self._place(path), self._place(operation.goal)
            self._entries[goal] = thing = self._entries.pop((folder, name))
            return _Event([(folder, name, None), (*goal, thing)])
        folder, name = self._place(path)
        if kind == "remove":
            del self._entries[folder, name]
            return _Event([(folder, name, None)])
        thing = self._entries[folder, name] = len(self._is_folder)
        self._is_folder[thing] = kind == "mkdir"
        return _Event([(folder, name, thing)])

    def _tree(self, events: list[_Event], content: Callable[[int], bytes]) -> Tree:
        entries: dict[tuple[int, str], int | None] = {}
        for event in [*self._before, *events]:
            for folder, name, thing in event.names:
                entries[folder, name] = thing
        tree: Tree = {}
        stack = [(0, "")]
        while stack:
            here, path = stack.pop()
            for (folder, name), thing in entries.items():
                if folder == here and thing is not None:
                    inner = f"{path}/{name}" if path else name
                    tree[inner] = None if self._is_folder[thing] else content(thing)
                    if self._is_folder[thing]:
                        stack.append((thing, inner))
        return tree

    def _written(self, thing: int, k: int) -> tuple[bytes, bytes]:
        """What is surely on disk of a file after k operations, and what was written since."""
        sure, since = b"".join(event.data for event in self._before if event.thing == thing), b""
        for event in self.events[:k]:
            if event.thing == thing:
                since += event.data
                if event.is_fsync:
                    sure, since = sure + since, b""
        return sure, since

    def killed(self, k: int) -> Tree:
        return self._tree(self.events[:k], lambda thing: b"".join(self._written(thing, k)))

    def barrier(self, k: int) -> int:
        """How many of the first k operations a journal has surely kept."""
        return max((i + 1 for i, event in enumerate(self.events[:k]) if event.is_fsync), default=0)

    def journalled(self, k: int, j: int, tail: str) -> Tree:
        def content(thing: int) -> bytes:
            sure, since = self._written(thing, k)
            return sure + {"lost": b"", "half": since[: len(since) // 2], "zeros": bytes(len(since))}[tail]

        return self._tree(self.events[:j], content)

    def loose(self, k: int, keeps: Callable[[int], bool], chance: random.Random) -> Tree:
        """``keeps`` says which changes of names come back where nothing makes them sure."""
        kept, blocked = [], set()
        for i, event in enumerate(self.events[:k]):
            touched = {(folder, name) for folder, name, _ in event.names}
            if self._is_sure(i, k) or (not touched & blocked and keeps(i)):
                kept.append(event)
            else:
                blocked |= touched

        def content(thing: int) -> bytes:
            sure, since = self._written(thing, k)
            length = chance.choice([0, len(since), chance.randint(0, len(since))])
            return sure + chance.choice([since[:length], bytes(length), chance.randbytes(length)])

        return self._tree(kept, content)

    def _is_sure(self, i: int, k: int) -> bool:
        synced = {event.thing for event in self.events[i + 1 : k] if event.is_fsync}
        return all(folder in synced for folder, _, _ in self.events[i].names)

    def each_reordered(self, chance: random.Random) -> Iterator[tuple[int, Tree]]:
        """States of the third kind in which one change of names alone is lost, or alone comes back."""
        for k in range(self.n + 1):
            for i in range(k):
                if not self._is_sure(i, k):
                    yield k, self.loose(k, lambda j, i=i: j != i, chance)
                    yield k, self.loose(k, lambda j, i=i: j == i, chance)

    def each_journalled(self) -> Iterator[tuple[int, Tree]]:
        """Every state of the second kind with its k."""
        for k in range(self.n + 1):
            for j in range(self.barrier(k), k + 1):
                for tail in TAILS:
                    yield k, self.journalled(k, j, tail)


def read_tree(root: Path) -> Tree:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }


def write_tree(root: Path, tree: Tree) -> None:
    root.mkdir()
    for path, data in sorted(tree.items()):
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)
