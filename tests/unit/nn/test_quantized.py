"""Quantised products: codes there and back, bounds of the error, number formats that stay, 8-bit floats as torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from octavo.errors import UnsupportedError
from octavo.nn.projection import GroupedProjection, Projection
from octavo.nn.quantized import (
    Float8Projection,
    Float8Weights,
    IntegerWeights,
    QuantizedGroupedProjection,
    QuantizedProjection,
    empty_for,
    float8_activations,
    integer_scales,
    packed,
    to_codes,
    to_float8,
    unpacked,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def filled(weight: torch.Tensor, bits, group: int, activations="model") -> QuantizedProjection:
    made = QuantizedProjection(weight.shape[1], weight.shape[0], "q", bits, group, activations=activations)
    made.scales = integer_scales(weight, group, bits)
    made.codes = packed(to_codes(weight, made.scales, bits), bits)
    return made


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [6, 7])
def test_codes_are_packed_and_unpacked(bits, width):
    codes = torch.randint(0, 1 << bits, (3, width), dtype=torch.uint8)
    stored = packed(codes, bits)
    assert torch.equal(unpacked(stored, width, bits), codes)
    assert stored.shape[1] == (width if bits == 8 else (width + 1) // 2)


def test_the_low_nibble_is_the_first_code():
    assert packed(torch.tensor([[3, 12]], dtype=torch.uint8), 4).tolist() == [[3 + 16 * 12]]


def test_the_weight_is_codes_minus_zero_times_scales_by_hand():
    made = QuantizedProjection(4, 1, "q", 4, 2)
    made.codes = packed(torch.tensor([[0, 15, 8, 9]], dtype=torch.uint8), 4)
    made.scales = torch.tensor([[0.5, -2.0]], dtype=torch.float16)
    assert made.weight.tolist() == [[-4.0, 3.5, 0.0, -2.0]]


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (8, 96), (4, 32), (4, 96)])
def test_no_weight_is_further_off_than_a_step_allows(bits, group):
    """Half a step for 8 bits; for 4 a whole one, where the far side of the largest magnitude has no code 8."""
    weight = torch.randn(40, 96)
    made = filled(weight, bits, group)
    steps = made.scales.float().abs().repeat_interleave(group, -1)
    away = (made.weight - weight).abs() / steps
    assert away.max() <= (0.51 if bits == 8 else 1.01)
    within = (weight / made.scales.float().repeat_interleave(group, -1)).abs() <= 7.5
    assert away[within].max() <= 0.51


def test_four_bits_put_the_largest_magnitude_on_minus_eight():
    made = filled(torch.tensor([[0.25, -0.5, 4.0, 1.0], [0.25, -4.0, 0.5, 1.0]]), 4, 4)
    assert made.unpacked()[0, 2] == 0 and made.unpacked()[1, 1] == 0
    assert made.scales[:, 0].tolist() == [-0.5, 0.5]


def test_a_row_of_nothing_stays_nothing():
    for bits in (4, 8):
        assert not filled(torch.zeros(2, 32), bits, 32).weight.any()


def test_the_product_is_that_of_the_weight_and_leaves_the_dtype():
    made = filled(torch.randn(12, 64), 4, 32)
    x = torch.randn(2, 3, 64)
    assert torch.equal(made(x), F.linear(x, made.weight))
    assert made(x.bfloat16()).dtype == torch.bfloat16
    assert made(x.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_model_leaves_codes_and_scales(dtype):
    made, weight = filled(torch.randn(12, 64), 8, 32), torch.randn(30, 40)
    before = made.dequantised()
    made.to(dtype)
    assert (made.scales.dtype, made.codes.dtype, made.weight.dtype) == (torch.float16, torch.uint8, dtype)
    assert torch.equal(made.dequantised(), before)
    small = Float8Projection(40, 30, "q", Float8Weights())
    small.codes, small.scales = to_float8(weight, "e4m3", None)
    before = small.dequantised()
    small.to(dtype)
    assert (small.scales.dtype, small.codes.dtype) == (torch.float32, torch.float8_e4m3fn)
    assert torch.equal(small.dequantised(), before)


def test_int8_activations_are_the_integer_product():
    weight, x = torch.randn(24, 48), torch.randn(5, 48) * torch.tensor([0.01, 1, 3, 100, 0])[:, None]
    made = filled(weight, 8, 48, activations="int8")
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    whole = (x / scale).round().to(torch.int64) @ (made.unpacked().to(torch.int64) - 128).T
    expected = whole.double() * scale.double() * made.scales.double().T
    torch.testing.assert_close(made(x).double(), expected, rtol=1e-5, atol=1e-7)
    exact = F.linear(x, weight)
    assert (made(x) - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize(("format", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_float8_is_the_cast_of_torch(format, dtype):
    weight = torch.randn(50, 70)
    codes, scales = to_float8(weight, format, None)
    scale = weight.abs().max() / torch.finfo(dtype).max
    assert torch.equal(codes.view(torch.uint8), (weight / scale).to(dtype).view(torch.uint8))
    assert scales.item() == scale


def test_each_block_of_float8_has_its_own_scale():
    weight = torch.randn(200, 300)
    weight[:128, :128] *= 1000
    made = Float8Projection(300, 200, "q", Float8Weights(block=128))
    made.codes, made.scales = to_float8(weight, "e4m3", 128)
    assert made.scales.shape == (2, 3)
    largest = weight[128:, 256:].abs().max()
    assert made.scales[1, 2] == largest / 448
    assert ((made.weight - weight).abs() <= weight.abs() / 16 + made.scales.max() * 2**-9).all()
    alone = to_float8(weight[128:, 256:], "e4m3", None)[0]
    assert torch.equal(made.codes[128:, 256:].float(), alone.float())


def test_float8_activations_have_a_scale_for_each_128_inputs():
    x = torch.randn(3, 200)
    x[:, :128] *= 1e4
    rounded = float8_activations(x, "e4m3", 128)
    alone = float8_activations(x[:, 128:], "e4m3", None)
    assert torch.equal(rounded[:, 128:], alone)
    assert ((rounded - x).abs() <= x.abs() / 16 + 1e-9 + x.abs().amax() * 2**-18).all()


def test_a_group_that_does_not_divide_the_inputs_is_halved():
    assert [IntegerWeights(group=128).group_of(width) for width in (256, 576, 48, 40, 7)] == [128, 64, 16, 40, 7]
    assert IntegerWeights(group=None).group_of(576) == 576


@pytest.mark.parametrize("storage", [IntegerWeights(bits=4, group=32), Float8Weights(block=128, activations="float8")])
def test_experts_read_what_each_would_alone(storage):
    made = empty_for(GroupedProjection(3, 64, 20, "expert.up"), storage)
    assert isinstance(made, QuantizedGroupedProjection)
    weight, x = torch.randn(3, 20, 64), torch.randn(9, 64)
    singles = []
    for g in range(3):
        single = empty_for(Projection(64, 20, "up"), storage)
        if isinstance(storage, IntegerWeights):
            single.scales = integer_scales(weight[g], 32, 4)
            single.codes = packed(to_codes(weight[g], single.scales, 4), 4)
        else:
            single.codes, single.scales = to_float8(weight[g], storage.format, storage.block)
        singles.append(single)
    made.codes = torch.stack([single.codes for single in singles])
    made.scales = torch.stack([single.scales for single in singles])
    y = made(x, torch.tensor([2, 2, 9]))
    torch.testing.assert_close(y, torch.cat([singles[0](x[:2]), singles[2](x[2:])]))
    torch.testing.assert_close(made.every(x)[1], singles[1](x))


def test_quantised_weights_are_not_trained():
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        torch.nn.Sequential(QuantizedProjection(32, 4, "q", 8, 32)).train()
