"""GGUF files written here: read back here, by transformers, by the gguf package, and by llama.cpp where it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="the optional package gguf is not installed, so nothing here was tested")

import gguf
import gguf_models

import octavo
from octavo.cli.main import main
from octavo.errors import ConfigError
from octavo.hub import gguf_write, vocabulary
from octavo.hub.folder import load_model
from octavo.hub.gguf_file import open_file
from octavo.language_model import LanguageModel
from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.tokenizer.config import Byte, ByteBPE, Unigram
from octavo.tokenizer.train import train

V = gguf_models.V
TEXTS = ["the cat sat on the mat, 1234 times; it's  there\n\n", "ça va? 你好 🙂 DON'T", "a" * 30 + "the the the"] * 8
MAMBA = {"kind": "mamba", "state_size": 8}
OWN = {
    "mamba": {"blocks": {"block": {"mixer": MAMBA, "channel": None}}, "positions": "none"},
    "mamba untied": {
        "blocks": {"block": {"mixer": MAMBA | {"conv_width": 3, "dt_rank": 5}, "channel": None}}, "positions": "none",
        "tie_embeddings": False,
    },
}  # fmt: skip
NAMES = ["llama", "llama tied", "llama biased", "qwen2", "qwen3", *OWN]


def own(**settings) -> Decoder:
    base = {"d_model": 64, "n_layers": 2, "vocab_size": V, "max_seq_len": 64, "norm": {"kind": "rmsnorm", "eps": 1e-5}}
    model = build(Decoder.Config.model_validate(base | settings)).eval()
    randomise(model, 0)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return train(ByteBPE(vocab_size=280), TEXTS)


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    made: dict[str, LanguageModel] = {}

    def of(name: str) -> LanguageModel:
        if name not in made:
            if name in OWN:
                made[name] = LanguageModel(own(**OWN[name]), tokenizer)
            else:
                folder = tmp_path_factory.mktemp("theirs")
                gguf_models.reference(name).save_pretrained(folder)
                made[name] = LanguageModel(load_model(folder), tokenizer)
        return made[name]

    return of


def same_tokenizer(one, other) -> None:
    for text in (*TEXTS, "<|im_start|>user", " \n\t x"):
        assert one.encode(text) == other.encode(text)
    messages = [{"role": "user", "content": "the cat"}]
    a, b = (t.render(messages, add_generation_prompt=True).ids for t in (one, other))
    assert a == b
    assert one.stop_ids == other.stop_ids
    for role in ("bos", "eos", "pad"):
        assert getattr(one.special, role) == getattr(other.special, role)


@pytest.mark.rows("A10", "A12")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", NAMES)
def test_read_back_it_is_the_same_model(name, dtype, models, tmp_path):
    lm = models(name)
    narrow = LanguageModel(own_copy(lm.model, dtype), lm.tokenizer)
    assert gguf_write.write(narrow.model, narrow.tokenizer, tmp_path / "m.gguf") == name.split()[0]
    again = octavo.load(tmp_path / "m.gguf", "saved")
    mine, theirs = dict(narrow.model.named_parameters()), dict(again.model.named_parameters())
    assert mine.keys() == theirs.keys()
    for key in mine:
        assert mine[key].dtype == theirs[key].dtype == dtype
        # A decay comes back through a logarithm.
        exact = torch.equal(mine[key], theirs[key])
        assert exact or ("a_log" in key and torch.allclose(mine[key], theirs[key], rtol=1e-5, atol=1e-6)), key
    assert again.max_seq_len == 64
    same_tokenizer(again.tokenizer, lm.tokenizer)
    kinds = {gguf.GGMLQuantizationType(t.type).name for t in open_file(tmp_path / "m.gguf").tensors.values()}
    assert kinds == {"F32"} | {{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]}


def own_copy(model: Decoder, dtype: torch.dtype) -> Decoder:
    other = build(model.config).to(dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("name", ["llama", "llama tied", "llama biased", "qwen2", "qwen3"])
def test_tensors_are_named_and_arranged_as_by_the_converter_of_llama_cpp(name, models, tmp_path):
    lm, theirs = models(name), gguf_models.reference(name)
    gguf_write.write(lm.model, lm.tokenizer, tmp_path / "m.gguf")
    wanted = gguf_models.tensors(name, theirs)
    file = open_file(tmp_path / "m.gguf")
    assert file.tensors.keys() == wanted.keys()
    for key in wanted:
        assert np.array_equal(file.array(key), wanted[key]), key


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("llama biased", "qwen3")])
@torch.no_grad()
def test_transformers_reads_it(name, models, tmp_path):
    """Its reader of GGUF sets no attention_bias, and takes 128 for the width of Qwen3's heads: neither is asked."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate alone: it was not asked")
    import transformers

    lm = models(name)
    gguf_write.write(lm.model, lm.tokenizer, tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    tokens = torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(3))
    wanted, got = theirs(tokens, use_cache=False).logits, lm.logits(tokens)
    assert float((got - wanted).abs().max()) < 2e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_says_the_same(name, models, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: llama.cpp was not asked")
    lm = models(name)
    gguf_write.write(lm.model, lm.tokenizer, tmp_path / "m.gguf")
    there = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, verbose=False, logits_all=True)
    for text in TEXTS[:3]:
        assert there.tokenize(text.encode(), add_bos=True, special=False) == lm.prompt_ids(text)
    compared = 0
    for text in ("the cat", "it's  there", "sat on", "你好", "1234"):
        ids = prompt = lm.prompt_ids(text)
        there.reset()
        there.eval(prompt)
        mine = lm.logits(prompt).numpy()
        assert np.abs(np.array(there.scores[: len(prompt)]) - mine).max() < 0.01 * np.abs(mine).max()  # a 16-bit cache
        for _ in range(20):
            first, second = lm.logits(ids)[-1].topk(2).values.tolist()
            if first - second < 0.02 * float(np.abs(mine).max()):
                break  # too near to tell in 16 bits
            ids = [*ids, int(lm.logits(ids)[-1].argmax())]
        there.reset()
        n = len(ids) - len(prompt)
        said = [token for token, _ in zip(there.generate(prompt, temp=0.0, top_k=1), range(n), strict=False)]
        assert said == ids[len(prompt) :]
        compared += n
    assert compared > 3


