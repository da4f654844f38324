"""Families as tables: which model is written as which, and what a folder must not be."""

from __future__ import annotations

import json

import pytest
import torch

from octavo.errors import CheckpointError, ConfigError
from octavo.hub.family import activation, hf_activation
from octavo.hub.folder import FAMILIES, choose_family, family_of, load_model, read_config, read_tensors, save_model
from octavo.models.decoder import Decoder, build
from octavo.nn.activation import ACTIVATIONS


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def config(block: dict | None = None, **changes) -> Decoder.Config:
    block = {"mixer": {"kind": "attention", "n_heads": 2, "n_kv_heads": 1}, "channel": {"kind": "glu"}} | (block or {})
    plain = {"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 16, "blocks": {"block": block}}
    return Decoder.Config.model_validate(plain | changes)


def mixer(**values) -> dict:
    return {"mixer": {"kind": "attention", **{"n_heads": 2} | values}}


GPT2 = mixer(qkv_bias=True, o_bias=True) | {"channel": {"kind": "mlp", "activation": "gelu_tanh", "bias": True}}
GEMMA2 = mixer(scale=4**-0.5, softcap=2.0) | {"norm_placement": "sandwich"}
GEMMA2_ENDS = {"norm": {"kind": "rmsnorm", "offset": True}, "embed_scale": 4.0, "logit_softcap": None}
OLMO2 = mixer(qk_norm="rmsnorm", qk_norm_over="all") | {"norm_placement": "branch"}
NANOCHAT = mixer(qk_norm={"kind": "rmsnorm", "weight": False}) | {
    "channel": {"kind": "mlp", "activation": "relu_squared"}
}
NANOCHAT_ENDS = {
    "norm": {"kind": "rmsnorm", "weight": False},
    "positions": {"kind": "rope", "reverse": True},
    "embed_norm": True,
    "logit_softcap": 15.0,
    "tie_embeddings": False,
}
LONG = {"kind": "longrope", "short": [1, 1, 2, 2], "long": [1, 2, 3, 4], "original": 16, "extended": 64}
SIX = LONG | {"short": [1] * 6, "long": [2] * 6}
CHOICES = {
    "llama": config(),
    "llama biased": config(mixer(qkv_bias=True, o_bias=True)),
    "llama dropout": config({"dropout": 0.1}),
    "llama without the norms": config(mixer(qk_norm_over="all")),
    "qwen2": config(mixer(qkv_bias=True)),
    "qwen2 window": config(mixer(qkv_bias=True, window=4)),
    "qwen3": config(mixer(qk_norm={"kind": "rmsnorm"})),
    "gpt2": config(GPT2, norm="layernorm", positions="learned"),
    "gpt2 untied": config(GPT2, norm="layernorm", positions="learned", tie_embeddings=False),
    "mistral": config(mixer(window=4)),
    "mistral width": config(mixer(head_dim=8, n_heads=3)),
    "gemma2": config(GEMMA2, **GEMMA2_ENDS),
    "gemma2 default scale": config(GEMMA2 | mixer(qkv_bias=True, o_bias=True), **GEMMA2_ENDS | {"logit_softcap": 9.0}),
    "olmo2": config(OLMO2),
    "olmo2 biased": config(OLMO2 | mixer(qkv_bias=True, o_bias=True, **OLMO2["mixer"])),
    "phi3": config(positions={"kind": "rope", "fraction": 0.5}),
    "phi3 long": config(positions={"kind": "rope", "scaling": LONG}),
    "phi3 longer": config(positions={"kind": "rope", "scaling": LONG | {"magnitude": 2.0}}),
    "nanochat": config(NANOCHAT, **NANOCHAT_ENDS),
    "octavo nanochat forward": config(NANOCHAT, **NANOCHAT_ENDS | {"positions": "rope"}),
    "octavo nanochat weighted": config(NANOCHAT, **NANOCHAT_ENDS | {"norm": "rmsnorm"}),
    "octavo nanochat plain embedding": config(NANOCHAT, **NANOCHAT_ENDS | {"embed_norm": False}),
    "octavo interleaved": config(positions={"kind": "rope", "layout": "interleaved"}),
    "octavo post": config({"norm_placement": "post"}),
    "octavo residual": config({"residual_scale": 2.0}),
    "octavo scale": config(mixer(scale=1.0)),
    "octavo eps": config(mixer(qk_norm={"kind": "rmsnorm", "eps": 1e-3})),
    "octavo head bias": config(head_bias=True),
    "octavo no norm": config(final_norm=False),
    "octavo no channel": config({"channel": None}),
    "octavo gpt2 without biases": config(mixer() | {"channel": {"kind": "mlp"}}, norm="layernorm", positions="learned"),
    "octavo gemma2 width": config(GEMMA2 | mixer(n_heads=3, head_dim=8), **GEMMA2_ENDS),
    "octavo gemma2 scale": config(GEMMA2 | mixer(scale=0.3), **GEMMA2_ENDS),
    "octavo gemma2 embedding": config(GEMMA2, **GEMMA2_ENDS | {"embed_scale": 3.0}),
    "octavo gemma2 without offset": config(GEMMA2, **GEMMA2_ENDS | {"norm": "rmsnorm"}),
    "octavo olmo2 window": config(OLMO2 | mixer(**OLMO2["mixer"], window=4)),
    "octavo olmo2 norms": config(OLMO2 | {"norm_placement": "pre"}),
    "octavo two windows": config(
        blocks={"a": mixer(window=4), "b": mixer(window=5)}, positions={"kind": "rope", "fraction": 0.5}
    ),
    "octavo softcap": config(mixer(softcap=2.0)),
    "octavo logit softcap": config(logit_softcap=2.0),
    "octavo embed scale": config(embed_scale=4.0),
    "octavo phi3 long factors": config(positions={"kind": "rope", "scaling": LONG | {"original": 8}}),
    "octavo phi3 long width": config(mixer(head_dim=12) | {}, positions={"kind": "rope", "scaling": SIX}),
    "octavo bilinear": config({"channel": {"kind": "glu", "activation": "identity"}}),
}


# What a family may say, but only when asked: transformers has no class for it.
MINIMIND = {
    "minimind": config(mixer(qk_norm="rmsnorm")),
    "minimind untied": config(mixer(qk_norm="rmsnorm"), tie_embeddings=False),
    "minimind without norms": config(mixer()),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_model_is_written_as_the_first_family_that_says_it_exactly(name, tmp_path):
    chosen = CHOICES[name]
    assert choose_family(chosen) == name.split()[0]
    model = build(chosen).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert save_model(model, tmp_path / "m") == name.split()[0]
    again = load_model(tmp_path / "m")
    from octavo.nn.contracts import Inputs

    tokens = torch.randint(19, (2, 9))
    assert torch.equal(again(Inputs(tokens)).logits, model(Inputs(tokens)).logits)


def test_a_family_that_cannot_say_it_is_refused_by_name():
    with pytest.raises(ConfigError, match="it can be written as octavo"):
        choose_family(CHOICES["octavo post"], "llama")
    assert choose_family(CHOICES["llama"], "octavo") == "octavo"
    with pytest.raises(ConfigError, match="it can be written as llama, mistral, phi3, octavo"):
        choose_family(config(tie_embeddings=False), "minimind")  # without norms on q and k it is always tied


@pytest.mark.parametrize("name", MINIMIND)
def test_a_family_without_a_class_is_written_only_when_asked(name, tmp_path, monkeypatch):
    chosen = MINIMIND[name]
    # Wherever it stands in the table.
    first = {"minimind": FAMILIES["minimind"], **FAMILIES}
    monkeypatch.setattr("octavo.hub.folder.FAMILIES", first)
    assert choose_family(chosen) == ("llama" if name.endswith("norms") else "qwen3")
    model = build(chosen).eval()
    assert save_model(model, tmp_path / "m", family="minimind") == "minimind"
    from octavo.nn.contracts import Inputs

    tokens = torch.randint(19, (2, 9))
    assert torch.equal(load_model(tmp_path / "m")(Inputs(tokens)).logits, model(Inputs(tokens)).logits)


# The others have configurations of their own beside their references, whose loader is as strict.
CHOSEN = {name.split()[0] for name in (*CHOICES, *MINIMIND)}


@pytest.mark.parametrize("family", [FAMILIES[name] for name in FAMILIES if name in CHOSEN], ids=lambda f: f.model_type)
def test_every_parameter_has_one_name_there(family):
    named = CHOICES if family.automatic else MINIMIND
    chosen = next(c for n, c in named.items() if n.split()[0] == family.model_type)
    entries = family.entries(chosen)
    ours = [name for entry in entries for name in entry.ours]
    assert sorted(ours) == sorted(name for name, _ in build(chosen, device="meta").named_parameters())
    assert len({entry.theirs for entry in entries}) == len(entries)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"identity"}))
