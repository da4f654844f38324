"""Rotary scalings by their formulas, the pairs they are about, and what a growing base asks of caches."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from octavo.errors import UnsupportedError
from octavo.infer.native import unsuitable
from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.nn.position import PositionDims
from octavo.nn.rope import RotaryPositions, critical_pairs, critical_table
from octavo.nn.rope_scaling import ROPE_SCALINGS, rope_frequencies, yarn_mscale

H, THETA, TRAINED = 16, 10000.0, 64


def scheme(**scaling) -> RotaryPositions:
    config = RotaryPositions.Config.model_validate({"theta": THETA, "scaling": scaling or None})
    return RotaryPositions(config, PositionDims(0, H, TRAINED))


def exact(base: float = THETA) -> torch.Tensor:
    return torch.tensor([base ** (-2 * i / H) for i in range(H // 2)], dtype=torch.float64)


def model(positions: dict, n_layers: int = 2, max_seq_len: int = 8, **mixer) -> Decoder:
    block = {"mixer": {"kind": "attention", "n_heads": 2, **mixer}}
    config = {"d_model": 16, "n_layers": n_layers, "vocab_size": 19, "max_seq_len": max_seq_len,
              "positions": positions, "blocks": {"block": block}}  # fmt: skip
    built = build(Decoder.Config.model_validate(config)).double().eval()
    randomise(built, 3)
    return built


def close(got: torch.Tensor, wanted: torch.Tensor, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=rtol, atol=0)


# -------------------------------------------------------------------------------------------- formulas


@pytest.mark.rows("R6")
def test_linear_divides_positions():
    x = torch.randn(1, 5, 2, H, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([[0, 4, 8, 40, 124]])
    torch.testing.assert_close(scheme(kind="linear", factor=4.0).rotation(at)(x), scheme().rotation(at // 4)(x))


@pytest.mark.rows("R7")
def test_trap_e6_ntk_raises_the_base_so_that_the_slowest_pair_is_interpolated_exactly():
    """E6: the notes write h(i) = (alpha b)^(-(i - 1) / H), a factor of two lost; alpha = s^(H / (H - 2)) is right.

    With it the fastest pair stays and the slowest is divided by s; with theirs every pair is wrong already for s = 1.
    """
    s = 4.0
    got = scheme(kind="ntk", factor=s).frequencies
    close(got, exact(THETA * s ** (H / (H - 2))))
    assert float(got[0]) == 1.0
    assert float(got[-1]) == pytest.approx(float(exact()[-1]) / s, rel=1e-6)
    noted = torch.tensor([THETA ** (-i / H) for i in range(H // 2)])
    assert torch.equal(scheme(kind="ntk", factor=1.0).frequencies, rope_frequencies(H, THETA))
    assert float((noted / got - 1).abs().max()) > 1


@pytest.mark.rows("R7")
def test_trap_e6_dynamic_ntk_is_not_the_simple_form():
    """E6: the notes have alpha = max(1, T / T_max); transformers has ((s T / T_max) - (s - 1))^(H / (H - 2)).

    Both are here, under two names; both are RoPE up to the trained length and differ beyond it.
    """
    lengths = torch.tensor([1, TRAINED, 2 * TRAINED, 5 * TRAINED])
    dynamic, simple = scheme(kind="dynamic", factor=2.0).scaling, scheme(kind="dynamic_simple").scaling
    got, plainer = dynamic.frequencies_for(lengths, H, THETA), simple.frequencies_for(lengths, H, THETA)
    for row, length in enumerate(lengths.tolist()):
        alpha = ((2.0 * max(length, TRAINED) / TRAINED) - 1.0) ** (H / (H - 2))
        close(got[row], exact(THETA * alpha))
        close(plainer[row], exact(THETA * max(1.0, length / TRAINED)))
    assert torch.equal(got[:2], plainer[:2])
    assert bool((got[2:, 1:] < plainer[2:, 1:]).all())


@pytest.mark.rows("R10")
def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    got = scheme(kind="yarn", factor=8.0, beta_fast=4.0, beta_slow=0.5).frequencies.double()
    plain = exact()
    turns = TRAINED * plain / (2 * math.pi)
    close(got[turns > 5], plain[turns > 5])
    close(got[turns < 0.2], plain[turns < 0.2] / 8)
    between = (turns < 4) & (turns > 0.5)
    assert bool(((got < plain) & (got > plain / 8))[between].all()) and bool(between.any())


@pytest.mark.rows("R10")
def test_yarn_magnitude():
    assert yarn_mscale(1.0) == 1.0
    assert yarn_mscale(40.0, 0.707) == pytest.approx(0.1 * 0.707 * math.log(40) + 1)
    assert scheme(kind="yarn", factor=40.0).scaling.magnitude == pytest.approx(0.1 * math.log(40) + 1)
    assert scheme(kind="yarn", factor=40.0, mscale=1.0, mscale_all_dim=1.0).scaling.magnitude == 1.0
    one = torch.zeros(1, 1, 1, H)
    one[..., 0] = 1
    told = scheme(kind="yarn", magnitude=1.5).rotation(torch.tensor([[0]]))(one)
    assert float(told[0, 0, 0, 0]) == pytest.approx(1.5)


@pytest.mark.rows("R10")
def test_llama3_has_three_zones():
    got = scheme(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0).frequencies
    for value, plain in zip(got.tolist(), exact().tolist(), strict=True):
        turns = TRAINED / (2 * math.pi / plain)
        keep = 1.0 if turns > 4 else 0.0 if turns < 1 else (turns - 1) / 3
        assert value == pytest.approx((1 - keep) * plain / 8 + keep * plain, rel=1e-6)


@pytest.mark.rows("R9")
def test_trap_e7_truncation_keeps_the_fast_pairs_and_stops_the_slow_ones():
    """E7: the notes' labels are reversed: their 'smaller bases are kept, larger ones set to zero' is the wrong way."""
    got = scheme(kind="truncation", keep=0.2, zero=0.001, middle=0.0005).frequencies
    plain = rope_frequencies(H, THETA)  # 1, 0.316, 0.1, 0.0316, 0.01, 0.00316, 0.001, 0.000316
    assert torch.equal(got[:2], plain[:2])  # fast: kept
    assert got[2:6].tolist() == pytest.approx([0.0005] * 4)
    assert got[6:].tolist() == [0.0, 0.0]  # slow: they do not turn at all


