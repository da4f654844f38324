"""The scripts in benchmarks/ keep up with the package: every one answers --help, every name they take from it is there,
and what they measure is measured once, on the smallest shapes. No figure is looked at."""

from __future__ import annotations

import argparse
import ast
import importlib
import io
import json
import os
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
COMMANDS = [name for name in SCRIPTS if "__main__" in (FOLDER / f"{name}.py").read_text("utf-8")]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Scripts set variables and import each other; the allocator of this process stays as it is."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setattr("octavo.training.machine.tune_allocator", lambda: None)
    before, modules = dict(os.environ), set(sys.modules)
    yield
    os.environ.clear()
    os.environ.update(before)
    for name in (set(sys.modules) - modules) & {*SCRIPTS, "planting"}:
        del sys.modules[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_answered(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert not ended.value.code
    assert f"usage: {name}.py" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_imported_is_there(name):
    """Imports inside functions too, which --help does not reach."""
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "octavo":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_mixers(tmp_path, capsys):
    mixers = importlib.import_module("mixers")
    kinds = ["attention", "mamba2"]
    found = mixers.cases(kinds, 16, 8)
    assert {case.name for case in found} == {*kinds}
    mixers.measure(found, [4, 8], 1, time.process_time)
    assert all(case.train.keys() == case.decode.keys() == {4, 8} for case in found)
    lines = mixers.table([stepped(case) for case in found], [4, 8]).splitlines()
    assert len(lines) == 2 + len(kinds)
    mixers.plot(found, [4, 8], tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def stepped(case):
    """A clock need not tick within so little work."""
    for times in (case.train, case.decode):
        times.update({length: [max(second, 1e-6) for second in seconds] for length, seconds in times.items()})
    return case


def test_mixers_takes_every_kind():
    mixers = importlib.import_module("mixers")
    from octavo.nn.tables import TOKEN_MIXERS

    found = mixers.cases([], 16, 8)
    causal = {kind for kind, of in TOKEN_MIXERS.items() if of.capabilities.causal}
    assert {case.name for case in found} == (causal | {*mixers.SETTINGS}) - mixers.LEFT_OUT
    assert all(mixers.training_seconds(case, 8, ticking()) == 1.0 for case in found)


def test_recurrences(monkeypatch, capsys):
    recurrences = importlib.import_module("recurrences")
    monkeypatch.setattr(recurrences, "D", 32)
    monkeypatch.setattr(recurrences, "T", 16)
    monkeypatch.setattr(recurrences.time, "process_time", ticking())
    mixer = {"kind": "mamba2", "n_heads": 4, "d_state": 8}
    sides = {"ours": recurrences.ours(mixer), "transformers": recurrences.mamba2_of_transformers(4, 8)}
    recurrences.compare("mamba2", sides, 1)
    retention = recurrences.ours({"kind": "retention", "n_heads": 4})
    recurrences.compare("retention", {"ours": retention, "again": retention}, 1)
    assert capsys.readouterr().out.count("| forward |") == 2


def ticking():
    """A clock that is one second later at every look."""
    seconds = iter(range(1_000_000))
    return lambda: float(next(seconds))


def test_moe(monkeypatch, capsys):
    moe = importlib.import_module("moe")
    monkeypatch.setattr(moe.time, "process_time", ticking())
    moe.compare(argparse.Namespace(
        dtype="fp32", experts=4, per_token=2, d_model=16, rows=2, seq_len=8, d_ff=8, balance="switch", plain=True,
        threads=1, rounds=1,
    ))  # fmt: skip
    assert "plain / dense, step and update" in capsys.readouterr().out


@pytest.mark.parametrize("packed", [False, True])
def test_attention(packed, monkeypatch, capsys):
    attention = importlib.import_module("attention")
    library, reason = attention.build.attempt()
    if library is None:
        pytest.skip(reason)
    monkeypatch.setattr(attention.time, "process_time", ticking())
    attention.compare((1, 32, 2, 1, 64), packed, argparse.Namespace(dtype="fp32", threads=1, rounds=1), 1e9)
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize("memory", ["all", "last"])
def test_bottleneck(memory):
    bottleneck = importlib.import_module("bottleneck")
    model = bottleneck.model_of("gru", 8, 3, memory)
    assert bottleneck.train(model, 0.02, 3, 4) >= 1
    assert len(bottleneck.accuracy(model, 3, n=4)) == 3


def test_ablations(monkeypatch):
    ablations = importlib.import_module("ablations")
    for name, value in {"D": 16, "LAYERS": 1, "T": 8, "ROWS": 2}.items():
        monkeypatch.setattr(ablations, name, value)
    data = torch.arange(400) % 256
    args = argparse.Namespace(equal=True, lr=1e-3, steps=1, held=1)
    counts = {name: ablations.train(way, data, 0, args)[1] for name, way in ablations.WAYS.items()}
    assert min(counts.values()) >= counts["as usual"]


def test_classifier(tmp_path):
    classifier = importlib.import_module("classifier")
    for name in ("good", "bad"):
        (tmp_path / name).write_text("".join(f"{name} text {i}\n" for i in range(10)))
    train, test = classifier.split([tmp_path / "good", tmp_path / "bad"])
    assert (len(train), len(test)) == (16, 4)
    given = classifier.np.array([label for _, label in test])
    assert classifier.figures(given, given, 0.0)["accuracy"] == 1.0


@pytest.mark.slow
def test_the_encoder_of_classifier(tmp_path):
    classifier = importlib.import_module("classifier")
    rows = [(f"{name} text of the number {i}", k) for i in range(300) for k, name in enumerate(("good", "bad"))]
    said = classifier.encoder(rows[40:], rows[:40], tmp_path, 1, 1)
    assert said.shape == (40,)


def test_memory():
    memory = importlib.import_module("memory")
    from octavo.training.memory import training_bytes

    model, train = memory.mlp(16, 1, 2, 32, 8, 0.1), {"step_tokens": 16}
    assert memory.measure(model, train) > 1e6
    shape, config = memory.configs(model, train)
    assert training_bytes(shape, config, config.precision).total > 0
    assert all(memory.configs(*of) for _, *of in memory.SHAPES)


def test_kenlm(tmp_path, capsys):
    kenlm = importlib.import_module("kenlm")
    (tmp_path / "text").write_text("a b c a b d\nb c a b c\nc a d b a\n" * 3)
    for name in ("one", "two"):
        kenlm.child(str(tmp_path / "text"), 2, 0, str(tmp_path / name))
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["cpu"].keys() == {"words", "counts", "estimates", "arpa"}
    assert f"{sum(said['ngrams'])} n-grams" in kenlm.compare(str(tmp_path / "one"), str(tmp_path / "two"))


def test_vectors(tmp_path):
    vectors = importlib.import_module("vectors")
    (tmp_path / "text").write_text("a b c d e f g h\n" * 50)
    settings = argparse.Namespace(kind="skipgram", loss="negative", dim=8, epochs=1, threads=1)
    assert vectors.ours(tmp_path / "text", settings)["vocabulary"] == 8


TINY = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 48, "seq_len": 16,
        "rows": 2, "dropout": 0.0}  # fmt: skip


@pytest.mark.parametrize("flat", [True, False])
def test_performance(flat, monkeypatch, capsys):
    performance = importlib.import_module("performance")
    monkeypatch.setattr(sys, "stdin", io.StringIO("time\nprofile\n"))
    variant = performance.FULL | {"compile": "off", "flat": flat, "micro": 1, "chunk": 8}
    performance.child(TINY, variant, 1)
    ready, times, profile = capsys.readouterr().out.splitlines()
    assert ready == "ready"
    assert len(json.loads(times)) == 3
    assert any(key.startswith(performance.KINDS["matrix products"]) for key in json.loads(profile))


def test_recipes_of_train_and_plan(tmp_path):
    from octavo.config import Recipe

    train, plan = importlib.import_module("train"), importlib.import_module("plan")
    for name, shape in train.SHAPES.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(train.recipe(shape, tmp_path, 2, 1, "fp32", "off", 4)))
        assert Recipe.load(str(file), []).train.steps == 2
    for name in plan.RECIPES:
        assert Recipe.load(str(plan.recipe(name, tmp_path, tmp_path)), []).train.valid_batches == 0


def test_batches_of_data(tmp_path):
    data = importlib.import_module("data")
    stored = data.shards(tmp_path / "shards", 3000)
    chats = data.WholeRows(data.conversations(50), 32)
    loader = data.Loader([chats, data.StreamRows(stored, 32)], 2, seed=1, weights=[1.0, 3.0])
    assert loader.batch(1)["tokens"].shape == (2, 32)


def test_duplicates_and_encoding_of_data(capsys):
    data = importlib.import_module("data")
    texts = [f"text number {i} of some words that are not the same {i * i}" for i in range(40)]
    assert data.near(texts, 1, n=20, size=200)  # the same bytes from one process and from two
    assert data.encoding({"text": texts}, [], 1)  # the same ids as the reference
    assert "Near duplicates: 20 documents" in capsys.readouterr().out


def test_deterministic(capsys):
    deterministic = importlib.import_module("deterministic")
    args = argparse.Namespace(requests=3, longest=20, tokens=2, rounds=1)
    lines = deterministic.compare("tiny", deterministic.SHAPES["tiny"], args, ticking())
    assert lines and all(line.startswith("| tiny | ") and line.count("|") == 6 for line in lines)
    assert capsys.readouterr().out.splitlines() == lines
