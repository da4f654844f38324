"""Runs that tag words: an encoder and a decoder learn them, figures at the end, and what the model then says."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from test_pipeline_encoders import BERT, DECODER, STEPS, recipe, run
from typer.testing import CliRunner

import octavo
from octavo import feed
from octavo.cli.classify import app
from octavo.cli.main import main
from octavo.config import Recipe
from octavo.errors import ConfigErrors, UnsupportedError
from octavo.hub.folder import read_config, read_tensors

FIRST, LAST, TOWN, REST = (
    ["anna", "bo", "eva"],
    ["wolff", "berg"],
    ["oslo", "ulm"],
    ["lives", "in", "sings", "and", "the"],
)


def sentence(generator: random.Random) -> tuple[list[str], list[str]]:
    words, tags = [], []
    for _ in range(generator.randrange(2, 6)):
        kind = generator.randrange(3)
        if kind == 0:
            words += [generator.choice(FIRST), generator.choice(LAST)]
            tags += ["B-PER", "I-PER"]
        elif kind == 1:
            words.append(generator.choice(TOWN))
            tags.append("B-LOC")
        words.append(generator.choice(REST))
        tags.append("O")
    return words, tags


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("tagged"), random.Random(1)
    made = [sentence(generator) for _ in range(240)]
    columns = ("".join(f"{w} x {t}\n" for w, t in zip(words, tags, strict=True)) for words, tags in made)
    (folder / "names.conll").write_text("\n".join(columns))
    for i in range(12):  # no two alike, or they would be left out as doubles
        (folder / f"{i}.txt").write_text(" ".join(" ".join(words) for words, _ in generator.sample(made, 12)))
    return folder


def tuned(files: Path, base: Path, out: Path, **data) -> Path:
    data = {"kind": "tagged", "paths": [str(files / "names.conll")], **data}
    tune = {**STEPS, "steps": 60, "held_out": 0.2, "data": data, "optimizer": {"lr": 5e-3}}
    made = Recipe.parse({"model": {"kind": "pretrained", "path": str(base)}, "tune": tune})
    assert made.tune is not None and made.tune.objective.kind == "classes"
    return run(made, out).path


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def tagger(request, files, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    base = run(recipe(files, BERT if request.param == "encoder" else DECODER), folder / "base").path
    how = {} if request.param == "encoder" else {"pieces": "last"}
    return request.param, tuned(files, base, folder / "run", **how)


@pytest.mark.rows("A2")
def test_tags_are_learnt_on_either(tagger, files):
    start, folder = tagger
    scores = json.loads((folder / "scores.json").read_text())["tags"]
    assert scores["sentences"] == 48 and scores["classes"] == ["O", "B-LOC", "B-PER", "I-PER"]
    assert scores["accuracy"] > 0.95 and scores["spans"]["f1"] > 0.9
    assert scores["spans"]["f1_interval_95"][0] <= scores["spans"]["f1"] <= scores["spans"]["f1_interval_95"][1]
    assert scores["majority_accuracy"] < 0.6 and set(scores["types"]) == {"LOC", "PER"}
    lm = octavo.load(folder)
    head = lm.model.config.classes
    assert head.over == "token" and head.labels == ("O", "B-LOC", "B-PER", "I-PER")
    said = lm.tag([["anna", "berg", "lives", "in", "ulm"], ["the", "oslo"]])
    assert said == [["B-PER", "I-PER", "O", "O", "B-LOC"], ["O", "B-LOC"]]
    long = ["anna", "berg", "sings"] * 40  # more than the model reads at once
    assert len(long) > lm.max_seq_len and lm.tag([long, []]) == [["B-PER", "I-PER", "O"] * 40, []]
    with pytest.raises(UnsupportedError, match="no classes of texts"):
        lm.classify(["anna"])
    if start == "encoder":
        assert read_config(folder / "model")["architectures"] == ["BertForTokenClassification"]
    else:
        assert not any("head." in name for name in read_tensors(folder / "model"))


@pytest.mark.rows("A2")
def test_a_tagger_goes_on_with_its_own_head_and_shows_its_rows(tagger, files):
    _, folder = tagger
    data = {"kind": "tagged", "paths": [str(files / "names.conll")]}
    tune = {**STEPS, "steps": 4, "held_out": 0.2, "data": data}
    again = Recipe.parse({"model": {"kind": "pretrained", "path": str(folder)}, "tune": tune})
    from octavo.models.override import carried_over, head_for, with_classes

    model = octavo.load(folder).model
    head = head_for(model.config, ("O", "B-LOC", "B-PER", "I-PER"), "single_label", over="token")
    assert head == model.config.classes
    assert (carried_over(model, with_classes(model.config, head)).classes.out.weight == model.classes.out.weight).all()
    assert head_for(model.config, ("a", "b"), "single_label").over == "sequence"
    shown = feed.look(again, folder, "tune", n=1)
    assert "names.conll:" in shown.rows[0].parts[0].origin and "/O" in shown.rows[0].parts[0].origin


@pytest.mark.rows("A2")
def test_classify_tags_lines_lists_and_columns(tagger, tmp_path, capsys):
    _, folder = tagger
    found = CliRunner().invoke(app, [str(folder)], input="anna wolff sings\noslo\n")
    assert [json.loads(line) for line in found.stdout.splitlines()] == [
        {"tokens": ["anna", "wolff", "sings"], "tags": ["B-PER", "I-PER", "O"]},
        {"tokens": ["oslo"], "tags": ["B-LOC"]},
    ]
    (tmp_path / "in.jsonl").write_text('{"tokens": ["eva", "berg"]}\n{"tokens": "in oslo"}\n')
    assert main(["classify", str(folder), str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.conll")]) == 0
    assert (tmp_path / "out.conll").read_text() == "eva\tB-PER\nberg\tI-PER\n\nin\tO\noslo\tB-LOC\n"
    (tmp_path / "in.jsonl").write_text('{"words": ["eva"]}\n')
    assert main(["classify", str(folder), str(tmp_path / "in.jsonl")]) == 3
    assert "no object with a text 'tokens'" in capsys.readouterr().err


def test_what_does_not_go_with_tags_is_refused(files):
    data = {"kind": "tagged", "paths": ["x"]}
    with pytest.raises(ConfigErrors, match="does not go with data tagged"):
        Recipe.parse({"model": {"kind": "pretrained", "path": "x"}, "tune": {"data": data, "objective": "causal"}})
    with pytest.raises(ConfigErrors, match=r"objective\.problem = multi_label"):
        wrong = {"kind": "classes", "problem": "multi_label"}
        Recipe.parse({"model": {"kind": "pretrained", "path": "x"}, "tune": {"data": data, "objective": wrong}})


def test_classify_says_what_is_missing(files, tmp_path, capsys):
    base = run(recipe(files, DECODER), tmp_path / "base").path
    (tmp_path / "in.txt").write_text("anna\n")
    assert main(["classify", str(base), str(tmp_path / "in.txt")]) == 2
    assert "has no head of classes" in capsys.readouterr().err
    assert main(["classify", str(base), str(tmp_path / "in.txt"), "--pieces", "all"]) == 2
