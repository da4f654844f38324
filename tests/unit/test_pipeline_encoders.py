"""Runs of encoders and classifiers, small: hidden tokens, then labels, also on a decoder; figures at the end."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import octavo
from octavo import feed
from octavo.config import Recipe
from octavo.errors import ConfigErrors
from octavo.eval.classes import accuracy, judge, macro_f1
from octavo.hub.folder import read_config
from octavo.models.heads import ClassesConfig
from octavo.models.override import carried_over, with_classes
from octavo.training.progress import Console

BLOCK = {"mixer": {"kind": "attention", "n_heads": 2}, "channel": {"kind": "mlp", "activation": "gelu", "bias": True}}
BERT = {
    "causal": False, "d_model": 32, "n_layers": 2, "max_seq_len": 48, "norm": {"kind": "layernorm", "eps": 1e-12},
    "positions": "learned", "n_token_types": 2, "embed_norm": True, "final_norm": False, "head_bias": True,
    "head_transform": {"activation": "gelu"},
    "blocks": {"block": {
        "mixer": {**BLOCK["mixer"], "qkv_bias": True, "o_bias": True}, "channel": BLOCK["channel"],
        "norm_placement": "post"}},
}  # fmt: skip
DECODER = {"d_model": 32, "n_layers": 2, "max_seq_len": 48, "blocks": {"block": BLOCK}}
STEPS = {"steps": 12, "step_tokens": 768, "precision": "fp32", "compile": "off", "threads": 1, "valid_every": 6,
         "save_every": 12, "schedule": {"kind": "linear", "warmup": 2}, "optimizer": {"lr": 5e-3}}  # fmt: skip
WORDS = ["good", "fine", "bad", "poor"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("texts"), random.Random(1)
    rows = [(generator.choice(WORDS[:2] if i % 2 else WORDS[2:]), i % 2) for i in range(240)]
    lines = [{"text": f"it is a {word} thing", "text_b": "so it is said", "label": "np"[k]} for word, k in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pool = [f"{a}{b}" for a in "bdfgklmn" for b in ("a", "el", "ir", "om", "un")]
    for i in range(12):  # no two alike, or they would be left out as doubles
        (folder / f"{i}.txt").write_text(
            " ".join(generator.choices(pool, k=80)) + " it is a good bad fine poor thing so said"
        )
    return folder


def recipe(files: Path, model: dict, **sections) -> Recipe:
    masked = not model.get("causal", True)
    train = {**STEPS, **({"objective": "masked"} if masked else {})}
    return Recipe.parse({
        "data": {"sources": [str(files / "*.txt")], "split": {"held_out": 0.2}}, "eval": {"orders": []},
        "tokenizer": {"kind": "word", "vocab_size": 100}, "model": model, "train": train, **sections,
    })  # fmt: skip


def run(made: Recipe, folder: Path):
    return octavo.train(made, out=folder, console=Console("quiet"), workers=1)


@pytest.fixture(scope="module")
def encoder(files, tmp_path_factory) -> Path:
    return run(recipe(files, BERT), tmp_path_factory.mktemp("encoder") / "run").path


@pytest.mark.rows("A1")
def test_an_encoder_is_trained_scored_and_written_as_bert(encoder):
    scores = json.loads((encoder / "scores.json").read_text())
    assert scores["masked"]["tokens"] > 20 and 0 < scores["masked"]["nats_per_token"] < 5
    assert "model" not in scores
    assert read_config(encoder / "model")["architectures"] == ["BertForMaskedLM"]
    lm = octavo.load(encoder)
    assert lm.tokenizer.special.mask == lm.tokenizer.vocab_size - 1
    shown = feed.look(Recipe.load(encoder / "recipe.yaml"), encoder, "pretrain", n=2)
    assert any("<|mask|>|" in token.special for row in shown.rows for part in row.parts for token in part.tokens)
    held = feed.of_stage(Recipe.load(encoder / "recipe.yaml"), encoder, "pretrain").valid
    assert held.static


@pytest.mark.rows("A2")
@pytest.mark.parametrize("start", ["encoder", "decoder"])
def test_classes_are_learnt_on_either(start, encoder, files, tmp_path):
    """The words decide: after a few dozen steps an encoder's first and a decoder's last token tell the classes."""
    base = encoder if start == "encoder" else run(recipe(files, DECODER), tmp_path / "decoder").path
    data = {"kind": "labelled", "paths": [str(files / "rows.jsonl")]}
    tune = {**STEPS, "steps": 100, "held_out": 0.2, "data": data, "optimizer": {"lr": 2e-3}}
    made = Recipe.parse({"model": {"kind": "pretrained", "path": str(base)}, "tune": tune})
    assert made.tune.objective.kind == "classes"
    folder = run(made, tmp_path / "run").path
    scores = json.loads((folder / "scores.json").read_text())["classes"]
    assert scores["texts"] == 48 and scores["classes"] == ["n", "p"]
    assert scores["accuracy"] > 0.9 and scores["interval_95"][0] <= scores["accuracy"] <= scores["interval_95"][1]
    lm = octavo.load(folder)
    assert lm.model.config.classes.labels == ("n", "p")
    assert lm.model.config.classes.pooling == ("first" if start == "encoder" else "last")
    said = lm.classify(["it is a good thing", "it is a poor thing"], ["so it is said"] * 2).argmax(1)
    assert said.tolist() == [1, 0]
    if start == "encoder":
        config = read_config(folder / "model")
        assert config["architectures"] == ["BertForSequenceClassification"] and config["id2label"]["1"] == "p"
        again = Recipe.parse({"model": {"kind": "pretrained", "path": str(folder)}, "tune": {**tune, "steps": 4}})
        rows = feed.of_stage(again, folder, "tune")
        assert "token_types" in rows.source.batch(0) and rows.classes == ("n", "p")
        shown = feed.look(again, folder, "tune", n=1)
        assert shown.noun == "text" and "label" in shown.rows[0].parts[0].origin


@pytest.mark.rows("A2")
def test_one_recipe_from_hidden_tokens_to_classes(files, tmp_path):
    data = {"kind": "labelled", "paths": [str(files / "rows.jsonl")], "pooling": "mean"}
    tune = {**STEPS, "data": data, "held_out": 0.2}
    folder = run(recipe(files, BERT, tune=tune), tmp_path / "run").path
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["masked"]["tokens"] and scores["classes"]["texts"] == 48
    assert octavo.load(folder).model.config.classes.pooling == "mean"


WRONG = [
    ({"train": {**STEPS, "objective": "masked"}, "model": DECODER}, "use model.causal=false"),
    ({"train": STEPS, "model": BERT}, "use train.objective.kind=masked"),
    ({"train": {**STEPS, "objective": "classes"}, "model": DECODER}, "tune.data.kind=labelled"),
]


@pytest.mark.parametrize(("sections", "said"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_what_does_not_go_together_is_refused(sections, said):
    with pytest.raises(ConfigErrors, match=said):
        Recipe.parse({"data": {"sources": ["x"]}, **sections})
    labelled = {"data": {"kind": "labelled", "paths": ["x"]}, "objective": "causal"}
    with pytest.raises(ConfigErrors, match="does not go with data labelled"):
        Recipe.parse({"model": {"kind": "pretrained", "path": "x"}, "tune": labelled})


def test_weights_are_carried_over_but_for_a_new_head(encoder):
    model = octavo.load(encoder).model
    shape = with_classes(model.config, ClassesConfig(n_classes=4))
    made = carried_over(model, shape)
    assert shape.head_transform is None and not shape.head_bias
    own, given = made.state_dict(), model.state_dict()
    assert {name for name in own if name not in given} == {"classes.out.weight", "classes.out.bias"}
    assert all((own[name] == given[name]).all() for name in own if name in given)
    again = carried_over(made, shape)
    assert (again.classes.out.weight == made.classes.out.weight).all()


def test_figures_of_classes_by_hand():
    import numpy as np

    given, said = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 0, 1, 1, 2, 0])
    assert accuracy(given, said) == pytest.approx(4 / 6)
    assert macro_f1(given, said) == pytest.approx((2 * 2 / 6 + 2 * 1 / 3 + 2 * 1 / 3) / 3)
    scores = np.eye(3)[said]
    found = judge(given, scores, ("a", "b", "c"), "single_label")
    assert found["accuracy"] == pytest.approx(4 / 6) and found["majority_accuracy"] == 0.5
    several = judge(np.array([[1, 0], [1, 1]]), np.array([[2.0, -1.0], [1.0, -1.0]]), ("a", "b"), "multi_label")
    assert several["accuracy"] == 0.5 and several["macro_f1"] == pytest.approx(0.5)
    numbers = judge(np.array([[1.0], [2.0]]), np.array([[1.0], [4.0]]), ("a",), "regression")
    assert numbers["mean_squared_error"] == 2.0
