"""The command line from raw text to a counted model: run, generate, score, serve, correct, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from recipes import tiny_recipe

import octavo
from octavo import launch
from octavo.cli.main import main
from octavo.config import Recipe
from octavo.errors import ConfigErrors, StopRequested
from octavo.pipeline import text
from octavo.run import RunFolder
from octavo.serve.app import create_app
from octavo.serve.listen import bind, make_server
from octavo.serve.settings import ServeConfig
from octavo.training.progress import Console

STAGES = ["data", "tokenizer", "count", "eval", "report"]


def counted_recipe(folder: Path, **model: Any) -> dict[str, Any]:
    """The tiny recipe with a model that is counted."""
    raw = tiny_recipe(folder, train=None, tune=None)
    return {**raw, "model": {"kind": "ngram", "order": 6, **model}, "name": "counted"}


def write_recipe(folder: Path, **model: Any) -> Path:
    path = folder / "counted.yaml"
    path.write_text(json.dumps(counted_recipe(folder, **model)))
    return path


def go(raw: dict[str, Any], out: Path, **options: Any) -> RunFolder:
    return launch.run(Recipe.parse(raw), out=out, console=Console("quiet"), workers=1, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in runs/counted."""
    folder = tmp_path_factory.mktemp("counted")
    write_recipe(folder)
    shown = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(shown):
        assert main(["run", "counted.yaml", "--no-chat", "--workers", "1"]) == 0
    assert "model   runs/counted/model" in shown.getvalue() and "octavo generate runs/counted" in shown.getvalue()
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_a_run_without_training_leaves_a_model_scores_and_a_page(place):
    run = place / "runs" / "counted"
    stages = json.loads((run / "stages.json").read_text())
    assert list(stages) == STAGES
    assert stages["count"]["entries"] > 1000 and sum(stages["count"]["entries_by_order"]) == stages["count"]["entries"]
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["model_type"] == "octavo" and config["model"]["kind"] == "ngram"
    assert config["model"]["vocab_size"] == 261 and config["eos_token_id"] == 2
    assert (run / "model" / "tokenizer.json").is_file() and not (run / "pretrain").exists()
    scores = json.loads((run / "scores.json").read_text())
    same_order = scores["baseline"]["orders"]["6"]["bits_per_byte"]
    assert scores["about"]["parameters"] is None
    assert abs(scores["model"]["bits_per_byte"] - same_order) < 0.15  # the baseline has one discount an order
    page = (run / "report.html").read_text()
    assert "n-grams" in page and "octavo tune" not in page and "not finished" not in page


def test_the_same_command_again_keeps_every_stage_and_resume_too(here, capsys):
    before = (here / "runs" / "counted" / "stages.json").read_bytes()
    assert main(["run", "counted.yaml", "--no-chat"]) == 0
    assert capsys.readouterr().err.count("finished earlier") == len(STAGES)
    assert main(["resume", "runs/counted", "--quiet"]) == 0
    assert (here / "runs" / "counted" / "stages.json").read_bytes() == before


def test_another_order_counts_anew_and_only_that(here, tmp_path):
    raw = counted_recipe(tmp_path)
    go(raw, tmp_path / "run")
    stages = RunFolder(tmp_path / "run").stages()
    shorter = {**raw, "model": {**raw["model"], "order": 3}}
    with pytest.raises(ConfigErrors, match="order: 6 -> 3"):
        go(shorter, tmp_path / "run")
    go(shorter, tmp_path / "run", allow=("model.order",))
    after = RunFolder(tmp_path / "run").stages()
    assert [name for name in STAGES if stages[name] == after[name]] == ["data", "tokenizer"]
    assert octavo.load(tmp_path / "run").model.counted.order == 3


def test_generate_continues_and_chat_answers(here, capsys):
    words = ["--max-new-tokens", "20", "--temperature", "0"]
    assert main(["generate", "runs/counted", "the c", *words]) == 0
    out = capsys.readouterr().out
    assert out == "the c" + octavo.load("runs/counted").generate("the c", max_new_tokens=20, temperature=0.0) + "\n"
    assert out.startswith("the cat ")
    messages = [{"role": "user", "content": "the cat"}]
    assert isinstance(octavo.load("runs/counted").generate(messages, max_new_tokens=8, seed=1), str)


