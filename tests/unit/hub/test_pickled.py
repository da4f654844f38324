"""Checkpoints in pickles: nanoGPT, nanochat and older folders, read in a child and converted once."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import octavo
from octavo.cli.main import main
from octavo.errors import CheckpointError
from octavo.hub import pickled

LETTERS = "\n !,.abcdefghijklmnopqrst"
V, D, L, H, T = len(LETTERS), 32, 3, 4, 24


@pytest.fixture
def in_process(monkeypatch):
    """What the child does, without the child: for tests about what was read."""

    def run(path: Path, folder: Path) -> None:
        try:
            pickled._convert(str(path), str(folder), 2 * path.stat().st_size)
        except Exception as error:
            raise CheckpointError(f"{path}: {pickled._explain(error)}") from None

    monkeypatch.setattr(pickled, "_run_child", run)


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 + 0.1 for name, shape in shapes.items()}


# ---------------------------------------------------------------------------------------------- nanoGPT


def gpt_weights(bias: bool) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (T, D)}
    sizes = {"ln_1": (D,), "attn.c_attn": (3 * D, D), "attn.c_proj": (D, D), "ln_2": (D,),
             "mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}  # fmt: skip
    named = {f"transformer.h.{i}.{name}": shape for i in range(L) for name, shape in sizes.items()}
    for name, shape in {**named, "transformer.ln_f": (D,)}.items():
        shapes |= {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})
    return draw(shapes)


def gpt_logits(w: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """nanoGPT's forward, from its description: pre-norm, one stacked product, exact GELU, tied head."""
    get = lambda name: (w[f"{name}.weight"], w.get(f"{name}.bias"))  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, (D,), *get(name), 1e-5)  # noqa: E731
    n = len(tokens)
    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:n]
    for i in range(L):
        at = f"transformer.h.{i}"
        q, k, v = F.linear(norm(x, f"{at}.ln_1"), *get(f"{at}.attn.c_attn")).split(D, -1)
        heads = []
        for h in range(H):
            part = slice(h * D // H, (h + 1) * D // H)
            scores = q[:, part] @ k[:, part].T / (D // H) ** 0.5
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + F.linear(torch.cat(heads, -1), *get(f"{at}.attn.c_proj"))
        wide = F.linear(norm(x, f"{at}.ln_2"), *get(f"{at}.mlp.c_fc"))
        x = x + F.linear(0.5 * wide * (1 + torch.erf(wide / 2**0.5)), *get(f"{at}.mlp.c_proj"))
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def save_gpt(path: Path, w: dict[str, torch.Tensor], *, prefix: str = "", **changes) -> None:
    args = {"n_layer": L, "n_head": H, "n_embd": D, "block_size": T, "bias": "transformer.ln_f.bias" in w,
            "vocab_size": V, "dropout": 0.1} | changes  # fmt: skip
    model = {prefix + name: tensor for name, tensor in w.items()}
    model[f"{prefix}lm_head.weight"] = model[f"{prefix}transformer.wte.weight"]  # one memory, two names
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    config = {"dataset": "shakespeare_char", "out_dir": "out", "lr_decay_iters": 5000}
    torch.save({"model": model, "optimizer": moments, "model_args": args, "iter_num": 7,
                "best_val_loss": torch.tensor(1.5), "config": config}, path)  # fmt: skip


def save_letters(folder: Path) -> Path:
    path = folder / "meta.json"
    path.write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    return path


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt_logits(tmp_path, in_process, bias, prefix, capsys):
    w = gpt_weights(bias)
    save_gpt(tmp_path / "ckpt.pt", w, prefix=prefix)
    save_letters(tmp_path)
    out = tmp_path / "folder"
    assert main(["convert", "--from-pickle", str(tmp_path / "ckpt.pt"), str(out)]) == 0
    # Only with biases has another family words for it; exact GELU is one of them.
    assert f"{out}: {'gpt2' if bias else 'octavo'}, " in capsys.readouterr().out
    lm = octavo.load(out)
    tokens = [3, 9, 1, 14, 20, 8, 0, 5]
    wanted = gpt_logits(w, tokens)
    torch.testing.assert_close(lm.logits(tokens), wanted, rtol=0, atol=1e-4)
    assert float(wanted.std()) > 0.3
    assert lm.tokenizer.decode(lm.tokenizer.encode("a good morn, lord\n")) == "a good morn, lord\n"
    assert lm.tokenizer.encode("ab") == [LETTERS.index("a"), LETTERS.index("b")]
    assert (lm.model.config.embed_dropout, lm.model.max_seq_len) == (0.1, T)
    if not bias:
        return
    import transformers

    there = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(there(torch.tensor([tokens])).logits[0], wanted, rtol=0, atol=1e-4)


def test_nanogpt_masks_are_no_weights_and_strange_ones_are_refused(tmp_path, in_process):
    w = gpt_weights(False)
    save_gpt(tmp_path / "ckpt.pt", {**w, "transformer.h.0.attn.bias": torch.ones(1, 1, T, T)})
    save_letters(tmp_path)
    pickled.read(tmp_path / "ckpt.pt")
    for change, said in [
        ({**w, "transformer.h.0.attn.q_gain": torch.ones(2)}, r"not used: transformer\.h\.0\.attn\.q_gain"),
        ({k: t for k, t in w.items() if "h.1.ln_2" not in k}, "missing: blocks.1.layers.channel.norm_in"),
        ({**w, "transformer.wpe.weight": torch.ones(T + 1, D)}, "of another shape"),
    ]:
        save_gpt(tmp_path / "ckpt.pt", change)
        with pytest.raises(CheckpointError, match=said) as caught:
            from octavo.language_model import from_foreign

            from_foreign(pickled.read(tmp_path / "ckpt.pt"), tmp_path / "ckpt.pt")
        assert "ckpt.pt" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_rmsnorm": True}, "the settings use_rmsnorm"),
        ({"n_layer": 0}, "n_layer = 0"),
        ({"n_layer": 10**6}, "n_layer = 1000000"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"n_head": 5}, "must divide"),
        ({"n_layer": 9}, "missing"),
    ],
    ids=str,
)
def test_nanogpt_settings_that_cannot_be(tmp_path, in_process, capsys, changes, said):
    save_gpt(tmp_path / "ckpt.pt", gpt_weights(False), **changes)
    letters = save_letters(tmp_path)
    command = [
        "convert",
        "--from-pickle",
        str(tmp_path / "ckpt.pt"),
        str(tmp_path / "out"),
        "--tokenizer",
        str(letters),
    ]
    assert main(command) == 4
    err = capsys.readouterr().err
    assert said in err and "ckpt.pt" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_the_vocabulary_beside_a_checkpoint_is_a_pickle_too_and_not_read(tmp_path, in_process, capsys):
    save_gpt(tmp_path / "ckpt.pt", gpt_weights(True))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {}}))
    command = ["convert", "--from-pickle", str(tmp_path / "ckpt.pt"), str(tmp_path / "out")]
    assert main(command) == 4
    err = capsys.readouterr().err
    assert "meta.pkl, which is a pickle too" in err and "json.dumps" in err and "--tokenizer meta.json" in err
    save_letters(tmp_path)
    assert main(command) == 0
    big = {**gpt_weights(True), "transformer.wte.weight": torch.zeros(50304, D)}
    save_gpt(tmp_path / "big.pt", big, vocab_size=50304)
    (tmp_path / "meta.json").unlink()
    assert main(["convert", "--from-pickle", str(tmp_path / "big.pt"), str(tmp_path / "other")]) == 4
    assert "GPT-2's encoder.json and vocab.bpe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        '{"a": 0, "b": 2}',
        '{"ab": 0}',
        "[1]",
        "{",
        '{"a": "x"}',
        '{"ranks": {"zz": 0}, "pattern": "", "special": {}}',
        "5",
    ],
)
def test_a_vocabulary_by_hand_that_cannot_be(tmp_path, content):
    from octavo.hub import vocabulary

    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        vocabulary.load(tmp_path / "meta.json")


