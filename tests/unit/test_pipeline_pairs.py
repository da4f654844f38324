"""Runs of encoder-decoders, small: pairs and damaged text; their scores, the commands that follow, going on."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo import feed, launch
from octavo.cli.main import main
from octavo.config import Recipe
from octavo.data.pairs import Pair, read
from octavo.data.pairs import PairsConfig as Files
from octavo.data.show import Part
from octavo.errors import ConfigErrors, StopRequested
from octavo.language_model import LanguageModel
from octavo.metrics_file import read_metrics
from octavo.models.decoder import Decoder, build
from octavo.report.folder import Run
from octavo.report.next_step import try_command
from octavo.run import RunFolder
from octavo.stop import StopSignal
from octavo.tokenizer import Byte, train
from octavo.training.loop import Trainer
from octavo.training.progress import Console

SMALL = {"d_model": 16, "n_layers": 1, "max_seq_len": 48, "positions": "sinusoidal"}
MIXER = {"mixer": {"kind": "attention", "n_heads": 2}}
DECODER = {**SMALL, "blocks": {"block": MIXER}}
BOTH = {
    "kind": "encoder_decoder",
    "encoder": {**DECODER, "causal": False},
    "decoder": {**SMALL, "blocks": {"block": {**MIXER, "cross": {"kind": "cross_attention", "n_heads": 2}}}},
}
STEPS = {"steps": 6, "step_tokens": 192, "precision": "fp32", "compile": "off", "threads": 1, "valid_every": 3,
         "save_every": 2, "log_every": 1, "schedule": {"kind": "linear", "warmup": 2},
         "optimizer": {"lr": 5e-3}}  # fmt: skip
COLOURS = {"red": "rot", "blue": "blau", "green": "gruen", "black": "schwarz"}
TIMINGS = ("seconds", "tokens_per_second", "mfu")


class Asked(StopSignal):
    """Asked to stop by a test, as if by a signal."""

    def ask(self) -> None:
        self._signal, self._asked_at = "SIGTERM", self._clock()


def go(raw: dict[str, Any], out: Path, stop: StopSignal | None = None) -> Path:
    return launch.run(Recipe.parse(raw), out=out, console=Console("quiet"), workers=1, stop=stop).path


def scores(run: Path) -> dict[str, Any]:
    return json.loads((run / "scores.json").read_text(encoding="utf-8"))


def outcome(run: Path, stage: str) -> tuple[Any, ...]:
    rows = read_metrics(run / stage / "metrics.jsonl")
    told = [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]
    judged = scores(run)
    for timed in (judged, judged.get("model"), judged.get("baseline")):
        if timed:
            timed.pop("seconds", None)
    return told, (run / "model" / "model.safetensors").read_bytes(), judged


def gone_on(raw: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same run, asked to stop after its fourth step, and gone on with."""
    stop, real = Asked(), Trainer.train_step

    def step(trainer: Trainer) -> dict[str, float]:
        figures = real(trainer)
        if trainer.step == 4:
            stop.ask()
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        with pytest.raises(StopRequested, match="step 4 of 6"):
            go(raw, folder, stop)
    return go(raw, folder)


# ------------------------------------------------------------------------------------------------ pairs


def reversing() -> dict[str, Any]:
    data = {"kind": "pairs", "made": "reverse", "n": 80}
    return {"name": "back", "tokenizer": {"kind": "byte"}, "model": BOTH, "tune": {**STEPS, "data": data,
            "held_out": 0.1}}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(reversing(), tmp_path_factory.mktemp("pairs") / "run")


@pytest.mark.rows("A4")
def test_pairs_are_read_trained_on_and_scored(run):
    stages = RunFolder(run).stages()
    assert list(stages) == ["tokenizer", "tune", "eval", "report"]
    assert stages["tune"]["pairs"] == 72 and "conversations" not in stages["tune"]
    told = scores(run)["pairs"]
    assert told["pairs"] == len(told["examples"]) == 8
    assert 0 <= told["interval_95"][0] <= told["exact_match"] <= told["interval_95"][1] <= 1 and 0 <= told["chrf"] <= 1
    kept = read(Files(files=(str(run / "tune/data/held_pairs.jsonl"),)))
    assert [Pair(row["source"], row["target"]) for row in told["examples"]] == kept
    assert not {pair.source for pair in kept} & {pair.source for pair in read(Files(made="reverse", n=80), 1)} - {
        pair.source for pair in kept
    }
    rows = read_metrics(run / "tune" / "metrics.jsonl")
    assert {row["kind"] for row in rows} == {"train", "valid"}
    valid = [row for row in rows if row["kind"] == "valid"]
    assert [row["step"] for row in valid] == [3, 6] and all("bits_per_byte" not in row for row in valid)


