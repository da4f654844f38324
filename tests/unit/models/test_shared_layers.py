"""Layers that share weights, each with a state of its own; DeepNorm; a stream without residual."""

import pytest
import torch

from octavo import laws
from octavo.models.block import DEEPNORM_ROLES
from octavo.models.cost import cost, predicted_parameters
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.nn.projection import Projection

ATTENTION = {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}}
BARE = {"mixer": {"kind": "attention", "n_heads": 4}, "channel": None}


def config(n_layers: int = 5, **more) -> Decoder.Config:
    small = {"d_model": 16, "n_layers": n_layers, "vocab_size": 17, "max_seq_len": 16}
    return Decoder.Config.model_validate(small | more)


def hybrid(**more) -> Decoder.Config:
    return config(blocks={"own": ATTENTION, "common": BARE}, pattern=["own", "common"], **more)


def test_shared_layers_are_one_and_the_same():
    model = build(hybrid(shared=["common"]))
    assert model.uses == [0, 1, 2, 1, 3]
    assert model.stack()[1] is model.stack()[3] and model.stack()[0] is not model.stack()[2]
    assert len(model.blocks) == 4
    assert set(model.new_state(1).layers) == {f"{depth}.mixer" for depth in range(5)}
    assert predicted_parameters(model) == cost(model).parameters == sum(p.numel() for p in model.parameters())


def test_sharing_equals_copies_of_the_weights():
    shared, free = build(hybrid(shared=["own", "common"])).double(), build(hybrid()).double()
    assert len(shared.blocks) == 2
    weights = {k: v for k, v in shared.state_dict().items() if not k.startswith("blocks")}
    for depth, place in enumerate(shared.uses):
        for name, value in shared.blocks[place].state_dict().items():
            weights[f"blocks.{depth}.{name}"] = value
    free.load_state_dict(weights)
    tokens = torch.randint(17, (2, 9))
    torch.testing.assert_close(shared(Inputs(tokens)).logits, free(Inputs(tokens)).logits, rtol=0, atol=0)
    shared(Inputs(tokens)).logits.square().sum().backward()
    free(Inputs(tokens)).logits.square().sum().backward()
    name = "layers.mixer.mixer.q.weight"
    copies = sum(free.blocks[depth].get_parameter(name).grad for depth in (0, 2, 4))
    torch.testing.assert_close(shared.blocks[0].get_parameter(name).grad, copies)


@pytest.mark.parametrize(
    "values",
    [
        {"shared": ["block"]},
        {"blocks": {"block": {"norm_placement": "post", "residual_scale": "deepnorm"}}},
        {"blocks": {"block": {"residual_scale": 0}}},
        {"causal": False},
    ],
    ids=["shared", "deepnorm", "no residual", "both ways"],
)
def test_the_laws_hold(values):
    made = config(n_layers=2, **values)
    names = set(laws.model.LAWS) - ({"causal", "incremental", "state"} if not made.causal else set())
    names -= {"compilable"}
    wrong = [str(result) for result in laws.check(made, laws=names) if not result.ok]
    assert not wrong


@pytest.mark.rows("F5")
def test_deepnorm_scales_the_stream_and_the_start():
    n = 6
    values = {"mixer": {"kind": "attention", "n_heads": 4}, "norm_placement": "post", "residual_scale": "deepnorm"}
    deep = build(config(n_layers=n, blocks={"block": values}, d_model=64, init={"scale_residual": False}))
    assert deep.blocks[0].residual_scale == pytest.approx((2 * n) ** 0.25)
    for module in deep.modules():
        if isinstance(module, Projection):
            wanted = 0.02 * ((8 * n) ** -0.25 if module.role in DEEPNORM_ROLES else 1)
            assert float(module.weight.std()) == pytest.approx(wanted, rel=0.06), module.role
    with pytest.raises(ValueError, match="made for norm_placement post"):
        config(blocks={"block": {"residual_scale": "deepnorm"}})


@pytest.mark.rows("F6")
def test_without_residual_the_gradient_of_the_first_layer_fades_with_depth():
    """The share of the loss's gradient that reaches the embedding of a deep stack, with and without x in the sum."""

    def reach(residual: float, n_layers: int) -> float:
        torch.manual_seed(0)
        block = {"residual_scale": residual, "channel": {"kind": "mlp"}}
        bare = {"blocks": {"block": block}, "positions": "none", "norm": "none"}
        model = build(config(n_layers=n_layers, d_model=32, **bare))
        x = torch.randint(17, (4, 8))
        leaves = []
        model.embed.register_forward_hook(lambda m, a, out: leaves.append(out.detach().requires_grad_()) or leaves[-1])
        hidden = model(Inputs(x), needs=("hidden",)).hidden
        (gradient,) = torch.autograd.grad((hidden * torch.randn_like(hidden)).sum(), leaves[0])
        return float(gradient.norm())

    kept = reach(1.0, 16) / reach(1.0, 2)
    lost = reach(0.0, 16) / reach(0.0, 2)
    assert kept > 0.5 and lost < 1e-3 * kept


def test_layers_may_rotate_heads_of_different_widths():
    wide, narrow = {"kind": "attention", "n_heads": 2}, {"kind": "attention", "n_heads": 4}
    both = config(2, blocks={"wide": {"mixer": wide}, "narrow": {"mixer": narrow}})
    model = build(both)
    assert sorted(model.rotary[0]) == [4, 8]
    wrong = [str(result) for result in laws.check(both) if not result.ok]
    assert not wrong
