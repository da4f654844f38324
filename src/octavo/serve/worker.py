"""The one thread that runs the model, and the short queue before it.

A request is admitted (or told to come back), prepared off the event loop, and then decoded here, one request
after the other. It can be stopped between any two passes of the model: when its client has left, when the
client does not read, when the server goes down. A request that fails takes nothing else with it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from octavo.serve.refusal import ApiError

if TYPE_CHECKING:
    from octavo.infer.text import Piece
    from octavo.infer.sampling import SamplingConfig
    from octavo.tokenizer import Tokenizer

FAILURES_UNTIL_NOT_READY = 3
STUCK_SECONDS = 60.0

log = logging.getLogger("octavo.serve")


class Stopped(Exception):
    """Raised inside the model call of a job that nobody waits for any more."""


class Job:
    """One admitted request: what to decode, and the way its pieces take back to the event loop."""

    def __init__(self, worker: Worker, request_id: str):
        self.worker, self.id = worker, request_id
        self.prompts: Sequence[Sequence[int]] = ()
        self.config: SamplingConfig | None = None
        self.n_top: int | None = None
        self.stopped = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | ApiError | None] = asyncio.Queue()
        self._finished = False

    def start(self, prompts: Sequence[Sequence[int]], config: SamplingConfig, n_top: int | None) -> None:
        """Queue it for decoding."""
        self.prompts, self.config, self.n_top = prompts, config, n_top
        self.worker.jobs.put(self)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces as they come; ends early if the job was stopped without an error.

        Raises:
            ApiError: the model failed on this request, or the server goes down.
        """
        while (item := await self._pieces.get()) is not None:
            if isinstance(item, ApiError):
                raise item
            yield item

    def stop(self, error: ApiError | None = None) -> None:
        """Stop decoding before the next pass; whoever reads the pieces gets ``error`` or the end."""
        if not self.stopped.is_set():
            self.stopped.set()
            self._pieces.put_nowait(error)

    def close(self) -> None:
        """The answer is out, or given up: stop, and free the place in the queue."""
        self.stop()
        if not self._finished:
            self._finished = True
            self.worker.open_jobs.discard(self)

    def send(self, item: Piece | ApiError | None) -> None:
        """From the worker's thread to the event loop."""
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, item)
        except RuntimeError:  # the loop has closed: the server is gone and so is the client
            self.stopped.set()


class Worker:
    """Decodes admitted jobs in their order.

    Args:
        max_jobs: requests accepted and not yet answered, the running one included.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, max_jobs: int):
        self.model, self.tokenizer, self.max_jobs = model, tokenizer, max_jobs
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.open_jobs: set[Job] = set()
        self.draining = False
        self.failures = 0
        self._pass_began: float | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="octavo-decode", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop every job and the thread."""
        self.stop_all()
        self.jobs.put(None)
        if self._thread is not None:
            self._thread.join(timeout=10)

    def stop_all(self) -> None:
        """Tell every open request that the server goes down."""
        self.draining = True
        for job in list(self.open_jobs):
            job.stop(ApiError(503, "The server is shutting down.", code="shutting_down"))

    def admit(self, request_id: str) -> Job:
        """A place in the queue; the caller closes the job when its answer is out.

        Raises:
            ApiError: 429 when the queue is full, 503 when the server goes down.
        """
        if self.draining:
            raise ApiError(503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "5"})
        if len(self.open_jobs) >= self.max_jobs:
            raise ApiError(
                429, "The server is busy. Try again in a second.", code="overloaded", headers={"Retry-After": "1"}
            )
        job = Job(self, request_id)
        self.open_jobs.add(job)
        return job

    def not_ready(self) -> str | None:
        """Why no work should be sent here now; None if all is well."""
        began = self._pass_began
        if self.draining:
            return "shutting down"
        if self._thread is None or not self._thread.is_alive():
            return "the decoding thread does not run"
        if self.failures >= FAILURES_UNTIL_NOT_READY:
            return f"the last {self.failures} requests failed"
        if began is not None and time.monotonic() - began > STUCK_SECONDS:
            return "a pass of the model does not end"
        return None

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                self._decode(job)
                self.failures = 0
            except Stopped:
                pass
            except Exception:
                self.failures += 1
                log.exception("request %s failed", job.id)
                job.send(ApiError(500, f"The model failed on request {job.id}; see the server's log.", code="engine"))
            finally:
                self._pass_began = None
                job.send(None)

    def _decode(self, job: Job) -> None:
        from octavo.infer.generate import pieces

        model = _Stoppable(self, job)
        for piece in pieces(model, self.tokenizer, job.prompts, job.config, on_full="stop", n_top=job.n_top):
            job.send(piece)


class _Stoppable:
    """The model as one job sees it: every pass first asks whether anybody still waits for it."""

    def __init__(self, worker: Worker, job: Job):
        self.worker, self.job, self.model = worker, job, worker.model
        self.vocab_size, self.max_seq_len = self.model.vocab_size, self.model.max_seq_len

    def new_state(self, rows: int, max_tokens: int | None = None) -> Any:
        self._check()
        return self.model.new_state(rows, max_tokens)

    def state_specs(self) -> Any:
        return self.model.state_specs()

    def __call__(self, inputs: Any, state: Any = None, needs: tuple[str, ...] = ("logits",)) -> Any:
        self._check()
        self.worker._pass_began = time.monotonic()
        return self.model(inputs, state=state, needs=needs)

    def _check(self) -> None:
        if self.job.stopped.is_set():
            raise Stopped
