"""Laws of sources of batches: a batch is a function of its step, so a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from octavo.laws.result import LawResult, require, verdict

Arrays = Mapping[str, np.ndarray]


def _same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def resumed(loader: Any, steps: int) -> None:
    """Asked out of order, twice, or from the middle on, every step has the batch it has in a run."""
    run = [loader.batch(step) for step in range(steps)]
    for step in [*range(steps // 2, steps), *reversed(range(steps)), 0]:
        require(_same(loader.batch(step), run[step]), f"the batch of step {step} depends on what was asked before")


def partitioned(loader: Any, steps: int) -> None:
    """The batches of all ranks, one under another, are the batch of one process."""
    rows = len(next(iter(loader.batch(0).values())))
    for world in (n for n in (2, 3, 4) if rows % n == 0):
        for step in range(steps):
            parts = [loader.batch(step, rank, world) for rank in range(world)]
            together = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            require(_same(together, loader.batch(step)), f"step {step}: {world} ranks do not make up the batch")


def shifted(loader: Any, steps: int) -> None:
    """Where a target counts it is the token after, in the same document; padding never counts."""
    for step in range(steps):
        batch = loader.batch(step)
        counted = batch["loss_mask"].astype(bool)
        require(not (counted & ~batch["valid"].astype(bool)).any(), f"step {step}: padding counts")
        here = counted[:, :-1] & (batch["doc_ids"][:, :-1] == batch["doc_ids"][:, 1:]) & batch["valid"][:, 1:]
        same = batch["targets"][:, :-1] == batch["tokens"][:, 1:]
        require(bool(same[here].all()), f"step {step}: a target is not the next token")


def epochs(loader: Any, steps: int) -> None:
    """One pass gives every row once; the next gives the same rows in another order."""
    n = loader.n_rows
    two_passes = -(-2 * n // loader.rows)
    rows = [row.tobytes() for step in range(two_passes) for row in loader.batch(step)["tokens"]][: 2 * n]
    first, second = rows[:n], rows[n:]
    require(sorted(first) == sorted(second), "the second pass does not give the rows of the first")
    require(first != second, "two passes have the same order")


def check_loader(loader: Any, steps: int = 6, *, same_rows: bool = False) -> list[LawResult]:
    """Every law of loaders.

    Args:
        loader: has ``batch(step, rank=0, world=1)``, giving numpy arrays by name, ``n_rows`` of a pass, ``rows`` of
            a step.
        steps: how many steps to look at.
        same_rows: every pass has the same rows (whole samples, not a stream that is cut anew): then ``epochs``
            is asked too.
    """
    laws = {"resumed": resumed, "partitioned": partitioned, "shifted": shifted}
    found = [verdict(name, law, loader, steps) for name, law in laws.items()]
    return [*found, verdict("epochs", epochs, loader, steps, asked=same_rows)]
