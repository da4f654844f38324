"""What attention can be, against the layers of transformers that are it: sinks, gates, one key head, local windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from proof import agree
from torch import Tensor, nn
from transformers import GPTBigCodeConfig, GPTNeoConfig, GPTNeoForCausalLM, GptOssConfig, Qwen3NextConfig
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeAttention
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

from octavo.models.decoder import Decoder, build
from octavo.nn.attention import Attention
from octavo.nn.contracts import Context, Dims, Inputs
from octavo.nn.position import PositionDims
from octavo.nn.rope import RotaryPositions
from octavo.nn.state import place

D, T = 48, 13


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@torch.no_grad()
def drawn(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    return module


def attention(weights: dict[str, Tensor], **values: Any) -> Attention:
    mixer = Attention(Attention.Config(**values), Dims(D, 1, 64))
    mixer.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    return mixer


def context(width: int | None = None, **rope: Any) -> Context:
    ctx = place(Inputs(torch.zeros(2, T, dtype=torch.long)))[0]
    if width is not None:
        scheme = RotaryPositions(RotaryPositions.Config(**rope), PositionDims(D, width, 64))
        ctx.rotations = {width: scheme.rotation(ctx.positions)}
    return ctx


def hidden(window: int | None = None) -> Tensor:
    """Their additive mask, (1, 1, T, T)."""
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    seen = seen if window is None else seen.triu(1 - window)
    return torch.zeros(T, T).masked_fill(~seen, float("-inf"))[None, None]


def compare(reference: str, got: Tensor, wanted: Tensor, leaves: list[tuple[Tensor, Tensor]], case: str) -> None:
    """Outputs, and the gradients of pairs (ours, theirs)."""
    agree("attention", reference, got, wanted, case=case)
    weight = torch.randn_like(wanted)
    mine = torch.autograd.grad((got * weight).sum(), [pair[0] for pair in leaves])
    theirs = torch.autograd.grad((wanted * weight).sum(), [pair[1] for pair in leaves])
    for a, b in zip(mine, theirs, strict=True):
        agree("attention", reference, a, b, case=f"{case}, gradients")


@pytest.mark.parametrize("backend", ["plain", "sdpa", "tiled"])
@pytest.mark.parametrize("window", [None, 5])
def test_sinks_are_those_of_gpt_oss(window, backend):
    kind = "full_attention" if window is None else "sliding_attention"
    config = GptOssConfig(
        hidden_size=D, num_attention_heads=6, num_key_value_heads=2, head_dim=8, num_hidden_layers=1,
        sliding_window=window or 5, layer_types=[kind],
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = drawn(GptOssAttention(config, 0))
    weights = {
        f"{n}.{part}": getattr(getattr(theirs, f"{n}_proj"), part) for n in "qkvo" for part in ("weight", "bias")
    }
    ours = attention(
        weights | {"sinks": theirs.sinks}, n_heads=6, n_kv_heads=2, head_dim=8, qkv_bias=True, o_bias=True, sinks=True,
        window=window, backend=backend,
    )  # fmt: skip
    x = torch.randn(2, T, D, requires_grad=True)
    tables = GptOssRotaryEmbedding(config)(x, torch.arange(T)[None])
    wanted = theirs(x, position_embeddings=tables, attention_mask=hidden(window))[0]
    got = ours(x, context(8, theta=150000.0))[0]
    case = f"sinks, {'window' if window else 'full'}, {backend}"
    compare("transformers GptOssAttention", got, wanted, [(x, x), (ours.sinks, theirs.sinks)], case)


def test_the_gate_is_that_of_qwen3_next():
    config = Qwen3NextConfig(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = drawn(Qwen3NextAttention(config, 0))
    both = theirs.q_proj.weight.view(4, 2, 16, D)  # of each head the query, then the gate
    weights = {f"{n}.weight": getattr(theirs, f"{n}_proj").weight for n in "kvo"}
    weights |= {"q.weight": both[:, 0].reshape(-1, D), "gate.weight": both[:, 1].reshape(-1, D)}
    weights |= {f"{n}_norm.weight": getattr(theirs, f"{n}_norm").weight for n in "qk"}
    norm = {"kind": "rmsnorm", "offset": True}
    ours = attention(weights, n_heads=4, n_kv_heads=2, head_dim=16, gate="channel", qk_norm=norm)
    x = torch.randn(2, T, D, requires_grad=True)
    tables = Qwen3NextRotaryEmbedding(config)(x, torch.arange(T)[None])
    wanted = theirs(x, position_embeddings=tables, attention_mask=hidden())[0]
    got = ours(x, context(16, fraction=0.25))[0]
    compare("transformers Qwen3NextAttention", got, wanted, [(x, x), (ours.o.weight, theirs.o_proj.weight)], "gate")


@pytest.mark.rows("B4")
def test_one_key_head_is_gpt_big_codes_multi_query():
    config = GPTBigCodeConfig(n_embd=D, n_head=6, multi_query=True, attn_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = "eager"
    theirs = drawn(GPTBigCodeAttention(config)).eval()
    cuts = {"q": slice(0, D), "k": slice(D, D + 8), "v": slice(D + 8, D + 16)}
    weights = {
        f"{n}.{part}": getattr(theirs.c_attn, part)[cut] for n, cut in cuts.items() for part in ("weight", "bias")
    }
    weights |= {f"o.{part}": getattr(theirs.c_proj, part) for part in ("weight", "bias")}
    ours = attention(weights, n_heads=6, n_kv_heads=1, qkv_bias=True, o_bias=True)
    x = torch.randn(2, T, D, requires_grad=True)
    wanted = theirs(x, attention_mask=hidden())[0]
    got = ours(x, context())[0]
    compare(
        "transformers GPTBigCodeAttention", got, wanted, [(x, x), (ours.o.weight, theirs.c_proj.weight)], "one key head"
    )


@pytest.mark.rows("B8")
def test_local_layers_between_global_ones_are_gpt_neo():
    """A whole model: every other layer reads a window; scores are not scaled there, as GPT-Neo has it."""
    theirs = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=61,
            hidden_size=D,
            num_layers=3,
            attention_types=[[["global", "local"], 1], [["local"], 1]],
            num_heads=4,
            intermediate_size=96,
            window_size=4,
            max_position_embeddings=32,
            attention_dropout=0.0,
            embed_dropout=0.0,
            resid_dropout=0.0,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    mixer = {"kind": "attention", "n_heads": 4, "scale": 1.0, "o_bias": True}
    block = {"channel": {"kind": "mlp", "d_ff": 96, "activation": "gelu_tanh", "bias": True}}
    ours = build(
        Decoder.Config.model_validate(
            {"d_model": D, "n_layers": 3, "vocab_size": 61, "max_seq_len": 32, "positions": "learned",
             "norm": "layernorm", "pattern": ["global", "local", "local"],
             "blocks": {"global": {"mixer": mixer, **block},
                        "local": {"mixer": mixer | {"reader": {"kind": "window", "window": 4}}, **block}}}
        )
    ).eval()  # fmt: skip
    base = theirs.transformer
    found = {"embed.weight": base.wte.weight, "positions.table.weight": base.wpe.weight}
    modules = {"norm": base.ln_f}
    for i, layer in enumerate(base.h):
        at, inner = f"blocks.{i}.layers", layer.attn.attention
        modules |= {f"{at}.mixer.norm_in": layer.ln_1, f"{at}.channel.norm_in": layer.ln_2}
        modules |= {f"{at}.channel.mixer.up": layer.mlp.c_fc, f"{at}.channel.mixer.down": layer.mlp.c_proj}
        modules |= {f"{at}.mixer.mixer.{n}": getattr(inner, f"{n}_proj") for n in "qkv"}
        modules[f"{at}.mixer.mixer.o"] = inner.out_proj
    for name, module in modules.items():
        found |= {f"{name}.{part}": weight for part, weight in module.named_parameters()}
    ours.load_state_dict({name: weight.detach() for name, weight in found.items()})
    tokens = torch.randint(61, (2, 20))
    agree(
        "window",
        "transformers GPTNeoForCausalLM",
        ours(Inputs(tokens)).logits,
        theirs(tokens).logits,
        case="whole rows",
    )
    with torch.no_grad():
        state = ours.new_state(2, 20)
        parts = [ours(Inputs(part), state=state).logits for part in tokens.split([9, 1, 10], 1)]
        agree("window", "transformers GPTNeoForCausalLM", torch.cat(parts, 1), theirs(tokens).logits, case="decoded")