def test_a_character_without_an_entry_is_refused_not_dropped(tmp_path):
    from octavo.hub import vocabulary

    tokenizer = vocabulary.load(save_letters(tmp_path))
    with pytest.raises(CheckpointError, match="cannot encode"):
        tokenizer.encode("aZa")


# --------------------------------------------------------------------------------------------- nanochat


SPECIAL = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>")
CHAT_V = 256 + 6 + len(SPECIAL)


def save_nanochat(folder: Path, **extra) -> tuple[Path, dict[str, torch.Tensor]]:
    sizes = {"c_q": (D, D), "c_k": (D // 2, D), "c_v": (D // 2, D), "c_proj": (D, D)}
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (CHAT_V, D), "lm_head.weight": (CHAT_V, D)}
    for i in range(L):
        shapes |= {f"transformer.h.{i}.attn.{name}.weight": shape for name, shape in sizes.items()}
        shapes |= {f"transformer.h.{i}.mlp.c_fc.weight": (4 * D, D), f"transformer.h.{i}.mlp.c_proj.weight": (D, 4 * D)}
    w = {name: tensor * 2 for name, tensor in draw(shapes).items()}
    w["transformer.wte.weight"] = w["transformer.wte.weight"].bfloat16()  # as nanochat keeps it
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in {**w, **extra}.items()}, folder / "model_000650.pt")
    config = {"sequence_len": T, "vocab_size": CHAT_V, "n_layer": L, "n_head": H, "n_kv_head": 2, "n_embd": D}
    (folder / "meta_000650.json").write_text(json.dumps({"step": 650, "model_config": config, "user_config": {}}))
    return folder / "model_000650.pt", w


