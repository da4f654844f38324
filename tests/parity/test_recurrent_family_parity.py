"""Mamba, Mamba-2, RWKV-4 and Bamba against transformers, both ways, on random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from proof import agree
from safetensors.torch import load_file

from octavo.errors import CheckpointError
from octavo.hub.folder import load_model, read_config, save_model
from octavo.infer.generate import generate
from octavo.infer.sampling import SamplingConfig
from octavo.nn.contracts import Inputs

V, T = 61, 12
ENDS = {"vocab_size": V, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SHAPE = {**ENDS, "hidden_size": 32, "num_hidden_layers": 3}
MAMBA2 = {**SHAPE, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 8}
BAMBA = {
    **ENDS, "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attn_layer_indices": [1, 2], "mamba_n_heads": 8, "mamba_n_groups": 2,
    "mamba_d_state": 16, "mamba_chunk_size": 8, "max_position_embeddings": 64,
}  # fmt: skip
RWKV = {**SHAPE, "context_length": 64, "rescale_every": 0}
CASES = {
    "mamba": transformers.MambaConfig(**SHAPE, state_size=5),
    "mamba biased": transformers.MambaConfig(
        **SHAPE, state_size=4, expand=1, conv_kernel=3, time_step_rank=5, use_bias=True, use_conv_bias=False,
        tie_word_embeddings=False, layer_norm_epsilon=1e-3,
    ),
    "mamba2": transformers.Mamba2Config(**MAMBA2),
    "mamba2 tied": transformers.Mamba2Config(
        **MAMBA2, use_bias=True, use_conv_bias=False, tie_word_embeddings=True, layer_norm_epsilon=1e-3, conv_kernel=3
    ),
    "rwkv": transformers.RwkvConfig(**RWKV),
    "rwkv narrow": transformers.RwkvConfig(**RWKV, intermediate_size=40, tie_word_embeddings=True),
    "bamba": transformers.BambaConfig(**BAMBA),
    "bamba biased": transformers.BambaConfig(
        **{**BAMBA, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True, mamba_proj_bias=True,
        mamba_conv_bias=False, tie_word_embeddings=True, rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    ),
}  # fmt: skip


def reference(name: str, **changes) -> transformers.PreTrainedModel:
    """A transformers model in which no weight is zero, one or shared by accident."""
    config = type(CASES[name])(**CASES[name].to_dict() | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = any(part in key for part in ("norm", "ln")) and key.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + float(is_norm))
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(their model, ours loaded from its folder, the folder, the family)."""
    theirs = reference(request.param)
    folder = tmp_path_factory.mktemp("recurrent")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder), folder, request.param.split()[0]


def some_tokens(rows: int = 3, n: int = T) -> torch.Tensor:
    return torch.randint(V, (rows, n), generator=torch.Generator().manual_seed(3))


class Bare:
    """As much of a tokenizer as decoding needs."""

    class special:
        pad = bos = eos = unk = turn_start = turn_end = None

    vocab_size = V

    def stream(self):
        return self

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def states_of(family: str, outputs) -> list[torch.Tensor]:
    """Their hidden states in our order: the embedding, the outputs of all layers but the last, the normed last."""
    if family == "bamba":
        return list(outputs.hidden_states)
    *layers, last = outputs.hidden_states  # no embedding there, and the last layer's output before and after the norm
    return [*layers[:-1], last]


@pytest.mark.rows("A10", "A12")
@torch.no_grad()
def test_logits_and_every_hidden_state(pair):
    theirs, ours, _, family = pair
    tokens = some_tokens()
    a = theirs(tokens, use_cache=False, output_hidden_states=True)
    b = ours(Inputs(tokens), needs=("logits", "hidden_states"))
    assert float(a.logits.std()) > 0.3  # an agreement about something
    wanted = states_of(family, a)
    mine = b.hidden_states[-len(wanted) :]
    assert len(wanted) >= 3
    for got, theirs_state in zip((b.logits, *mine), (a.logits, *wanted), strict=True):
        agree(ours.config.blocks[ours.config.layer_names()[0]].mixer.kind, f"transformers {family}", got, theirs_state)


@torch.no_grad()
def test_padded_rows_say_what_each_says_alone(pair):
    """Theirs row by row without padding: their recurrences are not all built for it."""
    theirs, ours, *_ = pair
    tokens, n = some_tokens(), [T, T - 5, 2]
    for side in ("left", "right"):
        order, lengths = torch.arange(T), torch.tensor(n)[:, None]
        valid = order < lengths if side == "right" else order >= T - lengths
        got = ours(Inputs(tokens, valid=valid)).logits
        for row in range(3):
            wanted = theirs(tokens[row, valid[row]][None], use_cache=False).logits[0]
            agree("mamba", "transformers", got[row, valid[row]], wanted, case=f"padding {side}")


