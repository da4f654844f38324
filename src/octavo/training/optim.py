"""Optimizers over flat buffers: fp32 master weights, gradients and moments, whatever the model computes in.

The parameters of one group (same weight decay, same rate) become views of one buffer, so that a step is a
few calls on long vectors, a gradient norm is one reduction, and 16-bit weights have fp32 masters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.adamw import adamw

from octavo.nn.contracts import Mixer
from octavo.schema import Config


def role_of(model: nn.Module) -> dict[str, str]:
    """The role of every parameter by name; biases are ``bias``, parameters of components without one ``other``."""
    roles = {}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            role = "bias" if name == "bias" or name.endswith("_bias") else getattr(module, "role", "other")
            roles[f"{path}.{name}" if path else name] = role
    return roles


def moved_by_counts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What no gradient moves but a mixer's ``after_step``: saved and taken back as the weights are."""
    for path, module in model.named_modules():
        if isinstance(module, Mixer) and type(module).after_step is not Mixer.after_step:
            for name, parameter in module.named_parameters(path, recurse=False):
                if not parameter.requires_grad:
                    yield name, parameter.data


class OptimizerConfig(Config):
    """What every optimizer has. weight_decay acts on weight products and tables except ``no_decay_roles``."""

    kind: str
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    no_decay_roles: tuple[str, ...] = ("norm", "bias", "other", "embed", "position")
    lr_scale: dict[str, float] = Field(default={}, description="a factor of lr by role")


class WeightAverage(Config):
    """A running mean of the weights, which is what is validated, sampled from and saved in the end.

    ``average += (1 - d) (weights - average)`` after each update, with d = min(decay, (1 + n) / (10 + n)) at
    update n, so that the beginning is soon forgotten (Polyak and Juditsky 1992, in its exponential form).
    """

    decay: float = Field(default=0.999, gt=0, lt=1)


class Group:
    """Parameters that share a rule, a decay and a rate, as views of flat buffers."""

    def __init__(
        self, named: list[tuple[str, nn.Parameter]], dtype: torch.dtype, rule: str, decay: float, scale: float
    ):
        self.rule, self.decay, self.scale = rule, decay, scale
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.shapes = [tuple(p.shape) for p in self.parameters]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.master = torch.cat([p.detach().to(wide).flatten() for _, p in named])
        # In fp32 the weights are the masters; in 16 bits they are their rounded copy.
        self.weights = self.master if dtype == wide else self.master.to(dtype)
        self.grads = torch.zeros_like(self.weights)
        self.total = self.grads if dtype == wide else torch.zeros_like(self.master)
        for (_, parameter), weight, grad in zip(named, self.views(self.weights), self.views(self.grads), strict=True):
            parameter.data = weight
            parameter.grad = grad

    def views(self, flat: Tensor) -> list[Tensor]:
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]


