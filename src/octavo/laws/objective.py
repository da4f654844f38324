"""Laws of objectives: a sum and a weight, so that any split of a batch is the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from octavo.batch import Batch
from octavo.laws.result import LawResult, require, require_close, verdict
from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build


@dataclass
class Trial:
    """An objective on a small float64 model, with a batch whose rows weigh differently."""

    objective: Any
    model: nn.Module
    batch: Batch

    def loss(self, batch: Batch) -> Tensor:
        outputs = self.model(batch.inputs(), needs=(*self.objective.needs, *self.objective.training_needs))
        return self.objective.loss_sum(outputs, batch) + sum(self.objective.beside(outputs, batch).values())

    def gradient(self, rows: int) -> tuple[Tensor, Tensor]:
        """The loss and the whole gradient, computed ``rows`` rows at a time."""
        self.model.zero_grad()
        total = self.objective.weight(self.batch)
        losses = []
        for part in self.batch.split(rows):
            loss = self.loss(part) / total
            loss.backward()
            losses.append(loss.detach())
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.model.parameters()]
        return torch.stack(losses).sum(), torch.cat([g.flatten() for g in grads])


def uneven_batch(vocab_size: int, rows: int = 6, n: int = 8, seed: int = 0) -> Batch:
    """Packed rows (rows, n) with float64 masks: prompts that do not count, padding, one row without any target."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(vocab_size, (rows, n + 1), generator=generator)
    lengths = torch.tensor([n, 2, n - 1, 3, n, 1])[torch.arange(rows) % 6]
    order = torch.arange(n).expand(rows, n)
    valid = order < lengths[:, None]
    mask = valid & (torch.rand(rows, n, generator=generator) < 0.7)
    mask[0, 0], mask[3] = True, False
    doc_ids = torch.where(valid, (order >= 4).long(), -1)
    return Batch(text[:, :-1], text[:, 1:], mask.double(), doc_ids, order % 4, valid)


def accumulation(trial: Trial) -> None:
    """k micro-batches give the loss and gradient of one, to rounding in float64."""
    loss, gradient = trial.gradient(trial.batch.rows)
    for rows in (1, 2, 4):
        part_loss, part_gradient = trial.gradient(rows)
        require_close(part_loss, loss, f"loss, {rows} rows at a time", 1e-12)
        require_close(part_gradient, gradient, f"gradient, {rows} rows at a time", 1e-12)


def weight(trial: Trial) -> None:
    """The weight is a sum over rows, and needs no model."""
    parts = torch.stack([trial.objective.weight(part) for part in trial.batch.split(1)])
    require_close(parts.sum(), trial.objective.weight(trial.batch), "weights of the rows", 1e-12)


def masked(trial: Trial) -> None:
    """What stands where the mask is zero is never learnt: the loss stays, and no gradient reaches the outputs."""
    batch = trial.batch
    other = torch.where(batch.loss_mask == 0, (batch.targets + 1) % trial.model.vocab_size, batch.targets)  # type: ignore[operator]
    with torch.no_grad():
        changed = trial.loss(replace(batch, targets=other))
        require_close(changed, trial.loss(batch), "other targets behind the mask", 1e-12)
    outputs = trial.model(batch.inputs(), needs=("logits",))
    logits = outputs.logits.detach().requires_grad_()
    loss = trial.objective.loss_sum(replace(outputs, logits=logits), batch)
    (gradient,) = torch.autograd.grad(loss, logits)
    require(bool((gradient[batch.loss_mask == 0] == 0).all()), "masked outputs get a gradient")
    require(bool((gradient[batch.loss_mask != 0] != 0).any(-1).all()), "outputs that count get no gradient")


def empty(trial: Trial) -> None:
    """A batch where nothing counts weighs zero and adds zero."""
    nothing = replace(trial.batch, loss_mask=torch.zeros_like(trial.batch.loss_mask))
    require(float(trial.objective.weight(nothing)) == 0, "nothing counts, yet it weighs something")
    require(float(trial.loss(nothing).detach()) == 0, "nothing counts, yet there is a loss")


LAWS: dict[str, Callable[[Trial], None]] = {
    "accumulation": accumulation,
    "weight": weight,
    "masked": masked,
    "empty": empty,
}


def check_objective(
    objective: Any, *, model: nn.Module | None = None, batch: Batch | None = None, masks_tokens: bool = True
) -> list[LawResult]:
    """Every law of objectives on ``objective``.

    Args:
        objective: an ``octavo.objectives.contract.Objective``.
        model: in float64; by default a small decoder with random weights.
        batch: for objectives that need more than tokens and a mask.
        masks_tokens: False for an objective that does not read ``loss_mask`` token by token.
    """
    if model is None:
        block = {"mixer": {"kind": "attention", "n_heads": 2}}
        model = build(Decoder.Config.model_validate(
            {"d_model": 8, "n_layers": 1, "vocab_size": 13, "max_seq_len": 16, "blocks": {"block": block}}
        )).double()  # fmt: skip
        randomise(model, 1)  # type: ignore[arg-type] - it was just built
    trial = Trial(objective, model, batch or uneven_batch(model.vocab_size))  # type: ignore[arg-type]
    return [
        verdict(name, law, trial, asked=masks_tokens or name not in ("masked", "empty")) for name, law in LAWS.items()
    ]
