"""Small weights in the native step: what they cost, against the model in fp32 whose weights are what the codes say."""

from __future__ import annotations

import copy

import pytest
import torch
from test_native import SHAPES, model
from test_native_rows import Pages

from octavo.infer.native import NativeModel, library, load, unsuitable
from octavo.infer.packing import rounded
from octavo.models.decoder import Decoder
from octavo.nn.contracts import Inputs
from octavo.nn.projection import Projection
from octavo.nn.quantized import ZERO, IntegerWeights, QuantizedProjection, empty_for, from_codes, put, to_codes

TEXT = [int(i) for i in torch.randint(53, (30,), generator=torch.Generator().manual_seed(1))]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    if library()[0] is None:
        pytest.skip(library()[1])


def dequantised(one: Decoder, weights: str, group: int = 64) -> Decoder:
    """The model whose products have the values that ``weights`` rounds theirs to, in fp32."""
    made = copy.deepcopy(one).float()
    if made.head is None:  # the embedding's rows are read as they are, its product is rounded
        made.head = Projection(made.embed.d, made.embed.n, "head", bias=made.head_bias is not None)
        made.head.weight.data, made.head.bias = made.embed.weight.data.clone(), made.head_bias
    for module in made.modules():
        if isinstance(module, Projection):
            weight = module.weight.data
            if weights == "bf16":
                module.weight.data = weight.bfloat16().float()
                continue
            codes, _, bits, scales, _ = rounded(weight, int(weights[3:]), group)
            padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % group), value=ZERO[bits])
            module.weight.data = from_codes(padded, scales, bits)[:, : weight.shape[1]]
    return made


def away(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).norm() / true.norm())


@torch.inference_mode()
def logits(one: Decoder) -> torch.Tensor:
    return one(Inputs(torch.tensor([TEXT]))).logits[0]


def native(made: NativeModel) -> torch.Tensor:
    return Pages(made, torch.float32, shuffled=True).step([(0, i, token) for i, token in enumerate(TEXT)])


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize(("weights", "most"), [("bf16", 2e-6), ("int8", 3e-4), ("int4", 3e-4)])
@pytest.mark.parametrize("shape", ["llama", "odd widths", "qwen2", "qwen3", "untied", "mlp", "tied with bias"])
def test_only_the_weights_are_rounded(shape, weights, most, emulated):
    loaded = load(emulated=emulated)
    if weights == "bf16" and loaded.decode_fp16():
        pytest.skip("rows are rounded too: test_fp16_arithmetic_loses_a_quarter_of_what_bf16_does")
    one = model(**SHAPES[shape])
    found, judge = native(NativeModel(one, weights, library=loaded)), logits(dequantised(one, weights))
    assert away(found, judge) < most
    assert away(judge, logits(one)) > 3 * away(found, judge)  # what the rounding of the weights alone does


@pytest.fixture
def _fp16():
    if not load().decode_fp16():
        pytest.skip("the processor has no fp16 arithmetic")


@pytest.mark.usefixtures("_fp16")
@pytest.mark.parametrize("shape", ["llama", "odd widths", "qwen2", "qwen3", "untied", "mlp", "tied with bias"])
def test_fp16_arithmetic_loses_a_quarter_of_what_bf16_does(shape):
    one = model(**SHAPES[shape])
    judge, lost = (
        logits(dequantised(one, "bf16")),
        away(native(NativeModel(one, "bf16")), logits(dequantised(one, "bf16"))),
    )
    assert 1e-4 < lost < 0.3 * away(logits(copy.deepcopy(one).bfloat16()).float(), judge)
    assert lost < away(judge, logits(one))  # less than the rounding of the weights


@pytest.mark.usefixtures("_fp16")
@pytest.mark.parametrize("times", [2.0**-40, 2.0**40])
def test_what_fp16_could_not_hold_is_scaled(times):
    """Rows times so much, and weights divided by it: the same numbers come out."""
    one = model(**SHAPES["llama"])
    other = copy.deepcopy(one)
    for block in other.stack():
        for part in dict(block.sub_layers()).values():
            part.norm_in.weight.data *= times
        layer, channel = (dict(block.sub_layers())[name].mixer for name in ("mixer", "channel"))
        for product in (layer.q, layer.k, layer.v, channel.gate, channel.up):
            product.weight.data /= times
    assert torch.equal(native(NativeModel(other, "bf16")), native(NativeModel(one, "bf16")))


