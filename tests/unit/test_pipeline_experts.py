"""A recipe with experts, from text to a model that answers: trained, saved, loaded, decoded, shown."""

import json
from pathlib import Path

import pytest
from recipes import tiny_recipe

import octavo
from octavo.cli.main import main
from octavo.metrics_file import read_metrics


@pytest.mark.rows("M3", "M5")
def test_octavo_train_runs_a_recipe_with_experts(tmp_path):
    import yaml

    channel = {"kind": "moe", "n_experts": 4, "d_ff": 16, "selection_bias": True, "score": "sigmoid",
               "balance": "sequence", "capacity_factor": 1.0, "n_shared_experts": 1}  # fmt: skip
    block = {"mixer": {"n_heads": 2}, "channel": channel}
    raw = tiny_recipe(tmp_path, model={"blocks": {"block": block}, "n_layers": 2})
    recipe, folder = tmp_path / "experts.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(raw))
    assert main(["train", str(recipe), "--out", str(folder)]) == 0
    for stage in ("pretrain", "tune"):
        rows = [row for row in read_metrics(folder / stage / "metrics.jsonl") if row["kind"] == "train"]
        assert all(len(row["moe.load.1"]) == 4 and row["loss.balance"] > 0 and "dropped" in row for row in rows)
    page = (folder / "report.html").read_text()
    assert "Experts: load at the end" in page and "Experts: choices dropped" in page
    assert json.loads((folder / "model" / "config.json").read_text())["model_type"] == "octavo"
    lm = octavo.load(folder)
    assert isinstance(lm.generate([{"role": "user", "content": "Say 3."}], max_new_tokens=5), str)
    bias = {name: p for name, p in lm.model.named_parameters() if name.endswith("selection_bias")}
    assert len(bias) == 2 and all(p.abs().max() > 0 for p in bias.values())


def test_impossible_experts_are_refused_before_anything_is_done(tmp_path: Path, capsys):
    import yaml

    block = {"mixer": {"n_heads": 2}, "channel": {"kind": "moe", "n_experts": 4, "experts_per_token": 5}}
    recipe = tmp_path / "experts.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tmp_path, model={"blocks": {"block": block}})))
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "experts_per_token = 5 is above n_experts = 4" in capsys.readouterr().err
