"""The recurrences that fade by channel, and the delta rule: every law at other settings, and numbers at their edges."""

import itertools

import pytest
import torch

from octavo import laws
from octavo.models.decoder import Decoder, build
from octavo.nn import delta_rule, rwkv4, vector_decay
from octavo.nn.contracts import Inputs

SETTINGS = {
    "gla": [{"chunk": 4}, {"chunk": 1, "head_dim": 3, "v_head_dim": 5}, {"backend": "plain", "decay_divisor": 1.0}],
    "rwkv4": [{"chunk": 5, "width": 7}, {"chunk": 1}, {"backend": "plain"}],
    "rwkv6": [{"chunk": 4, "n_heads": 2}, {"backend": "plain"}],
    "deltanet": [{"chunk": 5, "conv_width": 2, "negative_eigenvalues": True}, {"backend": "plain", "v_head_dim": 3}],
    "gated_deltanet": [{"chunk": 5, "n_key_heads": 2, "v_head_dim": 3}, {"backend": "plain", "conv_width": 3}],
}
ROWS = {"gla": "B9", "rwkv4": "S3", "rwkv6": "S3"}
CASES = [
    pytest.param(kind, settings, id=f"{kind} {settings}", marks=[pytest.mark.rows(ROWS[kind])] if kind in ROWS else [])
    for kind, all_settings in SETTINGS.items()
    for settings in all_settings
]


def small(kind, settings, **more):
    channel = "rwkv_channel" if kind.startswith("rwkv") else None
    block = {"mixer": {"kind": kind, **settings}, "channel": channel}
    return {"d_model": 16, "n_layers": 1, "vocab_size": 19, "max_seq_len": 16, "blocks": {"own": block}, **more}


@pytest.mark.parametrize("kind, settings", CASES)
def test_every_law_at_other_settings(kind, settings):
    results = laws.check(small(kind, settings))
    assert not [str(result) for result in results if not result.ok]
    assert {r.law for r in results if r.status == "holds"} >= {"twins", "incremental", "constant_state", "flops"}


@pytest.mark.parametrize(
    "kind", ["rwkv6", *(pytest.param(k, marks=pytest.mark.slow) for k in SETTINGS if k != "rwkv6")]
)
def test_no_graph_break_when_compiled(kind):
    (result,) = laws.check(small(kind, {"chunk": 8}), ["compilable"])
    assert result.status == "holds", result


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_model_in_16_bits_keeps_its_sums_in_32(kind):
    model = build(Decoder.Config.model_validate(small(kind, {}))).bfloat16()
    state = model.new_state(1, 8)
    with torch.no_grad():
        logits = model(Inputs(torch.arange(8)[None]), state).logits
    assert logits.dtype == torch.bfloat16
    layer = state.layer("0.mixer")
    sums = ("num", "den", "top") if kind == "rwkv4" else ("h",)
    assert {layer.read(name).dtype for name in sums} == {torch.float32}


@pytest.mark.rows("B9")
@pytest.mark.parametrize("bonus", [False, True], ids=["gla", "rwkv6"])
def test_decays_of_any_strength_neither_overflow_nor_lose_what_is_beside_them(bonus):
    """Channels that forget by e^-1000 a token next to channels that keep everything, in one chunk, in float32."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 6, generator=generator) for _ in range(3))
    g = -(10.0 ** torch.randint(-6, 4, (1, 70, 2, 6), generator=generator))
    u = torch.randn(2, 6, generator=generator) if bonus else None
    exact, _ = vector_decay.recurrent(*(x.double() for x in (q, k, v, g)), None, None, u)
    g.requires_grad_()
    y, h = vector_decay.chunked(q, k, v, g, None, None, u)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    (y.square().sum() + h.square().sum()).backward()
    assert torch.isfinite(g.grad).all()


def test_the_delta_rule_with_one_key_again_and_again():
    """Every token replaces the same entry: the series of powers would be off by more than the answer."""
    generator = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(torch.ones(1, 64, 1, 8), dim=-1)
    v, b = torch.randn(1, 64, 1, 4, generator=generator), torch.full((1, 64, 1), 2.0)
    exact, _ = delta_rule.recurrent(k.double(), k.double(), v.double(), b.double())
    y, _ = delta_rule.chunked(k, k, v, b)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1023, 1024, 1025, 2100])
def test_sections_of_a_long_text_join(n):
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(1, n, 1, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    g, b = -torch.rand(1, n, 1, 3, generator=generator).double(), torch.rand(1, n, 1, generator=generator).double()
    starts = torch.rand(1, n, generator=generator) < 0.002
    unit = torch.nn.functional.normalize(k, dim=-1)
    w, u, sums = torch.rand(3).double(), torch.rand(3).double(), rwkv4.empty(k[..., 0, :])
    flat = k[:, :, 0], v[:, :, 0], w, u, starts, torch.ones_like(starts), sums
    for form, inputs in [
        (vector_decay, (q, k, v, g, starts)),
        (delta_rule, (q, unit, v, b, g[..., 0], starts)),
        (rwkv4, flat),
    ]:
        (y, h), (wanted, last) = form.chunked(*inputs), form.recurrent(*inputs)
        torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(h, last, rtol=1e-9, atol=1e-9)


def test_what_does_not_fit_is_refused_by_name():
    for settings, said in [
        ({"kind": "gla", "n_heads": 3}, "n_heads = 3 must divide d_model = 16, or v_head_dim must be given"),
        ({"kind": "gla", "n_heads": 16}, "2 n_heads = 32 must divide d_model = 16, or head_dim must be given"),
        ({"kind": "gla", "chunk": 48}, "48 is not a power of two; use 32 or 64"),
        ({"kind": "rwkv6", "n_heads": 5}, "n_heads = 5 must divide d_model = 16"),
        ({"kind": "deltanet", "n_heads": 5}, "or head_dim must be given"),
        ({"kind": "gated_deltanet", "n_key_heads": 3}, "n_key_heads = 3 must divide n_heads = 4"),
    ]:
        block = {"mixer": settings}
        with pytest.raises(ValueError, match=said):
            Decoder.Config.model_validate({"d_model": 16, "vocab_size": 19, "blocks": {"own": block}})


def test_the_published_starting_values_differ_by_depth_and_channel():
    model = build(Decoder.Config.model_validate(small("rwkv4", {}, n_layers=3)))
    layers = [model.mixers()[f"{i}.mixer"] for i in range(3)]
    assert torch.allclose(layers[0].decay[[0, -1]], torch.tensor([-5.0, 3.0]))
    assert all((layer.decay.diff() > 0).all() for layer in layers)
    assert all((a.decay[1:-1] > b.decay[1:-1]).all() for a, b in itertools.pairwise(layers))
    assert not torch.equal(layers[0].bonus[:3], layers[0].bonus[1:4])
