"""THE training loop: a source of batches, an objective, a model.

Every method (pretraining, instruction tuning, later preference and policy learning) is a source and an
objective given to ``fit``. A step's batch, learning rate and random numbers are functions of (seed, step)
alone, so a resumed run needs no memory of the past beyond weights, moments and a step number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from octavo.batch import Batch
from octavo.errors import CheckpointError, NumericError, ResourceError, StopRequested
from octavo.files import write_json
from octavo.metrics_file import MetricsFile
from octavo.objectives.contract import Objective
from octavo.stop import StopSignal
from octavo.training import checkpoint
from octavo.training.machine import DTYPES, matmul_peak, set_threads, use_compile_cache
from octavo.training.optim import OPTIMIZERS, Optimizer
from octavo.training.progress import Console
from octavo.training.random_state import capture_random, restore_random
from octavo.training.schedule import SCHEDULES, Schedule
from octavo.training.settings import TrainConfig

MAX_FAILED_SAVES = 3


class Source(Protocol):
    """Batches by step number; ``fingerprint`` names the data and their order."""

    fingerprint: str

    def batch(self, step: int) -> Mapping[str, np.ndarray]: ...

    def prefetch(self, step: int) -> None: ...


@dataclass
class Held:
    """What ``fit`` needs beside the model: where to write, how to look in from time to time."""

    folder: Path
    run_id: str
    console: Console
    stop: StopSignal
    resume_command: str = "the same command"
    valid: list[Batch] = field(default_factory=list)
    valid_nats_per_bit_byte: float | None = None
    sample: Callable[[], list[dict[str, str]]] | None = None
    train_flops_per_token: int = 0
    started_from: str = ""
    tensorboard: Any = None


class Trainer:
    """One stage of training in a folder: ``metrics.jsonl`` and ``checkpoints/``."""

    def __init__(
        self, model: nn.Module, source: Source, objective: Objective, config: TrainConfig, held: Held, seed: int
    ):
        if config.precision == "auto" or config.compile == "auto":
            raise ValueError("resolve the `auto` choices before training: octavo.training.machine.resolve")
        self.model, self.source, self.objective, self.config = model, source, objective, config
        self.held, self.seed = held, seed
        if config.threads:
            set_threads(config.threads)
        model.to(config.device)
        if config.activation_checkpointing:
            recompute_blocks(model)
        self.dtype = DTYPES[config.precision]
        self.optimizer: Optimizer = OPTIMIZERS[config.optimizer.kind](config.optimizer, model, self.dtype)
        self.schedule: Schedule = SCHEDULES[config.schedule.kind](config.schedule)
        self.forward: Callable[[Batch], Tensor] = self._loss_sum
        if config.compile == "step":
            use_compile_cache()
            self.forward = torch.compile(self._loss_sum, dynamic=False)
        self.step = self.tokens_seen = 0
        self.skipped: list[int] = []
        self.failed_saves = 0
        self.last_saved = -1

    def _loss_sum(self, batch: Batch) -> Tensor:
        outputs = self.model(batch.inputs(), needs=self.objective.needs)
        return self.objective.loss_sum(outputs, batch)

    # ------------------------------------------------------------------------------------- one step

    def gradient(self, batch: Batch) -> tuple[float, float]:
        """Mean loss and gradient norm of a whole step, gradients left in the optimizer.

        The sum over micro-batches is divided by the weight of the whole step, so any split gives the
        gradient of one large batch.
        """
        weight = float(self.objective.weight(batch))
        if weight == 0:
            return 0.0, 0.0
        total = 0.0
        for part in batch.split(self.config.micro_batch_rows or batch.rows):
            loss = self.forward(part) / weight
            loss.backward()
            self.optimizer.gather()
            total += float(loss.detach())
        return total, float(self.optimizer.grad_norm())

    def train_step(self) -> dict[str, float]:
        """Do one optimizer step; returns its figures."""
        step, config = self.step, self.config
        # Random numbers (dropout) belong to the step, not to the history of the process.
        torch.manual_seed(_mix(self.seed, step))
        batch = Batch.from_numpy(self.source.batch(step), config.device)
        loss, norm = self.gradient(batch)
        lr = config.optimizer.lr * self.schedule.factor(step, config.steps)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._bad_numbers(step, loss, norm)
        else:
            clip = 1.0 if config.clip_norm is None or norm <= config.clip_norm else config.clip_norm / (norm + 1e-6)
            self.optimizer.step(lr, clip)
        self.step += 1
        self.tokens_seen += int(batch.valid.sum())
        return {"loss": loss, "grad_norm": norm, "lr": lr}

    def _bad_numbers(self, step: int, loss: float, norm: float) -> None:
        """A loss or gradient that is not finite never reaches the weights."""
        where = self.held.folder / "nan" / f"step-{step:08d}.json"
        where.parent.mkdir(parents=True, exist_ok=True)
        groups = self.optimizer.groups
        named = [(n, g) for group in groups for n, g in zip(group.names, group.views(group.total), strict=True)]
        norms = {name: float(grad.norm()) for name, grad in named}
        bad = {name: value for name, value in norms.items() if not math.isfinite(value)}
        write_json(where, {
                           "step": step, "seed": self.seed, "loss": repr(loss), "grad_norm": repr(norm),
                           "not_finite": sorted(bad), "grad_norms": {n: repr(v) for n, v in norms.items()},
        })  # fmt: skip
        self.optimizer.clear()
        self.skipped = [s for s in self.skipped if s > step - 100] + [step]
        if self.config.on_nan == "stop" or len(self.skipped) > self.config.max_skips:
            raise NumericError(
                f"the loss is {loss} and the gradient norm {norm} at step {step}",
                where=str(where),
                fix="lower the learning rate, use precision fp32, or set on_nan to skip",
                kept="no weight took this step; the last checkpoint is whole",
            )
        self.held.console.warn(f"step {step} skipped: loss {loss}, gradient norm {norm} ({where})")

    # ------------------------------------------------------------------------------------- the loop

    def fit(self) -> dict[str, float]:
        """Train to the last step, from the newest checkpoint if there is one; the model ends in fp32.

        Raises:
            StopRequested: a signal or the time limit; everything is saved.
            NumericError: a loss or gradient that is not finite.
            CheckpointError: the folder holds another run's or only damaged checkpoints.
            ResourceError: three saves in a row failed.
        """
        held, config, console = self.held, self.config, self.held.console
        position = self._resume()
        peak = matmul_peak(self.dtype) if held.train_flops_per_token and config.device == "cpu" else 0.0
        metrics = MetricsFile(held.folder / "metrics.jsonl", position)
        for notice in metrics.notices:
            console.warn(notice)
        figures: dict[str, float] = {}
        self.model.train()
        with metrics, console.bar(config.steps, "step", done=self.step) as bar:
            mark, marked = time.perf_counter(), self.tokens_seen
            while self.step < config.steps:
                if held.stop.requested:
                    self._stop(metrics)
                figures = self._guarded_step()
                n = self.step
                if n < config.steps:
                    self.source.prefetch(n)
                seconds = time.perf_counter() - mark
                rate = (self.tokens_seen - marked) / max(seconds, 1e-9)
                shown = {**figures, "tokens_per_second": rate}
                if peak:
                    shown["mfu"] = rate * held.train_flops_per_token / peak
                bar.update(1, **shown)
                if n % config.log_every == 0 or n == config.steps:
                    self._log(metrics, {"kind": "train", "step": n, "tokens_seen": self.tokens_seen, **shown,
                                        "seconds": seconds})  # fmt: skip
                    mark, marked = time.perf_counter(), self.tokens_seen
                if held.valid and (n % config.valid_every == 0 or n == config.steps):
                    valid = self.validate()
                    console.valid(n, **valid)
                    self._log(metrics, {"kind": "valid", "step": n, "tokens_seen": self.tokens_seen, **valid})
                    figures |= {f"valid_{k}": v for k, v in valid.items()}
                if held.sample is not None and (n % config.sample_every == 0 or n == config.steps):
                    self._sample(metrics, held.sample)
                if n % config.save_every == 0 or n == config.steps:
                    self._save(metrics)
                if n % config.log_every:
                    continue
                mark, marked = time.perf_counter(), self.tokens_seen  # looking in is not training time
        self.optimizer.release()
        self.model.eval()
        return figures

    def _guarded_step(self) -> dict[str, float]:
        """A step; where compiled code cannot be built after all, say so once and go on without."""
        if self.config.compile != "step" or self.forward == self._loss_sum:
            return self.train_step()
        from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
        from torch._inductor.exc import InductorError

        try:
            return self.train_step()
        except (BackendCompilerFailed, InductorError, TorchDynamoException) as error:
            reason = str(error).splitlines()[0][:120]
            self.held.console.warn(f"going on without compilation, slower: {type(error).__name__}: {reason}")
            self.optimizer.clear()
            self.forward = self._loss_sum
            return self.train_step()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss over the held-out batches; bits-per-byte where the bytes of a token are known."""
        self.model.eval()
        total = weight = 0.0
        for batch in self.held.valid:
            for part in batch.split(self.config.micro_batch_rows or batch.rows):
                total += float(self._loss_sum(part))
                weight += float(self.objective.weight(part))
        self.model.train()
        loss = total / max(weight, 1.0)
        scale = self.held.valid_nats_per_bit_byte
        return {"loss": loss} | ({"bits_per_byte": loss * scale} if scale else {})

    def _sample(self, metrics: MetricsFile, sample: Callable[[], list[dict[str, str]]]) -> None:
        self.model.eval()
        for record in sample():
            self.held.console.sample(record["text"], prompt=record["prompt"], step=self.step)
            self._log(metrics, {"kind": "sample", "step": self.step, **record})
        self.model.train()

    def _log(self, metrics: MetricsFile, record: dict[str, Any]) -> None:
        metrics.write(record)
        if self.held.tensorboard is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self.held.tensorboard.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    # ------------------------------------------------------------------------------------- checkpoints

    def _state(self, metrics: MetricsFile) -> dict[str, Any]:
        return {
            "step": self.step,
            "updates": self.optimizer.updates,
            "tokens_seen": self.tokens_seen,
            "skipped": self.skipped,
            "seed": self.seed,
            "source": self.source.fingerprint,
            "started_from": self.held.started_from,
            "metrics": metrics.position(),
            "random": capture_random(),
        }

    def _save(self, metrics: MetricsFile, *, last: bool = False) -> None:
        held = self.held
        if self.last_saved == self.step:
            return
        try:
            checkpoint.save(
                held.folder / "checkpoints",
                self.step,
                dict(self.optimizer.tensors()),
                self._state(metrics),
                run_id=held.run_id,
                keep=self.config.keep_checkpoints,
            )
            self.failed_saves, self.last_saved = 0, self.step
        except ResourceError as error:
            # One failed save loses nothing yet: the disk may have room again at the next.
            self.failed_saves += 1
            if last or self.failed_saves >= MAX_FAILED_SAVES or self.step == self.config.steps:
                raise
            held.console.warn(str(error))

    def _resume(self) -> Mapping[str, Any] | None:
        held = self.held
        found = checkpoint.recover(held.folder / "checkpoints")
        if found is None:
            return None
        for notice in found.notices:
            held.console.warn(notice)
        tensors, state = checkpoint.load(found.path)
        if state.get("started_from", "") != held.started_from:
            held.console.warn("this stage begins anew: the weights it starts from have changed")
            checkpoint.remove_all(held.folder / "checkpoints")
            return None
        if state["source"] != self.source.fingerprint or state["seed"] != self.seed:
            raise CheckpointError(
                f"{found.path} was trained on other data or with another seed than this run has",
                fix="use a new run folder, or restore the data it was trained on",
            )
        own = {name: tensor.shape for name, tensor in self.optimizer.tensors()}
        if own != (saved := {name: tensor.shape for name, tensor in tensors.items()}):
            wrong = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
            raise CheckpointError(
                f"{found.path} holds other weights than this model: {', '.join(wrong[:5])}",
                fix="use a new run folder for another model",
            )
        if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
            raise CheckpointError(
                f"{found.path} holds numbers that are not finite: {', '.join(bad[:5])}",
                fix="remove this step, the one before it is then gone on from",
            )
        self.optimizer.restore(tensors, state["updates"])
        self.step, self.tokens_seen, self.skipped = state["step"], state["tokens_seen"], state["skipped"]
        self.last_saved = self.step
        restore_random(state["random"])
        if self.step:
            held.console.note(f"going on from step {self.step} ({found.path.name})")
        return state["metrics"]

    def _stop(self, metrics: MetricsFile) -> None:
        self._save(metrics, last=True)
        raise StopRequested(
            f"{self.held.stop.reason}, saved at step {self.step} of {self.config.steps}",
            fix=f"go on with {self.held.resume_command}",
            kept=str(self.held.folder / "checkpoints"),
        )


def recompute_blocks(model: nn.Module) -> None:
    """Activation checkpointing from outside: keep each block's input, recompute the rest in the backward pass."""
    from torch.utils.checkpoint import checkpoint as rerun

    for block in model.blocks:  # type: ignore[union-attr]
        inner = block.forward
        block.forward = lambda *args, _inner=inner: (
            rerun(_inner, *args, use_reentrant=False) if torch.is_grad_enabled() else _inner(*args)
        )


def _mix(seed: int, step: int) -> int:
    """A 63-bit number from two (splitmix64's finaliser), so that near seeds and steps share nothing."""
    z = (seed * 0x9E3779B97F4A7C15 + step + 1) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1
