"""GGUF files: models against the transformers models they were made of, tokenizers against merging written plainly."""

from __future__ import annotations

import random
import re
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="the optional package gguf is not installed, so nothing here was tested")

import gguf
from gguf_models import BPE_PIECES, BYTE, CONTROL, MERGES, MODELS, NORMAL, UNKNOWN, USER_DEFINED, V, reference, write

import octavo
from octavo.cli.main import main
from octavo.errors import CheckpointError, ConfigError
from octavo.hub import formats
from octavo.hub import gguf as door
from octavo.hub.gguf_file import open_file
from octavo.tokenizer import bpe
from octavo.tokenizer.pieces import byte_alphabet

TOKENS = [5, 201, 33, 268, 12, 90, 7, 255, 140, 41]


@torch.no_grad()
def their_logits(model, tokens=TOKENS) -> np.ndarray:
    return model(torch.tensor([tokens])).logits[0].numpy()


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_the_file_was_made_of(tmp_path, name):
    model = reference(name)
    write(tmp_path / "m.gguf", name, model)
    lm = octavo.load(tmp_path / "m.gguf")
    wanted = their_logits(model)
    assert np.abs(lm.logits(TOKENS).numpy() - wanted).max() < 2e-5 * max(1, np.abs(wanted).max())
    assert wanted.std() > 0.5
    assert lm.max_seq_len == 64


@pytest.mark.parametrize("stored", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_what_the_package_says_they_are(tmp_path, stored):
    model = reference("qwen2")
    wanted = write(tmp_path / "m.gguf", "qwen2", model, matrices=stored)
    lm = octavo.load(tmp_path / "m.gguf")
    dtypes = {p.dtype for p in octavo.load(tmp_path / "m.gguf", "saved").model.parameters()}
    assert dtypes == {{"F16": torch.float16, "BF16": torch.bfloat16}.get(stored, torch.float32)}
    up = lm.model.blocks[1].layers["channel"].mixer.up.weight.detach().float().numpy()
    assert np.array_equal(up, wanted["blk.1.ffn_up.weight"])
    assert not np.array_equal(up, model.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy())


@pytest.mark.parametrize("stored", ["Q4_K", "Q6_K", "Q2_K", "IQ4_XS"])
def test_types_that_the_package_only_reads(tmp_path, stored):
    kind = gguf.GGMLQuantizationType[stored]
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(0).integers(0, 60, (3, 2 * block_bytes), dtype=np.uint8)  # below 60: no number is NaN
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("some.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_file(tmp_path / "m.gguf")
    assert file.tensors["some.weight"].shape == (3, 512)
    got = file.array("some.weight")
    assert np.array_equal(got, gguf.quants.dequantize(raw, kind)) and np.isfinite(got).all() and got.std() > 0


def test_the_container_reads_as_the_package_reads_it(tmp_path):
    write(tmp_path / "m.gguf", "gemma2", reference("gemma2"), matrices="Q8_0")
    file, theirs = open_file(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    assert [*file.tensors] == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        entry = file.tensors[tensor.name]
        assert (entry.start, entry.n_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert entry.shape == tuple(tensor.shape.tolist()[::-1])
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = file.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), key


def test_a_converted_file_is_a_folder_that_transformers_reads(tmp_path, capsys):
    import transformers

    model = reference("llama")
    write(tmp_path / "m.gguf", "llama", model)
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "folder")]) == 0
    assert "folder: llama, " in capsys.readouterr().out
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert np.abs(their_logits(again) - their_logits(model)).max() < 1e-5
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    here = octavo.load(tmp_path / "m.gguf").tokenizer
    messages = [{"role": "user", "content": "the cat"}]
    ids = there.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == here.render(messages, add_generation_prompt=True).ids


def test_it_talks_on_the_command_line(tmp_path, capsys, monkeypatch):
    import io

    write(tmp_path / "m.gguf", "llama", reference("llama"))
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    assert main(["chat", str(tmp_path / "m.gguf"), "--temperature", "0", "--max-new-tokens", "5"]) == 0
    answer = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    assert main(["chat", str(tmp_path), "--temperature", "0", "--max-new-tokens", "5"]) == 0  # the folder's only model
    assert capsys.readouterr().out == answer and answer.strip()


# -------------------------------------------------------------------------------------------- tokenizers


LETTER, OTHER = r"[^\W\d_]", r"(?:[^\w\s]|_)"
GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{LETTER}+| ?\d+| ?{OTHER}+|\s+(?!\S)|\s+"
LATER = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?{LETTER}+|NUMBERS| ?{OTHER}+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt-2": GPT2,
    "smollm": GPT2,
    "qwen2": LATER.replace("NUMBERS", r"\d"),
    "llama-bpe": LATER.replace("NUMBERS", r"\d{1,3}"),
}


