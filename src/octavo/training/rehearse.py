"""A training step tried out for some seconds, in a process of its own: how fast will the run be?

``python -m octavo.training.rehearse`` reads one JSON object from standard input and writes one. The model is
built with few layers if the whole would take too long: a step's time is a line in the number of layers.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from octavo.batch import Batch
from octavo.models.cost import cost
from octavo.models.decoder import Decoder, build
from octavo.stop import StopSignal
from octavo.training.loop import Held, Trainer
from octavo.training.machine import DTYPES, matmul_peak, set_threads, tune_allocator
from octavo.training.progress import Console
from octavo.training.settings import TrainConfig

PROBE_SECONDS = 0.25
REPEATS = 4


@dataclass
class Rehearsal:
    """What was measured, with the settings ``train`` (its precision and threads chosen).

    peaks: FLOP/s of large matrix products by precision and threads, as ``fp32 x 2``. gradient, update:
    seconds of one micro-batch's gradient and of one optimizer step, by number of layers. flops: of that
    micro-batch, by number of layers.
    """

    precision: str
    threads: int
    rows: int
    peaks: dict[str, float] = field(default_factory=dict)
    gradient: dict[int, float] = field(default_factory=dict)
    update: dict[int, float] = field(default_factory=dict)
    flops: dict[int, int] = field(default_factory=dict)

    def at(self, which: dict[int, float], layers: int) -> float:
        """``which`` for a model of ``layers`` layers, on the line through the two that were measured."""
        if layers in which:
            return which[layers]
        few, more = sorted(which)[:2]
        each = (which[more] - which[few]) / (more - few)
        return max(which[more] + each * (layers - more), which[few])


def rehearse(model: Decoder.Config, train: TrainConfig, rows: int, seq_len: int, budget: float = 12.0) -> Rehearsal:
    """Measure ``train`` on ``model`` for about ``budget`` seconds; ``auto`` and null settings are tried out.

    Args:
        rows: of a micro-batch.
    """
    tune_allocator()
    peaks = {}
    tried = ["fp32", "bf16"] if train.precision == "auto" else [train.precision]
    cores = torch.get_num_threads()
    counts = sorted({1, cores}) if train.threads is None else [train.threads]
    for precision in tried:
        for threads in counts:
            set_threads(threads)
            peaks[f"{precision} x {threads}"] = matmul_peak(DTYPES[precision], PROBE_SECONDS)
    best = max(peaks, key=lambda name: peaks[name])
    precision, _, threads = best.partition(" x ")
    found = Rehearsal(precision, int(threads), rows, peaks)
    set_threads(found.threads)
    chosen = train.model_copy(update={"precision": precision, "threads": int(threads), "compile": "off"})
    period = len(model.pattern or model.blocks)
    for layers in _layers(model, rows, seq_len, peaks[best], budget, period):
        smaller = model.model_copy(update={"n_layers": layers})
        gradient, update, flops = _step(smaller, chosen, rows, seq_len, budget / 3)
        found.gradient[layers], found.update[layers], found.flops[layers] = gradient, update, flops
    return found


def _layers(model: Decoder.Config, rows: int, seq_len: int, peak: float, budget: float, period: int) -> list[int]:
    """The whole model if it fits the budget, else one and two rounds of its pattern."""
    flops = rows * cost(build(model, device="meta"), seq_len).train_flops
    whole = 2.0 * flops / peak * (REPEATS + 1)
    return [model.n_layers] if whole < budget or model.n_layers <= 2 * period else [period, 2 * period]


def _step(
    model: Decoder.Config, train: TrainConfig, rows: int, seq_len: int, budget: float
) -> tuple[float, float, int]:
    from octavo.objectives.tables import OBJECTIVES

    net, objective = build(model), OBJECTIVES[train.objective.kind](train.objective)
    flops = rows * cost(net, seq_len).train_flops
    tokens = torch.randint(net.vocab_size, (rows, seq_len + 1))
    shape = (rows, seq_len)
    places = torch.arange(seq_len).expand(shape).contiguous()
    batch = Batch(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(shape),
        torch.zeros(shape, dtype=torch.long), places, torch.ones(shape, dtype=torch.bool),
        objective.extra(net.config, *shape),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        held = Held(Path(folder), "rehearsal", Console("quiet"), StopSignal())
        trainer = Trainer(net, _Nothing(), objective, train, held, 0)
        net.train()
        gradient = _median(lambda: trainer.gradient(batch), budget)
        update = _median(lambda: trainer.optimizer.step(1e-9), budget / 4)
    return gradient, update, flops


class _Nothing:
    """A source that is not asked."""

    fingerprint = ""

    def batch(self, step: int) -> dict[str, Any]:
        raise AssertionError("a rehearsal makes its own batch")

    def prefetch(self, step: int) -> None:
        return None


def _median(what: Callable[[], Any], budget: float) -> float:
    """Seconds of a call after a warm-up, within ``budget`` seconds but at least twice."""
    what()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 2 or (time.perf_counter() < end and len(times) < REPEATS):
        start = time.perf_counter()
        what()
        times.append(time.perf_counter() - start)
    return sorted(times)[(len(times) - 1) // 2]


def main() -> None:
    """The process's side: JSON in, JSON out."""
    asked = json.load(sys.stdin)
    model, train = Decoder.Config.model_validate(asked["model"]), TrainConfig.model_validate(asked["train"])
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    found = rehearse(model, train, asked["rows"], asked["seq_len"], asked["budget"])
    json.dump(asdict(found), sys.stdout)


if __name__ == "__main__":
    main()
