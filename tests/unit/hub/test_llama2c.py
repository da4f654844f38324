"""llama2.c files against run.c's mathematics written out in numpy: logits, greedy stories, the vocabulary."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from llama2c_files import WORDS, D, G, H, L, V, entries, story_folder, write_vocabulary

import octavo
from octavo.cli.main import main
from octavo.errors import CheckpointError, ConfigError
from octavo.hub import formats, llama2c

# -------------------------------------------------------------------------------------- run.c in numpy


def reference_logits(w: dict[str, np.ndarray], tokens: list[int], heads: int = G) -> np.ndarray:
    """run.c's forward, one position after the other, in float64: (n, V)."""
    K = D // H
    rms = lambda x, g: g * x / np.sqrt((x * x).mean() + 1e-5)  # noqa: E731
    keys, values, out = [[] for _ in range(L)], [[] for _ in range(L)], []
    for position, token in enumerate(tokens):
        x = w["embed"][token].astype(np.float64)
        for layer in range(L):
            h = rms(x, w["norm_in"][layer])
            q, k, v = (w[name][layer] @ h for name in "qkv")
            for vector in (q, k):
                for i in range(0, len(vector), 2):
                    angle = position / 10000.0 ** ((i % K) / K)
                    a, b = vector[i], vector[i + 1]
                    vector[i], vector[i + 1] = (
                        a * np.cos(angle) - b * np.sin(angle),
                        a * np.sin(angle) + b * np.cos(angle),
                    )
            keys[layer].append(k)
            values[layer].append(v)
            mixed = np.zeros(D)
            for head in range(H):
                own, other = slice(head * K, head * K + K), head // (H // heads) * K
                scores = np.array([q[own] @ key[other : other + K] for key in keys[layer]]) / np.sqrt(K)
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                mixed[own] = sum(s * value[other : other + K] for s, value in zip(shares, values[layer], strict=True))
            x = x + w["o"][layer] @ mixed
            h = rms(x, w["norm_mlp"][layer])
            gate = w["w1"][layer] @ h
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ h))
        out.append(w["head"] @ rms(x, w["norm"]))
    return np.array(out)


def reference_encode(text: str) -> list[int]:
    """run.c's encode: a space first, characters or their bytes, then the best-scoring join of neighbours, again."""
    pieces = [raw.decode() for raw, _ in entries()]
    scores = [score for _, score in entries()]
    ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    tokens = [ids[" "]] if text else []
    for char in text:
        tokens += [ids[char]] if char in ids else [byte + 3 for byte in char.encode()]
    while True:
        joins = [
            (scores[ids[pieces[a] + pieces[b]]], -i)
            for i, (a, b) in enumerate(zip(tokens, tokens[1:], strict=False))
            if pieces[a] + pieces[b] in ids
        ]
        if not joins:
            return tokens
        _, i = max(joins)
        tokens[-i : -i + 2] = [ids[pieces[tokens[-i]] + pieces[tokens[-i + 1]]]]


# --------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [G, H])
def test_logits_are_those_of_run_c(tmp_path, version, tied, heads):
    w = story_folder(tmp_path, tied=tied, version=version, heads=heads)
    lm = octavo.load(tmp_path)
    tokens = [1, 290, 301, 5, 262, 320, 299, 2, 310]
    wanted = reference_logits(w, tokens, heads)
    assert np.abs(lm.logits(tokens).numpy() - wanted).max() < 1e-4
    assert wanted.std() > 0.3
    assert (lm.model.head is None) is tied


def test_a_greedy_story_is_that_of_run_c(tmp_path):
    w = story_folder(tmp_path)
    lm = octavo.load(tmp_path)
    tokens = [1, *reference_encode("once upon a")]
    done = lm.complete("once upon a", temperature=0, max_new_tokens=12)
    for _ in range(len(done.ids)):
        tokens.append(int(reference_logits(w, tokens)[-1].argmax()))
    assert list(done.ids) == tokens[-len(done.ids) :]


def test_a_story_ends_where_the_next_begins(tmp_path):
    story_folder(tmp_path)
    assert octavo.load(tmp_path).tokenizer.stop_ids == {1, 2}


def test_ids_are_those_of_run_c(tmp_path):
    story_folder(tmp_path)
    tokenizer = octavo.load(tmp_path).tokenizer
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 8))) for _ in range(150)]
    texts += ["".join(draw.choices("aceinopstu  猫ï!\n日", k=draw.randrange(1, 25))) for _ in range(150)]
    for text in [*texts, "", " ", "  two", "<s>", "<0x41>", "emoji 😀\x00"]:
        assert tokenizer.encode(text) == reference_encode(text), repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special.bos == 1 and tokenizer.special.eos == 2 and tokenizer.special.unk == 0


def test_an_older_vocabulary_with_characters_for_bytes_reads_alike(tmp_path):
    """Before the names: entry 3 + n was the character of code n, also where the same character follows as a piece."""
    story_folder(tmp_path)
    wanted = octavo.load(tmp_path).tokenizer
    old = entries()
    old[3:259] = [(chr(byte).encode(), 0.0) for byte in range(256)]
    write_vocabulary(tmp_path / "tokenizer.bin", old)
    assert octavo.load(tmp_path).tokenizer.hash == wanted.hash


