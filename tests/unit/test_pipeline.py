"""A recipe stage by stage: what is kept, what is done again, what is refused, and that stopping changes nothing."""

import hashlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recipes import tiny_recipe, write_pairs, write_texts

import octavo
from octavo import feed, launch, pipeline
from octavo.config import Recipe
from octavo.data.shards import Shards
from octavo.errors import CheckpointError, ConfigError, ConfigErrors, DataError, StopRequested
from octavo.metrics_file import read_metrics
from octavo.pipeline import order, training
from octavo.run import RunFolder
from octavo.training.progress import Console

ALL = ["data", "tokenizer", "pretrain", "tune", "eval", "report"]
TIMINGS = ("seconds", "tokens_per_second", "mfu")


def go(raw: dict[str, Any], out: Path, **options: Any) -> RunFolder:
    return launch.run(Recipe.parse(raw), out=out, console=Console("quiet"), workers=1, **options)


def finished(folder: Path) -> dict[str, str]:
    """Stage -> when it was finished and from what."""
    stages = RunFolder(folder).stages()
    return {name: entry["fingerprint"] + entry["finished"] + str(entry["seconds"]) for name, entry in stages.items()}


def outcome(folder: Path) -> dict[str, Any]:
    logs = {
        stage: [
            {k: v for k, v in r.items() if k not in TIMINGS} for r in read_metrics(folder / stage / "metrics.jsonl")
        ]
        for stage in ("pretrain", "tune")
    }
    files = [*folder.glob("*/model.safetensors"), *folder.glob("data/*/*"), folder / "tokenizer" / "tokenizer.json"]
    hashes = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}
    return {**logs, **hashes}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One whole run that the tests look at and do not change."""
    folder = tmp_path_factory.mktemp("whole")
    raw = tiny_recipe(folder)
    go(raw, folder / "run")
    return raw, folder / "run"


def test_a_recipe_goes_from_text_to_a_model_that_answers(run):
    _, folder = run
    assert list(json.loads((folder / "stages.json").read_text())) == ALL
    for name in (
        "recipe.yaml",
        "environment.json",
        "scores.json",
        "report.html",
        "base/config.json",
        "model/config.json",
    ):
        assert (folder / name).is_file(), name
    lm = octavo.load(folder)
    assert isinstance(lm.generate([{"role": "user", "content": "Say 3."}], max_new_tokens=5), str)
    assert len(lm.complete("the cat", max_new_tokens=5, temperature=0.0).ids) <= 5
    base, final = (octavo.load(folder / name).model.state_dict() for name in ("base", "model"))
    assert all(base[name].shape == final[name].shape for name in base)
    assert any((base[name] != final[name]).any() for name in base), "tuning changed nothing"


@pytest.mark.rows("G5")
def test_the_logs_of_both_stages_have_the_kinds_they_should(run):
    _, folder = run
    pretrain = read_metrics(folder / "pretrain" / "metrics.jsonl")
    assert [r["step"] for r in pretrain if r["kind"] == "train"] == list(range(1, 9))
    assert [r["step"] for r in pretrain if r["kind"] == "valid"] == [4, 8]
    assert [(r["step"], r["prompt"]) for r in pretrain if r["kind"] == "sample"] == [(4, "the "), (8, "the ")]
    held_out = Shards.open(folder / "data" / "valid")
    for record in (r for r in pretrain if r["kind"] == "valid"):
        # All bytes of the held-out text are predicted in n_tokens - n_documents predictions.
        nats_a_byte = record["loss"] * (held_out.n_tokens - held_out.n_documents) / held_out.n_bytes
        assert record["bits_per_byte"] == pytest.approx(nats_a_byte / math.log(2))
    tune = read_metrics(folder / "tune" / "metrics.jsonl")
    assert [r["step"] for r in tune if r["kind"] == "valid"] == [3, 6]
    assert all("bits_per_byte" not in r for r in tune if r["kind"] == "valid")


def test_run_again_every_stage_is_kept(run, tmp_path):
    raw, folder = run
    before = finished(folder), outcome(folder)
    go(raw, folder)
    assert (finished(folder), outcome(folder)) == before


def test_the_same_recipe_gives_the_same_bytes_elsewhere(run, tmp_path):
    raw, folder = run
    go(raw, tmp_path / "again")
    expected, found = outcome(folder), outcome(tmp_path / "again")
    assert found == expected and any(name.startswith("model") for name in found)


def test_what_is_only_looked_at_may_change_and_redoes_nothing_but_the_scores(run, tmp_path):
    raw, _ = run
    folder = tmp_path / "run"
    recipe = {**raw, "tune": None}
    go(recipe, folder)
    before = finished(folder)
    eval_changed = {"eval": {"max_documents": 3}}
    go(
        {**recipe, "train": {**raw["train"], "log_every": 2, "valid_every": 1, "sample_prompts": []}, **eval_changed},
        folder,
    )
    after = finished(folder)
    assert [stage for stage in after if after[stage] == before[stage]] == ["data", "tokenizer", "pretrain"]


@pytest.mark.parametrize(
    ("section", "change", "key"),
    [
        ("model", {"d_model": 32}, "model.d_model"),
        ("train", {"steps": 9}, "train.steps"),
        ("data", {"split": {"held_out": 0.2}}, "data.split.held_out"),
        ("tune", {"seq_len": 32}, "tune.seq_len"),
    ],
)
def test_what_decides_the_weights_may_not_change_unasked(run, section, change, key):
    raw, folder = run
    before = finished(folder), (folder / "recipe.yaml").read_bytes()
    with pytest.raises(ConfigErrors) as caught:
        go({**raw, section: {**raw[section], **change}}, folder)
    assert f"--allow-change {key}" in str(caught.value) and caught.value.exit_code == 2
    assert (finished(folder), (folder / "recipe.yaml").read_bytes()) == before


def test_an_allowed_change_redoes_its_stage_and_all_after_it(run, tmp_path):
    raw, _ = run
    folder = tmp_path / "run"
    go(raw, folder)
    before = finished(folder)
    changed = {**raw, "tune": {**raw["tune"], "steps": 7, "schedule": "constant"}}
    with pytest.raises(ConfigErrors):
        go(changed, folder)
    go(changed, folder, allow=["tune"])
    after = finished(folder)
    assert {stage for stage in ALL if after[stage] == before[stage]} == {"data", "tokenizer", "pretrain"}
    # Another model cannot go on from the weights that are there: said, not done.
    with pytest.raises(CheckpointError, match="other weights than this model"):
        go({**raw, "model": {**raw["model"], "d_model": 32}}, folder, allow=["model", "tune"])


@pytest.mark.rows("G2")
@pytest.mark.parametrize("update", ["per_sample", "mini_batch", "full_batch"])
def test_an_update_sees_a_row_some_rows_or_all(run, tmp_path, update):
    raw, _ = run
    train = {**raw["train"], "update": update, "steps": 2, "micro_batch_rows": 16}
    folder = tmp_path / "run"
    go({**raw, "train": train, "tune": None, "eval": None}, folder)
    shards = Shards.open(folder / "data" / "train")
    seen = [r["tokens_seen"] for r in read_metrics(folder / "pretrain" / "metrics.jsonl") if r["kind"] == "train"]
    rows = -(-(shards.n_tokens - 1) // 64)
    expected = {"per_sample": 64, "mini_batch": 128, "full_batch": shards.n_tokens}[update]
    assert rows > 20 and seen[0] == pytest.approx(expected, abs=64 if update == "full_batch" else 0)


def test_choices_are_made_once_and_kept_in_the_run(run, tmp_path, monkeypatch):
    raw, _ = run
    auto = {k: v for k, v in raw["train"].items() if k not in ("precision", "threads")}
    folder = tmp_path / "run"
    recipe = Recipe.parse({**raw, "train": {**auto, "steps": 1}, "tune": None, "eval": None})
    monkeypatch.setattr("octavo.training.machine.cores", lambda: 1)
    first, _ = launch.freeze(recipe, None)
    assert first.train is not None and first.train.threads == 1 and first.train.precision != "auto"
    monkeypatch.setattr("octavo.training.machine.cores", lambda: 64)
    monkeypatch.setattr("octavo.training.machine.best_precision", lambda device="cpu": "bf16")
    again, _ = launch.freeze(recipe, first.plain())
    assert again == first
    other, _ = launch.freeze(recipe, None)
    assert other.train is not None and (other.train.threads, other.train.precision) == (64, "bf16")
    assert not folder.exists()


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(run, tmp_path):
    raw, _ = run
    with pytest.raises(ConfigError, match=r"train\.device = cuda:99"):
        go({**raw, "train": {**raw["train"], "device": "cuda:99"}}, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


# ------------------------------------------------------------------------------------------- stopping


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "stage", ["data", pytest.param("tokenizer", marks=SLOW), "pretrain", "tune", pytest.param("eval", marks=SLOW)]
)
def test_stopped_in_any_stage_and_gone_on_with_it_ends_the_same(run, tmp_path, monkeypatch, stage):
    raw, folder = run
    part = tmp_path / "run"
    stages = order.stages

    def late(job: pipeline.Job) -> Any:
        job.stop._deadline = time.monotonic()  # the time limit is reached as the stage begins
        return next(each for each in stages(job) if each.name == stage).work(job)

    with monkeypatch.context() as patch:
        patch.setattr(
            order, "stages", lambda job: [replace(s, work=late) if s.name == stage else s for s in stages(job)]
        )
        with pytest.raises(StopRequested) as caught:
            go(raw, part, max_time="1h")
    assert caught.value.exit_code == 75 and f"octavo resume {part}" in str(caught.value)
    assert "report" not in finished(part)
    go(raw, part)
    assert outcome(part) == outcome(folder)


# -------------------------------------------------------------------------------------- tuning by itself


def test_a_model_folder_is_tuned_with_its_own_tokenizer(run, tmp_path):
    raw, folder = run
    base = {"kind": "pretrained", "path": str(folder / "base")}
    recipe = {"name": "sft", "seed": 5, "model": base, "tune": raw["tune"]}
    go(recipe, tmp_path / "run")
    assert list(json.loads((tmp_path / "run" / "stages.json").read_text())) == ["tokenizer", "tune", "report"]
    tuned = octavo.load(tmp_path / "run")
    assert tuned.tokenizer.hash == octavo.load(folder / "base").tokenizer.hash
    # The same conversations, in the same order, from the same weights.
    assert outcome(tmp_path / "run")["tune"] == outcome(folder)["tune"]
    for name, weight in octavo.load(folder).model.state_dict().items():
        assert weight.equal(tuned.model.state_dict()[name]), name


def test_the_tokenizer_of_another_model_is_not_kept(run, tmp_path):
    raw, folder = run
    base = {"kind": "pretrained", "path": str(folder / "base")}
    recipe = {"name": "sft", "seed": 5, "model": base, "tune": raw["tune"]}
    go(recipe, tmp_path / "run")
    before = finished(tmp_path / "run")
    base["path"] = str(folder / "model")
    go(recipe, tmp_path / "run", allow=["model.path"])
    assert finished(tmp_path / "run")["tokenizer"] != before["tokenizer"]


@pytest.mark.parametrize(
    ("share", "n", "held"), [(0.05, 40, 2), (0.0, 40, 0), (0.5, 40, 20), (0.9, 40, 36), (0.3, 10, 3)]
)
def test_the_share_held_out_of_conversations_is_that_share(tmp_path, share, n, held):
    raw = tiny_recipe(tmp_path)
    raw["tune"] |= {"held_out": share, "data": {"kind": "chat", "paths": [str(write_pairs(tmp_path / "p.jsonl", n))]}}
    recipe = Recipe.parse(raw)
    assert recipe.tune is not None
    trained, kept = feed.conversations(recipe.tune, recipe.seed)
    assert (len(trained), len(kept)) == (n - held, held)
    together = {c.messages[0]["content"] for c in (*trained, *kept)}
    assert len(together) == n


# --------------------------------------------------------------------------------------------- refusals


def test_data_that_is_not_there_is_an_error_of_the_data(run, tmp_path):
    raw, _ = run
    with pytest.raises(DataError) as caught:
        go({**raw, "data": {"sources": [str(tmp_path / "nothing.txt")]}}, tmp_path / "run")
    assert caught.value.exit_code == 3 and "nothing.txt" in str(caught.value)
    assert "nothing.txt" in (tmp_path / "run" / "log").read_text()


def test_data_that_changed_under_a_run_is_noticed(tmp_path):
    raw = tiny_recipe(tmp_path)
    raw["tune"] = raw["eval"] = None
    go(raw, tmp_path / "run")
    before = finished(tmp_path / "run")
    write_texts(tmp_path / "texts.jsonl", seed=1)
    with pytest.raises(CheckpointError, match="changed since this run began"):
        go(raw, tmp_path / "run")
    assert finished(tmp_path / "run") == before, "the run is as it was"


def test_a_stage_that_starts_from_other_weights_begins_anew(tmp_path):
    raw = tiny_recipe(tmp_path)
    go(raw, tmp_path / "run")
    tuned = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    longer = {**raw, "train": {**raw["train"], "steps": raw["train"]["steps"] + 2}}
    go(longer, tmp_path / "run", allow=["train.steps"])
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() != tuned


def test_tuning_keeps_the_dropout_of_the_recipe(tmp_path, monkeypatch):
    raw = tiny_recipe(tmp_path)
    raw["model"]["blocks"]["block"]["dropout"] = 0.25
    seen = {}

    def look(job, stage, *rest):
        ready = real(job, stage, *rest)
        seen[stage] = ready.lm.model.stack()[0].config.dropout
        return ready

    real = training.ready
    monkeypatch.setattr(training, "ready", look)
    go(raw, tmp_path / "run")
    assert seen == {"pretrain": 0.25, "tune": 0.25}


def test_octavo_train_is_the_pipeline_and_takes_a_path_a_name_or_a_recipe(run, tmp_path):
    raw, folder = run
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(raw))
    found = octavo.train(path, ["seed=5"], out=folder, console=Console("quiet"))
    assert found.path == folder
    with pytest.raises(ConfigError, match="did you mean `quickstart`"):
        octavo.train("quickstrat")
    with pytest.raises(ConfigErrors, match="stepps is not a known key"):
        octavo.train(octavo.Recipe.parse(raw), ["train.stepps=5"])
