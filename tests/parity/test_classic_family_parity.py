"""GPT-NeoX, Phi, Bloom, MPT and Falcon against transformers, both ways, on random weights."""

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
SHAPE = {**ENDS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
BLOOM = {**ENDS, "hidden_size": 32, "n_layer": 3, "n_head": 4}
MPT = {**ENDS, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}
PART = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
CASES = {
    "gpt_neox": transformers.GPTNeoXConfig(**SHAPE, intermediate_size=48, rope_parameters=PART),
    "gpt_neox in sequence": transformers.GPTNeoXConfig(
        **SHAPE, intermediate_size=48, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new",
        rope_parameters={**PART, "rope_type": "linear", "factor": 2.0}, tie_word_embeddings=True,
    ),
    "phi": transformers.PhiConfig(**SHAPE, intermediate_size=48),
    "phi grouped": transformers.PhiConfig(
        **SHAPE, intermediate_size=48, num_key_value_heads=2, qk_layernorm=True, rope_parameters=PART,
        tie_word_embeddings=True, layer_norm_eps=1e-3,
    ),
    "bloom": transformers.BloomConfig(**BLOOM),
    "bloom of 3 heads": transformers.BloomConfig(
        **{**BLOOM, "hidden_size": 24, "n_head": 3}, tie_word_embeddings=False
    ),
    "mpt": transformers.MptConfig(**MPT),
    "mpt of 3 heads": transformers.MptConfig(
        **{**MPT, "d_model": 24, "n_heads": 3}, attn_config={"softmax_scale": 0.7}, layer_norm_epsilon=1e-3
    ),
    "falcon 7B": transformers.FalconConfig(**SHAPE),
    "falcon 40B": transformers.FalconConfig(
        **SHAPE, new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False, ffn_hidden_size=40
    ),
    "falcon 11B": transformers.FalconConfig(
        **SHAPE, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    ),
    "falcon RW": transformers.FalconConfig(**SHAPE, **RW),
    "falcon RW of 6 heads": transformers.FalconConfig(**{**SHAPE, "num_attention_heads": 6, "hidden_size": 24}, **RW),
    "falcon all heads, in parallel": transformers.FalconConfig(**SHAPE, multi_query=False, activation="relu"),
}  # fmt: skip


def reference(name: str) -> transformers.PreTrainedModel:
    """A transformers model in which no weight is zero, one or shared by accident."""
    # Falcon's ALiBi counts twice in transformers' eager form: once in the scores, once more in the mask.
    how = "sdpa" if "RW" in name else "eager"
    model = transformers.AutoModelForCausalLM.from_config(CASES[name], attn_implementation=how).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = any(part in key for part in ("norm", "ln_")) and key.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + float(is_norm))
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(their model, ours loaded from its folder, the folder, the family)."""
    theirs = reference(request.param)
    folder = tmp_path_factory.mktemp("classic")
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


@pytest.mark.rows("A10", "A12")
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@torch.no_grad()
def test_logits_and_every_hidden_state(pair, padding):
    theirs, ours, _, family = pair
    tokens, n, order = some_tokens(), torch.tensor([T, T - 5, 2]), torch.arange(T)
    valid = {"none": order >= 0 * n[:, None], "right": order < n[:, None], "left": order >= T - n[:, None]}[padding]
    options = {"attention_mask": valid.long(), "output_hidden_states": True}
    if family not in ("bloom", "mpt"):
        options["position_ids"] = (valid.long().cumsum(1) - 1).clamp(min=0)
    a = theirs(tokens, **options)
    b = ours(Inputs(tokens, valid=valid), needs=("logits", "hidden_states"))
    assert float(a.logits[valid].std()) > 0.3  # an agreement about something
    for got, wanted in zip((b.logits, *b.hidden_states), (a.logits, *a.hidden_states), strict=True):
        agree("attention", f"transformers {theirs.__class__.__name__}", got[valid], wanted[valid], case=padding)


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
    assert {name.replace("lm_head", "embed_out") for name in mine} == {*written} or mine.keys() == written.keys()
    assert all(torch.equal(written.get(name, written.get("embed_out.weight")), mine[name]) for name in mine)
    agree("attention", "transformers", again.eval()(tokens).logits, theirs(tokens).logits, case="export")
    assert torch.equal(load_model(target)(Inputs(tokens)).logits, ours(Inputs(tokens)).logits)
    prompt = tokens[0, :5]
    greedy = theirs.generate(
        prompt[None], do_sample=False, max_new_tokens=15, attention_mask=torch.ones(1, 5), pad_token_id=0
    )[0, 5:]
    (said,) = generate(
        ours, Bare(), [prompt.tolist()], SamplingConfig(temperature=0, max_new_tokens=15), stop_ids=()
    )  # fmt: skip
    assert list(said.ids) == greedy.tolist()


@torch.no_grad()
def test_decoding_with_a_state_is_one_pass_of_theirs(pair):
    theirs, ours, *_ = pair
    tokens = some_tokens(2)
    state = ours.new_state(2, T)
    got = [ours(Inputs(part), state).logits for part in tokens.split([5, 1, 1, 3, 1, 1], 1)]
    agree("attention", f"transformers {theirs.__class__.__name__}", torch.cat(got, 1), theirs(tokens).logits)


REFUSED = [
    ("gpt_neox", {"is_decoder": True}, "is_decoder = True"),
    ("gpt_neox", {"rope_parameters": PART | {"partial_rotary_factor": 0.4}}, "partial_rotary_factor = 0.4"),
    ("gpt_neox", {"rope_parameters": PART | {"rope_type": "longrope"}}, "longrope"),
    ("gpt_neox", {"hidden_act": "mish"}, "mish"),
    ("phi", {"num_attention_heads": 5}, "5 heads do not divide"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("bloom", {"slow_but_exact": True, "pretraining_tp": 4}, "slow_but_exact = True"),
    ("mpt", {"attn_config": {"clip_qkv": 6}}, "attn_config.clip_qkv = 6"),
    ("mpt", {"attn_config": {"alibi_bias_max": 16}}, "attn_config.alibi_bias_max = 16"),
    ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi = False"),
    ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln = True"),
    ("mpt", {"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm = True"),
    ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_config.attn_type"),
    ("mpt", {"expansion_ratio": 3}, "expansion_ratio = 3"),
    ("mpt", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
    ("mpt", {"no_bias": False}, "no_bias = False"),
    ("falcon 40B", {"parallel_attn": False}, "parallel_attn = False"),
    ("falcon 7B", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
    ("falcon RW", {"num_kv_heads": 2}, "num_kv_heads = 2"),
    ("falcon 7B", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("falcon 7B", {"rope_parameters": PART}, "partial_rotary_factor = 0.5"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("refused")
            reference(name).save_pretrained(made[name])
        return made[name]

    return of


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED, ids=str)
def test_what_would_change_the_mathematics_is_refused_by_its_key(name, changes, said, folders, tmp_path):
    config = read_config(folders(name)) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folders(name) / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert said in str(caught.value)
    assert "Fix:" in str(caught.value)


OLDER = {
    "gpt_neox": {"rope_parameters": None, "rotary_pct": 0.5, "rotary_emb_base": 5000},
    "phi": {"rope_parameters": None, "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "num_key_value_heads": None},
    "bloom": {"hidden_size": None, "n_embed": 32, "n_head": None, "num_attention_heads": 4, "n_layer": None,
              "num_hidden_layers": 3, "offset_alibi": 100, "pretraining_tp": 4, "slow_but_exact": False},
    "falcon 7B": {"rope_parameters": None, "num_kv_heads": None, "ffn_hidden_size": None},
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
@torch.no_grad()
def test_the_spelling_before_version_5(name, folders, tmp_path):
    config = read_config(folders(name)) | OLDER[name]
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (tmp_path / "model.safetensors").symlink_to(folders(name) / "model.safetensors")
    tokens = some_tokens()
    assert torch.equal(load_model(tmp_path)(Inputs(tokens)).logits, load_model(folders(name))(Inputs(tokens)).logits)


@torch.no_grad()
def test_a_missing_or_strange_tensor_is_named(folders, tmp_path):
    from safetensors.torch import save_file

    tensors = load_file(folders("falcon 40B") / "model.safetensors")
    tensors.pop("transformer.h.1.ln_mlp.bias")
    tensors["transformer.h.1.input_layernorm.bias"] = torch.zeros(32)
    tensors["transformer.h.0.self_attention.query_key_value.weight"] = torch.zeros(63, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(read_config(folders("falcon 40B"))))
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    for said in ("missing: transformer.h.1.ln_mlp.bias (1)", "not used: transformer.h.1.input_layernorm.bias (1)",
                 "has (63, 32), expected (64, 32)"):  # fmt: skip
        assert said in str(caught.value)


@torch.no_grad()
def test_falcon_rounds_the_places_of_far_keys_as_its_class_does(folders):
    """bfloat16 knows no 257: without the rounding the two part at the first key beyond 256."""
    theirs = reference("falcon RW of 6 heads")
    ours = load_model(folders("falcon RW of 6 heads"))
    tokens = some_tokens(1, 300)
    got, wanted = ours(Inputs(tokens)).logits, theirs(tokens).logits
    agree("alibi", "transformers FalconForCausalLM", got, wanted, case="300 keys")
    ours.positions.rounded = False
    assert float((ours(Inputs(tokens)).logits - wanted).abs().max()) > 0.01


@torch.no_grad()
def test_rounded_places_count_within_a_document(folders):
    """Two documents in one row say what each says alone; with a state too. Beyond 256 the rounding is felt."""
    ours, tokens = load_model(folders("falcon RW of 6 heads")), some_tokens(1, 300)
    doc_ids = (torch.arange(300) >= 7).long()[None]
    both = ours(Inputs(tokens, doc_ids=doc_ids)).logits
    alone = torch.cat([ours(Inputs(part)).logits for part in tokens.split([7, 293], 1)], 1)
    assert float((both - alone).abs().max()) < 1e-4
    state = ours.new_state(1, 300)
    halves = zip(tokens.split(100, 1), doc_ids.split(100, 1), strict=True)
    parts = [ours(Inputs(t, doc_ids=d), state).logits for t, d in halves]
    assert float((both - torch.cat(parts, 1)).abs().max()) < 1e-4