def test_the_page_of_such_a_run_says_what_it_is(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    for said in ("pairs right", "chrF", "trained on pairs of texts", "Sources it has not seen", "octavo eval"):
        assert said in page, said
    for wrong in ("octavo chat", "octavo serve", "not finished", "bits per byte", "conversations"):
        assert wrong not in page, wrong


def test_stopped_and_gone_on_with_it_ends_the_same(run, tmp_path, monkeypatch):
    assert outcome(gone_on(reversing(), tmp_path / "run", monkeypatch), "tune") == outcome(run, "tune")


def test_every_verb_works_on_it_or_says_in_a_line_why_not(run, tmp_path, capsys):
    example = scores(run)["pairs"]["examples"][0]
    assert try_command(Run(run)) == f"octavo generate {run} {example['source']} --temperature 0"
    assert main(["generate", str(run), example["source"], "--temperature", "0", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out == example["given"] + "\n"
    assert main(["eval", str(run), "--out", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["pairs"] == scores(run)["pairs"]
    assert "pairs right" in "".join(capsys.readouterr())
    assert main(["report", str(run)]) == 0
    (tmp_path / "talk.jsonl").write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    refused = {
        ("chat", str(run)): "holds no conversation",
        ("serve", str(run), "--port", "0"): "is an encoder-decoder",
        ("eval", str(run), "--data", str(tmp_path / "talk.jsonl")): "it is scored on pairs",
        ("tune", str(run), "--data", str(tmp_path / "talk.jsonl"), "--out", str(tmp_path / "t")): "is tuned on pairs",
    }
    for words, why in refused.items():
        capsys.readouterr()
        assert main(list(words)) == 2, words
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error[")]
        assert len(error) == 1 and why in error[0] and "Fix: " in error[0], words


def test_pairs_say_nothing_of_a_decoder(tmp_path, capsys):
    tokenizer = train(Byte(), [])
    model = build(Decoder.Config(d_model=16, n_layers=1, max_seq_len=16, vocab_size=tokenizer.vocab_size), seed=1)
    LanguageModel(model, tokenizer).save(tmp_path / "model")
    (tmp_path / "own.tsv").write_text("a\tb\n")
    assert main(["eval", str(tmp_path / "model"), "--pairs", str(tmp_path / "own.tsv")]) == 2
    assert "no encoder-decoder" in capsys.readouterr().err


@pytest.mark.rows("A4")
def test_the_recipe_translation_learns_pairs_of_ones_own(tmp_path, capsys):
    """Four words, which it must know after a hundred steps; one pair is too long for it, and is left out."""
    rows = [{"en": en, "de": de} for en, de in [*COLOURS.items()] * 10] + [{"en": "x" * 300, "de": "y"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"kind": "pairs", "files": [str(tmp_path / "pairs.jsonl")], "source_key": "en", "target_key": "de"}
    run = tmp_path / "run"
    changes = [f"tune.data={json.dumps(told)}", "model.encoder.n_layers=1", "model.decoder.n_layers=1",
               "tune.steps=100", "tune.step_tokens=256", "tune.schedule.warmup=10", "tune.held_out=0.1"]  # fmt: skip
    assert main(["run", "translation", *changes, "--out", str(run), "--quiet"]) == 0
    said = capsys.readouterr()
    assert "1 pairs are longer than the model reads" in said.out + said.err
    assert scores(run)["pairs"]["exact_match"] == 1.0
    (command,) = re.findall(r"^try +octavo (.*)$", said.out, re.M)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out.strip() in COLOURS.values()
    (tmp_path / "own.tsv").write_text("red\trot\nblue\tgelb\n", encoding="utf-8")
    assert main(["eval", str(run), "--pairs", str(tmp_path / "own.tsv"), "--out", str(tmp_path / "own.json")]) == 0
    assert json.loads((tmp_path / "own.json").read_text())["pairs"]["right"] == 1


def said(part: Part, state: str = "") -> str:
    return b"".join(token.raw for token in part.tokens if token.state == state or not state).decode()


def test_a_step_of_pairs_is_shown_source_and_target(run, capsys):
    shown = feed.look(Recipe.load(run / "recipe.yaml"), run, "tune", step=1, n=3)
    assert shown.noun == "pair" and len(shown.rows) == 3
    for row in shown.rows:
        source, target = row.parts
        assert (source.side, target.side) == ("source", "target") and source.piece.number == target.piece.number
        assert said(source)[::-1] == said(target, "trained") and said(source, "trained") == ""
        assert target.tokens[0].state == "read" and target.tokens[-1].special  # the start, and what ends a text
    assert main(["data", "show", str(run), "--rows", "1"]) == 0
    assert " source, whole, " in capsys.readouterr().out


def test_a_shown_pair_says_where_it_stands(tmp_path):
    file = tmp_path / "colours.tsv"
    file.write_text("".join(f"{source}\t{target}\n" for source, target in COLOURS.items()), encoding="utf-8")
    raw = reversing()
    raw["tune"] |= {"data": {"kind": "pairs", "files": [str(file)]}, "steps": 3, "held_out": 0.25}
    raw["eval"] = None
    folder = go(raw, tmp_path / "run")
    for split, numbers in (("train", {1, 2, 3}), ("valid", {4})):
        rows = feed.look(Recipe.load(folder / "recipe.yaml"), folder, "tune", split=split, n=9).rows
        lines = [int(row.parts[0].origin.removeprefix(f"{file}:")) for row in rows]
        assert set(lines) == numbers
        assert [said(row.parts[0]) for row in rows] == [list(COLOURS)[line - 1] for line in lines]
    assert feed.changed(Recipe.load(folder / "recipe.yaml"), folder) == []
    file.write_text("red\trot\n", encoding="utf-8")
    assert feed.changed(Recipe.load(folder / "recipe.yaml"), folder) == [
        "the pairs have changed since this run was tuned on them"
    ]


# ----------------------------------------------------------------------------------------- damaged text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, chance = tmp_path_factory.mktemp("text"), random.Random(1)
    words = "the cat saw a bird that sang over some quiet old town while rain fell".split()
    for number in range(12):
        lines = [" ".join(chance.choices(words, k=8)).capitalize() + "." for _ in range(8)]
        (folder / f"{number}.txt").write_text(" ".join(lines), encoding="utf-8")
    return folder


def learning(text: Path, kind: str, **sections: Any) -> dict[str, Any]:
    return {
        "name": kind, "data": {"sources": [str(text / "*.txt")], "split": {"held_out": 0.2}},
        "tokenizer": {"kind": "byte"}, "model": DECODER if kind == "prefix" else BOTH, "eval": {"orders": [1, 2]},
        "train": {**STEPS, "objective": kind}, **sections,
    }  # fmt: skip


@pytest.mark.rows("A4", "A5")
@pytest.mark.parametrize("kind", ["spans", "infilling", "prefix"])
def test_damaged_text_and_prefixes_are_learnt_scored_and_gone_on_with(kind, text, tmp_path, monkeypatch, capsys):
    run = go(learning(text, kind), tmp_path / "run")
    assert list(RunFolder(run).stages()) == ["data", "tokenizer", "pretrain", "eval", "report"]
    told, page = scores(run), (run / "report.html").read_text(encoding="utf-8")
    valid = [row for row in read_metrics(run / "pretrain" / "metrics.jsonl") if row["kind"] == "valid"]
    assert [row["step"] for row in valid] == [3, 6]
    assert all("bits_per_byte" not in row for row in valid)  # of damaged tokens there are none
    special = octavo.load(run).tokenizer.tokens
    if kind == "prefix":
        assert 0 < told["model"]["bits_per_byte"] < 10 and "mended" not in told
        assert main(["eval", str(run)]) == 0
    else:
        assert told["mended"]["tokens"] > 30 and 0 < told["mended"]["nats_per_token"] < 8 and "model" not in told
        assert "mending tokens right" in page and "bits per byte" not in page and "octavo chat" not in page
        assert ("<extra_id_0>" in special) == (kind == "spans") and ("<|mask|>" in special) == (kind == "infilling")
        assert main(["eval", str(run)]) == 2
        assert "it is scored on pairs" in capsys.readouterr().err
    assert main(["generate", str(run), "The cat saw", "--max-new-tokens", "4"]) == 0
    assert "not finished" not in page
    rows = feed.look(Recipe.load(run / "recipe.yaml"), run, "pretrain", n=2).rows
    if kind != "prefix":
        (source, target), where = rows[0].parts, str(text)
        assert source.origin.startswith(where) and source.trained == 0 < target.trained
        marks = [token.special for token in source.tokens if token.special]
        assert ("<extra_id_0>" in marks) == (kind == "spans") and ("<|mask|>" in marks) == (kind == "infilling")
    assert outcome(gone_on(learning(text, kind), tmp_path / "again", monkeypatch), "pretrain") == outcome(
        run, "pretrain"
    )


@pytest.mark.rows("A4")
def test_one_recipe_from_damaged_text_to_pairs(text, tmp_path):
    tune = {**STEPS, "data": {"kind": "pairs", "made": "reverse", "n": 40}, "held_out": 0.1}
    run = go(learning(text, "spans", tune=tune), tmp_path / "run")
    told = scores(run)
    assert told["mended"]["tokens"] > 30 and told["pairs"]["pairs"] == 4
    assert octavo.load(run).tokenizer.hash == octavo.load(run / "base").tokenizer.hash


def test_what_does_not_go_together_is_refused(text):
    raw = learning(text, "prefix")
    with pytest.raises(ConfigErrors, match=r"use train\.objective\.kind=masked"):
        Recipe.parse({**raw, "model": {**DECODER, "causal": False}})
    with pytest.raises(ConfigErrors, match="trains on damaged text"):
        Recipe.parse({**raw, "model": BOTH})