def plain_ids(text: str, cut: str) -> list[int]:
    """Cut, written in bytes, merged by the plain encoder; the user's own piece is found before all that."""
    letters, merges = byte_alphabet(), [tuple(merge.split(" ")) for merge in MERGES]
    ids: list[int] = []
    for part in re.split("(<think>)", text):
        if part == "<think>":
            ids.append(BPE_PIECES.index(part))
            continue
        for run in re.split(r"(\d)", part) if cut == "smollm" else [part]:
            for word in re.findall(PATTERNS[cut], run):
                spelt = "".join(letters[byte] for byte in word.encode())
                if cut == "llama-bpe" and spelt in BPE_PIECES:
                    ids.append(BPE_PIECES.index(spelt))
                else:
                    ids += [BPE_PIECES.index(piece) for piece in bpe.encode(spelt, merges)] if spelt else []
    return ids


def some_texts() -> list[str]:
    draw = random.Random(4)
    words = [
        "the",
        "cat",
        "then",
        "in",
        "thin",
        "é",
        "猫",
        "it's",
        "IT'S",
        "we'll",
        "12",
        "123",
        "1234567",
        "x_y",
        "--",
        "!?\n",
    ]
    texts = [
        "".join(draw.choices([*words, " ", " ", "  ", "\n\n", "\r\n", "\t", "."], k=draw.randrange(1, 14)))
        for _ in range(200)
    ]
    return [*texts, "", " ", "    ", "a <think> b", "<|im_end|> in text stays text", "e\u0301"]


@pytest.mark.parametrize("cut", PATTERNS)
def test_ids_are_those_of_plain_merging(tmp_path, cut):
    write(tmp_path / "m.gguf", "llama tied", reference("llama tied"), tokenizer={"tokenizer.ggml.pre": cut})
    tokenizer = door.read_tokenizer(open_file(tmp_path / "m.gguf"))
    assert tokenizer.vocab_size == len(BPE_PIECES)  # what only fills up the embedding is no text
    for text in some_texts():
        if "e\u0301" not in text:  # `re` does not take the mark for what it is
            assert tokenizer.encode(text) == plain_ids(text, cut), repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_roles_stops_and_the_chat_template(tmp_path):
    model = reference("llama tied")
    more = {"tokenizer.ggml.eot_token_id": 1}
    write(tmp_path / "m.gguf", "llama tied", model, **more)
    tokenizer = octavo.load(tmp_path / "m.gguf").tokenizer
    assert (tokenizer.special.bos, tokenizer.special.eos, tokenizer.special.turn_end) == (None, 2, 2)
    assert tokenizer.stop_ids == {1, 2}
    assert tokenizer.render([{"role": "user", "content": "in <|im_end|>"}]).ids.count(2) == 1
    write(tmp_path / "b.gguf", "llama tied", model, tokenizer={"tokenizer.ggml.add_bos_token": True})
    lm = octavo.load(tmp_path / "b.gguf")
    assert lm.prompt_ids("the")[0] == lm.tokenizer.special.bos == 0


SPM = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "t", "h", "e", "c", "a", "é",
       "th", "▁th", "▁the", "▁c", "▁ca", "at", "▁cat", "▁▁", "<mark>"]  # fmt: skip
SPM_META = {
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.merges": None,
    "tokenizer.ggml.tokens": SPM, "tokenizer.ggml.scores": [-float(i) for i in range(len(SPM))],
    "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 15 + [USER_DEFINED],
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
}  # fmt: skip


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_joins_by_score_and_falls_back_to_bytes(tmp_path, prefix):
    meta = {**SPM_META, "tokenizer.ggml.add_space_prefix": prefix}
    write(tmp_path / "m.gguf", "llama tied", reference("llama tied"), tokenizer=meta)
    tokenizer = octavo.load(tmp_path / "m.gguf").tokenizer
    pieces = lambda text: [tokenizer.tokens[i] for i in tokenizer.encode(text)]  # noqa: E731
    assert pieces("the cat") == (["▁the", "▁cat"] if prefix else ["th", "e", "▁cat"])
    assert pieces(" é\n")[-3:] == (["▁▁", "é", "<0x0A>"] if prefix else ["▁", "é", "<0x0A>"])
    assert pieces("a猫")[-4:] == ["a", "<0xE7>", "<0x8C>", "<0xAB>"]
    assert "<mark>" in pieces("a<mark>") and "</s>" not in pieces("</s>")
    assert tokenizer.special.bos == 1
    for text in ("the cat", " the  cat", "猫\n", "</s>", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ------------------------------------------------------------------------------------------ what is wrong


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        octavo.load(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and "Fix:" in text
    return text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"general.architecture": "rwkv6"}, "'rwkv6'. Fix: known in GGUF are llama, qwen2, qwen3, gemma2, mamba"),
        ({"llama.block_count": 3}, "block_count = 3"),
        ({"llama.block_count": 10**9}, "not a number from 1 to 1024"),
        ({"llama.block_count": None}, "block_count = None"),
        ({"llama.attention.head_count": 0}, "head_count = 0"),
        ({"llama.attention.head_count_kv": 3}, "cannot be 3 heads"),
        ({"llama.embedding_length": 63}, "of another shape"),
        ({"llama.feed_forward_length": 2**24}, "of another shape"),
        ({"llama.context_length": 2**30}, "context_length"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count differs from the head width 16"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type = yarn is not supported"),
        ({"llama.expert_count": 8}, "expert_count = 8 is not supported"),
        ({"llama.logit_scale": 2.0}, "logit_scale = 2.0 is not supported"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon = nan"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer of the kind 'bert'"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "cuts text into words in the way 'unheard-of'"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "not a pair"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "vocabulary"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "one number for each"),
        ({"tokenizer.ggml.tokens": ["a"] * V}, "twice"),
        ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(V + 1)], "tokenizer.ggml.token_type": None,
          "tokenizer.ggml.merges": []}, ""),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(tmp_path, more, said):
    write(tmp_path / "m.gguf", "llama", reference("llama"), **more)
    if said:
        assert said in refusal(tmp_path / "m.gguf")
    else:
        with pytest.raises(ConfigError, match=f"{V + 1} ids, the embedding {V} rows"):
            octavo.load(tmp_path / "m.gguf")