@pytest.mark.rows("A10", "A12")
@torch.no_grad()
def test_saved_here_it_loads_there_and_says_the_same(pair, tmp_path):
    theirs, ours, folder, family = pair
    target, tokens = tmp_path / "ours", some_tokens()
    assert save_model(ours, target) == family
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        target, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )
    assert not [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
    mine, written = (load_file(path / "model.safetensors") for path in (folder, target))
    assert mine.keys() == written.keys()
    assert all(torch.equal(written[name], mine[name]) for name in mine)
    wanted = theirs(tokens, use_cache=False).logits
    agree("mamba", "transformers", again.eval()(tokens, use_cache=False).logits, wanted, case="export")
    assert torch.equal(load_model(target)(Inputs(tokens)).logits, ours(Inputs(tokens)).logits)
    prompts = [tokens[0, :5], tokens[1, :7]]
    said = generate(
        ours, Bare(), [p.tolist() for p in prompts], SamplingConfig(temperature=0, max_new_tokens=15), stop_ids=()
    )  # fmt: skip
    for prompt, mine in zip(prompts, said, strict=True):
        greedy = theirs.generate(
            prompt[None], do_sample=False, max_new_tokens=15, attention_mask=torch.ones(1, len(prompt)), pad_token_id=0
        )[0, len(prompt) :]
        assert list(mine.ids) == greedy.tolist()
        assert len(set(mine.ids)) > 1


# ---------------------------------------------------------------------------------------------- special cases


def written(config: transformers.PreTrainedConfig, folder: Path, **changes) -> dict:
    """What transformers writes as config.json, some keys changed."""
    config.save_pretrained(folder)
    return read_config(folder) | changes


@torch.no_grad()
def test_mamba2_limits_the_step_in_every_pass(tmp_path):
    """Theirs forgets time_step_limit where it decodes one token with its cache; one pass is the reference."""
    theirs = reference("mamba2", time_step_limit=(0.6, 0.8))
    theirs.save_pretrained(tmp_path)
    ours, tokens = load_model(tmp_path), some_tokens()
    assert ours.config.blocks["block"].mixer.dt_limit == (0.6, 0.8)
    wanted = theirs(tokens, use_cache=False).logits
    agree("mamba2", "transformers Mamba2ForCausalLM", ours(Inputs(tokens)).logits, wanted, case="limited")
    state = ours.new_state(3, T)
    got = torch.cat([ours(Inputs(part), state).logits for part in tokens.split(1, 1)], 1)
    agree("mamba2", "transformers Mamba2ForCausalLM", got, wanted, case="limited, decoding against one pass")
    free = reference("mamba2")(tokens, use_cache=False).logits
    assert float((wanted - free).abs().max()) > 0.01  # the limit is felt
    save_model(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert tuple(again.config.time_step_limit) == (0.6, 0.8)


@pytest.mark.parametrize("limit", [[0.01, {"__float__": "Infinity"}], [0.01, float("inf")]], ids=["mapping", "number"])
def test_a_limit_on_one_side_alone_is_kept(limit, tmp_path):
    from octavo.hub.folder import FAMILIES, model_config

    config = model_config(written(CASES["mamba2"], tmp_path, time_step_limit=limit))
    assert config.blocks["block"].mixer.dt_limit == (0.01, 1e30)
    assert FAMILIES["mamba2"].fits(config)
    assert FAMILIES["mamba2"].write(config)["time_step_limit"] == [0.01, {"__float__": "Infinity"}]


@torch.no_grad()
def test_rwkv_rescaling_changes_nothing_but_what_eps_counts(tmp_path):
    """rescale_every halves their stream; every reader normalises it. Without eps nothing is left of it."""
    tokens, logits = some_tokens(), {}
    reference("rwkv").save_pretrained(tmp_path)
    for every in (0, 1):
        (tmp_path / "config.json").write_text(json.dumps(read_config(tmp_path) | {"rescale_every": every}))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        logits[every, 1e-5] = theirs(tokens, use_cache=False).logits
        for module in theirs.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 0.0
        logits[every, 0.0] = theirs(tokens, use_cache=False).logits
        agree("rwkv4", "transformers RwkvForCausalLM", load_model(tmp_path)(Inputs(tokens)).logits, logits[0, 1e-5])
    agree("rwkv4", "transformers RwkvForCausalLM", logits[1, 0.0], logits[0, 0.0], case="theirs, halved or not")
    assert float((logits[1, 1e-5] - logits[0, 1e-5]).abs().max()) > 1e-4  # eps is felt


REFUSED = [
    ("mamba", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("mamba", {"expand": 1.01}, "expand = 1.01"),
    ("mamba2", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ("mamba2", {"head_dim": 16}, "head_dim = 16"),
    ("mamba2", {"n_groups": 3}, "n_groups = 3 must divide"),
    ("rwkv", {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon = 0.001"),
    ("bamba", {"mamba_d_head": 16}, "mamba_d_head = 16"),
    ("bamba", {"attn_layer_indices": [1, 9]}, "attn_layer_indices = [9]"),
    ("bamba", {"hidden_act": "mish"}, "mish"),
]


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED, ids=str)
def test_what_would_change_the_mathematics_is_refused_by_its_key(name, changes, said, tmp_path):
    from octavo.hub.folder import model_config

    with pytest.raises(CheckpointError) as caught:
        model_config(written(CASES[name], tmp_path, **changes))
    assert said in str(caught.value)


def test_a_missing_or_strange_tensor_is_named(tmp_path):
    from safetensors.torch import save_file

    reference("mamba").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("backbone.layers.1.mixer.A_log")
    tensors["backbone.layers.1.mixer.in_proj.bias"] = torch.zeros(128)
    tensors["backbone.layers.0.mixer.conv1d.weight"] = torch.zeros(64, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    for said in ("missing: backbone.layers.1.mixer.A_log (1)", "not used: backbone.layers.1.mixer.in_proj.bias (1)",
                 "conv1d.weight has (64, 4), expected (64, 1, 4)"):  # fmt: skip
        assert said in str(caught.value)


def test_the_early_spelling_of_mambas_embedding(tmp_path):
    from safetensors.torch import save_file

    reference("mamba").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_model(tmp_path).vocab_size == V
