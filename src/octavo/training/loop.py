"""THE training loop: a source of batches, an objective, a model.

Every method (pretraining, instruction tuning, later preference and policy learning) is a source and an
objective given to ``fit``. A step's batch, learning rate and random numbers are functions of (seed, step)
alone, so a resumed run needs no memory of the past beyond weights, moments and a step number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from octavo.batch import Batch
from octavo.errors import CheckpointError, DataError, ResourceError, StopRequested
from octavo.metrics_file import MetricsFile
from octavo.nn.attention import use_backend
from octavo.nn.contracts import Aux, Mixer
from octavo.objectives.contract import Objective
from octavo.stop import StopSignal
from octavo.training import checkpoint, figures
from octavo.training.machine import DTYPES, matmul_peak, set_threads, use_compile_cache
from octavo.training.numeric import Guard, not_finite
from octavo.training.optim import Optimizer
from octavo.training.optimizers import OPTIMIZERS
from octavo.training.progress import Bar, Console
from octavo.training.random_state import capture_random, restore_random, step_seed
from octavo.training.room import told_when_it_runs_out
from octavo.training.schedule import SCHEDULES, Schedule
from octavo.training.settings import TrainConfig

MAX_FAILED_SAVES = 3
FIX_MEMORY = "set micro_batch_rows lower or activation_checkpointing to true; the same command goes on from there"


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
        use_backend(model, config.attention)
        if config.activation_checkpointing:
            recompute_blocks(model)
        self.dtype = DTYPES[config.precision]
        make = OPTIMIZERS[config.optimizer.kind]
        self.optimizer: Optimizer = make(config.optimizer, model, self.dtype, config.average)
        self.schedule: Schedule = SCHEDULES[config.schedule.kind](config.schedule)
        self.forward: Callable[[Batch], tuple[Tensor, Aux]] = self._losses
        if config.compile == "step":
            use_compile_cache()
            # Apart from those of other trainings in this process: of one function only a few versions are compiled.
            self.forward = torch.compile(self._losses, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]
        self.compiling = config.compile == "step"  # until the first gradient is there; it may be broken off
        self.step = self.tokens_seen = 0
        self.guard = Guard(config, self.optimizer, held.folder, held.run_id, held.console)
        self.figures: dict[str, float] = {}
        self.reported: Aux = {}  # what the layers said of the last step
        self.due: list[str] = []  # looks at the model that a stop broke off
        self.failed_saves = 0
        self.last_saved = -1
        self.stops = 0  # saves that only a stop asked for, since the last that was due

    def _losses(self, batch: Batch) -> tuple[Tensor, Aux]:
        """The objective's sum of losses; what else is trained on, and the figures of the layers."""
        objective = self.objective
        if not self.model.training:
            return objective.loss_sum(self.model(batch.inputs(), needs=objective.needs), batch), {}
        outputs = self.model(batch.inputs(), needs=(*objective.needs, *objective.training_needs))
        return objective.loss_sum(outputs, batch), outputs.aux | objective.beside(outputs, batch)

    # ------------------------------------------------------------------------------------- one step

    def gradient(self, batch: Batch) -> tuple[float, float]:
        """Mean loss and gradient norm of a whole step, gradients left in the optimizer.

        The sum over micro-batches is divided by the weight of the whole step, so any split gives the
        gradient of one large batch. Losses of the layers are trained on too, but are not in the loss.
        """
        self.reported = {}
        weight = float(self.objective.weight(batch))
        if weight == 0:
            return 0.0, 0.0
        total = 0.0
        for part in batch.split(self.config.micro_batch_rows or batch.rows):
            if self.held.stop.overdue:
                self.held.stop.check()
            loss, aux = self.forward(part)
            loss = loss / weight
            further = [value / weight for name, value in aux.items() if name.startswith(figures.TRAINED)]
            sum(further, loss).backward()
            self.optimizer.gather()
            total += float(loss.detach())
            self.reported = figures.gathered(self.reported, aux)
        return total, float(self.optimizer.grad_norm())

    def train_step(self) -> dict[str, float]:
        """Do one optimizer step; returns its figures."""
        step, config = self.step, self.config
        # Random numbers (dropout) belong to the step, not to the history of the process.
        torch.manual_seed(step_seed(self.seed, step))
        batch = Batch.from_numpy(self.source.batch(step), config.device)
        with self.held.stop.at_once() if self.compiling else nullcontext():
            loss, norm = self.gradient(batch)
        self.compiling = False
        lr = config.optimizer.lr * self.schedule.factor(step, config.steps)
        sigmas = self.guard.sigmas(loss)
        if trouble := self.guard.trouble(step, loss, norm, sigmas):
            if self.guard.refuse(trouble, step, self.seed, batch, loss, norm) == "rollback":
                self._roll_back()
        else:
            clip = 1.0 if config.clip_norm is None or norm <= config.clip_norm else config.clip_norm / (norm + 1e-6)
            self.optimizer.step(lr, clip)
            for module in self.model.modules():
                if isinstance(module, Mixer):
                    module.after_step(self.reported)
        self.step += 1
        self.tokens_seen += int(batch.valid.sum())
        further = figures.headline(self.reported, float(self.objective.weight(batch)))
        return {"loss": loss, "grad_norm": norm, "lr": lr, "spike": sigmas, **further}

    # ------------------------------------------------------------------------------------- the loop

    def fit(self, until: int | None = None) -> dict[str, float]:
        """Train to the last step, from the newest checkpoint if there is one; the model ends in fp32.

        Args:
            until: leave off after this step, saved, as if the run had been stopped there.

        Returns:
            The figures of the last step and of the last validation.

        Raises:
            StopRequested: a signal or the time limit; everything is saved.
            NumericError: a loss, gradient or weight that is not finite.
            CheckpointError: the folder holds another run's or only damaged checkpoints.
            DataError: what is trained on cannot be read any more; what was done is saved.
            ResourceError: three saves in a row failed, or the memory ran out.
        """
        held = self.held
        position = self._resume()
        metrics = MetricsFile(held.folder / "metrics.jsonl", position)
        for notice in metrics.notices:
            held.console.warn(notice)
        self.model.train()
        with metrics, held.console.bar(self.config.steps, "step", done=self.step) as bar:
            try:
                with told_when_it_runs_out("in training", FIX_MEMORY, self.guard.newest):
                    self._train(metrics, bar, min(until or self.config.steps, self.config.steps))
            except StopRequested:
                self.optimizer.clear()  # of a step that was given up
                self._save(metrics, last=True)
                raise StopRequested(
                    f"{held.stop.reason}, saved at step {self.step} of {self.config.steps}",
                    fix=f"go on with {held.resume_command}",
                    kept=str(held.folder / "checkpoints"),
                ) from None
            except DataError as error:
                self.optimizer.clear()
                self._save(metrics, last=True)
                where = f"{error.where}, step {self.step}" if error.where else f"step {self.step}"
                kept = str(held.folder / "checkpoints")
                raise DataError(error.what, where=where, fix=error.fix, kept=kept) from error
        self.optimizer.release()
        self.model.eval()
        return self.figures

    def _train(self, metrics: MetricsFile, bar: Bar, last: int) -> None:
        held, config = self.held, self.config
        peak = matmul_peak(self.dtype) if held.train_flops_per_token and config.device == "cpu" else 0.0
        self._look_in(metrics)  # what a stop broke off
        if config.on_nan == "rollback" and self.last_saved < 0:
            self._save(metrics)  # the weights to go back to before the first save
        mark, marked = time.perf_counter(), self.tokens_seen
        while self.step < last:
            held.stop.check()
            self.figures = self._guarded_step()
            n = self.step
            if n < config.steps:
                self.source.prefetch(n)
            seconds = time.perf_counter() - mark
            rate = (self.tokens_seen - marked) / max(seconds, 1e-9)
            shown = {**self.figures, "tokens_per_second": rate}
            if peak:
                shown["mfu"] = rate * held.train_flops_per_token / peak
            bar.update(1, **shown)
            if n % config.log_every == 0 or n == config.steps:
                self._log(metrics, {"kind": "train", "step": n, "tokens_seen": self.tokens_seen, **shown,
                                    **figures.written(self.reported), "seconds": seconds})  # fmt: skip
                mark, marked = time.perf_counter(), self.tokens_seen
            looks = {"valid": (held.valid, config.valid_every), "sample": (held.sample, config.sample_every)}
            self.due = [name for name, (what, every) in looks.items() if what and (n % every == 0 or n == config.steps)]
            self._look_in(metrics)
            if n % config.save_every == 0 or n == last or self.guard.left_out == n - 1:
                self._save(metrics)
            if n % config.log_every:
                continue
            mark, marked = time.perf_counter(), self.tokens_seen  # looking in is not training time

    def _look_in(self, metrics: MetricsFile) -> None:
        """Validate and sample where that is due. A stop breaks it off: it is done again on resume."""
        n = self.step
        if "valid" in self.due:
            valid = self.validate()
            self.held.console.valid(n, **valid)
            self._log(metrics, {"kind": "valid", "step": n, "tokens_seen": self.tokens_seen, **valid})
            self.figures |= {f"valid_{k}": v for k, v in valid.items()}
            self.due.remove("valid")
        if "sample" in self.due and self.held.sample is not None:
            self.model.eval()
            with self.optimizer.averaged():
                records = self.held.sample()
            for record in records:
                self.held.console.sample(record["text"], prompt=record["prompt"], step=n)
                self._log(metrics, {"kind": "sample", "step": n, **record})
            self.model.train()
            self.due.remove("sample")

    def _guarded_step(self) -> dict[str, float]:
        """A step; where compiled code cannot be built after all, say so once and go on without."""
        if self.config.compile != "step" or self.forward == self._losses:
            return self.train_step()
        from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
        from torch._inductor.exc import InductorError

        try:
            return self.train_step()
        except (BackendCompilerFailed, InductorError, TorchDynamoException) as error:
            self.held.stop.check()  # what the compiler reports may be the signal that broke it off
            reason = str(error).splitlines()[0][:120]
            self.held.console.warn(f"going on without compilation, slower: {type(error).__name__}: {reason}")
            self.optimizer.clear()
            self.forward = self._losses
            return self.train_step()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss over the held-out batches; bits-per-byte where the bytes of a token are known."""
        self.model.eval()
        total = weight = 0.0
        with self.optimizer.averaged():
            for batch in self.held.valid:
                for part in batch.split(self.config.micro_batch_rows or batch.rows):
                    self.held.stop.check()
                    total += float(self._losses(part)[0])
                    weight += float(self.objective.weight(part))
        self.model.train()
        loss = total / max(weight, 1.0)
        scale = self.held.valid_nats_per_bit_byte
        return {"loss": loss} | ({"bits_per_byte": loss * scale} if scale else {})

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
            "due": self.due,
            "stops": self.stops,
            "figures": {name: value for name, value in self.figures.items() if math.isfinite(value)},
            "guard": self.guard.state(),
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
        if bad := not_finite(self.optimizer.tensors()):
            self.guard.refuse_weights(self.step, bad)
            self._roll_back()
        stops = self.stops
        self.stops = stops + 1 if last else 0
        try:
            checkpoint.save(
                held.folder / "checkpoints",
                self.step,
                dict(self.optimizer.tensors()),
                self._state(metrics),
                run_id=held.run_id,
                keep=self.config.keep_checkpoints + self.stops,
            )
            self.failed_saves, self.last_saved = 0, self.step
        except ResourceError as error:
            # One failed save loses nothing yet: the disk may have room again at the next.
            self.stops = stops
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
        if bad := not_finite(tensors.items()):
            raise CheckpointError(
                f"{found.path} holds numbers that are not finite: {', '.join(bad[:5])}",
                fix="remove this step, the one before it is then gone on from",
            )
        self.optimizer.restore(tensors, state["updates"])
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self.stops = state.get("stops", 0)
        self.due, self.figures = list(state.get("due", ())), dict(state.get("figures", {}))
        self.guard.restore(state.get("guard", {}))
        self.last_saved = self.step
        restore_random(state["random"])
        if self.step:
            held.console.note(f"going on from step {self.step} ({found.path.name})")
        return state["metrics"]

    def _roll_back(self) -> None:
        """Take back the weights and moments of the last save that was due; the steps since then are left out.

        A save that only a stop asked for does not count: a run that was stopped leaves out the same steps.
        """
        whole = saved_steps(self.held.folder / "checkpoints")
        for path in whole:
            tensors, state = checkpoint.load(path)
            if state.get("stops", 0) == 0 or path == whole[-1]:
                self.optimizer.restore(tensors, state["updates"])
                self.guard.rolled_back.append([state["step"], self.step])
                return
        raise CheckpointError("there is no step to roll back to", fix="set on_nan to stop or skip")


def saved_steps(folder: Path) -> list[Path]:
    """The steps in a ``checkpoints`` folder that verify, the newest first."""
    steps = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return [path for path in sorted(steps, reverse=True) if not checkpoint.verify(path)]


def recompute_blocks(model: nn.Module) -> None:
    """Activation checkpointing from outside: keep each block's input, recompute the rest in the backward pass."""
    from torch.utils.checkpoint import checkpoint as rerun

    for block in model.blocks:  # type: ignore[union-attr]
        inner = block.forward
        block.forward = lambda *args, _inner=inner: (
            rerun(_inner, *args, use_reentrant=False) if torch.is_grad_enabled() else _inner(*args)
        )
