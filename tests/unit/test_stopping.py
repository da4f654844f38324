"""Asked to stop, each part of a run is broken off where it stands, and done again when the run goes on."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recipes import tiny_recipe

from octavo import launch
from octavo.config import Recipe
from octavo.data import prepare, vocabulary
from octavo.errors import StopRequested
from octavo.eval import metrics
from octavo.language_model import LanguageModel
from octavo.metrics_file import read_metrics
from octavo.pipeline import judging, text
from octavo.run import RunFolder
from octavo.stop import StopSignal
from octavo.training import checkpoint
from octavo.training.loop import Trainer
from octavo.training.progress import Console


@pytest.fixture(autouse=True, scope="module")
def no_page() -> Iterator[None]:
    """The page takes longer than all else in so small a run, and says nothing here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(judging, "report", lambda _: {})
        yield


class Asked(StopSignal):
    """Asked to stop by a test, as if by a signal."""

    def ask(self) -> None:
        self._signal, self._asked_at = "SIGTERM", self._clock()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    recipe = tiny_recipe(tmp_path_factory.mktemp("texts"))
    recipe["train"] |= {"sample_tokens": 12, "valid_batches": 1, "micro_batch_rows": 1}
    recipe["tune"] = None
    recipe["eval"] = {"orders": [1, 2]}
    return recipe


@pytest.fixture(scope="module")
def whole(raw: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    launch.run(Recipe.parse(raw), out=folder, console=Console("quiet"), workers=1)
    return folder


def go(raw: dict[str, Any], out: Path, stop: StopSignal | None = None) -> None:
    launch.run(Recipe.parse(raw), out=out, console=Console("quiet"), workers=1, stop=stop)


def figures(run: Path) -> list[dict[str, Any]]:
    timings = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in timings} for r in read_metrics(run / "pretrain" / "metrics.jsonl")]


def stopped(raw: dict[str, Any], run: Path, stop: StopSignal, stage: str) -> str:
    """What a run says that is stopped while ``stage`` is at work."""
    with pytest.raises(StopRequested) as caught:
        go(raw, run, stop)
    assert caught.value.exit_code == 75 and caught.value.fix == f"go on with octavo resume {run}"
    assert stage not in RunFolder(run).stages()
    return caught.value.what