def test_decoding_with_the_state_is_decoding_without(here):
    """Rows of different lengths together give what each gives alone, and the cropped window gives the same again."""
    lm = octavo.load("runs/counted")
    from octavo.infer.generate import encode_prompt, generate
    from octavo.infer.sampling import SamplingConfig

    prompts = [encode_prompt(lm.tokenizer, text) for text in ("the cat sees", "a", "our teacher paints")]
    config = SamplingConfig(max_new_tokens=25, seed=3)
    together = generate(lm.model, lm.tokenizer, prompts, config, n_top=2)
    assert [len(done.ids) for done in together] != [0, 0, 0]
    first = generate(lm.model, lm.tokenizer, prompts[:1], config)[0]
    assert first.ids == together[0].ids
    lm.model.max_seq_len = 8  # shorter than any answer: the window is read anew, which an n-gram does not notice
    assert generate(lm.model, lm.tokenizer, prompts[:1], config)[0].ids == first.ids


def test_eval_scores_through_the_counts(here, capsys):
    assert main(["eval", "runs/counted", "--out", "figures.json"]) == 0
    again, run = (json.loads(Path(name).read_text()) for name in ("figures.json", "runs/counted/scores.json"))
    assert again["model"]["bits_per_byte"] == run["model"]["bits_per_byte"]
    lm = octavo.load("runs/counted")
    text = "the cat sees the moon 7."
    nats = -lm.log_probs([text])[0]
    assert lm.score(text)["nats_per_token"] == pytest.approx(nats / len(text))
    assert lm.log_probs([text], end=True)[0] < -nats and lm.log_probs([""]) == [0]


