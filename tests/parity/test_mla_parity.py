"""Latent attention against transformers' DeepSeek V2 and V3: both forms, outputs and gradients, also with YaRN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from proof import agree
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from octavo.nn.contracts import Context, Dims, Inputs
from octavo.nn.latent import LatentAttention
from octavo.nn.position import Rotation
from octavo.nn.state import ContiguousState, place

pytestmark = pytest.mark.rows("B5")
D, H, K, ROPE, V, R, T = 48, 4, 16, 8, 12, 20, 11
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 16,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
CLASSES = {
    "V2": (DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding),
    "V3": (DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding),
}


def pair(version: str, q_rank: int | None, rope: dict[str, Any], **ours: Any) -> tuple[Any, LatentAttention, Any]:
    """Their layer, ours with the same weights, and their rotary module."""
    make_config, make, make_rotary = CLASSES[version]
    config = make_config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=H, kv_lora_rank=R, q_lora_rank=q_rank,
        qk_nope_head_dim=K, qk_rope_head_dim=ROPE, v_head_dim=V, max_position_embeddings=640,
        rope_parameters=dict(rope), attention_bias=True,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = make(config, 0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    values = {"n_heads": H, "head_dim": K, "rope_dim": ROPE, "v_head_dim": V, "kv_rank": R, "q_rank": q_rank}
    if rope is YARN:
        values["yarn"] = {"factor": rope["factor"], "mscale": rope["mscale_all_dim"]}
    mixer = LatentAttention(LatentAttention.Config(bias=True, **values, **ours), Dims(D, 1, 64))
    down, bias = theirs.kv_a_proj_with_mqa.weight, theirs.kv_a_proj_with_mqa.bias
    up = theirs.kv_b_proj.weight.view(H, K + V, R)
    weights = {
        "kv_down.weight": down[:R], "kv_down.bias": bias[:R], "k_rope.weight": down[R:], "k_rope.bias": bias[R:],
        "kv_norm.weight": theirs.kv_a_layernorm.weight, "k.weight": up[:, :K].reshape(-1, R),
        "v.weight": up[:, K:].reshape(-1, R), "o.weight": theirs.o_proj.weight, "o.bias": theirs.o_proj.bias,
    }  # fmt: skip
    if q_rank is None:
        weights["q.weight"] = theirs.q_proj.weight
    else:
        weights |= {"q_down.weight": theirs.q_a_proj.weight, "q_down.bias": theirs.q_a_proj.bias,
                    "q_norm.weight": theirs.q_a_layernorm.weight, "q.weight": theirs.q_b_proj.weight}  # fmt: skip
    mixer.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    return theirs, mixer, make_rotary(config)


def rotations(rotary: Any, x: Tensor, positions: Tensor) -> tuple[Any, Rotation]:
    """Their tables, and the same numbers as ours."""
    tables = rotary(x, positions)
    if torch.is_tensor(tables):  # V2 turns complex numbers
        return tables, Rotation(tables.real, tables.imag, "interleaved", lambda at: rotations(rotary, x, at)[1])
    cos, sin = (table[..., : ROPE // 2].float() for table in tables)
    return tables, Rotation(cos, sin, "interleaved", lambda at: rotations(rotary, x, at)[1])


def run_theirs(theirs: Any, x: Tensor, tables: Any) -> Tensor:
    hidden = torch.zeros(T, T).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).to(x.dtype)
    return theirs(x, attention_mask=hidden[None, None], position_embeddings=tables)[0]


def placed(turn: Rotation) -> Context:
    ctx = place(Inputs(torch.zeros(2, T, dtype=torch.long)))[0]
    ctx.rotations = {ROPE: turn}
    return ctx


@pytest.mark.parametrize("backend", ["plain", "auto", "absorbed"])
@pytest.mark.parametrize(
    ("version", "q_rank", "rope"), [("V2", None, PLAIN), ("V2", 14, YARN), ("V3", 14, PLAIN), ("V3", None, YARN)]
)
def test_outputs_and_gradients(version, q_rank, rope, backend):
    theirs, ours, rotary = pair(version, q_rank, rope, backend=backend)
    x = torch.randn(2, T, D, requires_grad=True)
    tables, turn = rotations(rotary, x, torch.arange(T)[None])
    wanted, got = run_theirs(theirs, x, tables), ours(x, placed(turn))[0]
    reference = f"transformers Deepseek{version}Attention"
    case = f"{backend}, {'queries compressed' if q_rank else 'plain queries'}, {rope['rope_type']} rope"
    agree("mla", reference, got, wanted, case=case)
    weight = torch.randn_like(wanted)
    dx, dup = torch.autograd.grad((wanted * weight).sum(), (x, theirs.kv_b_proj.weight))
    mine = torch.autograd.grad((got * weight).sum(), (x, ours.k.weight, ours.v.weight))
    agree("mla", reference, mine[0], dx, case=f"{case}, gradient of x")
    per_head = [part.view(H, -1, R) for part in mine[1:]]
    agree("mla", reference, torch.cat(per_head, 1), dup.view(H, K + V, R), case=f"{case}, gradient of keys and values")


@pytest.mark.parametrize("version", CLASSES)
def test_in_bf16(version):
    theirs, ours, rotary = pair(version, 14, PLAIN)
    x = torch.randn(2, T, D).bfloat16()
    tables, turn = rotations(rotary, x, torch.arange(T)[None])
    with torch.no_grad():
        wanted, got = run_theirs(theirs.bfloat16(), x, tables), ours.bfloat16()(x, placed(turn))[0]
    agree("mla", f"transformers Deepseek{version}Attention", got, wanted, case="whole row")


@torch.no_grad()
def test_decoding_from_the_latent_alone_is_their_full_pass():
    """Prompt and single tokens, each in the form that auto takes for it."""
    theirs, ours, rotary = pair("V3", 14, YARN)
    x = torch.randn(2, T, D)
    tables, _ = rotations(rotary, x, torch.arange(T)[None])
    wanted, state = run_theirs(theirs, x, tables), ContiguousState({"0": ours.state_spec()}, 2, T, torch.float32)
    parts, start = [], 0
    for n in (6, 1, 1, 3):
        ctx = state.begin(Inputs(torch.zeros(2, n, dtype=torch.long)))
        ctx.rotations = {ROPE: rotations(rotary, x, ctx.positions)[1]}
        parts.append(ours(x[:, start : start + n], ctx, state.layer("0"))[0])
        start += n
    agree("mla", "transformers DeepseekV3Attention", torch.cat(parts, 1), wanted, case="decoded in four cuts")
    assert [ours.absorbs(n, s) for n, s in ((6, 6), (1, 7), (1, 500))] == [False, True, True]
