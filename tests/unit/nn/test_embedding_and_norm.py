"""Look-ups and their gradients; the worked example of the notes; how roles start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.nn.norm import LayerNorm, NoNorm, RMSNorm
from octavo.nn.projection import Embedding, InitConfig, Projection, initialise
from octavo.training.optimizers import OPTIMIZERS


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def table(n: int = 7, d: int = 4) -> Embedding:
    embedding = Embedding(n, d, "embed").double()
    embedding.weight.data = torch.randn(n, d, dtype=torch.float64)
    return embedding


@pytest.mark.rows("T7")
def test_a_look_up_is_a_product_with_one_hot_rows():
    """E13: the id is a row number, not a binary code."""
    embedding, ids = table(), torch.tensor([[2, 0, 2], [6, 1, 2]])
    one_hot = F.one_hot(ids, 7).double()
    assert torch.equal(embedding(ids), one_hot @ embedding.weight)
    assert one_hot[0, 0].tolist() == [0, 0, 1, 0, 0, 0, 0]


@pytest.mark.rows("T7")
def test_only_used_rows_get_a_gradient_and_repeats_add_up():
    embedding, ids = table(), torch.tensor([[2, 0, 2]])
    scale = torch.randn(1, 3, 4, dtype=torch.float64)
    (embedding(ids) * scale).sum().backward()
    gradient = embedding.weight.grad
    assert (gradient[[1, 3, 4, 5, 6]] == 0).all()
    torch.testing.assert_close(gradient[2], scale[0, 0] + scale[0, 2])
    torch.testing.assert_close(gradient[0], scale[0, 1])


@pytest.mark.rows("T7")
@pytest.mark.parametrize(
    ("tied", "decay", "moves"), [(False, 0.0, False), (True, 0.0, True), (False, 0.1, True)], ids=str
)
def test_an_unused_row_stays_only_untied_and_without_decay(tied, decay, moves):
    """E22: the note says that only used rows are updated; a tied head or weight decay moves all of them."""
    block = {"mixer": {"kind": "attention", "n_heads": 2}}
    config = {"d_model": 8, "n_layers": 1, "vocab_size": 9, "max_seq_len": 8, "tie_embeddings": tied,
              "blocks": {"block": block}}  # fmt: skip
    model = build(Decoder.Config.model_validate(config))
    kind = OPTIMIZERS["sgd"]
    optimizer = kind(kind.Config(lr=0.1, weight_decay=decay, no_decay_roles=()), model)
    before = model.embed.weight.detach().clone()
    tokens = torch.tensor([[1, 2, 3, 1]])
    F.cross_entropy(model(Inputs(tokens)).logits.flatten(0, 1), tokens.flatten()).backward()
    optimizer.gather()
    optimizer.step(0.1)
    unused = [0, 4, 5, 6, 7, 8]
    assert torch.equal(model.embed.weight[unused], before[unused]) is not moves
    assert not torch.equal(model.embed.weight[1], before[1])


@pytest.mark.rows("X3")
def test_the_padding_row_gets_exactly_no_gradient():
    block = {"mixer": {"kind": "attention", "n_heads": 2}}
    config = {"d_model": 8, "n_layers": 1, "vocab_size": 9, "max_seq_len": 8, "padding_id": 4,
              "tie_embeddings": False, "blocks": {"block": block}}  # fmt: skip
    model = build(Decoder.Config.model_validate(config))
    assert (model.embed.weight[4] == 0).all()  # it starts at zero, as in transformers
    tokens = torch.tensor([[1, 4, 4, 2], [4, 4, 3, 3]])
    model(Inputs(tokens)).logits.square().sum().backward()
    assert (model.embed.weight.grad[4] == 0).all()
    assert (model.embed.weight.grad[[1, 2, 3]] != 0).any(-1).all()


# ------------------------------------------------------------------------------------------------- norms


@pytest.mark.rows("F4")
def test_the_worked_example_is_a_mean_over_the_last_axis():
    """E3: the notes average all 12 elements (7.36) and put w^2 inside; each row has its own root mean square."""
    x = torch.arange(1.0, 13.0).view(3, 4)
    norm = RMSNorm(RMSNorm.Config(eps=1e-6), 4)
    rms = (x / norm(x).detach())[:, 0]
    assert [round(float(value), 4) for value in rms] == [2.7386, 6.5955, 10.5594]
    assert float(x.square().mean().sqrt()) == pytest.approx(7.36, abs=0.005)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(norm(x), x / rms[:, None] * norm.weight)


@pytest.mark.rows("F4")
def test_layer_norm_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    norm = LayerNorm(LayerNorm.Config(eps=0.0), 4)
    norm.bias.data += 0.5
    torch.testing.assert_close(norm(x), (x - 3) / 3.5**0.5 + 0.5)
    without = LayerNorm(LayerNorm.Config(eps=0.0, bias=False), 4)
    assert without.bias is None
    torch.testing.assert_close(without(x), (x - 3) / 3.5**0.5)
    assert torch.equal(NoNorm(NoNorm.Config(), 4)(x), x)


@pytest.mark.rows("F4")
def test_an_offset_norm_scales_by_one_plus_its_weight_and_starts_at_zero():
    x, norm = torch.randn(3, 4), RMSNorm(RMSNorm.Config(offset=True), 4)
    plain = RMSNorm(RMSNorm.Config(), 4)
    assert torch.equal(norm.weight, torch.zeros(4))
    torch.testing.assert_close(norm(x), plain(x), rtol=0, atol=0)
    norm.weight.data = torch.tensor([0.5, -1.0, 2.0, 0.0])
    plain.weight.data = 1 + norm.weight.data
    torch.testing.assert_close(norm(x), plain(x), rtol=0, atol=1e-7)
    norm.reset()
    plain.reset()
    assert torch.equal(1 + norm.weight, plain.weight)


@pytest.mark.rows("F4")
def test_an_offset_norm_rounds_once_at_the_end():
    """In bf16, 1 + w and x * (1 + w) are not rounded on the way: w = 1/512 would vanish in 1 + w."""
    x = torch.randn(5, 64).bfloat16()
    norm = RMSNorm(RMSNorm.Config(offset=True), 64).bfloat16()
    norm.weight.data.fill_(1 / 512)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + 1 / 512)
    torch.testing.assert_close(norm(x), exact.bfloat16(), rtol=0, atol=0)


def test_reductions_are_done_in_full_precision():
    """In bf16 a mean of squares over 4096 channels would stop growing; the norm must not see that."""
    x = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)
    norm = RMSNorm(RMSNorm.Config(), 4096).bfloat16()
    assert torch.equal(norm(x), torch.ones_like(x))


# --------------------------------------------------------------------------------------- initialisation


def test_weights_start_by_role():
    model = torch.nn.ModuleList(
        [Projection(400, 300, "q", bias=True), Projection(400, 300, "o"), Embedding(500, 100, "embed"),
         LayerNorm(LayerNorm.Config(), 8)]
    )  # fmt: skip
    with torch.no_grad():
        model[3].weight.fill_(7.0)
    model.requires_grad_(False)
    initialise(model, InitConfig(std=0.02), n_layers=8, generator=torch.Generator().manual_seed(0))
    assert float(model[0].weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(model[1].weight.std()) == pytest.approx(0.02 / 4, rel=0.02)  # sqrt(2 * 8)
    assert float(model[2].weight.std()) == pytest.approx(0.02, rel=0.02)
    assert (model[0].bias == 0).all()
    assert (model[3].weight == 1).all()
    initialise(model, InitConfig(std=0.5, scale_residual=False), n_layers=8)
    assert float(model[1].weight.std()) == pytest.approx(0.5, rel=0.02)


def test_a_norm_without_weight_scales_nothing():
    x, norm = torch.randn(3, 8), RMSNorm(RMSNorm.Config(weight=False, eps=0), 8)
    assert not list(norm.parameters()) and norm.predicted_parameters() == 0
    assert torch.allclose(norm(x).square().mean(-1), torch.ones(3))
    assert torch.equal(norm(x), RMSNorm(RMSNorm.Config(eps=0), 8)(x))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValidationError, match="no w without weight"):
        RMSNorm.Config(weight=False, offset=True)


@pytest.mark.parametrize(
    ("norm", "start"),
    [
        (LayerNorm(LayerNorm.Config(), 4), {"weight": 1.0, "bias": 0.0}),
        (RMSNorm(RMSNorm.Config(), 4), {"weight": 1.0}),
        (RMSNorm(RMSNorm.Config(offset=True), 4), {"weight": 0.0}),
    ],
    ids=["layernorm", "rmsnorm", "rmsnorm offset"],
)
def test_reset_goes_back_to_the_start(norm, start):
    """What a model made without storage relies on: nothing of what the memory held before is left."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.fill_(7.0)
    norm.reset()
    assert {name: parameter.tolist() for name, parameter in norm.named_parameters()} == {
        name: [value] * 4 for name, value in start.items()
    }