def save_ranks(folder: Path) -> Path:
    """What tiktoken holds: byte strings by rank, a pattern, special tokens after them."""
    joins = [b"th", b"he", b"the", b" the", b"in", "é".encode()]
    ranks = {bytes([b]).hex(): b for b in range(256)} | {join.hex(): 256 + i for i, join in enumerate(joins)}
    special = {name: 256 + len(joins) + i for i, name in enumerate(SPECIAL)}
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    (folder / "ranks.json").write_text(json.dumps({"ranks": ranks, "pattern": pattern, "special": special}))
    return folder / "ranks.json"


def test_nanochat_logits_chat_and_tokens(tmp_path, in_process, capsys):
    import transformers

    path, w = save_nanochat(tmp_path)
    ranks = save_ranks(tmp_path)
    out = tmp_path / "folder"
    assert main(["convert", "--from-pickle", str(path), str(out), "--tokenizer", str(ranks)]) == 0
    assert f"{out}: nanochat, " in capsys.readouterr().out and "in float32" not in capsys.readouterr().err
    lm = octavo.load(out)
    tokens = [5, 77, 130, 200, 256, 258, 261, 3, 99]
    parts = {"c_q": "q_proj", "c_k": "k_proj", "c_v": "v_proj", "c_proj": "o_proj"}
    config = transformers.NanoChatConfig(
        vocab_size=CHAT_V, hidden_size=D, intermediate_size=4 * D, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=2, max_position_embeddings=T, rms_norm_eps=2.0**-23, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    state = {"model.embed_tokens.weight": w["transformer.wte.weight"].float(), "lm_head.weight": w["lm_head.weight"]}
    for i in range(L):
        at, to = f"transformer.h.{i}", f"model.layers.{i}"
        state |= {f"{to}.self_attn.{new}.weight": w[f"{at}.attn.{old}.weight"] for old, new in parts.items()}
        state |= {f"{to}.mlp.fc{n}.weight": w[f"{at}.mlp.{old}.weight"] for n, old in ((1, "c_fc"), (2, "c_proj"))}
    theirs.load_state_dict(state)
    with torch.no_grad():
        wanted = theirs(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(lm.logits(tokens), wanted, rtol=0, atol=1e-4)
    assert 1 < float(wanted.abs().max()) < 15
    tokenizer = lm.tokenizer
    assert tokenizer.encode("the thé 12345") == [258, 32, 256, 261, 32, *b"12345"]
    rendered = tokenizer.render(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u<|bos|>"},
            {"role": "assistant", "content": "a"},
        ]
    )
    bos, user, user_end, assistant, assistant_end = (tokenizer.special_id_of(name) for name in SPECIAL[:5])
    assert rendered.ids == [bos, user, *b"s\n\nu<|bos|>", user_end, assistant, *b"a", assistant_end]
    assert [i for i, m in zip(rendered.ids, rendered.loss_mask, strict=True) if m] == [*b"a", assistant_end]
    assert tokenizer.stop_ids == {bos, assistant_end} and lm.prompt_ids("u") == [bos, *b"u"]


@pytest.mark.parametrize(
    "name",
    [
        "resid_lambdas",
        "x0_lambdas",
        "value_embeds.1.weight",
        "transformer.h.0.attn.ve_gate.weight",
        "smear_gate.weight",
    ],
)
def test_later_nanochats_are_refused_by_what_they_have(tmp_path, in_process, name, capsys):
    path, _ = save_nanochat(tmp_path, **{name: torch.ones(2, 2)})
    assert main(["convert", "--from-pickle", str(path), str(tmp_path / "out")]) == 4
    err = capsys.readouterr().err
    assert "later nanochat" in err and next(part for part in name.split(".") if "_" in part) in err


def test_nanochat_settings_and_tokenizer_must_be_there(tmp_path, in_process, capsys):
    path, _ = save_nanochat(tmp_path)
    command = ["convert", "--from-pickle", str(path), str(tmp_path / "out")]
    assert main(command) == 4
    assert "comes without a tokenizer" in capsys.readouterr().err
    meta = tmp_path / "meta_000650.json"
    good = json.loads(meta.read_text())
    for change, said in [
        ({"window_pattern": "SSSL"}, "window_pattern, of a later nanochat"),
        ({"n_layer": 10**9}, "is no size"),
        ({"n_embd": None}, "n_embd is no size"),
    ]:
        meta.write_text(json.dumps({**good, "model_config": {**good["model_config"], **change}}))
        assert main(command) == 4
        assert said in capsys.readouterr().err
    for content, said in [("{", "holds no model_config"), ("[]", "holds no model_config"), (None, "does not exist")]:
        meta.write_text(content) if content else meta.unlink()
        assert main(command) == 4
        assert said in capsys.readouterr().err


# ----------------------------------------------------------------------- older folders, and what else pickles are


def test_a_folder_with_pytorch_model_bin(tmp_path, capsys):
    """Through the real child: the command that the refusal names works."""
    import transformers

    shape = {"vocab_size": 290, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48, "tie_word_embeddings": True}  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape)).eval()
    source = tmp_path / "old"
    model.config.save_pretrained(source)
    from octavo.tokenizer import Byte, train

    train(Byte(), ["x"]).save(source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    for given in (source, source / "pytorch_model.bin"):
        assert main(["generate", str(given), "x"]) == 4
        err = capsys.readouterr().err
        assert "is a pickle, and reading one can run code" in err
        assert f"octavo convert --from-pickle {given} TARGET" in err and err.count("\n") == 1
    assert main(["convert", str(source), str(tmp_path / "new")]) == 4
    assert "--from-pickle" in capsys.readouterr().err
    assert main(["convert", "--from-pickle", str(source), str(tmp_path / "new")]) == 0
    with torch.no_grad():
        wanted = model(torch.tensor([[5, 6, 7]])).logits[0]
    torch.testing.assert_close(octavo.load(tmp_path / "new").logits([5, 6, 7]), wanted, rtol=0, atol=1e-5)


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_something_runs_nothing(tmp_path, capsys):
    marker = tmp_path / "marker"
    torch.save({"model": {"w": Evil(marker)}}, tmp_path / "evil.pt")
    for command in (["generate", str(tmp_path / "evil.pt"), "x"], ["chat", str(tmp_path / "evil.pt")]):
        assert main(command) == 4
        assert f"Fix: octavo convert --from-pickle {tmp_path / 'evil.pt'} TARGET." in capsys.readouterr().err
    assert main(["convert", "--from-pickle", str(tmp_path / "evil.pt"), str(tmp_path / "out")]) == 4
    err = capsys.readouterr().err
    assert "it holds more than weights: posix.system" in err and err.count("\n") == 1
    assert not marker.exists() and not (tmp_path / "out").exists()


def nested(depth: int, width: int) -> bytes:
    """A dictionary of lists that each hold the one before ``width`` times: small here, vast when written out."""
    parts = [b"\x80\x02}X\x01\x00\x00\x00aX\x01\x00\x00\x00aq\x00s"]
    for i in range(1, depth):
        parts.append(b"X\x01\x00\x00\x00" + bytes([97 + i]) + b"]q" + bytes([i]))
        parts.append(b"(" + (b"h" + bytes([i - 1])) * width + b"es")
    return b"".join(parts) + b"."


def archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)


