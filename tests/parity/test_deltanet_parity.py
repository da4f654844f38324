"""The delta rule against fla-core's naive functions and transformers; gated DeltaNet against two models' layers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from proof import agree
from safetensors.torch import load_file
from transformers import DynamicCache, OlmoHybridConfig, Qwen3NextConfig
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from octavo.nn import delta_rule
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.deltanet import DeltaNet, GatedDeltaNet, unit
from octavo.nn.state import ContiguousState, place

GOLDEN = Path(__file__).parent / "golden"
CHUNKED = {size: lambda *a, size=size: delta_rule.chunked(*a, chunk=size) for size in (1, 8, 64)}
FORMS = {"recurrent": delta_rule.recurrent} | {f"chunks of {size}": form for size, form in CHUNKED.items()}
D, T = 12, 23
TOKENS = torch.zeros(2, T, dtype=torch.long)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["deltanet", "gated_deltanet"])
def test_the_recurrence_and_its_gradients(kind, form):
    given = {name.removeprefix("fp32."): x for name, x in load_file(GOLDEN / f"{kind}.safetensors").items()}
    reference = f"fla-core {'delta_rule_recurrence' if kind == 'deltanet' else 'naive_recurrent_gated_delta_rule'}"
    names = [name for name in ("q", "k", "v", "beta", "g", "initial_state") if name in given]
    leaves = {name: given[name].requires_grad_() for name in names}
    turned = {name: x.transpose(1, 2) if kind == "deltanet" else x for name, x in leaves.items()}  # heads before tokens
    q, k, v, b = (turned[name] for name in ("q", "k", "v", "beta"))
    o, h = FORMS[form](q * q.shape[-1] ** -0.5, k, v, b, turned.get("g"), None, leaves["initial_state"])
    o = o.transpose(1, 2) if kind == "deltanet" else o
    agree(kind, reference, o, given["o"], case=form)
    agree(kind, reference, h, given["h"], case=f"{form}, last state")
    loss = (o * given["o_weight"]).sum() + (h * given["h_weight"]).sum()
    for (name, _), gradient in zip(leaves.items(), torch.autograd.grad(loss, leaves.values()), strict=True):
        agree(kind, reference, gradient, given[f"grad.{name}"], case=f"{form}, gradient of {name}")


@pytest.mark.parametrize("theirs", [qwen.torch_recurrent_gated_delta_rule, qwen.torch_chunk_gated_delta_rule])
def test_the_recurrence_as_in_transformers(theirs):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, T, 4, 6), torch.randn(2, T, 4, 6), torch.randn(2, T, 4, 5)
    g, b, before = -3 * torch.rand(2, T, 4), torch.rand(2, T, 4), torch.randn(2, 4, 6, 5)
    o, h = theirs(q, k, v, g, b, initial_state=before, output_final_state=True, use_qk_l2norm_in_kernel=True)
    got, last = delta_rule.chunked(unit(q) * 6**-0.5, unit(k), v, b, g, None, before, chunk=8)
    agree("gated_deltanet", f"transformers {theirs.__name__}", got, o)
    agree("gated_deltanet", f"transformers {theirs.__name__}", last, h, case="last state")


def qwen3_next(**settings):
    """Their layer of two key heads for four value heads, and ours with its weights (theirs stand by key head)."""
    theirs = qwen.Qwen3NextGatedDeltaNet(config := qwen3_next_config(), 0)
    scatter(theirs)
    ours = GatedDeltaNet(
        GatedDeltaNet.Config(
            n_heads=4, n_key_heads=2, head_dim=6, v_head_dim=5, norm_eps=config.rms_norm_eps, **settings
        ),
        Dims(D, 1, 64),
    )
    q, k, v, z = theirs.in_proj_qkvz.weight.view(2, -1, D).split([6, 6, 10, 10], 1)
    b, a = theirs.in_proj_ba.weight.view(2, -1, D).split([2, 2], 1)
    products = {"q": q, "k": k, "v": v, "gate": z, "beta": b, "decay": a, "o": theirs.out_proj.weight[None]}
    ours.load_state_dict(
        {f"{name}.weight": w.flatten(0, 1) for name, w in products.items()}
        | {"conv": theirs.conv1d.weight[:, 0], "norm.weight": theirs.norm.weight}
        | {"rate": theirs.A_log, "shift": theirs.dt_bias}
    )
    return theirs, ours


def qwen3_next_config():
    return Qwen3NextConfig(
        hidden_size=D, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=6,
        linear_value_head_dim=5, linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"],
        vocab_size=11, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip


def olmo_hybrid(**settings):
    config = OlmoHybridConfig(
        hidden_size=D, linear_num_value_heads=3, linear_num_key_heads=3, linear_key_head_dim=4,
        linear_value_head_dim=8, linear_conv_kernel_dim=3, linear_allow_neg_eigval=True, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"], vocab_size=11, num_attention_heads=2,
    )  # fmt: skip
    theirs = OlmoHybridGatedDeltaNet(config, 0)
    scatter(theirs)
    ours = GatedDeltaNet(
        GatedDeltaNet.Config(n_heads=3, head_dim=4, v_head_dim=8, conv_width=3, negative_eigenvalues=True, **settings),
        Dims(D, 1, 64),
    )
    names = {"q": "q", "k": "k", "v": "v", "g": "gate", "b": "beta", "a": "decay", "o": "o"}
    ours.load_state_dict(
        {f"{own}.weight": getattr(theirs, f"{name}_proj").weight for name, own in names.items()}
        | {"conv": theirs.conv1d.weight[:, 0], "norm.weight": theirs.o_norm.weight}
        | {"rate": theirs.A_log, "shift": theirs.dt_bias}
    )
    return theirs, ours


@torch.no_grad()
def scatter(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.4)


PAIRS = {"Qwen3NextGatedDeltaNet": qwen3_next, "OlmoHybridGatedDeltaNet": olmo_hybrid}


@pytest.mark.parametrize("settings", [{"backend": "plain"}, {"backend": "chunked", "chunk": 8}, {}], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_the_gated_layer_and_the_gradient_of_its_input(name, settings):
    theirs, ours = PAIRS[name](**settings)
    x, other = (torch.randn(2, T, D, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    wanted, got = theirs(x), ours(other, place(Inputs(TOKENS))[0])[0]
    agree("gated_deltanet", f"transformers {name}", got, wanted, case=str(settings))
    weights = torch.randn(2, T, D)
    (wanted * weights).sum().backward()
    (got * weights).sum().backward()
    agree("gated_deltanet", f"transformers {name}", other.grad, x.grad, case=f"{settings}, gradient of the input")
    agree("gated_deltanet", f"transformers {name}", ours.rate.grad, theirs.A_log.grad, case=f"{settings}, of A")
    conv = theirs.conv1d.weight.grad[:, 0]
    agree("gated_deltanet", f"transformers {name}", ours.conv.grad, conv, case=f"{settings}, of the convolution")


@torch.no_grad()
def test_decoding_with_the_state():
    theirs, ours = qwen3_next()
    cache, x = DynamicCache(config=qwen3_next_config()), torch.randn(2, T, D)
    state = ContiguousState({"own": ours.state_spec()}, 2, T, torch.float32)
    for part, ids in zip(x.split([13, *[1] * 10], 1), TOKENS.split([13, *[1] * 10], 1), strict=True):
        got, _ = ours(part, state.begin(Inputs(ids)), state.layer("own"))
        agree("gated_deltanet", "transformers Qwen3NextGatedDeltaNet", got, theirs(part, cache), case="decoding")


@torch.no_grad()
def test_the_gated_layer_in_bf16():
    theirs, ours = qwen3_next()
    x = torch.randn(2, T, D).bfloat16()
    got, _ = ours.bfloat16()(x, place(Inputs(TOKENS))[0])
    agree("gated_deltanet", "transformers Qwen3NextGatedDeltaNet", got, theirs.bfloat16()(x))


def test_the_layer_without_gates_is_the_papers_formula_in_torchs_own_functions():
    torch.manual_seed(0)
    H, K, V, B = 2, 6, 4, 2
    layer = DeltaNet(DeltaNet.Config(n_heads=H, v_head_dim=V, chunk=8), Dims(D, 1, 64))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(B, T, D)
    mixed = torch.cat([layer.q(x), layer.k(x), layer.v(x)], -1).transpose(1, 2)
    mixed = F.silu(F.conv1d(F.pad(mixed, (3, 0)), layer.conv[:, None], groups=len(layer.conv)).transpose(1, 2))
    q, k, v = (t.view(B, T, H, -1) for t in mixed.split([H * K, H * K, H * V], -1))
    q, k, b = F.normalize(q, dim=-1), F.normalize(k, dim=-1), layer.beta(x).sigmoid()
    h, seen = torch.zeros(B, H, K, V), []
    for t in range(T):
        erase = torch.eye(K) - b[:, t, :, None, None] * torch.einsum("bhi,bhj->bhij", k[:, t], k[:, t])
        h = erase @ h + b[:, t, :, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        seen.append(torch.einsum("bhkv,bhk->bhv", h, q[:, t]) * K**-0.5)
    wanted = layer.o(F.rms_norm(torch.stack(seen, 1), (V,), layer.norm.weight, 1e-5).flatten(2))
    agree("deltanet", "torch, written out", layer(x, place(Inputs(TOKENS))[0])[0], wanted)
