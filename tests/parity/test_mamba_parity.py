"""Mamba against transformers' slow path: logits, gradients, cached decoding; and its block scan."""

from __future__ import annotations

import pytest
import torch
import transformers
from proof import agree

from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.nn import mamba
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.mamba import Mamba, scan, scan_by_steps
from octavo.nn.state import place

THEIRS = "transformers MambaForCausalLM"
D, E, N, R, W, LAYERS, V = 16, 32, 5, 3, 4, 2, 29


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pair(dtype: torch.dtype = torch.float32, backend: str = "auto"):
    config = transformers.MambaConfig(
        vocab_size=V, hidden_size=D, expand=2, state_size=N, num_hidden_layers=LAYERS,
        time_step_rank=R, conv_kernel=W, use_bias=True, residual_in_fp32=False, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(config).to(dtype).eval()
    assert theirs.config.intermediate_size == E
    randomise(theirs, 0)
    mixer = {"kind": "mamba", "expand": 2, "state_size": N, "dt_rank": R, "conv_width": W, "bias": True,
             "backend": backend}  # fmt: skip
    ours = build(
        Decoder.Config.model_validate(
            {"d_model": D, "n_layers": LAYERS, "vocab_size": V, "max_seq_len": 64, "positions": "none",
             "norm": {"kind": "rmsnorm", "eps": 1e-5}, "blocks": {"block": {"mixer": mixer, "channel": None}}}
        )
    ).to(dtype).eval()  # fmt: skip
    return ours, theirs


def names(ours: Decoder, theirs) -> list[tuple[torch.Tensor, torch.Tensor, slice]]:
    """Our parameter, theirs, and which rows of theirs."""
    every = slice(None)
    found = [(ours.embed.weight, theirs.backbone.embeddings.weight, every)]
    found.append((ours.norm.weight, theirs.backbone.norm_f.weight, every))
    for block, their in zip(ours.blocks, theirs.backbone.layers, strict=True):
        m, t = block.layers["mixer"].mixer, their.mixer
        found += [
            (block.layers["mixer"].norm_in.weight, their.norm.weight, every),
            (m.up.weight, t.in_proj.weight, slice(0, E)), (m.up.bias, t.in_proj.bias, slice(0, E)),
            (m.gate.weight, t.in_proj.weight, slice(E, None)), (m.gate.bias, t.in_proj.bias, slice(E, None)),
            (m.conv_weight, t.conv1d.weight, every), (m.conv_bias, t.conv1d.bias, every),
            (m.select.weight, t.x_proj.weight, every), (m.dt.weight, t.dt_proj.weight, every),
            (m.dt_bias, t.dt_proj.bias, every), (m.a_log, t.A_log, every), (m.skip, t.D, every),
            (m.o.weight, t.out_proj.weight, every), (m.o.bias, t.out_proj.bias, every),
        ]  # fmt: skip
    return found


@torch.no_grad()
def copied(dtype: torch.dtype = torch.float32, backend: str = "auto"):
    ours, theirs = pair(dtype, backend)
    mapped = names(ours, theirs)
    assert len(mapped) == len(list(ours.parameters()))
    for mine, their, rows in mapped:
        mine.copy_(their[rows].view_as(mine))
    return ours, theirs


@pytest.mark.rows("S2")
@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_logits_and_gradients(backend):
    ours, theirs = copied(backend=backend)
    tokens = torch.randint(V, (2, 21))
    got, wanted = ours(Inputs(tokens)).logits, theirs(tokens, use_cache=False).logits
    agree("mamba", THEIRS, got, wanted, case=f"logits, {backend}")
    got.square().mean().backward()
    wanted.square().mean().backward()
    for mine, their, rows in names(ours, theirs):
        agree("mamba", THEIRS, mine.grad, their.grad[rows].view_as(mine), case=f"gradients, {backend}")


@torch.no_grad()
def test_logits_in_16_bits():
    ours, theirs = copied(torch.bfloat16)
    tokens = torch.randint(V, (2, 21))
    agree("mamba", THEIRS, ours(Inputs(tokens)).logits, theirs(tokens, use_cache=False).logits, case="logits")


@pytest.mark.rows("S2")
@torch.no_grad()
def test_cached_decoding_is_theirs_and_the_whole_pass():
    ours, theirs = copied()
    tokens = torch.randint(V, (2, 14))
    whole, state = theirs(tokens, use_cache=False).logits, ours.new_state(2, 14)
    mine = [ours(Inputs(tokens[:, :9]), state).logits]
    out = theirs(tokens[:, :9], use_cache=True)
    yours = [out.logits]
    for t in range(9, 14):
        mine.append(ours(Inputs(tokens[:, t : t + 1]), state).logits)
        out = theirs(tokens[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
        yours.append(out.logits)
    agree("mamba", THEIRS, torch.cat(mine, 1), torch.cat(yours, 1), case="decoding, theirs with a cache")
    agree("mamba", THEIRS, torch.cat(mine, 1), whole, case="decoding, theirs in one pass")


def test_trap_e21_only_delta_b_and_c_depend_on_the_input():
    """The note says that A, B and C are functions of x_t. A is not: it is a parameter and acts through Delta."""
    mixer = Mamba(Mamba.Config(state_size=3), Dims(4, 1, 16)).double()
    randomise(mixer, 0)
    seen = []
    original = mamba.scan
    try:
        mamba.scan = lambda *args: seen.append(args) or original(*args)
        ctx = place(Inputs(torch.zeros(1, 6, dtype=torch.long)))[0]
        for seed in (1, 2):
            mixer(torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), ctx)
    finally:
        mamba.scan = original
    (dt1, _, a1, b1, c1, *_), (dt2, _, a2, b2, c2, *_) = seen
    assert isinstance(mixer.a_log, torch.nn.Parameter)
    assert torch.equal(a1, a2) and torch.equal(a1, -mixer.a_log.exp()) and a1.shape == (8, 3)
    for one, other in ((dt1, dt2), (b1, b2), (c1, c2)):
        assert not torch.isclose(one, other).any()
        assert not torch.isclose(one[:, 0], one[:, 1]).any()


@pytest.mark.parametrize("T", [1, 16, 50])
def test_the_scan_in_blocks_equals_the_steps_with_every_gradient(T, monkeypatch):
    """Over several blocks, with documents, a state, and decays that leave nothing in 32 bits."""
    monkeypatch.setattr(mamba, "_block", lambda *shape: 16)
    random = torch.Generator().manual_seed(T)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    dt, x, a, b, c, h = (
        draw(2, T, 3).exp(),
        draw(2, T, 3),
        -draw(3, 4).exp(),
        draw(2, T, 4),
        draw(2, T, 4),
        draw(2, 3, 4),
    )
    a[0, 0] = -1e5
    for starts in (None, torch.rand(2, T, generator=random) < 0.1):
        inputs = [v.clone().requires_grad_() for v in (dt, x, a, b, c, h)]
        found = []
        for run in (scan_by_steps, scan):
            y, last = run(*inputs[:5], starts, inputs[5])
            grads = torch.autograd.grad((y * y).sum() + (last * last).sum(), inputs, retain_graph=True)
            found.append([y, last, *grads])
        for wanted, got in zip(*found, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)


def test_the_scan_keeps_few_states():
    """What is kept for the backward pass: the states before blocks, not those of every token."""
    T, E, N, kept = 1024, 64, 16, []
    inputs = [torch.rand(1, T, E), torch.rand(1, T, E), -torch.rand(E, N), torch.rand(1, T, N), torch.rand(1, T, N)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        scan(*(v.requires_grad_() for v in inputs), None, torch.zeros(1, E, N))
    assert sum(v.numel() for v in inputs) <= sum(kept) < T * E * N / 4