def test_serve_answers_completions_over_a_socket(here):
    lm = octavo.load("runs/counted")
    config = ServeConfig(port=0)
    with bind(config) as sock:
        server = make_server(create_app(lm.model, lm.tokenizer, "counted", config), config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
            asked = {"model": "counted", "prompt": "the c", "max_tokens": 20, "temperature": 0}
            answer = httpx.post(f"{url}/completions", json=asked, timeout=30)
            assert answer.status_code == 200, answer.text
            expected = lm.generate("the c", max_new_tokens=20, temperature=0.0)
            assert answer.json()["choices"][0]["text"] == expected
            talk = {"model": "counted", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 5}
            scored = httpx.post(
                f"{url}/chat/completions", json=talk | {"logprobs": True, "top_logprobs": 5}, timeout=30
            )
            assert scored.status_code == 200 and scored.json()["choices"][0]["logprobs"]["content"]
            assert httpx.get(f"{url}/models").json()["data"][0]["max_model_len"] == 65_536
        finally:
            server.should_exit = True
            thread.join(10)


def test_correct_mends_what_was_typed(here, capsys, monkeypatch):
    assert main(["correct", "teh cat seess the mooon 7.", "--model", "runs/counted"]) == 0
    assert capsys.readouterr().out == "the cat sees the moon 7.\n"
    assert main(["correct", "our teaher", "--model", "runs/counted", "--n", "3", "--rescore", "runs/counted"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3 and rows[0][1] == "our teacher"
    assert [float(p) for p, _ in rows] == sorted((float(p) for p, _ in rows), reverse=True)
    Path("pairs.tsv").write_text("thx cat\tthe cat\na dxg\ta dog\nthx moon\tthe moon\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("thx cat paints\n\na dxg\n"))
    assert main(["correct", "--model", "runs/counted", "--pairs", "pairs.tsv"]) == 0
    assert capsys.readouterr().out == "the cat paints\n\na dog\n"
    Path("table.tsv").write_text("teq\tt\n")
    assert main(["correct", "teq", "--model", "runs/counted", "--channel", "pinyin", "--table", "table.tsv"]) == 0
    assert capsys.readouterr().out in ("t\n", "teq\n")


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (["tune", "runs/counted", "--data", "pairs.jsonl"], 2, "was counted and has no weights to train"),
        (["run", "counted.yaml", "train.steps=3", "--out", "o"], 2, "train: a model of kind ngram is counted"),
        (["run", "counted.yaml", "tune.steps=3", "--out", "o"], 2, "tune: a model of kind ngram is counted"),
        (["run", "counted.yaml", "data=null", "--out", "o"], 2, "is counted from text: set data.sources"),
        (["run", "counted.yaml", "model.ordre=3", "--out", "o"], 2, "did you mean `model.order`?"),
        (["run", "counted.yaml", "model.smoothing=kneser", "--out", "o"], 2, "kneser_ney"),
        (["run", "counted.yaml", "model.vocab_size=100", "--out", "o"], 2, "model.vocab_size is 100"),
        (["plan", "counted.yaml"], 2, "trains nothing"),
        (["plan", "sft", "model.path=runs/counted", "tune.data.kind=chat", "tune.data.paths=[x]"], 2, "was counted"),
        (["data", "show", "runs/counted"], 2, "its model is counted in one pass"),
        (["resume", "runs/counted", "--prove"], 2, "it has no steps to repeat"),
        (["longcontext", "runs/counted"], 2, "was counted"),
        (["convert", "runs/counted", "made", "--family", "llama"], 2, "cannot be written as 'llama'"),
        (["correct", "x"], 2, "there is no model"),
        (["correct", "x", "--model", "runs/counted", "--channel", "speech"], 2, "there is no channel 'speech'"),
        (["correct", "x", "--model", "runs/counted", "--channel", "pinyin"], 2, "give --table or --pairs"),
        (["correct", "x", "--model", "runs/counted", "--table", "t"], 2, "--table is no setting of the channel typing"),
        (["correct", "x", "--model", "runs/counted", "--rates", "insrt=1"], 2, "did you mean `insert`?"),
        (["correct", "x", "--model", "runs/counted", "--rates", "insert=much"], 2, "is not a number"),
        (["correct", "x", "--model", "runs/counted", "--pairs", "nowhere.tsv"], 2, "nowhere.tsv cannot be read"),
        (["correct", "x", "--model", "nowhere"], 2, "nowhere does not exist"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name_in_one_line(here, capsys, words, code, shown):
    before = sorted(os.listdir(here))
    assert main(words) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error[")]
    assert len(lines) == 1 and shown in lines[0], lines
    left = set(os.listdir(here)) - set(before)
    assert left <= ({"o"} if "vocab_size" in str(words) else set()), left


def test_a_copy_of_the_model_is_the_model(here, capsys):
    assert main(["convert", "runs/counted", "copy"]) == 0
    assert "copy: octavo, counted, 261 token ids" in capsys.readouterr().out
    one, other = octavo.load("runs/counted"), octavo.load("copy")
    text = "a small bird hears a song"
    assert one.log_probs([text]) == other.log_probs([text])


def test_a_count_that_was_broken_off_begins_anew_and_ends_the_same(here, tmp_path, monkeypatch):
    raw = counted_recipe(tmp_path)

    def broken_off(config: Any, documents: Any, **named: Any) -> Any:
        for number, _ in enumerate(documents):
            if number == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(text, "count", broken_off)
        with pytest.raises(StopRequested, match="in stage count"):
            go(raw, tmp_path / "run")
    stages = RunFolder(tmp_path / "run").stages()
    assert "tokenizer" in stages and "count" not in stages and not (tmp_path / "run" / "model").exists()
    (tmp_path / "run" / ".model.tmp").mkdir()  # what a killed process may leave
    (tmp_path / "run" / ".model.tmp" / "half").write_text("x")
    go(raw, tmp_path / "run")
    go(raw, tmp_path / "whole")
    one, other = (sorted((tmp_path / name / "model").rglob("*.*")) for name in ("run", "whole"))
    assert [path.name for path in one] == [path.name for path in other]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True) if a.is_file())
    assert not (tmp_path / "run" / ".model.tmp").exists()


@pytest.mark.parametrize(("kind", "bits"), [("uniform", 8.02), ("unigram", 4.4)])
def test_the_simplest_models_run_like_any_other(tmp_path, kind, bits):
    raw = counted_recipe(tmp_path) | {"model": kind}
    run = go(raw, tmp_path / "run")
    scores = json.loads((run.path / "scores.json").read_text())
    assert scores["model"]["bits_per_byte"] == pytest.approx(bits, abs=0.1)
    lm = octavo.load(run.path)
    assert len(lm.complete("the", max_new_tokens=6, seed=1).ids) <= 6


def test_damaged_arrays_are_refused_by_name(here, tmp_path, capsys):
    import shutil

    shutil.copytree(here / "runs" / "counted" / "model", tmp_path / "model")
    largest = max((tmp_path / "model" / "counts").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-3] ^= 0x40
    largest.write_bytes(bytes(data))
    assert main(["generate", str(tmp_path / "model"), "x"]) == 4
    assert largest.name in capsys.readouterr().err
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"order": 6', '"order": "six"', 1))
    assert main(["generate", str(tmp_path / "model"), "x"]) == 4
    assert "order" in capsys.readouterr().err
