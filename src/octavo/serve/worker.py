"""The one thread that runs a model's engine, and the way of requests to it and of pieces back.

A request is admitted (or told to come back), prepared off the event loop, and then decoded here together with all
others. It can be stopped between any two steps: when its client has left, when the client does not read, when the
server goes down. A request that fails takes nothing else with it. Texts to embed are read in batches between steps.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from octavo.errors import ConfigError
from octavo.serve.metrics import OTHER, Meter, Metrics
from octavo.serve.refusal import ApiError

if TYPE_CHECKING:
    from octavo.infer.engine import Engine
    from octavo.infer.request import Failure, Request
    from octavo.infer.text import Piece

FAILURES_UNTIL_NOT_READY = 3
STUCK_SECONDS = 60.0
RETRY_SECONDS = 5.0
"""Between two trials of a model that does not work."""

TOGETHER_SECONDS = 0.02
"""A text's tokens go out with those of so long a time: a write for each costs more than making it, and no eye sees the
difference. The first one and the last do not wait."""

TOTALS = {
    "preempted": "octavo_preempted_total",
    "tokens_shared": "octavo_shared_tokens_total",
    "tokens_drafted": "octavo_drafted_tokens_total",
    "tokens_accepted": "octavo_accepted_tokens_total",
}
"""Figures of an engine that go on when another takes its place."""

log = logging.getLogger("octavo.serve")


class Job:
    """One admitted request: what to do, and the way its results take back to the event loop."""

    def __init__(self, gate: Gate, request_id: str):
        self.gate, self.id = gate, request_id
        self.worker: Worker | None = None
        self.requests: Sequence[Request] = ()
        self.chore: Iterator[Any] | None = None
        self.left = 0
        self.began = time.monotonic()
        self.clock: dict[int, tuple[float, int]] = {}  # of each text: when its first token came, and how many since
        self.stopped = threading.Event()
        self.ended = False  # its last result was sent
        self.loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[Any] = asyncio.Queue()

    def start(self, worker: Worker, requests: Sequence[Request]) -> None:
        """Have requests decoded; their texts are numbered through, in their order."""
        self.worker, self.requests = worker, requests
        self.left = sum(request.n for request in requests)
        worker.tell(self)

    def start_chore(self, worker: Worker, chore: Iterator[Any]) -> None:
        """Have something else done, a part of it between any two steps; its parts are the results."""
        self.worker, self.chore = worker, chore
        worker.tell(self)

    async def results(self) -> AsyncIterator[list[Any]]:
        """Pieces or parts, all that have come since the last time; ends early if the job was stopped without an error.

        Raises:
            ApiError: the model failed on this request, or the server goes down.
        """
        while True:
            items = [await self._results.get()]
            while not self._results.empty():
                items.append(self._results.get_nowait())
            ends = (i for i, item in enumerate(items) if item is None or isinstance(item, ApiError))
            end = next(ends, len(items))
            if end:
                yield items[:end]
            if end < len(items):
                if items[end] is not None:
                    raise items[end]
                return

    def stop(self, error: ApiError | None = None) -> None:
        """Stop before the next pass; whoever reads the results gets ``error`` or the end."""
        if not self.stopped.is_set():
            self.stopped.set()
            self._results.put_nowait(error)
            if self.worker is not None:
                self.worker.tell(self)

    def give_up(self) -> None:
        """Its client has left, or does not read."""
        if not (self.ended or self.stopped.is_set()):
            self.gate.metrics.add("octavo_cancelled_total", model=self.worker.meter.model if self.worker else OTHER)
        self.stop()

    def close(self) -> None:
        """The answer is out, or given up: stop, and free the place in the queue."""
        self.stop()
        self.gate.open_jobs.discard(self)

    def receive(self, item: Any) -> None:
        """On the event loop: one more result."""
        self._results.put_nowait(item)


class Gate:
    """Who is in: requests accepted and not yet answered, of all models together.

    Args:
        max_jobs: how many there may be.
    """

    def __init__(self, max_jobs: int, metrics: Metrics | None = None):
        self.max_jobs, self.metrics = max_jobs, metrics or Metrics()
        self.open_jobs: set[Job] = set()
        self.draining = False

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

    def stop_all(self) -> None:
        """Tell every open request that the server goes down."""
        self.draining = True
        for job in list(self.open_jobs):
            job.stop(ApiError(503, "The server is shutting down.", code="shutting_down"))


class Worker:
    """Decodes the jobs of one model together.

    Args:
        make: makes the engine, and another after it has failed; None for a model that does not decode.
    """

    def __init__(self, make: Callable[[], Engine] | None, meter: Meter | None = None):
        self.make, self.meter = make, meter or Meter(Metrics(), "")
        self.engine: Engine | None = None
        self.failures = 0
        self._past: Counter[str] = Counter()
        self._try_at = 0.0
        self._chores: deque[Job] = deque()
        self._out: list[tuple[Job, Any]] = []
        self._hasty: set[Job] = set()
        self._delivered = 0.0
        self._told: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._owners: dict[Request, tuple[Job, int]] = {}  # its job, and the number of its first text there
        self._step_began: float | None = None
        self._thread: threading.Thread | None = None
        self._make_engine()

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="octavo-decode", daemon=True)
        self._thread.start()

    def tell(self, job: Job | None) -> None:
        """Something about a job has changed: it begins, or is stopped. None: the thread ends."""
        self._told.put(job)

    def close(self) -> None:
        """End the thread."""
        self.tell(None)
        if self._thread is not None:
            self._thread.join(timeout=10)

    def not_ready(self) -> str | None:
        """Why no work should be sent here now; None if all is well."""
        began = self._step_began
        if self._thread is None or not self._thread.is_alive():
            return "the decoding thread does not run"
        if self.failures >= FAILURES_UNTIL_NOT_READY:
            return f"the last {self.failures} requests failed"
        if began is not None and time.monotonic() - began > STUCK_SECONDS:
            return "a step of the engine does not end"
        return None

    def figures(self) -> dict[str, float]:
        """``Engine.figures``; what adds up does so over all engines."""
        engine = self.engine
        found = dict(engine.figures()) if engine is not None else {}
        return {**found, **{name: found.get(name, 0) + self._past[name] for name in TOTALS}}

    @property
    def _busy(self) -> bool:
        return self.engine is not None and self.engine.busy

    def _run(self) -> None:
        while self._listen():
            if self._busy:
                self._step()
            if self._chores:
                self._go_on(self._chores.popleft())
            if self._tries_now():
                self._try()
            self._deliver()

    def _step(self) -> None:
        assert self.engine is not None
        self._step_began = time.monotonic()
        try:
            events = self.engine.step()
        except Exception:
            log.exception("a step of the engine failed")
            self._failed()
            for job in {id(job): job for job, _ in self._owners.values()}.values():
                self._end(job, _engine_error(job))
            self._owners.clear()
            self._make_engine()
            return
        finally:
            self._step_began = None
        if events:
            self.meter.add("octavo_generated_tokens_total", len(events))
        now = time.monotonic()
        for request, event in events:
            self._pass_on(request, event, now)

    def _listen(self) -> bool:
        """Take what was told, waiting for it while there is nothing else to do; False when the thread is to end."""
        try:
            while True:
                idle = not self._busy and not self._chores
                wait = self._try_at - time.monotonic() if self._must_try() else None
                if idle and (wait is None or wait > 0):
                    job = self._told.get(timeout=wait)
                else:
                    job = self._told.get_nowait()
                if job is None:
                    return False
                self._changed(job)
                self._deliver()
        except queue.Empty:
            return True

    def _changed(self, job: Job) -> None:
        if job.stopped.is_set():
            self._forget(job)
        elif job.chore is not None:
            self._chores.append(job)
        elif self.engine is None:
            self._end(job, ApiError(503, "The model does not work now.", code="engine", headers={"Retry-After": "5"}))
        else:
            first = 0
            try:
                for request in job.requests:
                    self.engine.add(request)
                    self._owners[request] = (job, first)
                    first += request.n
            except Exception as error:  # it was checked before: what is left is memory
                log.warning("request %s: %s", job.id, error)
                self._forget(job)
                self._end(job, ApiError(400, "The request does not fit into the server's memory.", code="too_large"))

    def _pass_on(self, request: Request, event: Piece | Failure, now: float) -> None:
        from octavo.infer.request import Failure

        owner = self._owners.get(request)
        if owner is None:
            return
        job, first = owner
        if isinstance(event, Failure) and isinstance(event.error, ConfigError):  # its grammar leads nowhere
            log.warning("request %s: %s", job.id, event.error)
            self._forget(job)
            self._end(job, ApiError(400, "Nothing this model can write follows the schema.", code="invalid_schema"))
            return
        if isinstance(event, Failure):
            log.error("request %s failed", job.id, exc_info=event.error)
            self._failed()
            self._forget(job)
            self._end(job, _engine_error(job))
            return
        row = first + event.row
        self._out.append((job, replace(event, row=row)))
        began, n = job.clock.get(row, (now, -1))
        job.clock[row] = began, n + 1
        if n < 0:
            self._hasty.add(job)
        if n < 0 and len(job.clock) == 1:
            self.meter.observe("octavo_time_to_first_token_seconds", now - job.began)
        if event.finish_reason is not None:
            if n >= 0:
                self.meter.observe("octavo_time_per_token_seconds", (now - began) / (n + 1))
            job.left -= 1
            if not job.left:
                self.failures = 0
                self._forget(job)
                self._end(job, None)

    def _go_on(self, job: Job) -> None:
        """One more part of a chore."""
        assert job.chore is not None
        if job.stopped.is_set():
            return
        self._step_began = time.monotonic()
        try:
            self._out.append((job, next(job.chore)))
            self._hasty.add(job)
            self._chores.append(job)
        except StopIteration:
            self._end(job, None)
        except Exception:
            log.exception("request %s failed", job.id)
            self.meter.add("octavo_failures_total")
            self._end(job, _engine_error(job))
        finally:
            self._step_began = None

    def _forget(self, job: Job) -> None:
        """Nothing more is decoded for it."""
        for request in job.requests:
            if self._owners.pop(request, None) is not None and self.engine is not None:
                self.engine.cancel(request)

    def _end(self, job: Job, last: ApiError | None) -> None:
        job.ended = True
        self._hasty.add(job)
        self._out.append((job, last))

    def _deliver(self) -> None:
        """Results go to the event loop: those of jobs in haste at once, the others together."""
        now = time.monotonic()
        if self._busy and now - self._delivered < TOGETHER_SECONDS:
            out = [(job, item) for job, item in self._out if job in self._hasty]
            self._out = [(job, item) for job, item in self._out if job not in self._hasty]
        else:
            out, self._out, self._delivered = self._out, [], now
        self._hasty.clear()
        for loop in {job.loop for job, _ in out}:
            own = [(job, item) for job, item in out if job.loop is loop]
            try:
                loop.call_soon_threadsafe(_hand_over, own)
            except RuntimeError:  # the loop has closed: the server is gone and so are the clients
                for job, _ in own:
                    job.stopped.set()

    def _failed(self) -> None:
        self.failures += 1
        self.meter.add("octavo_failures_total")

    def _must_try(self) -> bool:
        return self.make is not None and self.failures >= FAILURES_UNTIL_NOT_READY

    def _tries_now(self) -> bool:
        return self._must_try() and not self._busy and time.monotonic() >= self._try_at

    def _try(self) -> None:
        """Failures in a row: another engine, and one token from it. If that comes, the model is ready again."""
        from octavo.infer.request import Failure, Request
        from octavo.infer.sampling import SamplingConfig

        self._make_engine()
        self._step_began = time.monotonic()
        try:
            if self.engine is not None:
                self.engine.add(Request([self.engine.tokenizer.special.first or 0], SamplingConfig(max_new_tokens=1)))
                if not any(isinstance(event, Failure) for _, event in self.engine.run()):
                    log.warning("the model works again")
                    self.failures = 0
        except Exception:
            log.exception("the model still fails")
            self._make_engine()
        finally:
            self._step_began = None
            self._try_at = time.monotonic() + RETRY_SECONDS

    def _make_engine(self) -> None:
        """An engine, in place of what there may have been; the first one has to succeed."""
        old, self.engine = self.engine, None
        if self.make is None:
            return
        if old is not None:
            self._past.update({name: int(old.figures()[name]) for name in TOTALS})
        made_before = old is not None or self.failures > 0
        del old  # its memory is given back before the next one takes its own
        try:
            self.engine = self.make()
            self.meter.add("octavo_engines_total")
        except Exception:
            if not made_before:
                raise
            log.exception("no engine could be made")
            self.failures = max(self.failures, FAILURES_UNTIL_NOT_READY)
            self._try_at = time.monotonic() + RETRY_SECONDS


def _hand_over(results: Sequence[tuple[Job, Any]]) -> None:
    for job, item in results:
        job.receive(item)


def _engine_error(job: Job) -> ApiError:
    return ApiError(500, f"The model failed on request {job.id}; see the server's log.", code="engine")
