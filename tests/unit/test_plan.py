"""The forecast: what it says fits what is run, what cannot fit is refused with the cheapest fix."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from octavo import plan as planning
from octavo.cli.main import load_verb
from octavo.config import Recipe
from octavo.errors import ConfigError, ResourceError
from octavo.training.rehearse import Rehearsal

TINY = {
    "data": {"sources": ["x.txt"]},
    "tokenizer": {"kind": "byte_bpe", "vocab_size": 300},
    "model": {
        "d_model": 32,
        "n_layers": 2,
        "max_seq_len": 32,
        "blocks": {"block": {"mixer": {"n_heads": 2, "kind": "attention"}}},
    },
    "train": {"steps": 10, "step_tokens": 128, "compile": "off", "valid_batches": 0},
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("some text\n" * 100)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def test_a_line_through_two_depths():
    found = Rehearsal("fp32", 1, 4, gradient={1: 1.5, 2: 2.0}, update={1: 0.1, 2: 0.2})
    assert found.at(found.gradient, 8) == pytest.approx(5.0)
    assert found.at(found.update, 2) == 0.2
    slower = Rehearsal("fp32", 1, 4, gradient={1: 1.5, 2: 1.0})
    assert slower.at(slower.gradient, 50) == 1.5  # never below what was measured with fewer layers


def test_time_is_made_of_what_was_measured(recipe, monkeypatch):
    def measured(model, train, rows, seq_len, budget):
        assert (rows, seq_len, model.vocab_size) == (2, 32, 300)
        return Rehearsal("fp32", 2, 2, {"fp32 x 2": 1e12}, {1: 0.25, 2: 0.5}, {2: 0.125}, {2: 10})

    monkeypatch.setattr(planning, "measure", measured)
    made = planning.plan(Recipe.load(str(recipe), ["train.micro_batch_rows=2"]))
    assert made.seconds == pytest.approx(10 * (2 * 0.5 + 0.125), rel=1e-6)
    assert made.tokens_per_second == pytest.approx(128 / 1.125)
    assert made.choices() == {"precision": "fp32", "threads": 2, "compile": "off"}


def test_compilation_leaves_products_and_is_paid_once(recipe, monkeypatch):
    flops = planning.cost(
        planning.build(planning.model_of(Recipe.load(str(recipe), [])), device="meta"), 32
    ).train_flops
    rate = 4 * flops  # so that the products of the four rows take one second

    def measured(*_):
        return Rehearsal("fp32", 1, 4, {"fp32 x 1": rate}, {2: 3.0}, {2: 0.0}, {2: 4 * flops})

    monkeypatch.setattr(planning, "measure", measured)
    made = planning.plan(Recipe.load(str(recipe), ["train.compile=step"]))
    assert made.tokens_per_second == pytest.approx(128 / 2.0)
    assert made.seconds == pytest.approx(20 + 25 + 2 * 3)
    monkeypatch.setattr(planning, "compile_works", lambda: "")
    assert planning.plan(Recipe.load(str(recipe), ["train.compile=auto"])).compile == "off"
    assert planning.plan(Recipe.load(str(recipe), ["train.compile=auto", "train.steps=100"])).compile == "step"


def test_what_cannot_fit_is_refused_with_the_cheapest_fix(recipe, monkeypatch, capsys):
    monkeypatch.setattr(planning, "measure", lambda *_: pytest.fail("nothing is measured of a run that cannot be"))
    big = ["train.step_tokens=1048576", "model.max_seq_len=1024", "train.micro_batch_rows=null"]
    loaded = Recipe.load(str(recipe), big)
    whole = planning.training_bytes(planning.model_of(loaded), loaded.train, "fp32").total
    monkeypatch.setattr(planning, "available_bytes", lambda: whole // 3)
    made = planning.plan(loaded)
    words, needed, price = made.fixes[0]
    rows = int(words.removeprefix("train.micro_batch_rows="))
    assert not made.fits and needed <= whole // 3 and "the same" in price
    twice = loaded.train.model_copy(update={"micro_batch_rows": 2 * rows})
    assert planning.training_bytes(planning.model_of(loaded), twice, "fp32").total > whole // 3  # the largest that fits
    with pytest.raises(ResourceError, match=r"are free.*Fix: train\.micro_batch_rows"):
        load_verb("plan").main([str(recipe), *big], standalone_mode=False)
    assert "would fit" in capsys.readouterr().out


def test_a_short_run_is_not_compiled(recipe, monkeypatch):
    monkeypatch.setattr(planning, "matmul_peak", lambda *_: 1e11)
    assert not planning.compiling_pays(Recipe.load(str(recipe), ["train.compile=auto"]), "pretrain")
    long = ["train.steps=1000000", "train.step_tokens=100000"]
    assert planning.compiling_pays(Recipe.load(str(recipe), long), "pretrain")


@pytest.mark.timeout(120)
def test_the_verb_measures_and_writes_a_recipe_that_loads(recipe, tmp_path, capsys):
    out = tmp_path / "frozen.yaml"
    arguments = [str(recipe), "train.threads=1", "--write", str(out), "--json"]
    load_verb("plan").main(arguments, standalone_mode=False)
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"] and facts["tokens_per_second"] > 0 and facts["bytes"]["weights"] > 0
    frozen = Recipe.load(str(out), [])
    assert frozen.train is not None and frozen.train.precision in ("fp32", "bf16") and frozen.train.threads == 1
    assert frozen.model == Recipe.load(str(recipe), []).model
    with pytest.raises(ConfigError, match="is there already"):
        load_verb("plan").main([str(recipe), "--write", str(out)], standalone_mode=False)


def test_there_must_be_something_to_plan(recipe):
    with pytest.raises(ConfigError, match="no stage 'tune'"):
        planning.plan(Recipe.load(str(recipe), []), "tune")
    assert torch.get_num_threads() >= 1
