"""Mixtures of experts against transformers' blocks and routers, with weights mapped by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from proof import agree
from torch import Tensor, nn
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.nllb_moe.configuration_nllb_moe import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.configuration_switch_transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    router_z_loss_func,
)

from octavo.nn.contracts import Context, Dims, Inputs
from octavo.nn.moe import Moe
from octavo.nn.state import place

D, F, E = 16, 12, 8
B, T = 2, 16


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def context(B: int = B, T: int = T, **named: Any) -> Context:
    return place(Inputs(torch.zeros(B, T, dtype=torch.long), **named))[0]


def moe(dtype: torch.dtype = torch.float32, **values: Any) -> Moe:
    config = Moe.Config(n_experts=E, d_ff=F, **values)
    return Moe(config, Dims(D, 1, T)).to(dtype).eval()


def drawn(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights that decide: scores far apart."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4)
    return module.to(dtype).eval()


@torch.no_grad()
def carry(theirs: Any, ours: Moe, router: Tensor) -> None:
    ours.router.weight.copy_(router)
    gate, up = theirs.experts.gate_up_proj.chunk(2, 1)
    assert ours.experts.gate is not None
    ours.experts.gate.weight.copy_(gate)
    ours.experts.up.weight.copy_(up)
    ours.experts.down.weight.copy_(theirs.experts.down_proj)


@torch.no_grad()
def carry_shared(theirs: Any, ours: Moe) -> None:
    shared: Any = ours.shared
    for own, other in ((shared.gate, "gate_proj"), (shared.up, "up_proj"), (shared.down, "down_proj")):
        own.weight.copy_(getattr(theirs, other).weight)


BACKENDS = pytest.mark.parametrize("backend", ["grouped", "plain"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def compare(name: str, theirs: Any, ours: Moe, dtype: torch.dtype, case: str) -> None:
    """Outputs, and where it is fp32 the gradients of the input, the router and an expert's weight."""
    x, y = (torch.randn(B, T, D, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_() for _ in "ab")
    wanted, got = theirs(x), ours(y, context())[0]
    agree("moe", f"transformers {name}", got, wanted, case=case)
    if dtype == torch.float32:
        theirs.zero_grad()
        wanted.square().sum().backward(), got.square().sum().backward()
        for case_, a, b in (
            ("input", y.grad, x.grad),
            ("router", ours.router.weight.grad, theirs.gate.weight.grad),
            ("down", ours.experts.down.weight.grad, theirs.experts.down_proj.grad),
        ):
            assert a is not None and b is not None
            agree("moe", f"transformers {name}", a, b, case=f"{case} gradient of {case_}")


@pytest.mark.rows("M2")
@DTYPES
@BACKENDS
def test_mixtral(backend, dtype):
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2)
    theirs = drawn(MixtralSparseMoeBlock(config), dtype)
    for order in ("score_first", "top_first"):  # the same thing where the scores are normalised
        ours = moe(dtype, order=order, backend=backend)
        carry(theirs, ours, theirs.gate.weight)
        compare("MixtralSparseMoeBlock", theirs, ours, dtype, f"{order} {backend}")


@pytest.mark.rows("M2")
@BACKENDS
@pytest.mark.parametrize("normalise", [True, False])
def test_qwen3(normalise, backend):
    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=3, norm_topk_prob=normalise
    )
    theirs = drawn(Qwen3MoeSparseMoeBlock(config), torch.float32)
    ours = moe(experts_per_token=3, normalise=normalise, backend=backend)
    carry(theirs, ours, theirs.gate.weight)
    compare("Qwen3MoeSparseMoeBlock", theirs, ours, torch.float32, f"normalise {normalise} {backend}")


@pytest.mark.rows("M5")
def test_qwen2_with_a_gated_shared_expert():
    config = Qwen2MoeConfig(
        hidden_size=D, moe_intermediate_size=F, shared_expert_intermediate_size=20, num_experts=E,
        num_experts_per_tok=2, norm_topk_prob=False,
    )  # fmt: skip
    theirs = drawn(Qwen2MoeSparseMoeBlock(config), torch.float32)
    ours = moe(normalise=False, n_shared_experts=1, shared_d_ff=20, shared_gate=True)
    carry(theirs, ours, theirs.gate.weight)
    carry_shared(theirs.shared_expert, ours)
    assert ours.shared_gate is not None
    ours.shared_gate.weight.data.copy_(theirs.shared_expert_gate.weight)
    compare("Qwen2MoeSparseMoeBlock", theirs, ours, torch.float32, "shared gate")


@pytest.mark.rows("M5")
@DTYPES
@BACKENDS
@pytest.mark.parametrize("normalise", [True, False])
def test_deepseek_v3(normalise, backend, dtype):
    config = DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=3, n_group=4, topk_group=2,
        norm_topk_prob=normalise, routed_scaling_factor=2.5, n_shared_experts=2,
    )  # fmt: skip
    theirs = drawn(DeepseekV3MoE(config), dtype)
    bias = torch.randn(E)
    theirs.gate.e_score_correction_bias = bias
    ours = moe(
        dtype, experts_per_token=3, score="sigmoid", normalise=normalise, n_groups=4, groups_per_token=2,
        group_score="two_largest", routed_scale=2.5, selection_bias=True, n_shared_experts=2, backend=backend,
    )  # fmt: skip
    carry(theirs, ours, theirs.gate.weight)
    carry_shared(theirs.shared_experts, ours)
    assert ours.selection_bias is not None
    ours.selection_bias.data = bias
    compare("DeepseekV3MoE", theirs, ours, dtype, f"normalise {normalise} {backend}")
    with_bias, aux = ours(x := torch.randn(B, T, D).to(dtype), context())
    ours.selection_bias.data = torch.zeros(E)
    without, other = ours(x, context())
    assert not torch.equal(with_bias, without) and not torch.equal(aux["moe.load.0"], other["moe.load.0"])


