"""Mixtures of experts: the gradient of the notes, routing and its traps, capacity, balance, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from octavo.errors import UnsupportedError
from octavo.laws.subject import randomise
from octavo.models.cost import cost
from octavo.models.decoder import Decoder, build
from octavo.nn import router
from octavo.nn.contracts import Context, Dims, Inputs
from octavo.nn.grouped import add_rows, grouped_product, take_rows
from octavo.nn.moe import DenseMoe, ExpertChoice, Mixture, Moe
from octavo.nn.projection import GroupedProjection, InitConfig, initialise
from octavo.nn.state import place
from octavo.training.muon import Muon, orthogonalise

D, E = 8, 4
DIMS = Dims(D, 2, 16)


def context(B: int = 2, T: int = 6, **named: Any) -> Context:
    return place(Inputs(torch.zeros(B, T, dtype=torch.long), **named))[0]


def made(cls: Any, **values: Any) -> Any:
    mixer = cls(cls.Config(**{"n_experts": E, **values}), DIMS).double().eval()
    randomise(mixer, 0, 0.6)
    return mixer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoder(channel: dict[str, Any], **changes: Any) -> Decoder:
    block = {"mixer": {"kind": "attention", "n_heads": 2, "backend": "plain"}, "channel": channel}
    settings = {"d_model": D, "n_layers": 2, "vocab_size": 19, "max_seq_len": 16, "blocks": {"block": block}}
    return build(Decoder.Config.model_validate({**settings, **changes}))


# ------------------------------------------------------------------------------------ the dense mixture


def by_hand(mixer: DenseMoe, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gates (N, E) and experts' outputs (E, N, D), expert by expert as the notes write them."""
    scores = [(x * w).sum(-1).exp() for w in mixer.router.weight]
    gates = torch.stack(scores, -1) / sum(scores)[:, None]  # type: ignore[index]
    up, down = mixer.experts.up.weight, mixer.experts.down.weight
    return gates, torch.stack([torch.clamp(x @ up[e].T, min=0) @ down[e].T for e in range(E)])


@pytest.mark.rows("M1")
def test_the_dense_mixture_is_the_sum_of_gated_relu_experts():
    mixer, x = made(DenseMoe, d_ff=5), random(2, 6, D)
    gates, outputs = by_hand(mixer, x.flatten(0, 1))
    wanted = sum(gates[:, e, None] * outputs[e] for e in range(E))
    torch.testing.assert_close(mixer(x, context())[0].flatten(0, 1), wanted, rtol=0, atol=1e-12)


