"""What the numbers of a step must be before they may change a weight.

A loss or gradient norm that is not finite reaches no weight, no moment and no moving average. The step is kept whole
in ``nan/step-N/`` (batch, weights, seed, loss, gradient norms by parameter), from where ``octavo replay`` computes it
again, and ``on_nan`` says how the run goes on. A loss far above those before it is a spike: logged, and left out if
``on_spike`` says so. All that is remembered goes into the checkpoints, so that a resumed run decides the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from octavo.batch import TENSORS, Batch
from octavo.errors import NumericError, ResourceError
from octavo.training import checkpoint
from octavo.training.optim import Optimizer
from octavo.training.progress import Console
from octavo.training.settings import TrainConfig

WINDOW = 100  # losses that a new one is compared with; steps in which those left out are counted
FEWEST = 20  # losses before a new one is judged
SIGMA_OF_MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
LEAST_SIGMA = 1e-3  # of the median: where the loss hardly moves, a small step up is no spike
KEPT_STEPS = 3

Trouble = Literal["", "not finite", "spike"]


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of tensors that hold a NaN or an infinity."""
    found = []
    for name, tensor in tensors:
        if tensor.numel() and tensor.is_floating_point():
            low, high = torch.aminmax(tensor.detach())  # one pass without a copy; NaN wins both
            if not math.isfinite(float(low)) or not math.isfinite(float(high)):
                found.append(name)
    return found


class Guard:
    """Judges the steps of one training stage.

    Attributes:
        refused: the steps of the last 100 that were not taken.
        rolled_back: for each rollback the step whose weights were taken back, and the last step left out.
        losses: the last 100 finite ones.
    """

    def __init__(self, config: TrainConfig, optimizer: Optimizer, folder: Path, run_id: str, console: Console):
        self.config, self.optimizer, self.folder, self.run_id, self.console = config, optimizer, folder, run_id, console
        self.refused: list[int] = []
        self.rolled_back: list[list[int]] = []
        self.losses: list[float] = []
        self._in_spike = False

    def state(self) -> dict[str, Any]:
        """What a resumed run has to remember, as JSON."""
        return {"refused": self.refused, "rolled_back": self.rolled_back, "losses": self.losses}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state`` gave."""
        self.refused, self.losses = list(state.get("refused", ())), list(state.get("losses", ()))
        self.rolled_back = [list(pair) for pair in state.get("rolled_back", ())]

    @property
    def left_out(self) -> int:
        """The last step that a rollback left out; -1 where there was none."""
        return self.rolled_back[-1][1] if self.rolled_back else -1

    def sigmas(self, loss: float) -> float:
        """How far a loss is above the median of the last 100, in robust standard deviations; 0 while there are few."""
        if len(self.losses) < FEWEST or not math.isfinite(loss):
            return 0.0
        middle = statistics.median(self.losses)
        spread = statistics.median(abs(past - middle) for past in self.losses)
        return (loss - middle) / max(SIGMA_OF_MAD * spread, LEAST_SIGMA * abs(middle), 1e-12)

    def trouble(self, step: int, loss: float, norm: float, sigmas: float) -> Trouble:
        """Why the step must not be taken, empty if it may be; the loss is remembered."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return "not finite"
        self.losses = [*self.losses[1 - WINDOW :], loss]
        spiked, was = sigmas >= self.config.spike_sigmas, self._in_spike
        self._in_spike = spiked
        if spiked and self.config.on_spike == "skip":
            return "spike"
        if spiked and not was:
            self.console.warn(f"step {step}: the loss {loss:.4g} is {sigmas:.1f} sigmas above those before it")
        return ""

    def refuse(self, trouble: Trouble, step: int, seed: int, batch: Batch, loss: float, norm: float) -> str:
        """Keep a step that must not be taken for ``octavo replay``, and forget its gradient.

        Returns:
            How the run goes on: ``skip`` or ``rollback``.

        Raises:
            NumericError: it does not.
        """
        weights = not_finite((n, t) for n, t in self.optimizer.tensors() if n.startswith("model/"))
        kept = self._keep(trouble, step, seed, batch, loss, norm, weights)
        self.optimizer.clear()
        figures = f"the loss is {loss:g} and the gradient norm {norm:g} at step {step}"
        if weights:
            return self.refuse_weights(step, weights, kept)
        return self._decide(self.config.on_nan if trouble == "not finite" else "skip", step, figures, kept)

    def refuse_weights(self, step: int, names: list[str], kept: Path | None = None) -> str:
        """Weights or moments are not finite: leaving steps out cannot mend that. Returns and raises as ``refuse``."""
        policy = "rollback" if self.config.on_nan == "rollback" else "stop"
        return self._decide(policy, step, f"{', '.join(names[:3])}: not finite at step {step}", kept)

    def _decide(self, policy: str, step: int, what: str, kept: Path | None) -> str:
        self.refused = [past for past in self.refused if past > step - WINDOW] + [step]
        many = len(self.refused) > self.config.max_skips
        if policy == "stop" or many:
            mend = "lower the learning rate or use precision fp32"
            raise NumericError(
                what + f", trouble {len(self.refused)} in {WINDOW} steps" * many,
                where=str(kept or ""),
                fix=f"`octavo replay {self.folder.parent}` shows where it began; {mend}"
                + (", or raise max_skips" if many else ", or set on_nan to skip or rollback"),
                kept=f"no weight took this step; {self.newest()}",
            )
        self.console.warn(f"{what}: {'left out' if policy == 'skip' else 'rolled back'} ({kept})")
        return policy

    def newest(self) -> str:
        """Words for what is safe."""
        steps = [path.name for path in (self.folder / "checkpoints").glob("step-*") if "." not in path.name]
        return f"{max(steps)} is the last that was saved" if steps else "none was saved yet"

    def _keep(
        self, trouble: Trouble, step: int, seed: int, batch: Batch, loss: float, norm: float, weights: list[str]
    ) -> Path | None:
        """``nan/step-N/``, a folder like that of a checkpoint; None where the disk refused."""
        gradients = [
            (name, gradient)
            for group in self.optimizer.groups
            for name, gradient in zip(group.names, group.views(group.total), strict=True)
        ]
        tensors = {f"batch/{name}": getattr(batch, name) for name in TENSORS}
        tensors |= {f"batch/{name}": tensor for name, tensor in batch.extra.items()}
        tensors |= {name: tensor for name, tensor in self.optimizer.tensors() if name.startswith("model/")}
        state = {
            "trouble": trouble,
            "step": step,
            "seed": seed,
            "loss": repr(loss),
            "grad_norm": repr(norm),
            "grad_norms": {name: repr(float(gradient.norm())) for name, gradient in gradients},
            "gradients_not_finite": not_finite(gradients),
            "weights_not_finite": weights,
            "updates": self.optimizer.updates,
        }
        try:
            return checkpoint.save(self.folder / "nan", step, tensors, state, run_id=self.run_id, keep=KEPT_STEPS)
        except ResourceError as error:  # the run's own trouble is the one to be told
            self.console.warn(str(error))
            return None
