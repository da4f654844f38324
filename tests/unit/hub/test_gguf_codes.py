"""Quantised GGUF files: types that are ours keep their codes, exports say them bit for bit, llama.cpp reads them."""

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
from octavo.hub import gguf_blocks, gguf_write
from octavo.hub.gguf_file import open_file
from octavo.infer import native
from octavo.language_model import LanguageModel
from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.nn.quantized import QuantizedProjection, quantized_modules
from octavo.quantize.model import dequantized, quantize
from octavo.quantize.scheme import scheme_of
from octavo.tokenizer.config import ByteBPE
from octavo.tokenizer.train import train

V = gguf_models.V
TEXTS = ["the cat sat on the mat, 1234 times; it's  there\n\n", "ça va? 你好 🙂 DON'T", "a" * 30 + "the the the"] * 8
NAMES = ["llama", "llama tied", "llama biased", "qwen2", "qwen3", "gemma2"]
KINDS = {"Q8_0": 8, "Q4_0": 4, "Q5_0": 8, "IQ4_NL": 8}
TOKENS = [5, 201, 33, 268, 12, 90, 7, 255, 140, 41]
MIXER = {"kind": "mamba", "state_size": 8, "dt_rank": 32}
MAMBA = {"blocks": {"block": {"mixer": MIXER, "channel": None}}, "positions": "none"}


