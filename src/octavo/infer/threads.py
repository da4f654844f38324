"""Torch's threads between two native steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FEW = 1 << 20
"""Numbers for which a second thread saves less than it costs."""


@contextmanager
def one_thread(n: int) -> Iterator[None]:
    """Operations on ``n`` numbers use this thread alone, if they are few.

    Torch's other threads do not sleep after an operation that used them: they try for some milliseconds whether there
    is another, on the cores that the native step needs next. What is chosen from a hundred thousand logits is known in
    less than one. (A thread whose first operation of all falls into this moment keeps to itself as well.)
    """
    before = torch.get_num_threads()
    if n > FEW or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
