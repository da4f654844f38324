"""A step that could not be taken, computed again with a look at every layer: where did the NaN begin?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.batch import Batch
from octavo.training.loop import Trainer
from octavo.training.numeric import not_finite
from octavo.training.random_state import step_seed


@dataclass
class Replay:
    """What came of it.

    Args:
        step: its number, from 0.
        loss, grad_norm: now; recorded_loss, recorded_norm: then.
        weights: parameters that are not finite before the step is computed.
        activation: the first module whose output is not finite, empty if all are.
        gradient: the first module, from the loss backwards, whose output has a gradient that is not finite.
        parameters: those whose gradient is not finite.
    """

    step: int
    loss: float
    grad_norm: float
    recorded_loss: float
    recorded_norm: float
    weights: list[str] = field(default_factory=list)
    activation: str = ""
    gradient: str = ""
    parameters: list[str] = field(default_factory=list)

    @property
    def reproduces(self) -> bool:
        """Whether the same figures came out: the same bits, or the same one of NaN and the infinities."""
        pairs = ((self.loss, self.recorded_loss), (self.grad_norm, self.recorded_norm))
        return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in pairs)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm) and not self.weights

    def lines(self) -> list[str]:
        """For the user, the most telling first."""
        found = [f"step {self.step}: loss {self.loss:g}, gradient norm {self.grad_norm:g}"]
        if not self.reproduces:
            found[0] += f"; recorded: loss {self.recorded_loss:g}, gradient norm {self.recorded_norm:g}"
        if self.weights:
            found.append(f"not finite before the step: {_some(self.weights)}")
        if self.activation:
            found.append(f"the first activation that is not finite: the output of {self.activation}")
        if self.gradient:
            found.append(f"the first gradient that is not finite, from the loss backwards: at {self.gradient}")
        if self.parameters:
            found.append(f"gradients not finite: {_some(self.parameters)}")
        return found


def replay(trainer: Trainer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Replay:
    """Compute a kept step again.

    Args:
        trainer: of the same run; its weights are replaced, no step is taken.
        tensors, state: what ``checkpoint.load`` gives of ``nan/step-N``; the weights may be another checkpoint's.
    """
    optimizer = trainer.optimizer
    optimizer.restore({**dict(optimizer.tensors()), **tensors}, state["updates"])
    arrays = {n.removeprefix("batch/"): t.numpy() for n, t in tensors.items() if n.startswith("batch/")}
    batch = Batch.from_numpy(arrays, trainer.config.device)
    trainer.model.train()

    def compute() -> tuple[float, float]:
        optimizer.clear()
        torch.manual_seed(step_seed(state["seed"], state["step"]))
        return trainer.gradient(batch)

    loss, norm = compute()
    result = Replay(state["step"], loss, norm, float(state["loss"]), float(state["grad_norm"]))
    result.weights = not_finite(trainer.model.named_parameters())
    # Compiled code has no layers to look at: the second time goes without.
    trainer.forward = trainer._losses
    with _watch(trainer.model, result):
        compute()
    result.parameters = not_finite(
        (name, gradient)
        for group in optimizer.groups
        for name, gradient in zip(group.names, group.views(group.total), strict=True)
    )
    optimizer.clear()
    return result


@contextmanager
def _watch(model: nn.Module, result: Replay) -> Iterator[None]:
    """Inside, the first output and the first gradient that are not finite are noted by the module's name."""

    def look(name: str, output: Any) -> None:
        for tensor in _tensors(output):
            if not result.activation and not_finite([(name, tensor)]):
                result.activation = name
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, name=name: look_back(name, gradient))

    def look_back(name: str, gradient: Tensor) -> None:
        if not result.gradient and not_finite([(name, gradient)]):
            result.gradient = f"the output of {name}"

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: look(name or "the model", output))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif is_dataclass(output):
        yield from _tensors(list(vars(output).values()))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