@pytest.mark.rows("M1")
def test_trap_e9_the_gradient_of_the_mixture_is_taken_for_one_thing_at_a_time():
    """The notes derive grad f = sum_e g_e (grad log g_e h_e + grad h_e) for x in one line and for theta_e in the next.
    The identity holds for either: for x both terms stay; for an expert's own weights grad log g_e is zero and the sum
    has one term; for the router grad h_e is zero."""
    mixer, x = made(DenseMoe, d_ff=5), random(6, D).requires_grad_()
    direction = random(6, D, seed=1)
    targets = {"x": x, "router": mixer.router.weight, "down": mixer.experts.down.weight, "up": mixer.experts.up.weight}
    out = mixer(x[None], context(1))[0][0]
    whole = dict(zip(targets, torch.autograd.grad((out * direction).sum(), list(targets.values())), strict=True))
    gates, outputs = by_hand(mixer, x)
    fixed_gates, fixed_outputs = gates.detach(), outputs.detach()
    for name, target in targets.items():
        terms = []
        for e in range(E):
            through_gate = fixed_gates[:, e, None] * gates[:, e, None].log() * fixed_outputs[e]
            through_expert = fixed_gates[:, e, None] * outputs[e]
            parts = [
                torch.autograd.grad(
                    (part * direction).sum(), target, retain_graph=True, allow_unused=True, materialize_grads=True
                )[0]
                for part in (through_gate, through_expert)
            ]
            terms.append(parts)
            if name in ("up", "down"):
                assert not parts[0].any(), "no gate depends on an expert's weights"
                assert not parts[1][torch.arange(E) != e].any(), "nor does another expert"
            if name == "router":
                assert not parts[1].any() and parts[0].any()
            if name == "x":
                assert parts[0].any() and parts[1].any()
        torch.testing.assert_close(sum(a + b for a, b in terms), whole[name], rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- routing


@pytest.mark.rows("M2")
@pytest.mark.parametrize("order", ["score_first", "top_first"])
@pytest.mark.parametrize("backend", ["plain", "grouped"])
def test_all_experts_chosen_is_the_dense_mixture(order, backend):
    dense = made(DenseMoe, d_ff=5)
    sparse = made(Moe, d_ff=5, experts_per_token=E, gated=False, activation="relu", order=order, backend=backend)
    sparse.load_state_dict(dense.state_dict())
    x = random(2, 6, D)
    torch.testing.assert_close(sparse(x, context())[0], dense(x, context())[0], rtol=0, atol=1e-12)


@pytest.mark.rows("M2")
def test_trap_e9_softmax_before_and_after_the_choice_differ_unless_normalised():
    """The notes write softmax(topk(x W)) where other models take topk(softmax(x W)): these are different weights, one
    sums to one and the other does not, and the same only where the second is divided by its sum."""
    logits = random(50, E)
    scores = router.scores_of(logits, "softmax")
    chosen = router.choose(scores, 2)
    after = router.weights_of(logits, scores, chosen, "top_first", False)
    before = router.weights_of(logits, scores, chosen, "score_first", False)
    torch.testing.assert_close(after.sum(-1), torch.ones(50, dtype=torch.float64))
    assert (before.sum(-1) < 0.999).all() and ((after - before).abs() > 1e-3).any(-1).all()
    normalised = router.weights_of(logits, scores, chosen, "score_first", True)
    torch.testing.assert_close(normalised, after, rtol=0, atol=1e-12)


@pytest.mark.rows("M5")
def test_the_bias_changes_who_is_chosen_and_no_weight():
    mixer, x = made(Moe, score="sigmoid", selection_bias=True, normalise=False), random(2, 6, D)
    logits = F.linear(x, mixer.router.weight)
    scores = logits.sigmoid()
    for bias, chosen in ((5.0, 12), (-5.0, 0)):
        mixer.selection_bias.data = torch.tensor([bias, 0, 0, 0])
        assigned, aux = mixer.assign(logits, context())
        torch.testing.assert_close(assigned.weight, scores.flatten(0, 1)[assigned.token, assigned.expert])
        assert int(aux["moe.load.0"][0]) == chosen
    assert not mixer.selection_bias.requires_grad


@pytest.mark.rows("M5")
def test_only_experts_of_the_best_groups_are_chosen():
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.5, 0.1, 0.2]])  # three groups of two
    assert router.choose(scores, 2, n_groups=3, group_score="max").tolist() == [[0, 1]]
    assert router.choose(scores, 2, n_groups=3, group_score="two_largest").sort().values.tolist() == [[2, 3]]
    two = router.choose(scores, 3, n_groups=3, groups_per_token=2, group_score="max")
    assert sorted(two[0].tolist()) == [0, 2, 3]
    assert router.choose(scores, 2).tolist()[0][0] == 0


# --------------------------------------------------------------------------------------------- capacity


@pytest.mark.rows("M3")
def test_what_overflows_passes_a_block_unchanged_and_is_counted():
    """The notes' capacity 2 B / E: of 12 tokens that all want one of four experts, 6 are read by it and the others
    leave f(x) = x to the residual."""
    channel = {"kind": "moe", "n_experts": E, "experts_per_token": 1, "capacity_factor": 2.0}
    model = decoder(channel, norm={"kind": "none"})
    block, x = model.stack()[0], random(2, 6, D).abs().float()
    mixer = model.mixers()["0.channel"]
    with torch.no_grad():
        mixer.router.weight.copy_(torch.tensor([1.0, 0, 0, 0])[:, None].expand(E, D))
        for parameter in mixer.experts.parameters():
            parameter.fill_(0.1)
        dict(block.sub_layers())["mixer"].mixer.o.weight.zero_()  # the block is its channel mixer alone
    block.train()
    y, aux = block(x, context())
    assert aux["moe.load.0"].tolist() == [12, 0, 0, 0] and int(aux["moe.dropped.0"]) == 6
    assert torch.equal(y.flatten(0, 1)[6:], x.flatten(0, 1)[6:]), "dropped: f(x) = x"
    assert ((y - x).flatten(0, 1)[:6].abs() > 0).all()
    block.eval()
    y, aux = block(x, context())
    assert "moe.dropped.0" not in aux and ((y - x).abs() > 0).all(), "nothing is dropped outside training"