def test_the_command_line_continues_a_story_and_convert_keeps_it(tmp_path, capsys):
    story_folder(tmp_path)
    told = ["once upon a", "--temperature", "0", "--max-new-tokens", "8"]
    assert main(["generate", str(tmp_path), *told]) == 0
    first = capsys.readouterr().out
    assert main(["generate", str(tmp_path / "model.bin"), *told]) == 0
    assert capsys.readouterr().out == first
    assert main(["convert", str(tmp_path / "model.bin"), str(tmp_path / "folder")]) == 0
    assert f"folder: llama, {24 * V + 3 * (4 * 24 * 24 - 2 * 12 * 24 + 3 * 40 * 24 + 48) + 24:,} parameters" in (
        capsys.readouterr().out
    )
    assert main(["generate", str(tmp_path / "folder"), *told]) == 0
    assert capsys.readouterr().out == first


# ------------------------------------------------------------------------------------------ what is wrong


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        octavo.load(path)
    text = str(caught.value)
    assert "\n" not in text and "Fix:" in text
    return text


def test_a_length_that_the_header_does_not_explain(tmp_path):
    story_folder(tmp_path)
    model = tmp_path / "model.bin"
    whole = model.read_bytes()
    for damaged in (whole[:-4], whole[:-1], whole + b"\0", whole[:28], whole[:100]):
        model.write_bytes(damaged)
        said = refusal(model)
        assert str(model) in said and f"it has {len(damaged):,}" in said
    story_folder(tmp_path, version=1)
    whole = model.read_bytes()
    for damaged in (whole[:-1], whole[:256], whole[:40], whole[:4]):
        model.write_bytes(damaged)
        assert str(model) in refusal(model)


def test_int8_exports_are_refused_by_version(tmp_path):
    story_folder(tmp_path, version=1)
    raw = bytearray((tmp_path / "model.bin").read_bytes())
    raw[4] = 2
    (tmp_path / "model.bin").write_bytes(raw)
    said = refusal(tmp_path / "model.bin")
    assert "version 2" in said and "--version 1" in said


@pytest.mark.parametrize("at", range(7))
@pytest.mark.parametrize("value", [0, -1, 2**31 - 1, 2**24, 7])
def test_absurd_numbers_are_refused_before_anything_is_made(tmp_path, at, value):
    story_folder(tmp_path, version=1)
    raw = bytearray((tmp_path / "model.bin").read_bytes())
    struct.pack_into("<i", raw, 8 + 4 * at, value)
    (tmp_path / "model.bin").write_bytes(raw)
    if (at, value) == (6, 7) or (at, value) == (6, 2**24):  # a context of another length is another context
        assert octavo.load(tmp_path / "model.bin").max_seq_len == value
    else:
        assert "damaged llama2.c file" in refusal(tmp_path / "model.bin")


def test_a_vocabulary_that_is_missing_damaged_or_of_another_model(tmp_path):
    story_folder(tmp_path)
    words = tmp_path / "tokenizer.bin"
    whole = words.read_bytes()
    for damaged in (
        whole[:-1],
        whole + b"x",
        whole[:50],
        b"",
        b"\0" * 100,
        whole.replace("猫".encode(), b"\xff\xfe\xfd"),
    ):
        words.write_bytes(damaged)
        assert f"{words} is not a llama2.c vocabulary of {V} entries" in refusal(tmp_path)
    write_vocabulary(words, entries()[:-1])
    assert f"of {V} entries" in refusal(tmp_path)
    twice = entries()
    twice[-1] = twice[-2]
    write_vocabulary(words, twice)
    assert "twice" in refusal(tmp_path)
    words.unlink()
    assert "there is no vocabulary beside" in refusal(tmp_path)


def test_other_files_are_not_taken_for_models(tmp_path):
    for name, content in {
        "noise.bin": bytes(range(256)) * 10, "empty.bin": b"", "text.txt": b"once upon a time " * 50,
        "words.bin": np.arange(1000, dtype="<u2").tobytes(), "array.npy": b"\x93NUMPY" + b"\1" * 100,
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert formats.recognise(tmp_path / name) is None, name
        with pytest.raises(ConfigError, match="is a file, not a run or model folder"):
            octavo.load(tmp_path / name)
    assert formats.locate(tmp_path) is None


def test_a_folder_of_several_models_asks_which(tmp_path):
    story_folder(tmp_path)
    (tmp_path / "other.bin").write_bytes((tmp_path / "model.bin").read_bytes())
    assert "several models: model.bin, other.bin" in refusal(tmp_path)


def test_what_needs_a_folder_says_how_to_make_one(tmp_path, capsys):
    story_folder(tmp_path)
    assert main(["tune", str(tmp_path / "model.bin"), "--data", "x.jsonl"]) == 2
    assert f"octavo convert {tmp_path / 'model.bin'} TARGET" in capsys.readouterr().err


def test_reordering_rotary_pairs_and_its_shape():
    import torch

    rows = torch.arange(8.0)[:, None]
    assert llama2c.half_pairs(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert llama2c.half_pairs(rows.flatten(), 1).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
