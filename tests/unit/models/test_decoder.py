"""The decoder: residuals, heads, hidden states, patterns, and configurations that cannot be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from octavo.errors import UnsupportedError
from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def config(**changes) -> Decoder.Config:
    block = {"mixer": {"kind": "attention", "n_heads": 2}, **changes.pop("block", {})}
    plain = {"d_model": 16, "n_layers": 3, "vocab_size": 19, "max_seq_len": 16, "blocks": {"block": block}}
    return Decoder.Config.model_validate(plain | changes)


def model(**changes) -> Decoder:
    built = build(config(**changes)).double().eval()
    randomise(built, 1)
    return built


def some_tokens(rows: int = 2, n: int = 6) -> torch.Tensor:
    return torch.randint(19, (rows, n), generator=torch.Generator().manual_seed(2))


# -------------------------------------------------------------------------------------------- residuals


@pytest.mark.rows("F6")
def test_without_the_residual_deep_models_get_no_gradient():
    """What reaches the embedding of an untied model at the start, over the depth; no norms, to see it bare."""

    def gradient(depth: int, scale: float) -> float:
        block = {"residual_scale": scale, "channel": {"kind": "mlp"}}
        init = {"std": 0.1, "scale_residual": False}
        deep = build(config(n_layers=depth, norm="none", block=block, init=init, tie_embeddings=False)).double()
        tokens = some_tokens(4, 12)
        F.cross_entropy(deep(Inputs(tokens[:, :-1])).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return float(deep.embed.weight.grad.norm())

    with_residual, without = ([gradient(depth, scale) for depth in (2, 6, 12)] for scale in (1.0, 0.0))
    assert max(with_residual) / min(with_residual) < 1.5
    assert without[0] > 1e4 * without[1] > 1e8 * without[2] > 0


@pytest.mark.rows("F5", "F6")
@pytest.mark.parametrize("placement", ["pre", "branch", "sandwich", "post"])
def test_a_block_is_the_sum_it_says(placement):
    deep = model(n_layers=1, block={"norm_placement": placement, "residual_scale": 1.5})
    tokens = some_tokens()
    x, after, _ = (*deep(Inputs(tokens), needs=("hidden_states",)).hidden_states, None)
    from octavo.nn.state import place

    ctx = place(Inputs(tokens))[0]
    ctx.rotations = {deep.blocks[0].layers["mixer"].mixer.head_dim: deep.positions.rotation(ctx.positions)}
    for layer in deep.blocks[0].layers.values():
        h = layer.norm_in(x) if placement in ("pre", "sandwich") else x
        y = layer.mixer(h, ctx)[0]
        y = layer.norm_out(y) if placement in ("branch", "sandwich") else y
        x = 1.5 * x + y
        x = layer.norm_sum(x) if placement == "post" else x
    torch.testing.assert_close(deep.norm(x), after, rtol=0, atol=1e-12)


def test_a_parallel_block_adds_both_to_the_same_x():
    deep = model(n_layers=1, block={"topology": "parallel", "shared_norm": True})
    tokens = some_tokens()
    x, after = deep(Inputs(tokens), needs=("hidden_states",)).hidden_states
    from octavo.nn.state import place

    ctx = place(Inputs(tokens))[0]
    ctx.rotations = {deep.blocks[0].layers["mixer"].mixer.head_dim: deep.positions.rotation(ctx.positions)}
    block = deep.blocks[0]
    h = block.norm(x)
    total = x + block.layers["mixer"].mixer(h, ctx)[0] + block.layers["channel"].mixer(h, ctx)[0]
    torch.testing.assert_close(deep.norm(total), after, rtol=0, atol=1e-12)


@pytest.mark.rows("B10")
def test_dropout_in_both_places_and_none_in_evaluation():
    """On the probabilities (the mixer's setting) and on the branch before it is added (the block's)."""
    tokens = some_tokens()
    calm = model()(Inputs(tokens)).logits
    for block in ({"mixer": {"kind": "attention", "n_heads": 2, "dropout": 0.5}}, {"dropout": 0.5}):
        loud = model(block=block)
        torch.testing.assert_close(loud(Inputs(tokens)).logits, calm, rtol=0, atol=0)
        loud.train()
        first, second = loud(Inputs(tokens)).logits, loud(Inputs(tokens)).logits
        assert not torch.allclose(first, second)
        torch.manual_seed(4)
        third = loud(Inputs(tokens)).logits
        torch.manual_seed(4)
        assert torch.equal(loud(Inputs(tokens)).logits, third)


# ------------------------------------------------------------------------------------------------ heads


@pytest.mark.rows("F7")
def test_a_tied_head_is_the_embedding_and_its_gradient_is_the_sum_of_both_uses():
    tied, untied = model(), model(tie_embeddings=False)
    untied.load_state_dict(tied.state_dict() | {"head.weight": tied.embed.weight.detach().clone()})
    tokens = some_tokens()
    outs = [one(Inputs(tokens)).logits for one in (tied, untied)]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    for out in outs:
        out.square().sum().backward()
    both = untied.embed.weight.grad + untied.head.weight.grad
    torch.testing.assert_close(tied.embed.weight.grad, both, rtol=1e-10, atol=1e-10)
    assert "head.weight" not in tied.state_dict()
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 19 * 16


@pytest.mark.rows("F7")
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_as_wide_as_the_vocabulary_and_softmax_to_one(tied):
    out = model(tie_embeddings=tied, head_bias=True)(Inputs(some_tokens())).logits
    assert out.shape == (2, 6, 19)
    torch.testing.assert_close(out.softmax(-1).sum(-1), torch.ones(2, 6).double())


@pytest.mark.rows("F7")
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_capped_logits_are_bent_after_the_head_and_the_bound_holds(tied):
    shape = {"tie_embeddings": tied, "head_bias": True}
    free, capped = model(**shape), model(**shape, logit_softcap=0.5)
    capped.load_state_dict(free.state_dict())
    wanted = free(Inputs(some_tokens())).logits
    got = capped(Inputs(some_tokens()), needs=("logits", "hidden", "head"))
    weight, bias, cap, _ = got.head  # for a loss that never holds all logits
    torch.testing.assert_close(cap * torch.tanh(F.linear(got.hidden, weight, bias) / cap), got.logits, rtol=0, atol=0)
    torch.testing.assert_close(got.logits, 0.5 * torch.tanh(wanted / 0.5), rtol=0, atol=1e-12)
    assert float(wanted.abs().max()) > 0.5 > float(got.logits.abs().max())
    assert torch.equal(got.logits, capped.logits(got.hidden))


@torch.no_grad()
def test_the_embedding_norm_acts_before_the_first_block_and_is_counted():
    from octavo.models.cost import predicted_parameters

    built = model(embed_norm=True)
    first = built(Inputs(some_tokens()), needs=("hidden_states",)).hidden_states[0]
    assert torch.equal(first, built.embed_norm(built.embed(some_tokens())))
    assert predicted_parameters(built) == sum(p.numel() for p in built.parameters())
    assert predicted_parameters(built) == predicted_parameters(model()) + 16


@torch.no_grad()
def test_the_embedding_scale_acts_on_tokens_before_positions_and_not_on_the_head():
    scaled = model(embed_scale=4.0, positions="learned")
    plain = model(positions="learned")
    plain.load_state_dict(scaled.state_dict())
    tokens = some_tokens()
    first = scaled(Inputs(tokens), needs=("hidden_states",)).hidden_states[0]
    wanted = 4 * scaled.embed.weight[tokens] + scaled.positions.table.weight[:6]
    torch.testing.assert_close(first, wanted, rtol=0, atol=1e-12)
    hidden = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(scaled.logits(hidden), plain.logits(hidden))


def test_the_embedding_scale_is_rounded_like_the_stream():
    """Gemma was trained with sqrt(3072) = 55.43 rounded to 55.5 in bf16."""
    built = model(embed_scale=3072**0.5).bfloat16()
    tokens = some_tokens()
    first = built(Inputs(tokens), needs=("hidden_states",)).hidden_states[0]
    assert torch.equal(first, built.embed.weight[tokens] * 55.5)


@pytest.mark.rows("X4")
def test_hidden_states_are_the_embedding_the_layers_and_the_normed_last():
    deep, tokens = model(), some_tokens()
    out = deep(Inputs(tokens), needs=("logits", "hidden", "hidden_states"))
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], deep.embed(tokens))
    assert torch.equal(out.hidden_states[-1], out.hidden)
    torch.testing.assert_close(out.hidden @ deep.embed.weight.T, out.logits)
    shallow = build(config(n_layers=2)).double().eval()
    shallow.load_state_dict({k: v for k, v in deep.state_dict().items() if not k.startswith("blocks.2")})
    before_norm = shallow(Inputs(tokens), needs=("hidden_states",)).hidden_states
    assert torch.equal(before_norm[1], out.hidden_states[1])
    assert torch.equal(deep.norm(out.hidden_states[2]), before_norm[2])  # normed only where it is the last


def test_attention_is_recorded_per_layer_and_sums_to_one():
    out = model()(Inputs(some_tokens()), needs=("attention",))
    assert out.logits is None
    assert [tuple(weights.shape) for weights in out.attention] == [(2, 2, 6, 6)] * 3
    torch.testing.assert_close(out.attention[0].sum(-1), torch.ones(2, 2, 6).double())
    assert (out.attention[0].triu(1) == 0).all()


def test_an_unknown_output_is_refused():
    with pytest.raises(UnsupportedError, match="logits, hidden"):
        model()(Inputs(some_tokens()), needs=("value",))


# -------------------------------------------------------------------------------------------- structure


def test_a_pattern_is_cycled():
    blocks = {name: {"mixer": {"kind": "attention", "n_heads": 2, "window": w}} for name, w in (("l", 3), ("g", None))}
    deep = build(config(n_layers=5, blocks=blocks, pattern=("l", "l", "g")), device="meta")
    assert [block.layers["mixer"].mixer.config.window for block in deep.blocks] == [3, 3, None, 3, 3]
    assert deep.uses == list(range(5))
    assert {"0.mixer", "4.channel"} <= set(deep.mixers())


def test_capabilities_are_what_all_mixers_promise():
    assert model().capabilities.causal
    assert not model().capabilities.constant_state


LONGROPE = {"kind": "longrope", "short": [1.0] * 4, "long": [2.0] * 4, "original": 16, "extended": 64}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d_model": 15}, "must divide d_model = 15"),
        ({"pattern": ("other",)}, "unknown blocks"),
        ({"blocks": {}}, "at least one block"),
        ({"d_model": 6, "block": {"mixer": {"kind": "attention", "n_heads": 2}}}, "head_dim = 3 is odd"),
        ({"padding_id": 19}, "must be below vocab_size = 19"),
        ({"block": {"topology": "parallel", "norm_placement": "post"}}, "one sum"),
        ({"block": {"shared_norm": True}}, "needs topology parallel"),
        ({"block": {"mixer": {"kind": "attention", "heads": 2}}}, "heads"),
        ({"positions": "spiral"}, "spiral"),
        ({"embed_scale": 0}, "embed_scale"),
        ({"logit_softcap": 0}, "logit_softcap"),
        ({"positions": {"kind": "rope", "scaling": LONGROPE | {"short": [1.0]}}}, "short has 1 factors for 4 pairs"),
        ({"positions": {"kind": "rope", "fraction": 0.5, "scaling": LONGROPE}}, "short has 4 factors for 2 pairs"),
        ({"positions": {"kind": "rope", "scaling": LONGROPE | {"long": [1, 1, 0, 1]}}}, "must be positive"),
        ({"positions": {"kind": "rope", "scaling": "stretch"}}, "scaling"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        config(**changes)


def test_the_vocabulary_must_be_known_to_build():
    with pytest.raises(UnsupportedError, match="vocab_size"):
        build(config(vocab_size=None))


def test_the_start_does_not_depend_on_what_else_was_drawn():
    torch.manual_seed(0)
    one = build(config(), seed=5)
    torch.rand(100)
    assert torch.equal(one.embed.weight, build(config(), seed=5).embed.weight)
