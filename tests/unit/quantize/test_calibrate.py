"""The moments that products are solved against: sums over what they read, behind the blocks as they have become."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.nn.projection import GroupedProjection, Projection
from octavo.quantize.calibrate import Moment, through_blocks


@pytest.fixture(scope="module")
def model() -> Decoder:
    attention = {"kind": "attention", "n_heads": 2}
    blocks = {
        "dense": {"mixer": attention, "channel": {"kind": "glu", "d_ff": 24}},
        "mixed": {"mixer": attention, "channel": {"kind": "moe", "n_experts": 4, "experts_per_token": 2, "d_ff": 12}},
    }
    config = {"d_model": 16, "n_layers": 4, "max_seq_len": 32, "vocab_size": 60, "tie_embeddings": False,
              "blocks": blocks, "pattern": ["dense", "mixed"], "init": {"std": 0.3}}  # fmt: skip
    return build(Decoder.Config.model_validate(config), seed=5).eval()


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randint(0, 60, (70, 32), generator=torch.Generator().manual_seed(1))


def named(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Projection | GroupedProjection)}


@torch.no_grad()
def read_by_all(model: Decoder, rows: Tensor) -> dict[str, Tensor]:
    """The moments of every product in plain forward passes of the whole model, a row at a time, in float64."""
    found: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, ends: Tensor | None) -> None:
        if ends is None:
            parts = [x.flatten(0, -2).double()]
        else:
            starts = [0, *ends.tolist()[:-1]]
            parts = [x[start:end].double() for start, end in zip(starts, ends.tolist(), strict=True)]
        H = torch.stack([part.T @ part for part in parts])
        found[name] = found.get(name, 0) + (H if ends is not None else H[0])

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0], (*args, None)[1]))
        for name, module in named(model).items()
    ]
    for row in rows:
        model(Inputs(row[None]))
    for handle in handles:
        handle.remove()
    return found


def test_moments_are_sums_over_what_each_product_reads(model, rows):
    rows = rows[:64]  # whole batches
    found: dict[str, Moment | None] = {}
    wanted = frozenset(named(model))
    through_blocks(model, rows, wanted, found.__setitem__)
    expected = read_by_all(model, rows)
    assert found.keys() == expected.keys() and "head" in found
    for name, moment in found.items():
        assert moment is not None
        torch.testing.assert_close(moment.H.double(), expected[name], rtol=1e-4, atol=1e-3)


def test_experts_have_moments_of_their_own(model, rows):
    found: dict[str, Moment | None] = {}
    name = next(name for name, module in named(model).items() if isinstance(module, GroupedProjection))
    through_blocks(model, rows[:64], frozenset({name}), found.__setitem__)
    moment = found[name]
    assert moment is not None and moment.H.shape[0] == 4
    assert len({round(float(H.trace()), 3) for H in moment.H}) == 4


def test_later_blocks_read_what_earlier_ones_have_become(rows):
    config = {"d_model": 16, "n_layers": 2, "max_seq_len": 32, "vocab_size": 60,
              "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 2}}}, "init": {"std": 0.3}}  # fmt: skip
    model = build(Decoder.Config.model_validate(config), seed=5).eval()
    found: dict[str, Moment | None] = {}

    def replace(name: str, moment: Moment | None) -> None:
        found[name] = moment
        if name.startswith("blocks.0"):
            module = model.get_submodule(name)
            assert isinstance(module, Projection)
            with torch.no_grad():
                module.weight.mul_(0.5)

    through_blocks(model, rows[:64], frozenset(named(model)), replace)
    expected = read_by_all(model, rows[:64])  # of the model as it is now
    for name in (name for name in found if name.startswith("blocks.1")):
        torch.testing.assert_close(found[name].H.double(), expected[name], rtol=1e-4, atol=1e-3)
