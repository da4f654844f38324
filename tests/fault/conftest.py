"""Every fault test counts what it tried; ``benchmarks/reliability.py`` makes the published table of these counts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import serving
from forked_server import Parent

from octavo.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One token a byte, with a chat template."""
    return serving.chat_tokenizer()


@pytest.fixture
def live(tokenizer: Tokenizer) -> Callable[..., Any]:
    """``with live(reply=..., settings=...) as server``: a server in a thread of this process."""
    return partial(serving.live, tokenizer)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parent]:
    """``with running(forks, reply=..., settings=...) as server``: a server in a process of its own."""
    parent = Parent(tmp_path_factory.mktemp("servers"))
    yield parent
    parent.close()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """``record(id, n, failures, **facts)``: note that ``n`` faults of row ``id`` were tried, and fail if any failed.

    ``failures`` is a number, or one line for each. ``facts`` may be anything JSON can hold, such as ``seed``;
    ``seconds`` is the test's own time unless it is given. A test that cannot run here says so before it skips:
    ``record("R5", 0, 0, skipped="no tmpfs")``. One JSON object a line is appended to the file named by the
    environment variable OCTAVO_RELIABILITY, if it is set.
    """
    began = time.monotonic()

    def note(id: str, n: int, failures: int | Sequence[str], **facts: Any) -> None:
        lines = [] if isinstance(failures, int) else list(failures)
        count = failures if isinstance(failures, int) else len(lines)
        entry = {"id": id, "n": n, "failures": count, "seed": None, "seconds": round(time.monotonic() - began, 2)}
        entry |= {"test": request.node.nodeid, **facts}
        if path := os.environ.get("OCTAVO_RELIABILITY"):
            # One write at the end of the file: workers of a parallel run do not cut into each other's lines.
            with open(path, "ab", buffering=0) as file:
                file.write(json.dumps(entry).encode() + b"\n")
        shown = "".join(f"\n  {line}" for line in lines[:10])
        assert count == 0, f"{id}: {count} of {n} failed (seed {entry['seed']}){shown}"
        assert n > 0 or "skipped" in entry, f"{id}: nothing was tried"

    yield note