def test_archives_that_cannot_be_honest(tmp_path, in_process):
    path, plain = tmp_path / "x.pt", {"a/version": b"3", "a/byteorder": b"little"}
    torch.save({"m": torch.zeros(1).expand(10**12)}, path)
    with pytest.raises(CheckpointError, match="its tensors are larger than the file"):
        pickled.unpickle(path)
    archive(path, {"a/data.pkl": nested(14, 10), **plain})
    with pytest.raises(CheckpointError, match="holds more than 1,048,576 values"):
        pickled.unpickle(path)
    archive(path, {"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(10**7), **plain}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is not an archive that torch.save writes"):
        pickled.unpickle(path)
    archive(path, {"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}.", **plain})
    with pytest.raises(CheckpointError, match="is not an archive"):
        pickled.unpickle(path)
    torch.save({"m": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for cut in (whole[: len(whole) // 2], whole[:100], b"", b"\x80\x02}."):
        path.write_bytes(cut)
        with pytest.raises(CheckpointError, match="is damaged, or older than torch 1.6"):
            pickled.unpickle(path)
    torch.save({"m": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="weights of no known kind"):
        pickled.read(path)


@pytest.mark.parametrize(("limit", "value"), [("BASE_MEMORY_BYTES", 64 << 20), ("BASE_SECONDS", 1)])
def test_the_child_may_not_grow_or_run_on(tmp_path, monkeypatch, limit, value):
    torch.save({"m": torch.zeros(1000)}, tmp_path / "x.pt")
    monkeypatch.setattr(pickled, limit, value)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        pickled.unpickle(tmp_path / "x.pt")


# ------------------------------------------------------------------------------------------- the target


def test_convert_overwrites_nothing_and_leaves_nothing_half(tmp_path, in_process, capsys, monkeypatch):
    save_gpt(tmp_path / "ckpt.pt", gpt_weights(True))
    save_letters(tmp_path)
    out = tmp_path / "made" / "folder"
    command = ["convert", "--from-pickle", str(tmp_path / "ckpt.pt"), str(out)]
    from octavo.language_model import LanguageModel

    with monkeypatch.context() as broken:
        broken.setattr(LanguageModel, "save", lambda self, folder, **_: (folder.mkdir(), 1 / 0))
        assert main(command) == 1
    capsys.readouterr()
    assert not list((tmp_path / "made").iterdir())
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(command) == 2
    assert f"{out} exists, and nothing is overwritten" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["folder"]


def test_convert_between_folders_changes_dtype_and_family(tmp_path, in_process, capsys):
    save_gpt(tmp_path / "ckpt.pt", gpt_weights(True))
    save_letters(tmp_path)
    first, second = tmp_path / "one", tmp_path / "two"
    assert main(["convert", "--from-pickle", str(tmp_path / "ckpt.pt"), str(first)]) == 0
    assert main(["convert", str(first), str(second), "--dtype", "bfloat16", "--family", "octavo"]) == 0
    assert "two: octavo, " in capsys.readouterr().out
    lm = octavo.load(second, "saved")
    assert lm.model.embed.weight.dtype == torch.bfloat16
    assert main(["convert", str(first), str(tmp_path / "three"), "--family", "qwen3"]) == 2
    assert "cannot be written as 'qwen3'" in capsys.readouterr().err
    assert main(["convert", str(first), str(tmp_path / "three"), "--dtype", "float99"]) == 2
    assert main(["convert", "--from-pickle", str(first / "config.json"), str(tmp_path / "three")]) == 4
    assert main(["convert", "--from-pickle", str(tmp_path / "nothing.pt"), str(tmp_path / "three")]) == 2
    assert not (tmp_path / "three").exists()