def test_activation_names_go_both_ways(name):
    assert activation(hf_activation(name)) == name


def test_an_unknown_family_gets_a_suggestion():
    with pytest.raises(CheckpointError, match="did you mean `qwen2`"):
        family_of("qwen-2")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": 3}', "{"])
def test_a_config_that_is_none(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_config(tmp_path)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a pickle"):
        read_tensors(tmp_path)


def test_an_index_must_stay_inside_its_folder_and_agree_with_its_shards(tmp_path):
    save_model(build(CHOICES["llama"]), tmp_path / "m", shard_bytes=2000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    assert len(set(good["weight_map"].values())) > 1
    name = next(iter(good["weight_map"]))
    for change, said in [
        ({name: "../secret.safetensors"}, "outside"),
        ({name: "missing.safetensors"}, "missing.safetensors is missing"),
        ({"more": next(iter(good["weight_map"].values()))}, "disagree on more"),
    ]:
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | change}))
        with pytest.raises(CheckpointError, match=said):
            read_tensors(tmp_path / "m")
    index.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(tmp_path / "m")


def test_a_header_longer_than_any_models_is_refused_before_it_is_read(tmp_path, monkeypatch):
    save_model(build(CHOICES["llama"]), tmp_path / "m")
    with open(tmp_path / "m" / "model.safetensors", "wb") as file:
        file.write(((16 << 20) + 1).to_bytes(8, "little"))
        file.truncate(32 << 20)  # without blocks on the disk
    with pytest.raises(CheckpointError, match="its header says it has 16,777,217 bytes"):
        read_tensors(tmp_path / "m")


def test_a_missing_key_of_config_json_is_named(tmp_path):
    save_model(build(CHOICES["llama"]), tmp_path / "m")
    config_path = tmp_path / "m" / "config.json"
    plain = json.loads(config_path.read_text())
    plain.pop("intermediate_size")
    config_path.write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="no intermediate_size"):
        load_model(tmp_path / "m")


def test_saving_over_a_folder_keeps_what_is_not_a_model(tmp_path):
    folder = tmp_path / "m"
    save_model(build(CHOICES["llama"]), folder, shard_bytes=2000)
    (folder / "tokenizer.json").write_text("{}")
    save_model(build(CHOICES["qwen2"]), folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert read_config(folder)["model_type"] == "qwen2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_qwen3_without_head_dim_has_its_default():
    """Its configuration class says 128, whatever hidden_size / heads would be."""
    hf = FAMILIES["qwen3"].write(CHOICES["qwen3"])
    hf.pop("head_dim")
    (block,) = FAMILIES["qwen3"].read(hf).blocks.values()
    assert block.mixer.head_dim == 128
