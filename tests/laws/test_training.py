"""Laws of training: any split of a step is the step, and a resumed run is the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo import laws
from octavo.batch import Batch
from octavo.data.loader import Loader
from octavo.data.pack import WholeRows
from octavo.laws.objective import uneven_batch
from octavo.models.decoder import Decoder, build
from octavo.objectives.likelihood import CausalLikelihood
from octavo.stop import StopSignal
from octavo.training.loop import Held, Trainer
from octavo.training.progress import Console
from octavo.training.settings import TrainConfig

V = 17


def packed(n: int = 11, seed: int = 0) -> WholeRows:
    """Rows of 8 with one or two samples each; the first tokens of a sample are its prompt."""
    rng = np.random.default_rng(seed)
    samples = []
    for length in rng.integers(4, 10, n):
        ids = rng.integers(1, V, length)
        samples.append((ids.tolist(), [0, 0, *[1] * (int(length) - 2)]))
    return WholeRows(samples, 8)


def trainer(folder: Path, source, *, seed: int = 3, **values) -> Trainer:
    block = {"mixer": {"kind": "attention", "n_heads": 2, "dropout": values.pop("dropout", 0.0)}, "dropout": 0.0}
    config = {"d_model": 8, "n_layers": 2, "vocab_size": V, "max_seq_len": 8, "blocks": {"block": block}}
    model = build(Decoder.Config.model_validate(config), seed=1)
    settings = {"steps": 8, "precision": "fp32", "compile": "off", "log_every": 1, "valid_batches": 0, "save_every": 3}
    held = Held(folder, "run", Console("quiet"), StopSignal())
    return Trainer(model, source, CausalLikelihood(), TrainConfig(**settings | values), held, seed)


# ---------------------------------------------------------------------------------------------- loaders


@pytest.mark.rows("G2")
@pytest.mark.parametrize("rows", [1, 4, None], ids=["per sample", "mini-batch", "full batch"])
def test_every_law_on_a_loader(rows):
    results = laws.check_loader(Loader(packed(), rows, seed=5), same_rows=True)
    assert [str(result) for result in results] == [f"{name}: holds" for name in
                                                   ("resumed", "partitioned", "shifted", "epochs")]  # fmt: skip


def test_every_law_on_a_mixture():
    loader = Loader([packed(11, 0), packed(7, 1)], 4, seed=5, weights=[1, 3])
    assert not [str(result) for result in laws.check_loader(loader) if not result.ok]


class Remembers:
    """The mistake: an order that comes from a generator with a history."""

    n_rows, rows = 8, 2

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.inner = Loader(packed(), 2, seed=5)

    def prefetch(self, step: int) -> None:
        """Nothing to make ahead."""

    def batch(self, step, rank=0, world=1):
        return self.inner.batch(int(self.rng.integers(100)), rank, world)


def test_a_loader_with_a_history_is_found():
    assert {r.law for r in laws.check_loader(Remembers()) if not r.ok} == {"resumed", "partitioned"}


# --------------------------------------------------------------------------------------------- the loop


@pytest.mark.rows("G1")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_give_the_gradient_of_one_batch(precision, tmp_path):
    """fp32 to 1e-6; in bf16 micro-batches are added in fp32, so only their own rounding differs."""
    batch = uneven_batch(V)
    found = {}
    for rows in (None, 1, 2, 4):
        one = trainer(tmp_path, Loader(packed(), 2), precision=precision, micro_batch_rows=rows)
        loss, norm = one.gradient(batch)
        found[rows] = torch.cat([group.total.clone() for group in one.optimizer.groups]), loss, norm
    gradient, loss, norm = found[None]
    allowed = 1e-6 if precision == "fp32" else 2e-2
    for rows in (1, 2, 4):
        other, other_loss, other_norm = found[rows]
        assert float((other - gradient).norm() / gradient.norm()) < allowed, rows
        assert other_loss == pytest.approx(loss, rel=allowed)
        assert other_norm == pytest.approx(norm, rel=allowed)


@pytest.mark.rows("G2")
def test_the_full_batch_does_not_depend_on_the_order(tmp_path):
    gradients = []
    for seed in (1, 2):
        source = Loader(packed(), None, seed=seed)
        one = trainer(tmp_path, source)
        one.gradient(Batch.from_numpy(source.batch(0)))
        gradients.append(torch.cat([group.total.clone() for group in one.optimizer.groups]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-6


class Killed(Exception):
    pass


class Dies:
    """A source that ends the process, as far as the loop can tell, at one step."""

    def __init__(self, source, step):
        self.source, self.at, self.fingerprint = source, step, source.fingerprint

    def prefetch(self, step: int) -> None:
        """Nothing to make ahead."""

    def batch(self, step):
        if step == self.at:
            raise Killed
        return self.source.batch(step)


def logged(folder: Path) -> list[tuple[int, float, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("killed_at", [2, 5])
def test_a_resumed_run_is_the_run(killed_at, optimizer, tmp_path):
    """Every logged figure and every weight, bit for bit, with dropout and warm-up."""
    source = Loader(packed(), 4, seed=9)
    values = {"dropout": 0.2, "optimizer": {"kind": optimizer, "lr": 0.02, "weight_decay": 0.1},
              "schedule": {"kind": "cosine", "warmup": 2}}  # fmt: skip
    if optimizer == "sgd":
        values["optimizer"]["momentum"] = 0.9
    whole = trainer(tmp_path / "whole", source, **values)
    whole.fit()
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", Dies(source, killed_at), **values).fit()
    resumed = trainer(tmp_path / "killed", source, **values)
    resumed.fit()
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert len(logged(tmp_path / "whole")) == 8
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.rows("G1")
def test_the_logged_rate_is_the_schedule(tmp_path):
    one = trainer(tmp_path, Loader(packed(), 4), optimizer={"kind": "sgd", "lr": 0.5},
                  schedule={"kind": "linear", "warmup": 2, "final": 0.0})  # fmt: skip
    one.fit()
    assert [rate for *_, rate in logged(tmp_path)] == pytest.approx(
        [0.5 * f for f in (1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    )