# -------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    ("split", "name"), [("gpt2", "gpt-2"), ("qwen2", "qwen2"), ("llama3", "dbrx")], ids=["gpt2", "qwen2", "llama3"]
)
def test_each_way_of_cutting_has_its_name(split, name, tmp_path):
    lm = LanguageModel(own(**OWN["mamba"]), train(ByteBPE(vocab_size=280, split=split), TEXTS))
    gguf_write.write(lm.model, lm.tokenizer, tmp_path / "m.gguf")
    assert open_file(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == name
    same_tokenizer(octavo.load(tmp_path / "m.gguf").tokenizer, lm.tokenizer)


@pytest.mark.parametrize("leading_space", [True, False], ids=["leading space", "bare"])
def test_sentencepiece_keeps_its_order_of_merging(leading_space, tmp_path):
    letters = ["▁", *"abcdeht"]
    joined = ["th", "the", "▁the", "▁t", "he", "ca", "▁ca", "at", "▁cat", "cat"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *joined]
    kinds = [vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.CONTROL, *[vocabulary.BYTE] * 256]
    kinds += [vocabulary.NORMAL] * (len(pieces) - len(kinds))
    scores = [0.0] * (len(pieces) - len(joined)) + [-float(i) for i in range(len(joined))]
    roles = {"bos": 1, "eos": 2, "unk": 0}
    made = vocabulary.sentencepiece(tmp_path, pieces, scores, kinds, roles, leading_space=leading_space)
    lm = LanguageModel(own(**OWN["mamba"]), made)
    gguf_write.write(lm.model, lm.tokenizer, tmp_path / "m.gguf")
    again = octavo.load(tmp_path / "m.gguf").tokenizer
    for text in ("the cat", "  hath  chat", "é the\n", "", "x"):
        assert again.encode(text) == made.encode(text)
        assert again.decode(again.encode(text)) == made.decode(made.encode(text))
    file = open_file(tmp_path / "m.gguf")
    assert file.metadata["tokenizer.ggml.add_space_prefix"] is leading_space
    assert file.metadata["tokenizer.ggml.token_type"].tolist()[: len(kinds)] == kinds


# ---------------------------------------------------------------------------------------------- refusals


ATTENTION = {"kind": "attention", "n_heads": 4}
REFUSED = [
    ({"blocks": {"block": {"mixer": MAMBA | {"bias": True}, "channel": None}}, "positions": "none"}, "use_bias = True"),
    ({"blocks": {"block": {"mixer": MAMBA | {"expand": 1}, "channel": None}}, "positions": "none"}, "expand = 1"),
    ({"blocks": {"block": {"mixer": ATTENTION, "channel": {"kind": "glu", "bias": True}}}}, "mlp_bias = True"),
    ({"blocks": {"block": {"mixer": ATTENTION, "channel": {"kind": "glu", "activation": "gelu"}}}}, "hidden_act"),
    ({"positions": {"kind": "rope", "scaling": {"kind": "linear", "factor": 2.0}}}, "rope_scaling"),
    ({"blocks": {"block": {"mixer": ATTENTION | {"window": 8}}}}, "this model"),
    ({"norm": "layernorm"}, "this model"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), REFUSED, ids=str)
def test_what_a_file_could_not_say_is_refused(settings, said, tokenizer, tmp_path):
    lm = LanguageModel(own(**{"blocks": {"block": {"mixer": ATTENTION}}, **settings}), tokenizer)
    with pytest.raises(ConfigError) as caught:
        gguf_write.write(lm.model, lm.tokenizer, tmp_path / "m.gguf")
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Byte(), "without merges"),
        (Unigram(vocab_size=60), "Unigram"),
        (ByteBPE(vocab_size=280, split="spaces"), "cuts text into words"),
        (ByteBPE(vocab_size=280, split="gpt2", digits="three"), "cuts text into words"),
    ],
    ids=str,
)
def test_tokenizers_without_words_in_gguf_are_refused(config, said, tmp_path):
    lm = LanguageModel(own(**OWN["mamba"]), train(config, TEXTS))
    with pytest.raises(ConfigError, match=said):
        gguf_write.write(lm.model, lm.tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_numbers_beyond_float16_are_refused(models, tmp_path):
    model = own_copy(models("llama").model, torch.float32)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e6
    half = LanguageModel(model.half(), models("llama").tokenizer)
    assert not torch.isfinite(half.model.head.weight).all()
    with pytest.raises(ConfigError, match="float16"):
        gguf_write.write(half.model, half.tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_it_and_overwrites_nothing(models, tmp_path, capsys):
    models("qwen2").save(tmp_path / "folder")
    target = tmp_path / "new" / "m.gguf"
    assert main(["convert", str(tmp_path / "folder"), str(target), "--to", "gguf", "--dtype", "bfloat16"]) == 0
    assert f"{target}: GGUF, qwen2, " in capsys.readouterr().out
    assert [path.name for path in target.parent.iterdir()] == ["m.gguf"]
    before = target.read_bytes()
    assert main(["convert", str(tmp_path / "folder"), str(target), "--to", "gguf"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert main(["convert", str(target), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "qwen2"
    assert main(["convert", str(target), str(tmp_path / "own"), "--to", "octavo"]) == 0
    assert json.loads((tmp_path / "own" / "config.json").read_text())["model_type"] == "octavo"
    for wrong in (["--to", "onnx"], ["--to", "gguf", "--family", "llama"]):
        assert main(["convert", str(target), str(tmp_path / "no"), *wrong]) == 2
    assert not (tmp_path / "no").exists()