@pytest.mark.rows("M3")
def test_capacity_counts_valid_tokens_and_queues_are_fair():
    assert router.capacities(torch.tensor([12, 5, 0]), 2.0, 1, 4).tolist() == [6, 3, 0]
    assert router.capacities(torch.tensor([3]), 1.0, 2, 3).tolist() == [2], "no rounding up of what is whole"
    experts = torch.tensor([[[0, 1], [1, 0], [0, 1]]])  # two choices of three tokens
    assert router.places(experts, 2, "token").tolist() == [[[0, 0], [1, 1], [2, 2]]]
    assert router.places(experts, 2, "choice").tolist() == [[[0, 1], [0, 2], [1, 2]]]


@pytest.mark.rows("M3")
@pytest.mark.parametrize("over", ["row", "batch"])
def test_padding_takes_no_place(over):
    mixer = made(Moe, eval_capacity_factor=0.5, capacity_over=over)
    x = random(1, 6, D)
    valid = torch.arange(9)[None] < 6
    padded, aux = mixer(F.pad(x, (0, 0, 0, 3), value=3.0), context(1, 9, valid=valid))
    whole, wanted = mixer(x, context(1, 6))
    torch.testing.assert_close(padded[:, :6], whole, rtol=0, atol=1e-12)
    assert int(aux["moe.dropped.0"]) == int(wanted["moe.dropped.0"]) > 0
    assert torch.equal(aux["moe.load.0"], wanted["moe.load.0"])


# ---------------------------------------------------------------------------------------------- balance


@pytest.mark.rows("M4")
def test_balance_losses_and_the_squared_counts_of_the_notes():
    """sum c_e^2 is what one would punish and has no gradient; sum m_e c_e has one, through m_e alone."""
    logits = random(2, 6, E).requires_grad_()
    ctx, k = context(), 2
    n, scores = 12, logits.softmax(-1)
    losses = {}
    for balance in ("sum", "switch", "sequence"):
        mixer = made(Moe, balance=balance, balance_weight=0.5)
        aux = mixer.assign(logits, ctx)[1]
        losses[balance] = aux["loss.balance"]
        count = aux["moe.load.0"]
        assert not count.square().sum().requires_grad and int(count.sum()) == n * k
    m = scores.sum((0, 1))
    torch.testing.assert_close(losses["sum"], 0.5 * (m * count).sum() / n)
    torch.testing.assert_close(losses["switch"], E * losses["sum"])
    held = torch.autograd.grad(losses["sum"], logits, retain_graph=True)[0]
    through_m = torch.autograd.grad(0.5 * (m * count.detach()).sum() / n, logits, retain_graph=True)[0]
    torch.testing.assert_close(held, through_m)
    assert held.abs().max() > 0
    by_row = 0.0  # equations 17 to 20, one row after the other
    for b in range(2):
        chosen = scores[b].topk(k, -1).indices
        f = torch.stack([(chosen == e).sum() for e in range(E)]) * E / (k * 6)
        by_row = by_row + 6 * (f * scores[b].mean(0)).sum()
    torch.testing.assert_close(losses["sequence"], 0.5 * by_row)