@pytest.mark.rows("M5")
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2(method):
    config = DeepseekV2Config(
        hidden_size=D, moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=2, n_group=4, topk_group=2,
        topk_method=method, routed_scaling_factor=1.5, n_shared_experts=2, num_attention_heads=4,
    )  # fmt: skip
    theirs = drawn(DeepseekV2Moe(config), torch.float32)
    groups = {"n_groups": 4, "groups_per_token": 2} if method == "group_limited_greedy" else {}
    ours = moe(normalise=False, routed_scale=1.5, n_shared_experts=2, **groups)
    carry(theirs, ours, theirs.gate.weight)
    carry_shared(theirs.shared_experts, ours)
    compare("DeepseekV2Moe", theirs, ours, torch.float32, method)


# ------------------------------------------------------------------------------------------- capacity


@pytest.mark.rows("M3")
def test_nllb_drops_the_same_choices():
    """Two choices, all first ones before all second ones, 2 ceil(n / E) tokens an expert over the batch."""
    config = NllbMoeConfig(
        d_model=D, num_experts=E, second_expert_policy="all", normalize_router_prob_before_dropping=True,
        batch_prioritized_routing=False, moe_eval_capacity_token_fraction=-1.0, router_dtype="float32",
    )  # fmt: skip
    theirs: Any = drawn(NllbMoeTop2Router(config), torch.float32)
    theirs.expert_capacity = None  # its own rule
    theirs.classifier.weight.data[0] += 0.3
    ours = moe(eval_capacity_factor=1.0, first="choice")
    ours.router.weight.data.copy_(theirs.classifier.weight)
    x = torch.randn(B, T, D)
    _, weights, logits = theirs(x.flatten(0, 1))
    assigned, aux = ours.assign(logits.view(B, T, E), context())
    mine = torch.zeros(B * T, E + 1).index_put((assigned.token, assigned.expert), assigned.weight)[:, :E]
    agree("moe", "transformers NllbMoeTop2Router", mine, weights, case="capacity")
    assert int(aux["moe.dropped.0"]) == 2 * B * T - int((weights > 0).sum()) > 0
    other, _ = moe(eval_capacity_factor=1.0, first="token").assign(logits.view(B, T, E), context())
    assert not torch.equal(other.expert, assigned.expert), "the order of the queue matters here"


@pytest.mark.rows("M3")
@BACKENDS
def test_switch_drops_the_same_tokens(backend):
    """One choice; each row has its own queue, first come, first served."""
    config = SwitchTransformersConfig(
        d_model=D, d_ff=F, num_experts=E, expert_capacity=3, router_jitter_noise=0.0, dropout_rate=0.0,
        router_dtype="float32",
    )  # fmt: skip
    theirs: Any = drawn(SwitchTransformersSparseMLP(config), torch.float32)
    with torch.no_grad():
        theirs.router.classifier.weight[0] += 0.3
    ours = moe(
        experts_per_token=1, gated=False, activation="relu", normalise=False, capacity_over="row", backend=backend,
        eval_capacity_factor=3 * E / T, balance="switch", balance_weight=1.0, z_loss=1.0,
    )  # fmt: skip
    with torch.no_grad():
        ours.router.weight.copy_(theirs.router.classifier.weight)
        for e in range(E):
            ours.experts.up.weight[e].copy_(theirs.experts[f"expert_{e}"].wi.weight)
            ours.experts.down.weight[e].copy_(theirs.experts[f"expert_{e}"].wo.weight)
    x = torch.randn(B, T, D)
    got, aux = ours(x, context())
    agree("moe", "transformers SwitchTransformersSparseMLP", got, theirs(x), case=f"capacity {backend}")
    index, _, logits = theirs.router(x)
    assert int(aux["moe.dropped.0"]) == B * T - int(index.sum()) > 0
    passed = index.sum(-1) == 0
    assert (got[passed] == 0).all() and (got[~passed] != 0).any(-1).all(), "what overflows is left to the residual"
    agree("moe", "transformers router_z_loss_func", aux["loss.router_z"] / (B * T), router_z_loss_func(logits))


@pytest.mark.rows("M4")
def test_the_balance_loss_of_mixtral_and_its_gradient():
    x = torch.randn(B, T, D)
    valid = torch.arange(T) < torch.tensor([[T], [T - 5]])
    ours = moe(experts_per_token=3, balance="switch", balance_weight=1.0)
    nn.init.normal_(ours.router.weight)
    aux = ours(x, context(valid=valid))[1]
    logits = nn.functional.linear(x, ours.router.weight).flatten(0, 1)
    wanted = load_balancing_loss_func((logits,), E, 3, valid.long())
    assert isinstance(wanted, Tensor)
    mine = aux["loss.balance"] / valid.sum()
    agree("moe", "transformers load_balancing_loss_func", mine, wanted)
    a, b = (torch.autograd.grad(loss, ours.router.weight)[0] for loss in (mine, wanted))
    agree("moe", "transformers load_balancing_loss_func", a, b, case="gradient")