def blocks_of(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Random bytes of a type with sensible scales, which may be negative: every code there is."""
    drawn = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    raw = drawn.integers(0, 256, (shape[0], shape[1] // 32, size), dtype=np.uint8)
    raw[..., :2] = (drawn.standard_normal((*raw.shape[:2], 1)) * 0.02).astype("<f2").view(np.uint8)
    return raw.reshape(shape[0], -1)


def restored(path, kind: str, raw: np.ndarray):
    """The file at ``path`` with one tensor of that type, opened."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("some.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_file(path)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_stand_for_what_the_package_says_bit_for_bit(kind, tmp_path):
    raw = blocks_of(kind, (37, 96))
    codes = gguf_blocks.read(restored(tmp_path / "m.gguf", kind, raw), "some.weight")
    assert (codes.bits, codes.shape, codes.kind) == (KINDS[kind], (37, 96), kind)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(codes.plain().numpy(), wanted)
    assert np.array_equal(codes.wider().plain().numpy(), wanted)
    if kind in ("Q8_0", "Q4_0"):
        assert np.array_equal(gguf_blocks.bytes_of(codes), raw)
        assert {0, 255 if kind == "Q8_0" else 15} <= set(codes.unpacked().flatten().tolist())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_keeps_the_codes_of_its_file(name, kind, tmp_path):
    """The same logits as from dequantised weights: the permuted rows of Llama's queries and keys, a tied head."""
    wanted = gguf_models.write(tmp_path / "m.gguf", name, gguf_models.reference(name), matrices=kind)
    lm, plain = octavo.load(tmp_path / "m.gguf"), octavo.load(tmp_path / "m.gguf", codes=False)
    small = quantized_modules(lm.model)
    assert len(small) == 2 * 7 + 1 and "head" in small and not quantized_modules(plain.model)
    assert {(m.bits, m.group) for m in small.values()} == {(KINDS[kind], 32)}
    up = lm.model.blocks[1].layers["channel"].mixer.up.weight.numpy()
    assert np.array_equal(up, wanted["blk.1.ffn_up.weight"])
    attention = lm.model.blocks[0].layers["mixer"].mixer
    for leaf, heads in (("q", 4), ("k", 2)):
        weight = getattr(attention, leaf).weight.numpy()
        stored = gguf_models.permuted(weight, heads) if name.startswith("llama") else weight
        assert np.array_equal(stored, wanted[f"blk.0.attn_{leaf}.weight"])
    assert np.array_equal(lm.model.head.weight.numpy(), wanted.get("output.weight", wanted["token_embd.weight"]))
    assert torch.equal(lm.logits(TOKENS), plain.logits(TOKENS))
    own = dict(dequantized(lm.model).named_parameters())
    for key, parameter in plain.model.named_parameters():
        assert torch.equal(own[key], parameter), key
    assert f"15 products keep their codes (int{KINDS[kind]}), all else is float32" in lm.read_as
    assert "dequantised to float32" in plain.read_as


@pytest.mark.parametrize(("first", "second", "left"), [("Q5_0", "Q8_0", 8), ("Q4_0", "Q8_0", 8), ("Q4_0", "Q6_K", 0)])
def test_products_that_are_made_as_one_are_of_one_kind(first, second, left, tmp_path, monkeypatch):
    """llama.cpp mixes types within a layer: 4 bits become 8 beside 8, and beside plain ones plain."""
    quants = gguf.quants.quantize
    shapes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(gguf_models.MODELS, "mixed", ("qwen2", type(gguf_models.MODELS["qwen2"][1])(
        **(gguf_models.SHAPE | shapes))))  # fmt: skip
    model = gguf_models.reference("mixed")
    stored = gguf_models.write(tmp_path / "one.gguf", "mixed", model, matrices=first)
    file = gguf.GGUFReader(tmp_path / "one.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    for key, entry in file.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            gguf_models.add(writer, key, entry.contents())
    for tensor in file.tensors:
        kind, data = tensor.tensor_type, tensor.data
        if "attn_v.weight" in tensor.name:
            kind = gguf.GGMLQuantizationType[second]
            values = stored[tensor.name]
            data = quants(values, kind) if second == "Q8_0" else q6_k(values.shape)
            stored[tensor.name] = gguf.quants.dequantize(data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lm = octavo.load(tmp_path / "m.gguf")
    attention = lm.model.blocks[0].layers["mixer"].mixer
    for leaf in "qkv":
        product = getattr(attention, leaf)
        assert getattr(product, "bits", 0) == left
        assert np.array_equal(product.weight.detach().numpy(), stored[f"blk.0.attn_{leaf}.weight"])
    assert isinstance(attention.o, QuantizedProjection) and native.unsuitable(lm.model) == ""
    assert torch.equal(lm.logits(TOKENS), octavo.load(tmp_path / "m.gguf", codes=False).logits(TOKENS))


def q6_k(shape: tuple[int, int]) -> np.ndarray:
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q6_K][1]
    raw = np.random.default_rng(1).integers(0, 256, (shape[0], shape[1] // 256, size), dtype=np.uint8)
    raw[..., -2:] = np.full(raw.shape[:2], 1e-4, "<f2")[..., None].view(np.uint8)
    return raw.reshape(shape[0], -1)


# ----------------------------------------------------------------------------------------------- exports


@pytest.fixture(scope="module")
def tokenizer():
    return train(ByteBPE(vocab_size=280), TEXTS)


def shaped(name: str, tokenizer, tmp_path) -> LanguageModel:
    """A model of random weights whose widths are multiples of 64."""
    if name == "mamba":
        base = {"d_model": 64, "n_layers": 2, "vocab_size": V, "max_seq_len": 64, "norm": {"kind": "rmsnorm"}}
        model = build(Decoder.Config.model_validate(base | MAMBA)).eval()
        randomise(model, 0)
        return LanguageModel(model, tokenizer)
    gguf_models.reference(name).save_pretrained(tmp_path / "theirs")
    from octavo.hub.folder import load_model

    return LanguageModel(load_model(tmp_path / "theirs"), tokenizer)


@pytest.mark.parametrize("scheme", [("int8", 32), ("int8", 64), ("int4", 32), ("int8", 0)], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama tied", "llama biased", "qwen2", "qwen3", "mamba"])
def test_an_export_has_every_code_and_scale(name, scheme, tokenizer, tmp_path):
    lm = shaped(name, tokenizer, tmp_path)
    lm.model = quantize(lm.model, scheme_of(scheme[0], group=scheme[1]))
    assert gguf_write.write(lm.model, tokenizer, tmp_path / "m.gguf") == name.split()[0]
    file, kind = open_file(tmp_path / "m.gguf"), {"int8": "Q8_0", "int4": "Q4_0"}[scheme[0]]
    matrices = {
        n for n, entry in file.tensors.items() if len(entry.shape) == 2 and "ssm_conv1d" not in n and "ssm_a" not in n
    }
    assert {file.type_name(n) for n in matrices - {"token_embd.weight"}} == {kind}
    assert file.metadata["general.file_type"] == {"int8": 7, "int4": 2}[scheme[0]]
    theirs = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    assert np.array_equal(theirs["output.weight"], lm.model.head.weight.numpy())
    assert np.array_equal(theirs["token_embd.weight"], lm.model.embed.weight.detach().numpy())
    again = octavo.load(tmp_path / "m.gguf")
    mine, back = quantized_modules(lm.model), quantized_modules(again.model)
    assert mine.keys() == back.keys()
    for key, product in mine.items():
        assert torch.equal(product.codes, back[key].codes), key
        assert torch.equal(product.scales.repeat_interleave(product.group // 32, 1), back[key].scales), key
    if name != "mamba":  # a decay comes back through a logarithm
        assert torch.equal(again.logits(TOKENS), lm.logits(TOKENS))


def test_what_was_read_is_written_byte_for_byte(tmp_path):
    """A tied file stays tied: the codes of the embedding stand there once."""
    for name, kind in (("llama tied", "Q8_0"), ("qwen2", "Q4_0"), ("llama", "Q4_0")):
        source, target = tmp_path / f"{name}.gguf", tmp_path / f"{name} again.gguf"
        gguf_models.write(source, name, gguf_models.reference(name), matrices=kind)
        lm = octavo.load(source)
        gguf_write.write(lm.model, lm.tokenizer, target)
        one, other = open_file(source), open_file(target)
        assert one.tensors.keys() == other.tensors.keys()
        for key in one.tensors:
            own_head = key == "token_embd.weight" and "output.weight" in one.tensors
            same = one.array(key) == other.array(key) if own_head else one.raw(key) == other.raw(key)
            assert np.all(same), key


def test_narrow_groups_are_written_in_full(tokenizer, tmp_path):
    base = {"d_model": 48, "n_layers": 1, "vocab_size": V, "max_seq_len": 64, "norm": {"kind": "rmsnorm"},
            "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 3},
                                 "channel": {"kind": "glu", "d_ff": 64}}}}  # fmt: skip
    model = build(Decoder.Config.model_validate(base)).eval()
    randomise(model, 0)
    small = quantize(model.bfloat16(), "int4")
    gguf_write.write(small, tokenizer, tmp_path / "m.gguf")
    file = open_file(tmp_path / "m.gguf")
    assert {file.type_name(n) for n in ("blk.0.attn_q.weight", "output.weight")} == {"F32"}
    assert (file.type_name("blk.0.ffn_down.weight"), file.type_name("token_embd.weight")) == ("Q4_0", "BF16")
    again = octavo.load(tmp_path / "m.gguf", torch.float32)
    wide = dequantized(small).float()
    wanted = LanguageModel(wide, tokenizer).logits(TOKENS)
    assert float((again.logits(TOKENS) - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
    assert torch.equal(again.model.head.weight, small.head.dequantised())


@pytest.mark.parametrize(("scheme", "said"), [("fp8", "8-bit floats"), ("int8-dynamic", "rounded to 8 bits")])
def test_schemes_without_words_in_gguf_are_refused(scheme, said, tokenizer, tmp_path):
    lm = shaped("llama", tokenizer, tmp_path)
    with pytest.raises(ConfigError, match=said):
        gguf_write.write(quantize(lm.model, scheme), tokenizer, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


# ------------------------------------------------------------------------------------------ command line


@pytest.mark.rows("A10", "A12")
def test_the_command_line_there_and_back(tokenizer, tmp_path, capsys):
    shaped("qwen2", tokenizer, tmp_path).save(tmp_path / "folder")
    made = tmp_path / "m.gguf"
    words = ["quantize", str(tmp_path / "folder"), "--scheme", "int4", "--to", "gguf", "--out"]
    assert main([*words, str(made)]) == 0
    assert main([*words, str(made)]) == 2
    assert main(["quantize", str(tmp_path / "folder"), "--scheme", "int4", "--out", str(tmp_path / "small")]) == 0
    assert main(["convert", str(tmp_path / "small"), str(tmp_path / "n.gguf"), "--to", "gguf"]) == 0
    one, other = (open_file(tmp_path / name) for name in ("m.gguf", "n.gguf"))
    assert all(np.array_equal(one.raw(name), other.raw(name)) for name in one.tensors)
    capsys.readouterr()
    wanted = octavo.load(tmp_path / "small")
    for to, family, small in ((None, "qwen2", 0), ("hf", "qwen2", 0), ("octavo", "octavo", 15)):
        target = tmp_path / f"back-{to}"
        assert main(["convert", str(made), str(target), *(["--to", to] if to else [])]) == 0
        said = capsys.readouterr().out
        assert f"{target}: {family}, " in said
        assert ("15 x Q4_0: dequantised to float32" if not small else "15 products keep their codes (int4)") in said
        again = octavo.load(target)
        assert json.loads((target / "config.json").read_text())["model_type"] == family
        assert len(quantized_modules(again.model)) == small
        assert float((again.logits(TOKENS) - wanted.logits(TOKENS)).abs().max()) < 1e-4
    assert main(["convert", str(made), str(tmp_path / "plain"), "--to", "octavo", "--dequantize"]) == 0
    assert not quantized_modules(octavo.load(tmp_path / "plain").model)
    assert main(["quantize", str(made), "--scheme", "int8", "--out", str(tmp_path / "other")]) == 0
    assert main(["generate", str(made), "the cat", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    (tmp_path / "t.txt").write_text(TEXTS[0])
    capsys.readouterr()
    assert (
        main(["quantize", str(tmp_path / "folder"), "--scheme", "fp8", "--to", "gguf", "--out", str(tmp_path / "f")])
        == 2
    )
    assert "GGUF has no words for fp8" in capsys.readouterr().err


def test_the_native_step_serves_the_codes(tmp_path):
    """Decoding through blocks of the packed codes gives the logits of the plain weights."""
    if native.library()[0] is None:
        pytest.skip(f"no native step on this machine: {native.library()[1]}")
    gguf_models.write(tmp_path / "m.gguf", "llama tied", gguf_models.reference("llama tied"), matrices="Q4_0")
    lm, plain = octavo.load(tmp_path / "m.gguf"), octavo.load(tmp_path / "m.gguf", codes=False)
    assert native.unsuitable(lm.model) == ""
    state = lm.model.new_state(1, len(TOKENS) + 1)
    step, rows = native.NativeStep(lm.model, state), torch.tensor([0])
    got = torch.cat([step(torch.tensor([token]), rows) for token in TOKENS])
    wanted = plain.logits(TOKENS)
    assert float((got - wanted).abs().max()) < 2e-3 * float(wanted.abs().max())
    assert native.packed(lm.model).n_bytes < 0.45 * native.packed(plain.model).n_bytes


# --------------------------------------------------------------------------------------------- llama.cpp


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "qwen3"])
def test_llama_cpp_reads_our_codes(name, scheme, tokenizer, tmp_path):
    """Logits are near, as it rounds activations to 8 bits in blocks of 32 and its cache to 16.

    Greedy text is the same wherever the first two are not too near for that.
    """
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: llama.cpp was not asked")
    lm = shaped(name, tokenizer, tmp_path)
    lm.model = quantize(lm.model, scheme)
    gguf_write.write(lm.model, tokenizer, tmp_path / "m.gguf")
    there = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, verbose=False, logits_all=True)
    compared = 0
    for text in ("the cat", "it's  there", "sat on", "你好", "1234"):
        ids = prompt = lm.prompt_ids(text)
        assert there.tokenize(text.encode(), add_bos=True, special=False) == prompt
        there.reset()
        there.eval(prompt)
        mine = lm.logits(prompt).numpy()
        assert np.abs(np.array(there.scores[: len(prompt)]) - mine).max() < 0.1 * np.abs(mine).max()  # 0.045 was seen
        for _ in range(20):
            logits = lm.logits(ids)[-1]
            first, second = logits.topk(2).values.tolist()
            if first - second < 0.1 * float(logits.abs().max()):
                break
            ids = [*ids, int(logits.argmax())]
        there.reset()
        n = len(ids) - len(prompt)
        answer = [token for token, _ in zip(there.generate(prompt, temp=0.0, top_k=1), range(n), strict=False)]
        assert answer == ids[len(prompt) :]
        compared += n
    assert compared > 0
