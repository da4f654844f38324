"""Experts in training: their losses are trained on, their counts are told, what no gradient moves is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training import first_batch, log_of, packed, tiny, trainer, weights_hash

from octavo.batch import Batch
from octavo.data.loader import Loader
from octavo.errors import StopRequested
from octavo.hub.folder import load_model, save_model
from octavo.metrics_file import read_metrics
from octavo.models.decoder import Decoder
from octavo.training import checkpoint, figures
from octavo.training.loop import Trainer
from octavo.training.optim import moved_by_counts

MOE: dict[str, Any] = {"kind": "moe", "n_experts": 4, "d_ff": 8}
V3: dict[str, Any] = {"score": "sigmoid", "selection_bias": True, "bias_rate": 0.01, "balance": "sequence",
                      "balance_weight": 0.1, "n_shared_experts": 1, "z_loss": 0.01}  # fmt: skip


def experts(dropout: float = 0.1, **moe: Any) -> Decoder:
    block = {"mixer": {"kind": "attention", "n_heads": 2}, "channel": {**MOE, **moe}, "dropout": dropout}
    return tiny(blocks={"block": block})


def lines(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == kind]


# ---------------------------------------------------------------------------------------------- resume


@pytest.mark.rows("M5")
@pytest.mark.parametrize(
    "changes",
    [{}, {"micro_batch_rows": 1}, {"precision": "bf16"}, {"activation_checkpointing": True},
     {"average": {"decay": 0.9}, "optimizer": {"kind": "muon"}}],
    ids=lambda c: "-".join(c) or "plain",
)  # fmt: skip
def test_a_resumed_run_with_experts_is_bitwise_the_uninterrupted_one(tmp_path, changes):
    moe: dict[str, Any] = {**V3, "capacity_factor": 1.0, "dropout": 0.1}
    changes = {"steps": 11, **changes}  # an odd number of moves by one size is not back where it began
    made = trainer(tmp_path / "whole", model=experts(**moe), **changes)
    made.fit()
    for stop in (5, 4):  # steps of this process: at step 5 and at step 9
        with pytest.raises(StopRequested):
            trainer(tmp_path / "part", model=experts(**moe), stop_after=stop, **changes).fit()
    again = trainer(tmp_path / "part", model=experts(**moe), **changes)
    again.fit()
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")
    assert weights_hash(again.model) == weights_hash(made.model)
    assert all(bias.abs().max() > 0 for _, bias in moved_by_counts(made.model))
    assert len(list(moved_by_counts(made.model))) == 2


# -------------------------------------------------------------------------------------- selection bias


@pytest.mark.rows("M5")
def test_the_selection_bias_moves_once_a_step_by_the_loads_of_the_whole_step(tmp_path):
    made = trainer(tmp_path, model=experts(**V3), micro_batch_rows=1)
    expected = {name: torch.zeros(4) for name, _ in moved_by_counts(made.model)}
    for _ in range(3):
        made.train_step()
        for depth, (name, bias) in enumerate(moved_by_counts(made.model)):
            load = made.reported[f"moe.load.{depth}"].float()
            expected[name] += 0.01 * torch.sign(load.mean() - load)
            torch.testing.assert_close(bias, expected[name], rtol=0, atol=0)
    assert {name.rpartition(".")[2] for name in expected} == {"selection_bias"}


@pytest.mark.rows("M5")
def test_the_selection_bias_is_saved_exported_and_loaded(tmp_path):
    made = trainer(tmp_path, model=experts(**V3), steps=5)
    made.fit()
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    saved, _ = checkpoint.load(found.path)
    assert save_model(made.model, tmp_path / "model") == "octavo"  # type: ignore[arg-type]
    loaded = dict(load_model(tmp_path / "model").named_parameters())
    for name, bias in moved_by_counts(made.model):
        assert bias.abs().max() > 0
        assert torch.equal(saved[f"model/{name}"], bias) and torch.equal(loaded[name], bias)
        assert not loaded[name].requires_grad


def test_a_step_that_is_left_out_moves_no_bias(tmp_path):
    made = trainer(tmp_path, model=experts(**V3), on_nan="skip")
    real = made.gradient
    made.gradient = lambda batch: (float("nan"), real(batch)[1])  # type: ignore[method-assign]
    made.train_step()
    assert all(not bias.any() for _, bias in moved_by_counts(made.model))


# ---------------------------------------------------------------------------------------------- losses


def gradients(made: Trainer, batch: Batch) -> dict[str, torch.Tensor]:
    made.optimizer.clear()
    made.gradient(batch)
    return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


def test_losses_of_the_layers_are_trained_on_and_are_not_the_loss(tmp_path):
    batch = first_batch()
    weight = batch.loss_mask.sum()
    moe: dict[str, Any] = {"balance": "switch", "balance_weight": 0.5, "z_loss": 0.1}
    made, bare = (trainer(tmp_path, model=experts(0.0, **more)) for more in (moe, {}))
    made.model.train(), bare.model.train()
    got, plain = gradients(made, batch), gradients(bare, batch)
    assert made.gradient(batch)[0] == bare.gradient(batch)[0], "the reported loss is the objective's"
    made.optimizer.clear()
    aux = made.model(batch.inputs()).aux
    own = [p for _, p in made.model.named_parameters()]
    further = torch.autograd.grad(
        (aux["loss.balance"] + aux["loss.router_z"]) / weight, own, allow_unused=True, materialize_grads=True
    )
    for (name, _), more in zip(made.model.named_parameters(), further, strict=True):
        torch.testing.assert_close(got[name], plain[name] + more, rtol=1e-4, atol=1e-6)
    assert max(float(more.abs().max()) for more in further) > 1e-3
    told = figures.headline(made.reported, float(weight))
    assert told["loss.balance"] == pytest.approx(float(aux["loss.balance"].detach() / weight), rel=1e-5)
    assert made.validate() == bare.validate()


@pytest.mark.rows("M5")
def test_the_sequence_wise_loss_is_that_of_any_split(tmp_path):
    """It adds up over rows; the loss over a batch does not, and is that of the micro-batch."""
    batch = first_batch()
    for balance, adds_up in (("sequence", True), ("switch", False)):
        moe = {"balance": balance, "balance_weight": 1.0}
        one, split = (trainer(tmp_path, model=experts(0.0, **moe), micro_batch_rows=rows) for rows in (None, 3))
        a, b = gradients(one, batch), gradients(split, batch)
        same = all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-6) for name in a)
        assert same == adds_up
        assert torch.equal(one.reported["moe.load.1"], split.reported["moe.load.1"])


# --------------------------------------------------------------------------------------------- figures


def test_the_log_has_load_drops_and_losses_of_each_layer(tmp_path):
    changes = {"log_every": 3, "micro_batch_rows": 2, "valid_every": 100}
    made = trainer(tmp_path, model=experts(**V3, capacity_factor=0.5), **changes)
    made.fit()
    records, loader = lines(tmp_path), Loader(packed(), 4, seed=3)
    assert [record["step"] for record in records] == [3, 6, 9, 12]
    for record in records:
        tokens = int(loader.batch(record["step"] - 1)["valid"].sum())
        for depth in ("0", "1"):
            load = record[f"moe.load.{depth}"]
            assert len(load) == 4 and all(isinstance(n, int) for n in load)
            assert sum(load) == 2 * tokens, "two choices for each valid token of all micro-batches of the step"
            assert record[f"moe.max_load.{depth}"] == pytest.approx(max(load) / (sum(load) / 4))
            assert 0 < record[f"moe.dropped.{depth}"] < 1
        assert record["max_load"] == max(record["moe.max_load.0"], record["moe.max_load.1"])
        assert record["loss.balance"] > 0 and record["loss.router_z"] > 0
    json.dumps(records)
    assert set(lines(tmp_path, "valid")[-1]) == {"kind", "step", "tokens_seen", "loss", "bits_per_byte"}


def test_the_console_names_the_busiest_expert_and_what_was_dropped(tmp_path, capsys):
    from octavo.training.progress import Console

    made = trainer(tmp_path, model=experts(balance="switch", capacity_factor=0.5), steps=3)
    made.held.console = Console("plain", interval_seconds=0.0)
    made.fit()
    shown = capsys.readouterr().err
    assert "busiest expert" in shown and "dropped" in shown and "balance loss" in shown


def test_a_model_without_experts_reports_nothing_more(tmp_path):
    made = trainer(tmp_path, steps=3)
    made.fit()
    assert made.reported == {} and not any("moe" in name or "load" in name for name in lines(tmp_path)[-1])


@pytest.mark.rows("M4")
def test_a_collapsed_router_stays_so_without_balance_and_spreads_with_it(tmp_path):
    """All tokens begin at one of four experts, which is then the only one that learns to be worth choosing."""
    ways: dict[str, dict[str, Any]] = {
        "none": {},
        "switch": {"balance": "switch", "balance_weight": 0.3},
        "bias": {"selection_bias": True, "bias_rate": 0.02},
    }
    begin, end = {}, {}
    for name, moe in ways.items():
        model = experts(0.0, experts_per_token=1, normalise=False, **moe)
        with torch.no_grad():
            model.embed.weight += 0.05  # a direction that all tokens share
            for part, parameter in model.named_parameters():
                if part.endswith("router.weight"):
                    parameter[0] += 0.05
        made = trainer(tmp_path / name, model=model, steps=40, valid_every=100, save_every=100)
        made.fit()
        loads = [line["max_load"] for line in lines(tmp_path / name)]
        begin[name], end[name] = loads[0], sum(loads[-5:]) / 5
    assert set(begin.values()) == {4.0}
    assert end["none"] > 2.5, "one expert reads most of what four could"
    assert end["switch"] < 1.7 and end["bias"] < 2.0, "1 is even"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_step_with_experts_computes_what_the_eager_step_does(tmp_path):
    told = {}
    for kind in ("off", "step"):
        made = trainer(tmp_path / kind, model=experts(0.0, **V3, capacity_factor=1.0), compile=kind, steps=6)
        made.fit()
        assert made.forward is not made._losses or kind == "off"
        told[kind] = lines(tmp_path / kind)
    for eager, compiled in zip(told["off"], told["step"], strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], abs=1e-4)
        assert compiled["loss.balance"] == pytest.approx(eager["loss.balance"], abs=1e-4)
    assert told["step"][0]["moe.load.0"] == told["off"][0]["moe.load.0"]