class Optimizer(ABC):
    """The contract: gather gradients of micro-batches, then one step.

    Building one moves the model's weights into the optimizer's buffers and casts them to ``dtype``.
    """

    moments: tuple[str, ...] = ()

    def __init__(
        self,
        config: OptimizerConfig,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        average: WeightAverage | None = None,
    ):
        self.config, self.average = config, average
        roles = role_of(model)
        members: dict[tuple[str, float, float], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                role = roles[name]
                decay = 0.0 if role in config.no_decay_roles else config.weight_decay
                key = (self.rule_of(parameter, role), decay, config.lr_scale.get(role, 1.0))
                members.setdefault(key, []).append((name, parameter))
        self.counted = list(moved_by_counts(model))
        self.groups = [Group(named, dtype, *key) for key, named in members.items()]
        self.state = [{name: torch.zeros_like(g.master) for name in self.moments} for g in self.groups]
        self.averages = [group.master.clone() for group in self.groups] if average else []
        self.updates = 0

    def rule_of(self, parameter: nn.Parameter, role: str) -> str:
        """Which of the optimizer's rules updates a parameter; one rule by default."""
        return ""

    def gather(self) -> None:
        """Add the gradients of a micro-batch to the fp32 total and clear them."""
        for group in self.groups:
            if group.total is not group.grads:
                group.total.add_(group.grads)
                group.grads.zero_()

    def grad_norm(self) -> Tensor:
        """The l2 norm of the whole gradient, fp32."""
        return torch.stack([group.total.norm() for group in self.groups]).norm()

    def step(self, lr: float, clip_scale: float = 1.0) -> None:
        """Update every weight with its gradient times ``clip_scale``, then clear the gradients."""
        self.updates += 1
        for group, state in zip(self.groups, self.state, strict=True):
            if clip_scale != 1.0:
                group.total.mul_(clip_scale)
            self.update(group, state, lr * group.scale)
            if group.weights is not group.master:
                group.weights.copy_(group.master)
        if self.average:
            decay = min(self.average.decay, (1 + self.updates) / (10 + self.updates))
            for average, group in zip(self.averages, self.groups, strict=True):
                average.lerp_(group.master, 1 - decay)
        self.clear()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model computes with the averaged weights inside; without an average, with its own."""
        held = [group.weights.clone() for group in self.groups] if self.averages else []
        for average, group in zip(self.averages, self.groups, strict=False):
            group.weights.copy_(average)
        try:
            yield
        finally:
            for own, group in zip(held, self.groups, strict=False):
                group.weights.copy_(own)

    def clear(self) -> None:
        """Forget all gradients."""
        for group in self.groups:
            group.grads.zero_()
            group.total.zero_()

    @abstractmethod
    def update(self, group: Group, state: dict[str, Tensor], lr: float) -> None:
        """One update of ``group.master`` in place from ``group.total``."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Master weights as ``model/NAME``, their average as ``average/NAME`` and moments as
        ``optimizer/MOMENT/NAME``, views into the buffers; what mixers move themselves as ``model/NAME`` too."""
        yield from ((f"model/{name}", tensor) for name, tensor in self.counted)
        for i, (group, state) in enumerate(zip(self.groups, self.state, strict=True)):
            kinds = [("model", group.master), *((f"optimizer/{moment}", flat) for moment, flat in state.items())]
            kinds += [("average", self.averages[i])] if self.averages else []
            for kind, flat in kinds:
                yield from ((f"{kind}/{n}", view) for n, view in zip(group.names, group.views(flat), strict=True))

    def release(self) -> None:
        """Give the model its fp32 weights back, averaged if they are, in memory of their own."""
        for i, group in enumerate(self.groups):
            final = self.averages[i] if self.averages else group.master
            for parameter, view in zip(group.parameters, group.views(final), strict=True):
                parameter.grad = None
                parameter.data = view.clone()

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Take back what ``tensors`` gave, name by name, and the number of updates made."""
        for name, view in self.tensors():
            view.copy_(tensors[name])
        for group in self.groups:
            if group.weights is not group.master:
                group.weights.copy_(group.master)
        self.updates = updates


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), torch's fused kernel."""

    moments = ("exp_avg", "exp_avg_sq")

    class Config(OptimizerConfig):
        kind: Literal["adamw"] = "adamw"
        lr: float = Field(default=1e-3, gt=0)
        weight_decay: float = Field(default=0.1, ge=0)
        beta1: float = Field(default=0.9, ge=0, lt=1)
        beta2: float = Field(default=0.95, ge=0, lt=1)
        eps: float = Field(default=1e-8, gt=0)

    @torch.no_grad()
    def update(self, group: Group, state: dict[str, Tensor], lr: float) -> None:
        self.adam(group, state, lr)

    def adam(self, group: Group, state: dict[str, Tensor], lr: float) -> None:
        """The update itself, also for the parameters that another rule leaves to Adam."""
        self.adam_on(group.master, group.total, state["exp_avg"], state["exp_avg_sq"], lr, group.decay)

    def adam_on(self, weights: Tensor, grad: Tensor, mean: Tensor, square: Tensor, lr: float, decay: float) -> None:
        """Algorithm 2 on flat fp32 vectors, in place."""
        config, step = self.config, torch.tensor(float(self.updates - 1), device=weights.device)
        adamw(
            [weights], [grad], [mean], [square], [], [step],
            fused=True, amsgrad=False, maximize=False, lr=lr, weight_decay=decay,
            beta1=config.beta1, beta2=config.beta2, eps=config.eps,  # type: ignore[attr-defined]
        )  # fmt: skip


class Sgd(Optimizer):
    """Gradient descent, with momentum if asked: the update of the textbook."""

    moments = ("momentum",)

    class Config(OptimizerConfig):
        kind: Literal["sgd"] = "sgd"
        lr: float = Field(default=0.1, gt=0)
        momentum: float = Field(default=0.0, ge=0, lt=1)

    @torch.no_grad()
    def update(self, group: Group, state: dict[str, Tensor], lr: float) -> None:
        grad = group.total.add(group.master, alpha=group.decay) if group.decay else group.total
        if self.config.momentum:  # type: ignore[attr-defined]
            grad = state["momentum"].mul_(self.config.momentum).add_(grad)  # type: ignore[attr-defined]
        group.master.add_(grad, alpha=-lr)