def ends_the_same(raw: dict[str, Any], run: Path, whole: Path) -> None:
    go(raw, run)
    assert figures(run) == figures(whole)
    assert (run / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def when_called(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, nth: int, act: Callable[[], None]) -> list[int]:
    """``act`` before the nth call of ``owner.name``; the calls that were made."""
    real, calls = getattr(owner, name), []

    def called(*arguments: Any, **named: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == nth:
            act()
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, called)
    return calls


def test_the_preparation_of_documents(raw, whole, tmp_path, monkeypatch):
    stop = Asked()
    real, told = prepare.clean_documents, []

    def clean(config: Any, folder: Any, *, workers: Any, progress: Any) -> Any:
        def asked(*state: Any) -> None:
            stop.ask()
            told.append(state)
            progress(*state)

        return real(config, folder, workers=workers, progress=asked)

    monkeypatch.setattr(prepare, "clean_documents", clean)
    assert stopped(raw, tmp_path / "run", stop, "data") == "SIGTERM, while preparing"
    assert len(told) == 1
    monkeypatch.undo()
    ends_the_same(raw, tmp_path / "run", whole)


@pytest.mark.parametrize("soon", [0, 1 << 30], ids=["elsewhere", "here"])
def test_the_training_of_a_tokenizer(raw, tmp_path, monkeypatch, soon):
    raw = {**raw, "tokenizer": {"kind": "byte_bpe", "vocab_size": 300}}
    stop, saved = Asked(), []
    monkeypatch.setattr(vocabulary, "SOON_BYTES", soon)
    when_called(monkeypatch, text, "learn", 1, stop.ask)
    monkeypatch.setattr(vocabulary.Tokenizer, "save", lambda *_: saved.append(1))
    what = stopped(raw, tmp_path / "run", stop, "tokenizer")
    assert what == "SIGTERM, while training the tokenizer" and not saved


def test_the_writing_of_shards(raw, tmp_path, monkeypatch):
    stop = Asked()
    splits = when_called(monkeypatch, text, "write_shards", 1, stop.ask)
    assert stopped(raw, tmp_path / "run", stop, "tokenizer") == "SIGTERM, while preparing"
    assert splits == [1]  # the held-out documents were not begun


def test_a_step_is_finished_and_saved(raw, tmp_path, monkeypatch):
    stop = Asked()
    when_called(monkeypatch, Trainer, "gradient", 3, stop.ask)
    what = stopped(raw, tmp_path / "run", stop, "pretrain")
    assert what == "SIGTERM, saved at step 3 of 8"


def test_a_step_that_takes_too_long_is_given_up_between_two_micro_batches(raw, tmp_path, monkeypatch):
    now = [0.0]
    stop = Asked(clock=lambda: now[0])
    real, parts = Trainer._losses, []

    def slow(self: Trainer, batch: Any) -> Any:
        parts.append(self.step)
        if len(parts) == 6:  # the second of the two micro-batches of step 3 is still to come
            stop.ask()
        now[0] += 5.0
        return real(self, batch)

    monkeypatch.setattr(Trainer, "_losses", slow)
    raw = {**raw, "train": {**raw["train"], "step_tokens": 256, "valid_every": 100}}
    what = stopped(raw, tmp_path / "run", stop, "pretrain")
    assert what == "SIGTERM, saved at step 1 of 8" and parts == [0, 0, 0, 0, 1, 1]


def test_a_validation_is_broken_off_and_done_again(raw, whole, tmp_path, monkeypatch):
    stop, batches = Asked(), []
    real = Trainer._losses

    def look(self: Trainer, batch: Any) -> Any:
        if not self.model.training:
            batches.append(self.step)
            stop.ask()
        return real(self, batch)

    monkeypatch.setattr(Trainer, "_losses", look)
    what = stopped(raw, tmp_path / "run", stop, "pretrain")
    assert what == "SIGTERM, saved at step 4 of 8" and batches == [4]
    found = checkpoint.newest(tmp_path / "run" / "pretrain" / "checkpoints")
    assert found is not None and checkpoint.load(found.path)[1]["due"] == ["valid", "sample"]
    monkeypatch.undo()
    assert sum(r["kind"] == "valid" for r in figures(whole)) == 2
    ends_the_same(raw, tmp_path / "run", whole)


def test_sampling_is_broken_off_between_two_tokens_and_done_again(raw, whole, tmp_path, monkeypatch):
    stop, pieces = Asked(), []
    real = LanguageModel.stream

    def stream(self: LanguageModel, *arguments: Any) -> Any:
        for piece in real(self, *arguments):
            pieces.append(piece)
            if len(pieces) == 2:
                stop.ask()
            yield piece

    monkeypatch.setattr(LanguageModel, "stream", stream)
    what = stopped(raw, tmp_path / "run", stop, "pretrain")
    assert what == "SIGTERM, saved at step 4 of 8" and len(pieces) == 2
    found = checkpoint.newest(tmp_path / "run" / "pretrain" / "checkpoints")
    assert found is not None and checkpoint.load(found.path)[1]["due"] == ["sample"]
    monkeypatch.undo()
    ends_the_same(raw, tmp_path / "run", whole)


def test_the_scores_are_broken_off_at_once(raw, tmp_path, monkeypatch):
    reached = []
    real = judging.evaluate

    def evaluate(**named: Any) -> Any:
        reached.append("begun")
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("went on")
        return real(**named)

    monkeypatch.setattr(judging, "evaluate", evaluate)
    with StopSignal(notify=lambda _: None) as stop:
        what = stopped(raw, tmp_path / "run", stop, "eval")
    assert what == "SIGTERM, in stage eval" and reached == ["begun"]
    assert not (tmp_path / "run" / "scores.json").exists()


def test_the_time_limit_is_seen_while_scoring(raw, tmp_path, monkeypatch):
    now = [0.0]
    stop = StopSignal("1h", clock=lambda: now[0])

    def an_hour() -> None:
        now[0] += 3600.0

    monkeypatch.setattr(metrics, "BATCH_LOGITS", 1)
    calls = when_called(monkeypatch, LanguageModel, "logits", 1, an_hour)
    what = stopped(raw, tmp_path / "run", stop, "eval")
    assert what == "the time limit of 1h is reached, in stage eval" and calls == [1]


def test_between_two_stages(raw, tmp_path, monkeypatch):
    stop = Asked()
    when_called(monkeypatch, RunFolder, "finish", 1, stop.ask)
    what = stopped(raw, tmp_path / "run", stop, "tokenizer")
    assert what == "SIGTERM, before stage tokenizer" and list(RunFolder(tmp_path / "run").stages()) == ["data"]