@pytest.mark.usefixtures("_fp16")
def test_a_channel_far_larger_than_all_others_takes_nothing_from_them():
    one = model(**SHAPES["llama"])
    for block in one.stack():
        channel = dict(block.sub_layers())["channel"].mixer
        channel.up.weight.data[3] *= 4096
        channel.down.weight.data[:, 3] /= 4096
    assert away(native(NativeModel(one, "bf16")), logits(dequantised(one, "bf16"))) < 5e-3


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_groups_of_other_sizes(weights, group):
    one = model(d_model=192)
    found = native(NativeModel(one, weights, group=group))
    assert away(found, logits(dequantised(one, weights, group))) < 6e-4


@pytest.mark.parametrize("emulated", [False, True])
def test_scales_below_the_smallest_normal_number_of_16_bits(emulated):
    one = model()
    for block in one.stack():
        for _, part in block.sub_layers():
            for module in part.modules():
                if isinstance(module, Projection) and module.role in ("o", "down"):
                    module.weight.data *= 1e-3
    _, _, _, scales, _ = rounded(dict(one.stack()[0].sub_layers())["mixer"].mixer.o.weight.data, 8, 64)
    assert float(scales.float().abs().max()) < torch.finfo(torch.float16).tiny
    made = NativeModel(one, "int8", library=load(emulated=True) if emulated else None)
    assert away(native(made), logits(dequantised(one, "int8"))) < 3e-4


def test_codes_to_nearest_are_half_a_step_away_at_most():
    weight = torch.randn(5, 100)
    weight[0, :32] = 0
    for bits in (8, 4):
        codes, _, _, scales, _ = rounded(weight, bits, 32)
        assert codes.shape == weight.shape and scales.shape == (5, 4)
        padded = torch.nn.functional.pad(codes, (0, 28), value=ZERO[bits])
        steps = scales.float().abs().repeat_interleave(32, 1)[:, :100]
        off = (from_codes(padded, scales, bits)[:, :100] - weight).abs()
        assert bool((off <= 0.502 * steps + (steps if bits == 4 else 0) * (codes == 15)).all())
        assert int(codes.max()) <= 255 and int(codes.min()) >= (1 if bits == 8 else 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_is_read_code_by_code(bits):
    one = model()
    for name, module in list(one.named_modules()):
        if isinstance(module, Projection):
            made = empty_for(module, IntegerWeights(bits=bits, group=32))
            assert isinstance(made, QuantizedProjection)
            weight = module.weight.data
            scales = (weight.unflatten(1, (-1, made.group)).abs().amax(-1) / (127 if bits == 8 else 7)).half()
            codes = to_codes(weight, scales.float(), bits)
            made.scales.copy_(scales)
            made.codes.copy_(codes if bits == 8 else codes[:, ::2] | (codes[:, 1::2] << 4))
            put(one, name, made)
    assert unsuitable(one) == ""
    assert away(native(NativeModel(one)), logits(one)) < 3e-4
    assert torch.equal(native(NativeModel(one, "bf16"))[0], native(NativeModel(one, "bf16"))[0])


@pytest.mark.parametrize(
    ("shape", "name", "storage", "why"),
    [
        ("llama", "mixer.mixer.o", {"bits": 4}, ""),
        ("llama", "mixer.mixer.k", {"bits": 8}, "weights of several kinds"),
        ("llama", "channel.mixer.down", {"activations": "int8"}, "activations rounded to 8 bits"),
        ("odd widths", "mixer.mixer.o", {"bits": 8}, "one scale for 56 inputs"),
    ],
)
def test_quantised_products_that_are_not_served_are_named(shape, name, storage, why):
    one = model(**SHAPES[shape])
    product = one.get_submodule(f"blocks.1.layers.{name}")
    assert isinstance(product, Projection)
    put(one, f"blocks.1.layers.{name}", empty_for(product, IntegerWeights(**storage)))
    assert unsuitable(one) == why


def test_settings_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="weights int3 in groups of 64"):
        NativeModel(model(), "int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups of 48"):
        NativeModel(model(), "int8", group=48)
