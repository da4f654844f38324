"""The one thread that runs the engine, and the way of requests to it and of pieces back.

A request is admitted (or told to come back), prepared off the event loop, and then decoded here together with all
others. It can be stopped between any two steps: when its client has left, when the client does not read, when the
server goes down. A request that fails takes nothing else with it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from octavo.serve.refusal import ApiError

if TYPE_CHECKING:
    from octavo.infer.engine import Engine
    from octavo.infer.request import Failure, Request
    from octavo.infer.text import Piece

FAILURES_UNTIL_NOT_READY = 3
STUCK_SECONDS = 60.0

log = logging.getLogger("octavo.serve")


class Job:
    """One admitted request: what to decode, and the way its pieces take back to the event loop."""

    def __init__(self, worker: Worker, request_id: str):
        self.worker, self.id = worker, request_id
        self.requests: Sequence[Request] = ()
        self.left = 0
        self.stopped = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | ApiError | None] = asyncio.Queue()
        self._finished = False

    def start(self, requests: Sequence[Request]) -> None:
        """Hand it to the engine; the texts of its requests are numbered through, in their order."""
        self.requests = requests
        self.left = sum(request.n for request in requests)
        self.worker.tell(self)

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
            self.worker.tell(self)

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
    """Decodes admitted jobs together.

    Args:
        make: makes the engine; again after it has failed.
        max_jobs: requests accepted and not yet answered.
    """

    def __init__(self, make: Callable[[], Engine], max_jobs: int):
        self.make, self.max_jobs = make, max_jobs
        self.engine = make()
        self.open_jobs: set[Job] = set()
        self.draining = False
        self.failures = 0
        self._told: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._owners: dict[Request, tuple[Job, int]] = {}  # its job, and the number of its first text there
        self._step_began: float | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="octavo-decode", daemon=True)
        self._thread.start()

    def tell(self, job: Job | None) -> None:
        """Something about a job has changed: it begins, or is stopped. None: the thread ends."""
        self._told.put(job)

    def close(self) -> None:
        """Stop every job and the thread."""
        self.stop_all()
        self.tell(None)
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
        began = self._step_began
        if self.draining:
            return "shutting down"
        if self._thread is None or not self._thread.is_alive():
            return "the decoding thread does not run"
        if self.failures >= FAILURES_UNTIL_NOT_READY:
            return f"the last {self.failures} requests failed"
        if began is not None and time.monotonic() - began > STUCK_SECONDS:
            return "a step of the engine does not end"
        return None

    def _run(self) -> None:
        while self._listen():
            if not self.engine.busy:
                continue
            self._step_began = time.monotonic()
            try:
                events = self.engine.step()
            except Exception:
                log.exception("a step of the engine failed")
                self._begin_anew()
                continue
            finally:
                self._step_began = None
            for event in events:
                self._pass_on(*event)

    def _listen(self) -> bool:
        """Take what was told, waiting for it while there is nothing else to do; False when the thread is to end."""
        try:
            while True:
                job = self._told.get(block=not self.engine.busy)
                if job is None:
                    return False
                self._changed(job)
        except queue.Empty:
            return True

    def _changed(self, job: Job) -> None:
        if job.stopped.is_set():
            for request in job.requests:
                if self._owners.pop(request, None) is not None:
                    self.engine.cancel(request)
            return
        first = 0
        try:
            for request in job.requests:
                self.engine.add(request)
                self._owners[request] = (job, first)
                first += request.n
        except Exception as error:  # it was checked before: what is left is memory
            log.warning("request %s: %s", job.id, error)
            self._drop(job, ApiError(400, "The request does not fit into the server's memory.", code="too_large"))

    def _pass_on(self, request: Request, event: Piece | Failure) -> None:
        from octavo.infer.request import Failure

        owner = self._owners.get(request)
        if owner is None:
            return
        job, first = owner
        if isinstance(event, Failure):
            self.failures += 1
            log.error("request %s failed", job.id, exc_info=event.error)
            self._drop(job, _engine_error(job))
            return
        job.send(replace(event, row=first + event.row))
        if event.finish_reason is not None:
            job.left -= 1
            if not job.left:
                self.failures = 0
                self._drop(job, None)

    def _drop(self, job: Job, last: ApiError | None) -> None:
        """Nothing more is decoded for it."""
        for request in job.requests:
            if self._owners.pop(request, None) is not None:
                self.engine.cancel(request)
        if last is not None:
            job.send(last)
        job.send(None)

    def _begin_anew(self) -> None:
        """The engine itself failed: everybody in it is told so, and another takes its place."""
        self.failures += 1
        for job in {id(job): job for job, _ in self._owners.values()}.values():
            job.send(_engine_error(job))
            job.send(None)
        self._owners.clear()
        self.engine = self.make()


def _engine_error(job: Job) -> ApiError:
    return ApiError(500, f"The model failed on request {job.id}; see the server's log.", code="engine")
