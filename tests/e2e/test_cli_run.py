"""The command line from raw text to an answer: run, stop, resume, refuse, generate, chat, tune."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from recipes import tiny_recipe, write_pairs

import octavo
from octavo.cli.main import main
from octavo.metrics_file import read_metrics

TIMINGS = ("seconds", "tokens_per_second", "mfu")


def octavo_command(*words: str, cwd: Path, stdin: str = "", timeout: float = 100) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "octavo", *words]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=timeout)


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "octavo", *words]
    return subprocess.Popen(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def write_recipe(folder: Path, **sections: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(tiny_recipe(folder, **sections)))
    return path


def figures(folder: Path, stage: str) -> list[dict[str, Any]]:
    records = read_metrics(folder / stage / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


def wait_for_step(folder: Path, stage: str, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not any(r["step"] >= step for r in read_metrics(folder / stage / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in runs/tiny."""
    folder = tmp_path_factory.mktemp("cli")
    write_recipe(folder)
    done = octavo_command("run", "tiny.yaml", "--no-chat", "--workers", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "model   runs/tiny/model" in done.stdout and "octavo chat runs/tiny" in done.stdout
    return folder


def test_the_run_left_a_model_scores_and_a_report(place):
    run = place / "runs" / "tiny"
    for name in ("model/model.safetensors", "model/tokenizer.json", "base/config.json", "scores.json", "report.html"):
        assert (run / name).is_file(), name
    assert set(json.loads((run / "stages.json").read_text())) == {
        "data", "tokenizer", "pretrain", "tune", "eval", "report",
    }  # fmt: skip


def test_the_same_command_again_keeps_every_stage(place):
    before = (place / "runs" / "tiny" / "stages.json").read_bytes()
    done = octavo_command("run", "tiny.yaml", "--no-chat", cwd=place)
    assert done.returncode == 0 and done.stderr.count("finished earlier") == 6, done.stderr
    assert (place / "runs" / "tiny" / "stages.json").read_bytes() == before


def test_generate_and_chat_answer(place):
    words = ["--max-new-tokens", "12", "--temperature", "0"]
    done = octavo_command("generate", "runs/tiny", "the cat", *words, cwd=place)
    assert done.returncode == 0 and done.stdout.startswith("the cat"), done.stderr
    expected = octavo.load(place / "runs" / "tiny").generate("the cat", max_new_tokens=12, temperature=0.0)
    assert done.stdout == f"the cat{expected}\n"
    done = octavo_command("chat", "runs/tiny", *words, cwd=place, stdin="Say 3.\n")
    assert done.returncode == 0 and done.stdout, done.stderr
    question = [{"role": "user", "content": "Say 3."}]
    first = octavo.load(place / "runs" / "tiny").generate(question, max_new_tokens=12, temperature=0.0)
    assert done.stdout.strip() == first.strip()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopped_in_training_it_says_how_to_go_on_and_does(place, tmp_path, number):
    long = {"steps": 30_000, "save_every": 10_000, "sample_prompts": [], "valid_every": 30_000}
    write_recipe(tmp_path, train=long, tune=None, eval=None)
    run = tmp_path / "out" / "mine"
    process = start("run", "tiny.yaml", "--no-chat", "--workers", "1", "--out", "out/mine", cwd=tmp_path)
    try:
        wait_for_step(run, "pretrain", 3, process)
        if number == signal.SIGINT:
            second = octavo_command("run", "tiny.yaml", "--no-chat", "--out", "out/mine", cwd=tmp_path)
            assert second.returncode == 2 and "Traceback" not in second.stderr
            assert second.stderr.startswith("error[LOCKED]: ") and f"process {process.pid}" in second.stderr
        process.send_signal(number)
        asked = time.monotonic()
        _, shown = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 75 and time.monotonic() - asked < 10
    (line,) = [line for line in shown.splitlines() if line.startswith("error[STOPPED]")]
    assert "octavo resume out/mine" in line and "saved at step" in line
    assert "Traceback" not in shown and "StopRequested" in (run / "log").read_text()
    stopped = figures(run, "pretrain")
    if number == signal.SIGTERM:
        return
    # Go on for a moment, by the command that was named; what was logged stays as it was.
    for limit in ("3s", "9s", "27s"):  # the limit counts from the command's start, which takes a busy machine a while
        done = octavo_command("resume", "out/mine", "--max-time", limit, cwd=tmp_path)
        assert done.returncode == 75 and f"time limit of {limit}" in done.stderr, done.stderr
        gone_on = figures(run, "pretrain")
        if len(gone_on) > len(stopped):
            break
    assert len(gone_on) > len(stopped) and gone_on[: len(stopped)] == stopped
    assert [r["step"] for r in gone_on] == list(range(1, len(gone_on) + 1))


def test_a_run_stopped_and_resumed_ends_as_the_one_that_was_not(place, tmp_path):
    write_recipe(tmp_path)
    done = octavo_command("run", "tiny.yaml", "--no-chat", "--workers", "1", "--max-time", "1s", cwd=tmp_path)
    assert done.returncode == 75 and "octavo resume runs/tiny" in done.stderr, done.stderr
    done = octavo_command("resume", "runs/tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run, whole = tmp_path / "runs" / "tiny", place / "runs" / "tiny"
    for stage in ("pretrain", "tune"):
        assert figures(run, stage) == figures(whole, stage)
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_a_model_folder_is_tuned_on_a_file_of_pairs(place, tmp_path, monkeypatch, capsys):
    write_pairs(tmp_path / "mine.jsonl", 12)
    model = str(place / "runs" / "tiny" / "base")
    small = ["tune.steps=3", "tune.schedule.warmup=1", "tune.step_tokens=128", "tune.compile=off", "tune.threads=1"]
    monkeypatch.chdir(tmp_path)
    assert main(["tune", model, *small, "--data", "mine.jsonl", "--out", "tuned"]) == 0
    assert "model   tuned/model" in capsys.readouterr().out
    assert [r["step"] for r in figures(tmp_path / "tuned", "tune") if r["kind"] == "train"] == [3]
    assert (
        octavo.load(tmp_path / "tuned").generate([{"role": "user", "content": "Say 3."}], max_new_tokens=3) is not None
    )


def test_train_leaves_tuning_out(tmp_path, monkeypatch, capsys):
    write_recipe(tmp_path, eval=None)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny.yaml", "train.steps=3", "--workers", "1", "--quiet"]) == 0
    assert (tmp_path / "runs" / "tiny" / "model" / "config.json").is_file()
    assert not (tmp_path / "runs" / "tiny" / "tune").exists()
    assert "octavo generate runs/tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (["run", "tiny.yaml", "train.stepps=3"], 2, "did you mean `train.steps`?"),
        (["run", "tinny.yaml"], 2, "tinny.yaml cannot be read"),
        (["run", "quikstart"], 2, "did you mean `quickstart`?"),
        (["run", "tiny.yaml", "data.sources=nowhere.txt", "--out", "o"], 3, "nowhere.txt"),
        (["resume", "nowhere"], 2, "not the folder of a run"),
        (["tune", "nowhere", "--data", "pairs.jsonl"], 2, "nowhere does not exist"),
        (["generate", "nowhere", "x"], 2, "nowhere does not exist"),
        (["run", "tiny.yaml", "--max-time", "soon", "--out", "o"], 2, "not a length of time"),
        (["run"], 2, "RECIPE"),
    ],
)
def test_a_mistake_is_one_line_and_its_kind_is_the_exit_code(tmp_path, monkeypatch, capsys, words, code, shown):
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert main(words) == code
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error[")]
    assert len(errors) == 1 and shown.lower() in errors[0].lower() and not any("Traceback" in line for line in lines)
    if code == 2:
        assert lines == errors and sorted(os.listdir(tmp_path)) == before


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    write_recipe(tmp_path)
    done = octavo_command("run", "tiny.yaml", "train.stepps=3", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "did you mean `train.steps`?" in done.stderr


def test_a_notebook_trains_and_samples_in_a_few_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, eval=None, tune=None)
    run = octavo.train("tiny.yaml", ["train.steps=3", "train.save_every=2"], workers=1)
    lm = octavo.load(run.path)
    assert run.path == Path("runs/tiny")
    assert isinstance(lm.generate("the ", max_new_tokens=5), str)
    assert lm.logits(lm.tokenizer.encode("the")).shape == (3, lm.model.vocab_size)
    assert lm.score("the cat sees the moon")["bits_per_byte"] > 0
    assert octavo.load(lm.save(tmp_path / "copy") and tmp_path / "copy").tokenizer.hash == lm.tokenizer.hash
