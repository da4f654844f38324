"""A run that is gone on with after something changed: what may, what is refused, and what is only told."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import tiny_recipe, write_texts

from octavo.cli.main import main
from octavo.metrics_file import read_metrics
from octavo.pipeline import judging
from octavo.tokenizer import Byte, ByteBPE, train
from octavo.training import checkpoint

Stopped = tuple[dict[str, Any], Path]


@pytest.fixture(autouse=True, scope="module")
def no_page() -> Iterator[None]:
    """The page takes longer than all else in so small a run, and says nothing here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(judging, "report", lambda _: {})
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """A run that stopped in pretraining, saved at its fourth step."""
    folder = tmp_path_factory.mktemp("begun")
    raw = tiny_recipe(folder)
    raw["tune"] = raw["eval"] = None
    raw["train"] |= {"valid_every": 100, "sample_prompts": []}
    from octavo.training.loop import Trainer

    real = Trainer.train_step

    def step(self: Trainer) -> dict[str, float]:
        figures = real(self)
        if self.step == 4:
            self.held.stop._signal = "SIGTERM"
        return figures

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "train_step", step)
        assert go(raw, folder / "run") == 75
    return raw, folder / "run"


def go(raw: dict[str, Any], run: Path, *words: str) -> int:
    path = run.with_suffix(".yaml")
    path.write_text(json.dumps(raw))
    return main(["run", str(path), "--out", str(run), "--no-chat", "--workers", "1", *words])


@pytest.fixture
def stopped(begun: Stopped, tmp_path: Path) -> Stopped:
    raw, run = begun
    return json.loads(json.dumps(raw)), Path(shutil.copytree(run, tmp_path / "run"))


def with_train(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**raw, "train": {**raw["train"], **changes}}


def rates(run: Path) -> list[float]:
    return [r["lr"] for r in read_metrics(run / "pretrain" / "metrics.jsonl") if r["kind"] == "train"]


def test_what_changes_the_model_or_its_data_is_refused_and_named(stopped, capsys):
    raw, run = stopped
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "log"}
    other = with_train(raw, seq_len=32)
    other["model"]["d_model"] = 32
    assert go(other, run) == 2
    shown = capsys.readouterr().err
    for line in ("model.d_model: 16 -> 32", "train.seq_len: null -> 32", "--allow-change model.d_model"):
        assert line in shown
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "log"} == before


def test_a_new_rate_is_noted_and_acts_from_here_on(stopped, capsys):
    raw, run = stopped
    changes = {"optimizer": {"kind": "adamw", "lr": 0.5}, "on_nan": "skip", "micro_batch_rows": 1}
    assert go(with_train(raw, **changes), run) == 0
    shown = capsys.readouterr().err
    assert "train.optimizer.lr: 0.001 -> 0.5" in shown and 'train.on_nan: "stop" -> "skip"' in shown
    assert "train.micro_batch_rows: null -> 1" in shown
    found = rates(run)
    assert len(found) == 8 and max(found[:4]) <= 1e-3 and min(found[4:]) > 0.01
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["on_nan"] == "skip"


def test_other_documents_under_the_same_name_are_refused(stopped, capsys):
    raw, run = stopped
    texts = write_texts(run.with_name("texts.jsonl"), seed=7)
    raw["data"]["sources"] = [str(texts)]
    assert go(raw, run) == 2 and "data.sources.0" in capsys.readouterr().err

    source = Path(tiny_recipe(run.parent)["data"]["sources"][0])
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    original = Path(recipe["data"]["sources"][0]["path"])
    held = Path(shutil.copy2(original, run.parent / "held.jsonl"))
    try:
        original.write_bytes(original.read_bytes() + source.read_bytes())
        assert main(["resume", str(run), "--quiet"]) == 4
        assert "the files of data.sources changed since this run began to train on them" in capsys.readouterr().err
    finally:
        shutil.copy2(held, original)  # with its time, which belongs to the fingerprint


def test_shards_that_were_made_anew_are_refused(stopped, capsys):
    """The prepared documents have changed, and no file they came from: only the order of the loader knows."""
    _, run = stopped
    state = run / "pretrain" / "checkpoints" / "step-00000004"
    tensors, saved = checkpoint.load(state)
    checkpoint.save(state.parent, 4, tensors, {**saved, "source": "0" * 64}, run_id="other")
    assert main(["resume", str(run), "--quiet"]) == 4
    assert "was trained on other data or with another seed" in capsys.readouterr().err


def test_another_machine_or_version_is_one_warning(stopped, capsys):
    _, run = stopped
    path = run / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "1.0.0", "cpu": "abacus", "threads": 64}))
    assert main(["resume", str(run)]) == 0
    shown = capsys.readouterr().err
    assert shown.count("bit-identical resume not promised") == 1
    for change in ("torch 1.0.0 -> 2.", "threads 64 -> 1", "cpu abacus -> "):
        assert change in shown


@pytest.mark.parametrize("size", ["as many", "more"])
def test_another_tokenizer_is_refused_also_with_as_many_ids(stopped, capsys, size):
    _, run = stopped
    if size == "more":
        other = train(ByteBPE(vocab_size=300), ["the cat sees a letter " * 9])
        other.save(run / "tokenizer")
    else:
        other_vocabulary(run / "tokenizer" / "tokenizer.json")
    assert main(["resume", str(run), "--quiet"]) == 3
    assert "was written with tokenizer" in capsys.readouterr().err


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_before_training(tmp_path, capsys):
    raw = tiny_recipe(tmp_path)
    raw["model"]["vocab_size"] = 100
    assert go(raw, tmp_path / "run") == 2
    assert "ids, model.vocab_size is 100" in capsys.readouterr().err
    assert not (tmp_path / "run" / "pretrain" / "checkpoints").exists()


def test_a_model_with_another_tokenizer_is_not_tuned(stopped, capsys):
    raw, run = stopped
    raw["tune"] = tiny_recipe(run.parent)["tune"]
    assert go(raw, run, "--allow-change", "tune", "--quiet") == 0
    other_vocabulary(run / "base" / "tokenizer.json")
    stages = json.loads((run / "stages.json").read_text())
    del stages["tune"]
    (run / "stages.json").write_text(json.dumps(stages))
    assert main(["resume", str(run), "--quiet"]) == 2
    assert "base has another tokenizer (" in capsys.readouterr().err


def other_vocabulary(path: Path) -> None:
    """The same entries, two of them with each other's ids."""
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    a, b = list(vocab)[40:42]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(spec))
    assert train(Byte(), []).vocab_size == len(vocab)


def test_a_stage_goes_on_only_from_the_weights_it_began_with(stopped, capsys):
    raw, run = stopped
    raw["tune"] = tiny_recipe(run.parent)["tune"]
    assert go(raw, run, "--allow-change", "tune", "--quiet") == 0
    newest = checkpoint.newest(run / "tune" / "checkpoints")
    assert newest is not None
    tensors, saved = checkpoint.load(newest.path)
    assert len(saved["started_from"]) == 64
    checkpoint.save(newest.path.parent, newest.step, tensors, {**saved, "started_from": "0" * 64}, run_id="other")
    stages = json.loads((run / "stages.json").read_text())
    for stage in ("tune", "report"):
        del stages[stage]
    (run / "stages.json").write_text(json.dumps(stages))
    assert main(["resume", str(run)]) == 0
    assert "this stage begins anew: the weights it starts from have changed" in capsys.readouterr().err
    assert [r["step"] for r in read_metrics(run / "tune" / "metrics.jsonl") if r["kind"] == "train"] == list(
        range(1, 7)
    )
