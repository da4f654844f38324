"""Gated linear attention against fla-core's naive function (golden/make_fla_recurrences.py) and its layer in torch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from proof import agree
from safetensors.torch import load_file

from octavo.nn import vector_decay
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.gla import Gla
from octavo.nn.state import place

pytestmark = pytest.mark.rows("B9")
GOLDEN = load_file(Path(__file__).parent / "golden" / "gla.safetensors")
REFERENCE = "fla-core naive_recurrent_gla"
CHUNKED = {size: lambda *a, size=size: vector_decay.chunked(*a, chunk=size) for size in (1, 8, 64)}
FORMS = {"recurrent": vector_decay.recurrent} | {f"chunks of {size}": form for size, form in CHUNKED.items()}


def case(dtype):
    return {name.removeprefix(f"{dtype}."): x for name, x in GOLDEN.items() if name.startswith(dtype)}


@pytest.mark.parametrize("form", FORMS)
def test_the_recurrence_and_its_gradients_with_decays_from_none_to_e_40(form):
    given = case("fp32")
    leaves = {name: given[name].requires_grad_() for name in ("q", "k", "v", "gk", "initial_state")}
    q, k, v, g, before = leaves.values()
    o, h = FORMS[form](q * q.shape[-1] ** -0.5, k, v, g, None, before)
    agree("gla", REFERENCE, o, given["o"], case=form)
    agree("gla", REFERENCE, h, given["h"], case=f"{form}, last state")
    loss = (o * given["o_weight"]).sum() + (h * given["h_weight"]).sum()
    for (name, _), gradient in zip(leaves.items(), torch.autograd.grad(loss, leaves.values()), strict=True):
        agree("gla", REFERENCE, gradient, given[f"grad.{name}"], case=f"{form}, gradient of {name}")


def test_the_recurrence_in_bf16():
    given = case("bf16")
    q, k, v, g = (given[name] for name in ("q", "k", "v", "gk"))
    o, _ = vector_decay.chunked(q.float() * q.shape[-1] ** -0.5, k, v, g, None, given["initial_state"])
    agree("gla", REFERENCE, o.bfloat16(), given["o"], case="chunked")


def test_the_layer_is_the_papers_formula_in_torchs_own_functions():
    torch.manual_seed(0)
    B, T, D, H, K, V = 2, 11, 12, 2, 3, 6
    layer = Gla(Gla.Config(n_heads=H, decay_rank=5, chunk=4), Dims(D, 1, 16))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(B, T, D)
    y, _ = layer(x, place(Inputs(torch.zeros(B, T, dtype=torch.long)))[0])
    q, k, v = (p(x).view(B, T, H, -1) for p in (layer.q, layer.k, layer.v))
    low = layer.decay_out.weight @ layer.decay_in.weight
    a = torch.sigmoid(x @ low.T + layer.decay_out.bias).view(B, T, H, K) ** (1 / 16)
    h, seen = torch.zeros(B, H, K, V), []
    for t in range(T):
        h = torch.einsum("bhk,bhkv->bhkv", a[:, t], h) + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        seen.append(torch.einsum("bhk,bhkv->bhv", q[:, t], h) / K**0.5)
    wanted = F.rms_norm(torch.stack(seen, 1), (V,), layer.norm.weight, 1e-5).flatten(2) * F.silu(layer.gate(x))
    agree("gla", "torch, written out", y, layer.o(wanted))
