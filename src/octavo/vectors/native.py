"""The inner loop in C++ (nn/kernels/word2vec.cpp), built when it is first needed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from octavo.vectors.task import Task

_POINTERS = ("input", "output", "tokens", "starts", "keep", "share", "other", "path_starts", "path_nodes", "path_signs")
_NUMBERS = ("words", "first", "last", "done", "total", "predictions")


class _Task(ctypes.Structure):
    """The fields of the kernel's Task."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("key", ctypes.c_uint64),
        *((name, ctypes.c_double) for name in ("rate", "least_rate", "loss")),
        *((name, ctypes.c_int32) for name in ("width", "window", "negative", "cbow", "whole")),
    )


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The kernel of this process, or why there is none; tried once."""
    from octavo.nn.kernels import build  # imports torch

    try:
        loaded = ctypes.CDLL(str(build.build("word2vec")))
        loaded.word2vec_train.argtypes = (ctypes.c_void_p,)
        loaded.word2vec_train.restype = None
        loaded.word2vec_size.restype = ctypes.c_int64
        if loaded.word2vec_size() != ctypes.sizeof(_Task):
            return None, "the kernel has another layout"
        return loaded, ""
    except (build.Unavailable, OSError, AttributeError) as error:
        return None, str(error)


def train(
    task: Task, epoch: int, pieces: Sequence[tuple[int, int]], pool: ThreadPoolExecutor | None = None
) -> tuple[float, int]:
    """Train on pieces (first, last) of the units of text, each in a thread of its own where a pool is given.

    Returns:
        The sum of losses, and the number of yes-or-no answers in it.
    """
    loaded = library()[0]
    assert loaded is not None
    tasks = [_as_struct(task, epoch, first, last) for first, last in pieces]
    run = map if pool is None else pool.map
    list(run(loaded.word2vec_train, [ctypes.addressof(t) for t in tasks]))
    return sum(t.loss for t in tasks), sum(t.predictions for t in tasks)


def _as_struct(task: Task, epoch: int, first: int, last: int) -> _Task:
    arrays = (task.input, task.output, task.tokens, task.starts, task.keep, task.share, task.other)
    way = (task.tree.starts, task.tree.nodes, task.tree.signs) if task.tree is not None else (None,) * 3
    pointers = [None if a is None else a.ctypes.data for a in (*arrays, *way)]
    numbers = (len(task.input), first, last, len(task.tokens) * epoch, task.total, 0)
    rates = (task.config.lr, task.config.lr_end, 0.0)
    shape = (task.input.shape[1], task.window, task.negative, int(task.cbow), int(task.whole))
    return _Task(*pointers, *numbers, task.key(epoch), *rates, *shape)
