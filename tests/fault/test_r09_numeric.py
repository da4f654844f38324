"""NaN and infinity put into losses, activations, gradients, weights and moments: nothing changes, all is replayed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training import Counted, packed, tiny, trainer

from octavo.data.loader import Loader
from octavo.errors import CheckpointError, NumericError
from octavo.objectives.likelihood import CausalLikelihood
from octavo.training import checkpoint
from octavo.training.loop import Trainer
from octavo.training.replay import replay

STEP = 5
LAYER = "blocks.0.layers.mixer.mixer"


class Switch:
    """Whether the injection acts now: in the run at one step, in a replay always."""

    on = False
    calls = 0


class Watched(Counted):
    """A source that turns the injection on at one step."""

    def __init__(self, switch: Switch):
        super().__init__(Loader(packed(), 4, seed=3))
        self.switch = switch

    def batch(self, step: int) -> dict[str, Any]:
        self.switch.on, self.switch.calls = step == STEP, 0
        return super().batch(step)


def into_loss(value: float) -> Callable[[Trainer, Switch], None]:
    def inject(made: Trainer, switch: Switch) -> None:
        class Sour(CausalLikelihood):
            def loss_sum(self, outputs, batch):
                return super().loss_sum(outputs, batch) + (value if switch.on else 0.0)

        made.objective = Sour()

    return inject


def into_activation(module: str, value: float) -> Callable[[Trainer, Switch], None]:
    def spoil(output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        mark = torch.zeros_like(tensor)
        mark.view(-1)[7] = value
        return (tensor + mark, *output[1:]) if isinstance(output, tuple) else tensor + mark

    def inject(made: Trainer, switch: Switch) -> None:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            return spoil(output) if switch.on else output

        made.model.get_submodule(module).register_forward_hook(hook)

    return inject


def into_gradient(name: str, value: float, micro_batches: int = 1) -> Callable[[Trainer, Switch], None]:
    """Only the gradient of the last micro-batch is spoiled."""

    def inject(made: Trainer, switch: Switch) -> None:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            switch.calls += 1
            if not switch.on or switch.calls % micro_batches:
                return gradient
            spoiled = gradient.clone()
            spoiled.view(-1)[3] = value
            return spoiled

        made.model.get_parameter(name).register_hook(hook)

    return inject


def into_weight(name: str, value: float) -> Callable[[Trainer, Switch], None]:
    def inject(made: Trainer, switch: Switch) -> None:
        def hook(*_: Any) -> None:
            if switch.on:
                made.model.get_parameter(name).data.view(-1)[2] = value

        made.model.register_forward_pre_hook(hook)

    return inject


INJECTIONS: dict[str, tuple[Callable[[Trainer, Switch], None], dict[str, Any], str]] = {
    # name: (injection, settings, what the replay must name)
    "loss NaN": (into_loss(math.nan), {}, "step 5: loss nan"),
    "loss inf": (into_loss(math.inf), {}, "step 5: loss inf"),
    "loss -inf": (into_loss(-math.inf), {"micro_batch_rows": 1}, "step 5: loss -inf"),
    "activation NaN": (into_activation(LAYER, math.nan), {}, f"the output of {LAYER}"),
    "activation inf": (into_activation("norm", math.inf), {"micro_batch_rows": 2}, "the output of norm"),
    "gradient NaN": (into_gradient("embed.weight", math.nan), {}, "gradients not finite: embed.weight"),
    "gradient inf": (into_gradient("norm.weight", math.inf), {}, "gradients not finite: norm.weight"),
    "gradient NaN in the last micro-batch": (
        into_gradient(f"{LAYER}.q.weight", math.nan, micro_batches=4),
        {"micro_batch_rows": 1},
        f"gradients not finite: {LAYER}.q.weight",
    ),
    "gradient -inf in bf16": (
        into_gradient(f"{LAYER}.o.weight", -math.inf),
        {"precision": "bf16"},
        f"gradients not finite: {LAYER}.o.weight",
    ),
    "gradient NaN with recomputing": (
        into_gradient(f"{LAYER}.v.weight", math.nan),
        {"activation_checkpointing": True},
        f"gradients not finite: {LAYER}.v.weight",
    ),
    "weight NaN": (into_weight("norm.weight", math.nan), {}, "not finite before the step: norm.weight"),
    "weight inf": (into_weight(f"{LAYER}.k.weight", math.inf), {}, f"not finite before the step: {LAYER}.k.weight"),
}


def tried(folder: Path, name: str, policy: str) -> list[str]:
    """What went wrong with one injection."""
    inject, settings, named = INJECTIONS[name]
    wrong: list[str] = []

    def make(where: Path, switch: Switch) -> Trainer:
        made = trainer(where, model=tiny(), source=Watched(switch), on_nan=policy, save_every=2, steps=7, **settings)
        inject(made, switch)
        return made

    switch = Switch()
    made = make(folder, switch)
    before: dict[str, torch.Tensor] = {}
    real = made.gradient

    def gradient(batch: Any) -> tuple[float, float]:
        if made.step == STEP:
            before.update({name: tensor.clone() for name, tensor in made.optimizer.tensors()})
        return real(batch)

    made.gradient = gradient  # type: ignore[method-assign]
    spoils_weights = name.startswith("weight")
    try:
        made.fit()
        if policy == "stop" or (spoils_weights and policy == "skip"):
            wrong.append("went on")
    except NumericError as error:
        if policy == "rollback" or (policy == "skip" and not spoils_weights):
            wrong.append(f"stopped: {error}")
        if error.exit_code != 5 or f"at step {STEP}" not in str(error) or "octavo replay" not in str(error):
            wrong.append(str(error))
        for tensor, held in made.optimizer.tensors():
            if not spoils_weights and not torch.equal(held, before[tensor]):
                wrong.append(f"{tensor} changed")
    kept = folder / "nan" / f"step-{STEP:08d}"
    tensors, state = checkpoint.load(kept)
    for saved in (folder / "checkpoints").iterdir():
        if not all(t.isfinite().all() for t in checkpoint.load(saved)[0].values()):
            wrong.append(f"{saved.name} holds numbers that are not finite")

    again, without = Switch(), Switch()
    again.on = True
    came = replay(make(folder / "again", again), tensors, state)
    if not came.reproduces or came.is_finite:
        wrong.append(f"replay gave {came}")
    if not any(named in line for line in came.lines()):
        wrong.append(f"replay says {came.lines()}, not {named}")
    clean = make(folder / "clean", without)
    if not spoils_weights and not (found := replay(clean, tensors, state)).is_finite:
        wrong.append(f"without the injection the replay gave {found}")
    return [f"{name}, {policy}: {text}" for text in wrong]


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_twelve_injections(tmp_path, record, policy):
    wrong = []
    for i, name in enumerate(INJECTIONS):
        wrong += tried(tmp_path / str(i), name, policy)
    assert len(INJECTIONS) == 12
    record("R9", len(INJECTIONS), wrong, policy=policy)


def test_a_moment_that_is_not_finite_is_found_before_the_first_step(tmp_path, record):
    made = trainer(tmp_path, save_every=3, steps=6)
    made.fit()
    tensors, state = checkpoint.load(tmp_path / "checkpoints" / "step-00000006")
    wrong = []
    names = sorted(name for name in tensors if name.startswith("optimizer/"))[::5]
    for name in names:
        spoiled = {**tensors, name: tensors[name].clone()}
        spoiled[name].view(-1)[0] = math.nan
        checkpoint.save(tmp_path / "checkpoints", 7, spoiled, {**state, "step": 7}, run_id="other", keep=1)
        again = trainer(tmp_path, steps=9)
        try:
            again.fit()
            wrong.append(f"{name} was taken")
        except CheckpointError as error:
            if name not in str(error):
                wrong.append(str(error))
        if again.step:
            wrong.append(f"a step was taken with {name}")
    record("R9", len(names), wrong, what="moments at resume")
