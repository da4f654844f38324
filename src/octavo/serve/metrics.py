"""What the server counts, in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats)."""

from __future__ import annotations

import bisect
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import accumulate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
"""The label of whatever a client made up: names from outside do not make new series."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

FAMILIES = {
    "octavo_requests_total": ("counter", "HTTP requests answered, by route and status."),
    "octavo_model_requests_total": ("counter", "Requests for a model; unknown names are `other`."),
    "octavo_requests_open": ("gauge", "Requests accepted and not yet answered."),
    "octavo_requests_limit": ("gauge", "Requests that may be open at once; more get 429."),
    "octavo_ready": ("gauge", "Whether the model takes work: 1 or 0."),
    "octavo_running": ("gauge", "Texts that are decoded together now."),
    "octavo_waiting": ("gauge", "Texts that wait for memory or a place."),
    "octavo_blocks": ("gauge", "Blocks of decode state, by what they are: held, idle (kept to be shared) or free."),
    "octavo_slots_held": ("gauge", "Texts that have a state."),
    "octavo_prompt_tokens_total": ("counter", "Tokens of prompts and of texts to embed."),
    "octavo_generated_tokens_total": ("counter", "Tokens decoded."),
    "octavo_cancelled_total": ("counter", "Requests whose client left or did not read."),
    "octavo_failures_total": ("counter", "Requests on which the model or the engine failed."),
    "octavo_engines_total": ("counter", "Engines made; more than one means that some were replaced."),
    "octavo_preempted_total": ("counter", "Texts that gave their memory up and were read again."),
    "octavo_shared_tokens_total": ("counter", "Tokens of prompts found already read."),
    "octavo_drafted_tokens_total": ("counter", "Tokens guessed ahead."),
    "octavo_accepted_tokens_total": ("counter", "Tokens guessed ahead that held."),
    "octavo_time_to_first_token_seconds": ("histogram", "From a request's arrival to its first token."),
    "octavo_time_per_token_seconds": ("histogram", "Mean time between the tokens of a text, after its first."),
}

Labels = Mapping[str, str]


class Metrics:
    """Counters and histograms that any thread may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        self._timings: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[list[int], list[float]]] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """More of a counter."""
        with self._lock:
            self._counts[name, tuple(labels.items())] += value

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """One more time of a histogram."""
        key = name, tuple(labels.items())
        with self._lock:
            counts, total = self._timings.setdefault(key, ([0] * (len(SECONDS) + 1), [0.0]))
            counts[bisect.bisect_left(SECONDS, seconds)] += 1
            total[0] += seconds

    def text(self, now: Iterable[tuple[str, Labels, float]]) -> str:
        """Everything, and the figures that hold ``now``."""
        found: dict[str, list[str]] = {name: [] for name in FAMILIES}
        with self._lock:
            for (name, labels), value in self._counts.items():
                found[name].append(_line(name, dict(labels), value))
            for (name, labels), (counts, (total,)) in self._timings.items():
                for bound, n in zip((*map(_number, SECONDS), "+Inf"), accumulate(counts)):
                    found[name].append(_line(f"{name}_bucket", {**dict(labels), "le": bound}, n))
                found[name].append(_line(f"{name}_sum", dict(labels), total))
                found[name].append(_line(f"{name}_count", dict(labels), sum(counts)))
        for name, labels, value in now:
            found[name].append(_line(name, labels, value))
        parts = list[str]()
        for name, lines in found.items():
            if lines:
                kind, text = FAMILIES[name]
                parts += [f"# HELP {name} {text}\n# TYPE {name} {kind}\n", *lines]
        return "".join(parts)


class Meter:
    """What is counted of one model."""

    def __init__(self, metrics: Metrics, model: str):
        self.metrics, self.model = metrics, model

    def add(self, name: str, value: float = 1) -> None:
        self.metrics.add(name, value, model=self.model)

    def observe(self, name: str, seconds: float) -> None:
        self.metrics.observe(name, seconds, model=self.model)


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {_number(value)}\n" if inside else f"{name} {_number(value)}\n"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
