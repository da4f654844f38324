"""The train = serve certificate: a good model passes, and whatever is planted in one of its ways is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.batch import Batch
from octavo.certify import certificate, elsewhere, engines
from octavo.certify.judge import judge_scores
from octavo.certify.prompts import Numbers, asked
from octavo.certify.reference import Reference
from octavo.cli.main import main
from octavo.data.shards import write_shards
from octavo.infer import native
from octavo.infer.executors import PlainExecutor
from octavo.language_model import LanguageModel, load
from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.tokenizer import ByteBPE, train

TEXTS = ["the cat sat on the mat, 1234 times; it's there\n\n", "ça va? 你好 🙂 DON'T", "a" * 30 + "the the the"] * 4
ATTENTION = {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}, "channel": {"kind": "glu", "d_ff": 64}}
MAMBA2 = {"mixer": {"kind": "mamba2", "n_heads": 4, "d_state": 8}, "channel": None}
FEW = ["-n", "4", "--tokens", "6"]


@pytest.fixture(scope="module")
def tokenizer():
    return train(ByteBPE(vocab_size=300), TEXTS)


def made(tokenizer, block=ATTENTION, dtype=torch.float32, **changes) -> LanguageModel:
    values = {"vocab_size": tokenizer.vocab_size, "d_model": 32, "n_layers": 2, "max_seq_len": 96,
              "norm": {"kind": "rmsnorm", "eps": 1e-5}, "blocks": {"block": block}}  # fmt: skip
    model = build(Decoder.Config.model_validate(values | changes)).eval()
    randomise(model, 0)
    return LanguageModel(model.to(dtype), tokenizer)


@pytest.fixture(scope="module")
def good(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("certify") / "model"
    assert made(tokenizer).save(folder) == "llama"
    return folder


@pytest.fixture
def exported(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "exported"))


def certified(model: Path, tmp_path: Path, *more: str) -> tuple[int, dict]:
    code = main(["certify", str(model), *FEW, *more, "--out", str(tmp_path / "found.json")])
    return code, json.loads((tmp_path / "found.json").read_text("utf-8"))


def red(found: dict) -> set[tuple[str, str]]:
    return {
        (backend["name"], aspect)
        for backend in found["backends"]
        for aspect, check in backend["checks"].items()
        if not check["equal"]
    }


def of(found: dict, name: str) -> dict:
    return next(backend for backend in found["backends"] if backend["name"] == name)


# ------------------------------------------------------------------------------------------------ what is good


def test_a_good_model_passes_and_carries_its_certificate(good, capsys):
    pytest.importorskip("transformers")
    assert main(["certify", str(good), "-n", "6", "--tokens", "8", "--weights", "int8"]) == 0
    out = capsys.readouterr().out
    assert "equal, 6 prompts, up to 8 new tokens" in out and "NO:" not in out
    found = json.loads((good / "certificate.json").read_text("utf-8"))
    assert found["equal"] and found["prompts"] == 6 and found["versions"]["octavo"]
    assert set(found["model"]["files"]) >= {"model.safetensors", "config.json", "tokenizer.json"}
    trained, plain, theirs = (of(found, name)["checks"] for name in ("trainer, packed rows", "engine, plain, paged",
                                                                     "transformers"))  # fmt: skip
    assert trained["template"]["figure"] == theirs["template"]["figure"] == "3 of 3"
    assert trained["ids"]["figure"] == theirs["ids"]["figure"] == "6 of 6"
    assert trained["stop"]["values"]["taught"] == [2, 4]
    for checks in (trained, plain, theirs):
        assert checks["log-probabilities"]["values"]["largest"] < 1e-4
        assert checks["log-probabilities"]["values"]["tokens"] > 6
    assert plain["greedy text"]["values"]["wrong"] == theirs["greedy text"]["values"]["wrong"] == []
    small = of(found, "engine, int8")
    assert 0 < small["figures"]["mean_change"] < 0.5 and small["checks"].keys() == plain.keys()
    if not native.library()[1]:
        assert not of(found, "engine, native, paged")["skipped"]
    again = certificate.certify(good, n=1, n_new=1, against=["engine"])
    assert again.model["sha256"] == found["model"]["sha256"]  # the certificate is no part of the model


def test_a_recurrent_model_in_our_own_layout_passes(tokenizer, tmp_path):
    model = tmp_path / "model"
    assert made(tokenizer, MAMBA2 | {"channel": {"kind": "glu", "d_ff": 64}}, positions="none").save(model) == "octavo"
    code, found = certified(model, tmp_path)
    assert code == 0 and not red(found)
    assert of(found, "transformers")["skipped"] == "no Hugging Face family can say this model"
    assert of(found, "engine, native, paged")["skipped"].startswith("no native step: ")


def test_what_is_served_in_sixteen_bits_is_asked_in_them(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("octavo.training.machine.best_precision", lambda: "bf16")
    made(tokenizer, dtype=torch.bfloat16).save(tmp_path / "model")
    code, found = certified(tmp_path / "model", tmp_path, "--against", "engine")
    assert code == 0
    exact, rounded = (of(found, f"engine, plain, {how}")["checks"]["log-probabilities"]["values"]
                      for how in ("paged", "bf16"))  # fmt: skip
    assert exact["largest"] < 1e-4 < engines.LEAST < rounded["largest"] < rounded["tolerance"] < 2


def test_quantised_weights_are_asked_as_they_are(good, tmp_path):
    assert main(["quantize", str(good), "--scheme", "int4", "--group", "32", "--out", str(tmp_path / "small")]) == 0
    code, found = certified(tmp_path / "small", tmp_path)
    assert code == 0 and found["model"]["quantised"]
    assert of(found, "transformers")["skipped"]


def test_a_model_without_a_tokenizer_is_asked_in_numbers(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "bare"))
    for path in (*folder.glob("*token*.json"), folder / "chat_template.jinja"):
        path.unlink()
    code, found = certified(folder, tmp_path)
    assert code == 0 and {"template", "ids"}.isdisjoint(of(found, "engine, plain, paged")["checks"])


def test_prompts_of_a_file(good, tmp_path):
    lines = [
        {"prompt": "the cat"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    code, found = certified(good, tmp_path, "--against", "engine", "--prompts", str(path))
    assert (code, found["prompts"]) == (0, 2)
    assert of(found, "trainer, packed rows")["checks"]["template"]["figure"] == "1 of 1"


def test_a_run_is_asked_how_its_documents_begin(good, tmp_path, tokenizer):
    texts = [f"the mat {i} and the cat sat on it" for i in range(9)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), "utf-8")
    tokenizer.save(tmp_path / "tokenizer")
    prepare = ["data", "prepare", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "data"), "--workers", "1"]
    assert main(prepare) == 0
    write_shards(tmp_path / "data", "train", tmp_path / "tokenizer", workers=1)
    prompts = [prompt.text or prompt.messages[0]["content"] for prompt in asked(load(good), tmp_path, 6, 80)]  # type: ignore[index]
    assert len(prompts) == 6 and set(prompts[:3]) <= set(texts) and not set(prompts[3:]) & set(texts)


# ------------------------------------------------------------------------------------------- what is planted


def test_a_weight_that_was_flipped_in_the_export(good, exported, tmp_path, capsys):
    pytest.importorskip("transformers")
    tensors = load_file(exported / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    at = divmod(int(tensors[name].abs().argmax()), tensors[name].shape[1])
    tensors[name][at] *= -1
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    code, found = certified(good, tmp_path, "--against", "transformers", "--exported", str(exported))
    assert code == 4 and not found["equal"]
    assert red(found) >= {("transformers", "weights"), ("transformers", "log-probabilities")}
    assert {backend for backend, _ in red(found)} == {"transformers"}
    out = capsys.readouterr().out
    assert "down.weight is not the same" in next(
        line for line in out.splitlines() if line.startswith("differs: transformers: weights: ")
    )
    assert "NOT equal" in out


@pytest.mark.parametrize("at", [0, -1])
def test_the_last_bit_of_a_weight_is_seen(at, good, exported, tmp_path):
    pytest.importorskip("transformers")
    tensors = load_file(exported / "model.safetensors")
    flat = tensors["model.embed_tokens.weight"].view(-1)
    flat[at] = torch.nextafter(flat[at], torch.tensor(9.0))
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    _, found = certified(good, tmp_path, "--against", "transformers", "--exported", str(exported))
    assert red(found) == {("transformers", "weights")}


def test_another_template(good, exported, tmp_path):
    pytest.importorskip("transformers")
    path = exported / "chat_template.jinja"
    path.write_text(path.read_text("utf-8").replace("assistant\\n", "assistant"), "utf-8")
    code, found = certified(good, tmp_path, "--against", "transformers", "--exported", str(exported))
    assert code == 4
    assert red(found) == {("transformers", "template"), ("transformers", "ids")}


def test_another_stop_id(good, exported, tmp_path, capsys):
    pytest.importorskip("transformers")
    path = exported / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"eos_token_id": [2, 7]}), "utf-8")
    code, found = certified(good, tmp_path, "--against", "transformers", "--exported", str(exported))
    assert code == 4
    assert ("transformers", "stop") in red(found) <= {("transformers", "stop"), ("transformers", "greedy text")}
    assert "a text ends at [2, 7], here at [2, 4]" in capsys.readouterr().out


def test_an_end_that_training_teaches_and_serving_does_not_know(good, tmp_path, monkeypatch):
    from octavo.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "stop_ids", property(lambda self: frozenset({self.special.eos})))
    code, found = certified(good, tmp_path, "--against", "engine")
    assert code == 4 and red(found) == {("trainer, packed rows", "stop")}


def test_an_engine_that_errs(good, tmp_path, monkeypatch):
    logits = PlainExecutor._logits

    def wrong(self, inputs, state, rows, n, group=()):
        return logits(self, inputs, state, rows, n, group).roll(1, -1)

    monkeypatch.setattr(PlainExecutor, "_logits", wrong)
    code, found = certified(good, tmp_path, "--against", "engine")
    assert code == 4
    assert {("engine, plain, paged", "log-probabilities"), ("engine, plain, paged", "greedy text")} <= red(found)
    assert not {aspect for name, aspect in red(found) if name.startswith("trainer")}


def test_documents_that_mix_in_packed_rows(good, tmp_path, monkeypatch):
    inputs = Batch.inputs

    def mixed(self):
        made = inputs(self)
        made.doc_ids = torch.zeros_like(made.doc_ids)
        return made

    monkeypatch.setattr(Batch, "inputs", mixed)
    code, found = certified(good, tmp_path, "--against", "engine")
    assert code == 4 and red(found) == {("trainer, packed rows", "log-probabilities")}


def test_numbers_that_are_none():
    check = judge_scores([np.zeros(3)], [np.array([0.0, float("nan"), 0.0])], 1.0)
    assert not check.equal and check.figure == "not a number"


# --------------------------------------------------------------------------------------------- other programs


def test_an_export_that_cannot_be_read(good, exported, tmp_path):
    pytest.importorskip("transformers")
    (exported / "model.safetensors").write_bytes(b"no")
    code, found = certified(good, tmp_path, "--against", "transformers", "--exported", str(exported))
    assert code == 4 and red(found) == {("transformers", "weights"), ("transformers", "log-probabilities")}


def test_llama_cpp_that_ends_at_once(good, tmp_path, monkeypatch):
    """A stand-in for its process: what it says is judged, and its end is an answer too."""
    pytest.importorskip("gguf")
    lm = load(good)
    prompts = asked(lm, good, 2, 40)
    reference = Reference(lm.model, prompts, n_tokens=300, stop_ids=frozenset({2, 4}), n_new=4)
    monkeypatch.setattr(elsewhere, "missing", lambda package: False)
    child = tmp_path / "child.py"
    monkeypatch.setattr(elsewhere, "CHILD", child)
    child.write_text("import sys; sys.exit('no such instruction')")
    found = elsewhere.ask_llama_cpp(lm, None, reference, prompts)
    assert "no such instruction" in found.checks["log-probabilities"].difference
    answer = {
        "version": "0", "template": lm.tokenizer.chat_template, "ids": [p.ids for p in prompts], "stop_ids": [2],
        "scores": [s.tolist() for s in reference.scores], "greedy": reference.texts,
    }  # fmt: skip
    child.write_text(f"import sys; open(sys.argv[2], 'w').write({json.dumps(answer)!r})")
    found = elsewhere.ask_llama_cpp(lm, None, reference, prompts)
    assert [aspect for aspect, check in found.checks.items() if not check.equal] == ["stop"]


def test_llama_cpp_says_the_same(good, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: llama.cpp was not asked")
    code, found = certified(good, tmp_path, "--against", "llama-cpp")
    assert code == 0 and of(found, "llama.cpp")["checks"].keys() == {"weights", "template", "ids", "log-probabilities",
                                                                      "greedy text", "stop"}  # fmt: skip


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--against", "lama-cpp"], "did you mean `llama-cpp`?"),
        (["--weights", "int5"], "int5"),
        (["--exported", "nowhere"], "nowhere is neither a model folder nor a GGUF file"),
        (["--tokens", "96"], "96 new tokens leave no room for a prompt"),
        (["--prompts", "nowhere"], "nowhere cannot be read"),
    ],
)
def test_refusals(more, said, good, capsys):
    assert main(["certify", str(good), *more]) == 2
    assert said in capsys.readouterr().err


def test_a_package_that_is_asked_for_must_be_there(good, monkeypatch, capsys):
    monkeypatch.setattr(elsewhere, "missing", lambda package: True)
    assert main(["certify", str(good), "--against", "llama-cpp"]) == 2
    assert "Fix: pip install llama-cpp-python." in capsys.readouterr().err


def test_an_encoder_is_refused(tokenizer, tmp_path, capsys):
    made(tokenizer, causal=False).save(tmp_path / "model")
    assert main(["certify", str(tmp_path / "model")]) == 2
    assert "is no model that continues texts" in capsys.readouterr().err


def test_numbers_stand_in_for_a_tokenizer():
    assert Numbers(10, [3]).stop_ids == {3} and Numbers(10).push(4) == "4 "