def test_tensors_must_be_there_once_and_all_be_used(tmp_path):
    model = reference("llama")
    state = model.state_dict()
    for change, said in [
        (lambda s: s.pop("model.layers.1.self_attn.q_proj.weight"), "there is no tensor blk.1.attn_q.weight"),
        (lambda s: s.pop("model.layers.0.mlp.up_proj.weight"), "missing: model.layers.0.mlp.up_proj.weight"),
        (lambda s: s.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}), "not used"),
    ]:
        changed = dict(state)
        change(changed)
        model.state_dict = lambda changed=changed: changed
        write(tmp_path / "m.gguf", "llama", model)
        assert said in refusal(tmp_path / "m.gguf")


def patched(path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))


def test_damaged_containers_name_the_file_and_the_place(tmp_path):
    path = tmp_path / "m.gguf"
    model = reference("llama tied")

    def fresh() -> bytes:
        write(path, "llama tied", model)
        return path.read_bytes()

    whole = fresh()
    for end in (0, 3, 4, 8, 23, 24, 100, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        if end < 4:
            with pytest.raises(ConfigError):
                octavo.load(path)
        else:
            assert "damaged GGUF file" in refusal(path)
    for at, form, value, said in [
        (4, "<I", 1, "version 1"), (4, ">I", 3, "big-endian"), (4, "<I", 0, "version 0"),
        (8, "<Q", 2**40, "tensors in"), (16, "<Q", 2**60, "keys"), (24, "<Q", 2**62, "a text of"),
    ]:  # fmt: skip
        raw = bytearray(whole)
        struct.pack_into(form, raw, at, value)
        path.write_bytes(raw)
        assert said in refusal(path)
    name = b"blk.0.attn_q.weight"
    at = whole.index(name) + len(name)  # then: dimensions, sizes, type, offset
    for offset, form, value, said in [
        (0, "<I", 0, "0 dimensions"), (0, "<I", 2**31, "dimensions"), (4, "<Q", 2**62, "outside the file"),
        (4, "<Q", 0, "cannot be stored"), (20, "<I", 999, "unknown type 999"), (20, "<I", 28, "lies on another"),
        (24, "<Q", 2**63, "outside the file"), (24, "<Q", 1, "outside the file"), (24, "<Q", 0, "lies on another"),
    ]:  # fmt: skip
        raw = bytearray(whole)
        struct.pack_into(form, raw, at + offset, value)
        path.write_bytes(raw)
        text = refusal(path)
        assert said in text or "blk.0" in text, (offset, value, text)
    path.write_bytes(whole)
    patched(path, b"blk.0.attn_q.weight", b"blk.0.attn_k.weight")
    assert "the tensor 'blk.0.attn_k.weight' is there twice" in refusal(path)


def test_alignment_lists_and_duplicates(tmp_path):
    model = reference("llama tied")
    for more, said in [
        ({"general.alignment": 3}, "general.alignment = 3"),
        ({"general.alignment": "x"}, "general.alignment = 'x'"),
    ]:
        write(tmp_path / "m.gguf", "llama tied", model)
        raw = (tmp_path / "m.gguf").read_bytes()
        key, value = next(iter(more.items()))
        extra = struct.pack("<Q", len(key)) + key.encode()
        extra += struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<IQ", 8, 1) + b"x"
        count = struct.unpack_from("<Q", raw, 16)[0]
        (tmp_path / "m.gguf").write_bytes(raw[:16] + struct.pack("<Q", count + 1) + extra + raw[24:])
        assert said in refusal(tmp_path / "m.gguf")
    write(tmp_path / "m.gguf", "llama tied", model)
    patched(tmp_path / "m.gguf", b"attention.value_length", b"attention.key_length\0\0")
    assert "key_length" in refusal(tmp_path / "m.gguf")


def test_without_the_package_the_way_to_it_is_said(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", "llama tied", reference("llama tied"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[gguf\]'"):
        octavo.load(tmp_path / "m.gguf")
    assert formats.recognise(tmp_path / "m.gguf") == "gguf"
