"""nanoGPT and nanochat checkpoints against their mathematics, and what is refused of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nano_checkpoints import LETTERS, D, H, L, T, draw, gpt_weights, read_here, save_gpt, save_letters

import octavo
from octavo.cli.main import main
from octavo.errors import CheckpointError
from octavo.hub import pickled


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(pickled, "_run_child", read_here)


# ---------------------------------------------------------------------------------------------- nanoGPT


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
    for content, said in [("{", "is not JSON"), ("[]", "holds no model_config"), (None, "does not exist")]:
        meta.write_text(content) if content else meta.unlink()
        assert main(command) == 4
        assert said in capsys.readouterr().err