@pytest.mark.rows("M4")
def test_an_even_load_has_the_least_loss():
    """Tokens that are spread evenly cost one a token in the forms of Switch and DeepSeek-V3, more otherwise."""
    even = torch.eye(E).repeat(3, 1)[None] * 50.0
    uneven = torch.eye(E)[:2].repeat(6, 1)[None] * 50.0
    for balance in ("switch", "sequence"):
        mixer = made(Moe, experts_per_token=1, balance=balance, balance_weight=1.0)
        a, b = (float(mixer.assign(logits, context(1, 12))[1]["loss.balance"]) / 12 for logits in (even, uneven))
        assert a == pytest.approx(1.0) and b == pytest.approx(2.0)


# ---------------------------------------------------------------------------------------- expert choice


@pytest.mark.parametrize("over", ["row", "batch"])
def test_experts_take_their_best_tokens_and_all_as_many(over):
    mixer = made(ExpertChoice, over=over, experts_per_token=2)
    x = random(2, 6, D)
    y, aux = mixer(x, context())
    rows = 1 if over == "batch" else 2
    each = -(-2 * (12 // rows) // E)
    assert aux["moe.load.0"].tolist() == [rows * each] * E
    scores = F.linear(x, mixer.router.weight).softmax(-1).view(rows, -1, E)
    gates = torch.zeros_like(scores)
    for r in range(rows):
        for e in range(E):
            for t in scores[r, :, e].argsort(descending=True)[:each]:
                gates[r, t, e] = scores[r, t, e]
    outputs = mixer.experts.every(x.flatten(0, 1))
    wanted = (outputs * gates.view(-1, E).T[..., None]).sum(0)
    torch.testing.assert_close(y.flatten(0, 1), wanted, rtol=0, atol=1e-12)
    assert int(aux["moe.dropped.0"]) == int((gates.view(-1, E).sum(-1) == 0).sum())


def test_a_causal_model_refuses_what_lets_later_tokens_decide():
    with pytest.raises(UnsupportedError, match=r"ExpertChoice .*reads ahead"):
        decoder({"kind": "expert_choice", "n_experts": E})
    with pytest.raises(UnsupportedError, match=r"Moe .*reads ahead"):
        decoder({"kind": "moe", "n_experts": E, "capacity_factor": 1.0, "first": "choice"})
    decoder({"kind": "expert_choice", "n_experts": E}, causal=False)
    decoder({"kind": "moe", "n_experts": E, "capacity_factor": 1.0, "first": "choice", "experts_per_token": 1})


def test_promises_follow_the_settings():
    assert made(Moe).capabilities.batch_independent
    limited = made(Moe, capacity_factor=1.0).capabilities
    assert not limited.batch_independent and limited.incremental and limited.packed and limited.causal
    assert made(Moe, capacity_factor=1.0, capacity_over="row").capabilities.batch_independent
    always = made(Moe, eval_capacity_factor=1.0).capabilities
    assert not always.incremental and not always.packed and not always.batch_independent
    assert not ExpertChoice.capabilities.causal and not ExpertChoice.capabilities.batch_independent


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"experts_per_token": 5}, "experts_per_token = 5 is above n_experts = 4"),
        ({"n_groups": 3}, "n_groups = 3 must divide n_experts = 4"),
        ({"n_groups": 2, "experts_per_token": 3}, "more than 1 groups of 2 have"),
        ({"n_groups": 4, "experts_per_token": 1, "group_score": "two_largest"}, "at least two experts"),
        ({"order": "top_first", "score": "sigmoid"}, "softmax over the chosen"),
        ({"shared_gate": True}, "need n_shared_experts"),
    ],
)
def test_impossible_settings_are_refused_in_words(values, told):
    with pytest.raises(ValidationError, match=told):
        Moe.Config(**{"n_experts": E, **values})


# -------------------------------------------------------------------------------------- grouped products


