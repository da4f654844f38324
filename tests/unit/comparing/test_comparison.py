"""Comparisons: what is shared, what differs, what is kept, and the figures of several seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipes import tiny_recipe, write_texts

from octavo.cli.main import main
from octavo.comparing import page
from octavo.comparing.bench import Bench
from octavo.comparing.result import Interval, Result, Row
from octavo.comparing.settings import Budget, Comparison, ablation, merged, names
from octavo.config import Recipe
from octavo.errors import ConfigError, ConfigErrors, StopRequested
from octavo.language_model import load
from octavo.stop import StopSignal
from octavo.training.progress import Console


def base_of(folder: Path) -> dict:
    recipe = tiny_recipe(folder)
    return {key: recipe[key] for key in ("data", "tokenizer", "model", "train")} | {"eval": {"max_bytes": 2000}}


def comparison_of(folder: Path, **settings) -> Comparison:
    values = {
        "name": "small",
        "base": base_of(folder),
        "budget": {"tokens": 8 * 128},
        "seeds": [1, 2],
        "looks": 2,
        "models": {
            "plain": {},
            "wide": {"model": {"d_model": 24}},
            "unigram": {"train": None, "model": {"kind": "unigram"}},
        },
    }
    return Comparison.model_validate(values | settings)


def run(comparison: Comparison, folder: Path, **settings) -> list[Row]:
    with StopSignal() as stop:
        return Bench(comparison, folder, Console("quiet"), stop, **settings).run()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    comparison = comparison_of(folder)
    return comparison, folder / "out", run(comparison, folder / "out")


def test_sections_merge_and_another_kind_replaces():
    base = {"model": {"kind": "decoder", "d_model": 8, "norm": {"kind": "rmsnorm", "eps": 1.0}}, "train": {"steps": 3}}
    assert merged(base, {"model": {"d_model": 9}})["model"] == base["model"] | {"d_model": 9}
    assert merged(base, {"model": {"norm": {"kind": "layernorm"}}})["model"]["norm"] == {"kind": "layernorm"}
    assert merged(base, {"model": {"kind": "unigram"}, "train": None}) == {"model": {"kind": "unigram"}, "train": None}
    assert merged({"norm": "layernorm"}, {"norm": "rmsnorm"}) == {"norm": "rmsnorm"}


def test_what_a_budget_is_is_said_once():
    assert str(Budget(tokens=1000)) == "1,000 tokens"
    for values in ({}, {"tokens": 5, "seconds": 1.0}):
        with pytest.raises(ValueError, match="one of seconds, tokens and flops"):
            Budget(**values)


def test_everything_wrong_with_any_model_is_said_with_its_name(tmp_path):
    wrong = {"a": {"model": {"d_modle": 3}}, "b": {"train": {"steps": 0}}}
    with pytest.raises(ConfigErrors) as caught:
        comparison_of(tmp_path, models=wrong).recipes()
    assert "models.a" in str(caught.value) and "d_modle" in str(caught.value) and "models.b" in str(caught.value)


@pytest.mark.parametrize("name", names())
def test_shipped_comparisons_are_of_models_that_can_be_built(name, tmp_path):
    comparison = Comparison.load(name)
    assert len(comparison.recipes()) == len(comparison.models)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ConfigError, match="there is no comparison `era`"):
        Comparison.load("era")


def test_every_model_spends_the_budget_and_the_best_stands_first(bench):
    comparison, _, rows = bench
    assert {row.model for row in rows} == set(comparison.models)
    assert [row.bits.mean for row in rows] == sorted(row.bits.mean for row in rows)
    for row in rows:
        if row.model != "unigram":
            assert {result.tokens for result in row.results} == {8 * 128}
            assert [result.seed for result in row.results] == [1, 2]
            assert len(row.curve) == 2 and row.bits.half is not None
    (unigram,) = next(row for row in rows if row.model == "unigram").results
    assert not unigram.trained and unigram.train_flops == 0


def test_seeds_differ_and_a_training_can_be_made_again(bench, tmp_path):
    _, folder, rows = bench
    first, second = next(row for row in rows if row.model == "plain").results
    assert first.bits_per_byte != second.bits_per_byte
    again = run(comparison_of(tmp_path, models={"plain": {}}, seeds=[2]), tmp_path / "out")
    assert again[0].results[0].bits_per_byte == second.bits_per_byte
    lm = load(folder / "models" / "plain" / "seed-1" / "model")
    assert lm.generate("the ", max_new_tokens=3, temperature=0) is not None


def test_only_what_is_new_is_trained(bench, tmp_path, monkeypatch):
    comparison, folder, rows = bench
    more = comparison.model_copy(update={"models": {**comparison.models, "deep": {"model": {"n_layers": 2}}}})
    made = []
    original = Bench._made
    monkeypatch.setattr(Bench, "_made", lambda self, tasks: made.extend(tasks) or original(self, tasks))
    with_more = run(more, folder)
    assert [(task[1], task[2]) for task in made] == [("deep", 1), ("deep", 2)]
    before = {row.model: row for row in rows}
    assert all(row == before[row.model] for row in with_more if row.model != "deep")
    made.clear()
    run(comparison.model_copy(update={"budget": Budget(tokens=4 * 128)}), folder, only=("plain",))
    assert [(task[1], task[2]) for task in made] == [("plain", 1), ("plain", 2)]


def test_side_by_side_gives_the_same(bench, tmp_path):
    _, _, rows = bench
    comparison = comparison_of(tmp_path, models={"plain": {}, "wide": {"model": {"d_model": 24}}})
    found = run(comparison, tmp_path / "out", jobs=2)
    before = {row.model: [result.bits_per_byte for result in row.results] for row in rows}
    assert {row.model: [result.bits_per_byte for result in row.results] for row in found} == {
        name: before[name] for name in ("plain", "wide")
    }


def test_a_stop_keeps_what_is_done(tmp_path):
    comparison, out = comparison_of(tmp_path, models={"plain": {}}), tmp_path / "out"
    with StopSignal() as stop, pytest.raises(StopRequested):
        bench = Bench(comparison, out, Console("quiet"), stop)
        original = bench._made

        def one(tasks):
            for done in original(tasks):
                yield done
                raise StopRequested("asked to stop")

        bench._made = one
        bench.run()
    assert (out / "models" / "plain" / "seed-1" / "result.json").is_file()
    assert not (out / "models" / "plain" / "seed-2" / "result.json").exists()
    assert len(run(comparison, out)[0].results) == 2


def result(bits: float, seed: int, model: str = "m", **values) -> Result:
    made = {"bytes": 10, "tokens": 100, "entries": 5, "state_bytes": 8, "train_flops": 1e6, "seconds": 2.0}
    return Result("f", model, seed, bits, **(made | values))


def test_the_interval_is_students():
    interval = Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2 and interval.half == pytest.approx(4.303 / 3**0.5)
    assert Interval.of([1.5]) == Interval(1.5, None)


def test_a_damaged_or_other_result_is_made_again(tmp_path):
    path = tmp_path / "result.json"
    made = result(1.5, 1, curve=((10, 2.0), (20, 1.6)), pairs=(3.0, 4))
    made.save(path)
    assert Result.load(path, "f") == made
    assert Result.load(path, "g") is None
    path.write_text("{")
    assert Result.load(path, "f") is None
    assert Result.load(tmp_path / "none", "f") is None


def test_tables_and_drawings_hold_every_model(tmp_path, bench):
    comparison, _, rows = bench
    paths = page.write(rows, comparison, tmp_path)
    assert {path.name for path in paths} == {
        "table.md", "results.json", "tokens.png", "flops.png", "seconds.png", "parameters.png", "state.png"
    }  # fmt: skip
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 2 + len(rows) and "±" in table[2] + table[3] + table[4]
    assert "pairs right" not in table[0]
    plain = json.loads((tmp_path / "results.json").read_text())
    assert [model["model"] for model in plain["models"]] == [row.model for row in rows]
    with_pairs = [Row("m", (result(1.0, 1, pairs=(70.0, 100)), result(1.2, 2, pairs=(60.0, 100))))]
    assert "65.0% (55.3% to 73.6%)" in page.markdown(with_pairs)


def test_an_ablation_is_every_combination(tmp_path):
    recipe = Recipe.parse({**base_of(tmp_path), "name": "r"})
    made = ablation(recipe, [("model.n_layers", [1, 2]), ("train.schedule", [{"kind": "wsd"}, "linear"])], seeds=[1])
    assert list(made.models) == [
        "n_layers=1,schedule=wsd", "n_layers=1,schedule=linear", "n_layers=2,schedule=wsd", "n_layers=2,schedule=linear"
    ]  # fmt: skip
    assert made.recipes()["n_layers=2,schedule=linear"].model.n_layers == 2
    with pytest.raises(ConfigErrors, match="n_layer"):
        ablation(recipe, [("model.n_layer", [1])])


@pytest.mark.rows("G7")
def test_the_command_line_compares_and_ablates(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(
        json.dumps(comparison_of(tmp_path, models={"plain": {}}).model_dump(mode="json", exclude={"budget", "seeds"}))
    )
    text = write_texts(tmp_path / "other.jsonl", seed=3)
    command = ["compare", "small.yaml", "--data", str(text), "--tokens", "512", "--seeds", "1", "--quiet"]
    assert main(command) == 0
    said = capfd.readouterr().out
    assert "512 tokens a model, one seed" in said and "plain" in said
    assert (tmp_path / "runs" / "small" / "tokens.png").is_file()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({**base_of(tmp_path), "name": "r"}))
    assert main(["ablate", str(recipe), "model.n_layers=1,2", "--tokens", "256", "--seeds", "1", "-q"]) == 0
    said = capfd.readouterr().out
    assert "n_layers=1" in said and "n_layers=2" in said
    assert main(["ablate", str(recipe), "model.n_layers"]) == 2
    assert "KEY=A,B,C" in capfd.readouterr().err
    assert main(["compare", "small.yaml", "--tokens", "5", "--seconds", "3"]) == 2
    assert "more than one budget" in capfd.readouterr().err