@pytest.mark.rows("R9")
def test_truncation_by_the_trained_length():
    """By default what came around in the training is kept; the edges belong to the outer zones."""
    c = 2 * math.pi / TRAINED
    got, plain = scheme(kind="truncation").frequencies, rope_frequencies(H, THETA)
    for value, was in zip(got.tolist(), plain.tolist(), strict=True):
        assert value == pytest.approx(was if was >= c else 0.0 if was <= c / 4 else c / 16)
    edge = float(plain[3])
    assert float(scheme(kind="truncation", keep=edge, zero=0.0).frequencies[3]) == pytest.approx(edge)
    assert float(scheme(kind="truncation", keep=1.0, zero=edge).frequencies[3]) == 0.0


@pytest.mark.rows("R9")
def test_the_critical_pairs_are_listed():
    frequencies = rope_frequencies(H, THETA)
    found = critical_pairs(frequencies, TRAINED)
    assert [p.pair for p in found] == [i for i in range(H // 2) if 2 * math.pi * THETA ** (2 * i / H) > TRAINED]
    assert found[0].pair == 3 and found[0].wavelength == pytest.approx(2 * math.pi * THETA ** (6 / H), rel=1e-6)
    assert found[0].turns == pytest.approx(TRAINED / found[0].wavelength)
    text = critical_table(frequencies, TRAINED)
    assert text.splitlines()[0] == "5 of 8 pairs turn less than once in 64 tokens"
    assert text.splitlines()[2].split() == ["3", "3.1623e-02", "198.7", "0.322"]
    assert len(text.splitlines()) == 2 + 5
    assert critical_pairs(scheme(kind="truncation").frequencies, TRAINED)[-1].wavelength == math.inf
    assert critical_table(frequencies[:1], TRAINED) == "0 of 1 pairs turn less than once in 64 tokens"


# ---------------------------------------------------------------------------------------- growing bases


@pytest.mark.rows("R7")
@pytest.mark.parametrize("kind", ["dynamic", "dynamic_simple"])
@torch.no_grad()
def test_within_the_trained_length_a_growing_base_is_rope(kind):
    growing, plain = model({"kind": "rope", "scaling": kind}), model({"kind": "rope"})
    tokens = torch.randint(19, (2, 20), generator=torch.Generator().manual_seed(0))
    a, b = growing(Inputs(tokens)).logits, plain(Inputs(tokens)).logits
    torch.testing.assert_close(a[:, :8], b[:, :8], rtol=0, atol=1e-5)  # float32 tables there, exact ones here
    assert float((a[:, 8:] - b[:, 8:]).abs().amax((0, 2)).min()) > 1e-4


@pytest.mark.rows("R7")
@torch.no_grad()
def test_the_cache_stays_true_while_the_base_grows():
    """Token by token, rows of different lengths in one batch, keys of every base in one cache: as read at once."""
    dynamic = model({"kind": "rope", "scaling": {"kind": "dynamic", "factor": 3.0}}, n_kv_heads=1)
    tokens = torch.randint(19, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted = [dynamic(Inputs(row[None])).logits[0] for row in (tokens[0], tokens[1, 5:])]
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[1, :5] = False
    state = dynamic.new_state(2, 24)
    parts = [
        dynamic(Inputs(t, valid=v), state=state).logits
        for t, v in zip(tokens.split([6, 1, 1, 5, 1, 10], 1), valid.split([6, 1, 1, 5, 1, 10], 1), strict=True)
    ]
    got = torch.cat(parts, 1)
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(got[1, 5:], wanted[1], rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_maps_of_a_growing_base_are_those_it_reads_by():
    dynamic = model({"kind": "rope", "scaling": "dynamic"}, n_layers=1)
    tokens = torch.randint(19, (2, 20), generator=torch.Generator().manual_seed(0))
    maps = dynamic(Inputs(tokens), needs=("attention",)).attention[0]
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 20, dtype=torch.float64))
    assert torch.equal(maps.triu(1), torch.zeros_like(maps))
    alone = dynamic(Inputs(tokens[:, :13]), needs=("attention",)).attention[0]
    torch.testing.assert_close(maps[:, :, :13, :13], alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_parts_of_any_size_give_the_same(monkeypatch):
    """How many turned keys are held at once is no part of the mathematics."""
    from octavo.nn import reader_raw

    dynamic = model({"kind": "rope", "scaling": "dynamic"})
    tokens = torch.randint(19, (2, 20), generator=torch.Generator().manual_seed(0))
    wanted = dynamic(Inputs(tokens)).logits
    monkeypatch.setattr(reader_raw, "NUMBERS", 1)
    torch.testing.assert_close(dynamic(Inputs(tokens)).logits, wanted, rtol=0, atol=1e-12)


def test_a_layer_that_would_keep_turned_keys_is_refused():
    dynamic = model({"kind": "rope", "scaling": "dynamic"}, reader={"kind": "rerope", "window": 4})
    with pytest.raises(UnsupportedError, match="other frequencies for each query"):
        dynamic(Inputs(torch.zeros(1, 4, dtype=torch.long)))


def test_the_native_step_declines_a_growing_base():
    dynamic = model({"kind": "rope", "scaling": "dynamic"}).float()
    assert unsuitable(dynamic) == "a rotation that depends on the length of the text"


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"kind": "linear", "factor": 0.5}, "greater than or equal to 1"),
        ({"kind": "yarn", "beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast = 1.0 must not be below beta_slow = 2.0"),
        ({"kind": "llama3", "high_freq_factor": 1.0}, "high_freq_factor = 1.0 must exceed low_freq_factor = 1.0"),
        ({"kind": "truncation", "keep": 0.1, "zero": 0.2}, "must be below keep = 0.1"),
        ({"kind": "dynamic", "original": 1}, "greater than or equal to 2"),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(scaling, said):
    with pytest.raises(ValidationError, match=said):
        RotaryPositions.Config.model_validate({"scaling": scaling})


@pytest.mark.parametrize("kind", ["ntk", "dynamic"])
def test_one_pair_has_no_ntk(kind):
    with pytest.raises(ValueError, match="two pairs of channels or more"):
        model({"kind": "rope", "scaling": kind}, head_dim=2)


def test_every_scaling_says_its_name():
    for kind, cls in ROPE_SCALINGS.items():
        assert cls.Config.model_fields["kind"].default == kind
        assert cls.by_length == (kind in ("dynamic", "dynamic_simple"))