@pytest.mark.parametrize("ends", [[2, 2, 5, 7], [0, 0, 0, 0], [0, 8, 8, 8], [1, 3, 6, 8]])
def test_grouped_products_and_their_gradients_are_those_of_each_group(ends):
    x, weight = random(8, 3).requires_grad_(), random(4, 5, 3, seed=1).requires_grad_()
    at = torch.tensor(ends)
    assert torch.autograd.gradcheck(lambda x, w: grouped_product(x, w, at), (x, weight))
    y, start = grouped_product(x, weight, at), 0
    for group, end in enumerate(ends):
        torch.testing.assert_close(y[start:end], x[start:end] @ weight[group].T)
        start = end
    assert not y[start:].any()
    torch.library.opcheck(torch.ops.octavo.grouped_product, (x, weight, at, True), test_utils="test_schema")
    torch.library.opcheck(torch.ops.octavo.grouped_product, (x, weight, at, True), test_utils="test_faketensor")


def test_rows_are_taken_and_added_back():
    x, at = random(4, 3).requires_grad_(), torch.tensor([1, 1, 3, 0, 1])
    assert torch.equal(take_rows(x, at), x[at])
    rows = random(5, 3, seed=1).requires_grad_()
    wanted = torch.zeros(4, 3, dtype=torch.float64).index_add(0, at, rows)
    assert torch.equal(add_rows(rows, at, 4), wanted)
    assert torch.autograd.gradcheck(lambda x: take_rows(x, at), (x,))
    assert torch.autograd.gradcheck(lambda r: add_rows(r, at, 4), (rows,))


def test_experts_start_like_other_products_of_their_role():
    wide = Moe(Moe.Config(n_experts=16, d_ff=64), Dims(64, 8, 16))
    initialise(wide, InitConfig(std=0.02), 8, torch.Generator().manual_seed(0))
    stds = {name: float(p.detach().std()) for name, p in wide.named_parameters()}
    assert stds["experts.up.weight"] == pytest.approx(0.02, rel=0.02)
    assert stds["experts.down.weight"] == pytest.approx(0.02 / 4, rel=0.02)
    roles = {module.role for module in wide.modules() if isinstance(module, GroupedProjection)}
    assert roles == {"expert.gate", "expert.up", "expert.down"}


def test_muon_makes_each_experts_matrix_orthogonal_alone():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = GroupedProjection(3, 4, 6, "expert.up")

    one = Two()
    nn.init.normal_(one.up.weight, generator=torch.Generator().manual_seed(0))
    before, gradient = one.up.weight.detach().clone(), random(3, 6, 4).float()
    config = Muon.Config(lr=0.1, weight_decay=0.0, momentum=0.0)
    optimizer = Muon(config, one)
    assert [group.rule for group in optimizer.groups] == ["muon"]
    one.up.weight.grad.copy_(gradient)  # type: ignore[union-attr]
    optimizer.step(0.1)
    for e in range(3):
        step = -0.1 * 0.2 * 6**0.5 * orthogonalise(gradient[e][None])[0]
        torch.testing.assert_close(one.up.weight[e].detach(), before[e] + step, rtol=1e-4, atol=1e-5)
    assert Muon(config, made(Moe)).groups[0].rule == "adam", "the router is no such matrix"


def test_counted_operations_are_those_of_the_chosen_experts():
    """The law counts the plain form, which asks every expert; this is the form that is used."""
    for channel in ({"kind": "moe", "n_shared_experts": 1, "shared_gate": True}, {"kind": "moe", "gated": False}):
        model = decoder({**channel, "n_experts": E})
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(Inputs(torch.zeros(1, 8, dtype=torch.long)))
        assert counter.get_total_flops() == cost(model, 8).forward_flops
    plain = decoder({"kind": "moe", "n_experts": E, "backend": "plain"})
    assert cost(plain, 8).forward_flops > cost(decoder({"kind": "moe", "n_experts": E}), 8).forward_flops


def test_the_default_width_has_the_products_of_a_dense_layer():
    wide = Dims(384, 1, 16)
    glu = build(Decoder.Config.model_validate({"d_model": 384, "n_layers": 1, "vocab_size": 9})).mixers()["0.channel"]
    for k in (1, 2, 4):
        mixer = Moe(Moe.Config(n_experts=8, experts_per_token=k), wide)
        router_flops = 2 * 384 * 8
        assert mixer.flops(1, 1) - router_flops == pytest.approx(glu.flops(1, 1), rel=0.01)
    assert isinstance(mixer, Mixture)
