"""Latent attention: what is cached, what decoding touches, which form is taken, the fast path with narrow values."""

from __future__ import annotations

import math

import pytest
import torch
from allocations import Allocated

from octavo.laws.subject import randomise
from octavo.nn import attend
from octavo.nn.attention import Attention, use_backend
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.kernels import build
from octavo.nn.latent import LatentAttention
from octavo.nn.state import ContiguousState, place

pytestmark = pytest.mark.rows("B5")


def latent(d_model: int = 32, **values) -> LatentAttention:
    mixer = LatentAttention(LatentAttention.Config.model_validate(values), Dims(d_model, 1, 128))
    randomise(mixer, 0)
    return mixer


def test_the_state_is_the_latent_and_the_rotary_key():
    mixer = latent(n_heads=4, kv_rank=12, rope_dim=6)
    state = ContiguousState({"0": mixer.state_spec()}, 3, 100, torch.float32)
    assert state.payload_bytes == 3 * 100 * (12 + 6) * 4
    heads = Attention(Attention.Config(n_heads=4), Dims(32, 1, 128))
    assert ContiguousState({"0": heads.state_spec()}, 3, 100, torch.float32).payload_bytes == 3 * 100 * (32 + 32) * 4


@torch.no_grad()
@pytest.mark.parametrize("n_new", [1, 3])
def test_decoding_makes_no_keys_and_values(n_new):
    """Nothing made for new tokens is as large as the expanded keys of one head; the expanded form makes all of them."""
    sizes, S = {}, 256
    for backend in ("auto", "sdpa"):
        mixer = latent(n_heads=4, head_dim=64, kv_rank=16, rope_dim=4, backend=backend)
        state = ContiguousState({"0": mixer.state_spec()}, 1, S, torch.float32)
        mixer(torch.randn(1, S - n_new, 32), state.begin(tokens(1, S - n_new)), state.layer("0"))
        ctx, x = state.begin(tokens(1, n_new)), torch.randn(1, n_new, 32)
        with Allocated([*mixer.parameters(), *state.layer("0").buffers.values()]) as seen:
            mixer(x, ctx, state.layer("0"))
        sizes[backend] = seen.largest
    assert sizes["auto"] < S * 64 * 4 < 4 * S * 64 * 4 <= sizes["sdpa"]


def tokens(B: int, T: int) -> Inputs:
    return Inputs(torch.zeros(B, T, dtype=torch.long))


@torch.no_grad()
def test_both_forms_read_the_same_state():
    mixer, x = latent(n_heads=4, kv_rank=12, v_head_dim=5, q_rank=7).double(), torch.randn(2, 20, 32).double()
    outputs = {}
    for backend in ("absorbed", "plain", "sdpa", "tiled"):
        one = latent(n_heads=4, kv_rank=12, v_head_dim=5, q_rank=7, backend=backend).double()
        state, parts = ContiguousState({"0": mixer.state_spec()}, 2, 20, torch.float64), []
        for part in x.split([15, 1, 4], 1):
            parts.append(one(part, state.begin(tokens(2, part.shape[1])), state.layer("0"))[0])
        outputs[backend] = torch.cat(parts, 1)
    whole = mixer(x, place(tokens(2, 20))[0])[0]
    for backend, got in outputs.items():
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-12, msg=backend)


def test_auto_takes_the_form_with_fewer_multiplications():
    """At DeepSeek V2's sizes: prompts are expanded, single tokens absorbed."""
    with torch.device("meta"):
        mixer = LatentAttention(
            LatentAttention.Config(n_heads=128, head_dim=128, rope_dim=64, kv_rank=512, q_rank=1536),
            Dims(5120, 1, 4096),
        )
    assert [mixer.absorbs(*sizes) for sizes in ((4096, 4096), (1, 4096), (1, 1), (8, 4096))] == [
        False,
        True,
        False,
        True,
    ]


def test_yarn_changes_the_scale():
    plain, stretched = latent(n_heads=4), latent(n_heads=4, yarn={"factor": 40.0, "mscale": 0.707})
    assert plain.scale == (plain.head_dim + plain.rope_dim) ** -0.5
    assert stretched.scale == pytest.approx(plain.scale * (0.1 * 0.707 * math.log(40) + 1) ** 2)
    assert latent(n_heads=4, scale=0.3, yarn={"factor": 1.0}).scale == 0.3


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("v_head_dim", [8, 5, 20])
@pytest.mark.parametrize("backend", ["auto", "absorbed"])
def test_training_runs_through_the_kernel_whatever_the_width_of_values(backend, v_head_dim, monkeypatch):
    calls, real = [], attend.attention.causal
    monkeypatch.setattr(attend.attention, "causal", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k))
    values = {"n_heads": 4, "rope_dim": 4, "kv_rank": 12, "v_head_dim": v_head_dim}
    doc_ids = (torch.arange(40) // 9).expand(2, 40)
    x, outputs = torch.randn(2, 40, 32), []
    for name in (backend, "plain"):
        mixer, given = latent(**values, backend=name).train(), x.clone().requires_grad_()
        ctx = place(Inputs(torch.zeros(2, 40, dtype=torch.long), doc_ids=doc_ids))[0]
        y = mixer(given, ctx)[0]
        y.square().sum().backward()
        outputs.append([y, given.grad, mixer.k.weight.grad, mixer.v.weight.grad])
    assert len(calls) == 1
    for got, wanted in zip(*outputs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.detach().abs().max()))


def test_training_chooses_its_backend_as_for_attention():
    mixer, own = latent(n_heads=4), latent(n_heads=4, backend="absorbed")
    for module in (mixer, own):
        use_backend(module, "sdpa")
    assert (mixer.backend, own.backend) == ("sdpa", "absorbed")
