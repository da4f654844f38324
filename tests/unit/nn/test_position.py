"""Position schemes: the sum (learned, sinusoidal) and the turn (RoPE) are different components."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.errors import UnsupportedError
from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.nn.position import PositionDims, SinusoidalPositions, sinusoid
from octavo.nn.rope import RotaryPositions


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def model(positions: dict, max_seq_len: int = 8, **mixer):
    block = {"mixer": {"kind": "attention", "n_heads": 2, **mixer}}
    config = {"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": max_seq_len,
              "positions": positions, "blocks": {"block": block}}  # fmt: skip
    built = build(Decoder.Config.model_validate(config)).double().eval()
    randomise(built, 3)
    return built


def turn(positions: torch.Tensor, x: torch.Tensor, **values) -> torch.Tensor:
    scheme = RotaryPositions(RotaryPositions.Config(**values), PositionDims(0, x.shape[-1], 0))
    return scheme.rotation(positions)(x)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.rows("R1")
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_a_shift_is_one_linear_map(layout):
    """PE(t + k) = M_k PE(t) with an M_k that does not depend on t: found on some t, tested on others."""
    d, k = 8, 5
    table = sinusoid(torch.arange(200), d, layout).double()
    here, there = table[:-k], table[k:]
    solution = torch.linalg.lstsq(here[:100], there[:100]).solution
    torch.testing.assert_close(here[100:] @ solution, there[100:], rtol=0, atol=1e-4)
    expected = torch.zeros(d, d, dtype=torch.float64)
    steps = torch.arange(d // 2, dtype=torch.float64)
    spacing = 2 * steps / d if layout == "interleaved" else steps / (d // 2 - 1)
    for i, frequency in enumerate(10000**-spacing):
        s, c = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + d // 2)
        angle = float(frequency) * k
        expected[s, s] = expected[c, c] = math.cos(angle)
        expected[c, s], expected[s, c] = math.sin(angle), -math.sin(angle)
    torch.testing.assert_close(here @ expected, there, rtol=0, atol=1e-4)


@pytest.mark.rows("R1")
def test_the_two_layouts_are_different_tables():
    interleaved, half = (sinusoid(torch.arange(6), 8, layout) for layout in ("interleaved", "half"))
    torch.testing.assert_close(interleaved[:, 0], half[:, 0])
    torch.testing.assert_close(interleaved[:, 1], half[:, 4])
    assert not torch.allclose(interleaved[:, 2::2], half[:, 1:4])  # their wavelengths differ too


def test_trap_e4_adding_a_sinusoid_is_not_rope():
    """E4: the notes define the added sinusoid under the heading RoPE.

    Sinusoids are added before the first block, a rotation acts on queries and keys: two components.
    """
    x, positions = random(1, 4, 8), torch.arange(4)[None]
    added = SinusoidalPositions(SinusoidalPositions.Config(), PositionDims(8, 4, 16))
    turned = RotaryPositions(RotaryPositions.Config(), PositionDims(8, 4, 16))
    assert added.rotation(positions) is None
    torch.testing.assert_close(added.embed(x, positions) - x, sinusoid(positions, 8, "interleaved").double())
    assert torch.equal(turned.embed(x, positions), x)
    assert turned.rotation(positions) is not None


# -------------------------------------------------------------------------------------------------- RoPE


@pytest.mark.rows("R4")
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_the_distance_alone(layout):
    q, k = random(1, 1, 1, 8), random(1, 1, 1, 8, seed=1)

    def score(i: int, j: int) -> float:
        at = lambda t: torch.tensor([[t]])  # noqa: E731
        return float((turn(at(i), q, layout=layout) * turn(at(j), k, layout=layout)).sum())

    for distance in (0, 1, 7):
        values = [score(j + distance, j) for j in (0, 3, 11, 40)]
        assert max(values) - min(values) < 2e-5  # fp32 tables
    assert abs(score(5, 0) - score(0, 5)) > 1e-3  # and on its sign
    assert score(0, 0) == pytest.approx(float((q * k).sum()))


@pytest.mark.rows("R4")
def test_a_rotation_keeps_lengths_and_undoes_another():
    """R_i^T R_j = R_(j - i): shown on the basis."""
    basis = torch.eye(6, dtype=torch.float64)[None, None]
    matrix = lambda t: turn(torch.tensor([[t]]), basis)[0, 0].T  # noqa: E731
    torch.testing.assert_close(matrix(9).T @ matrix(4), matrix(-5), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix(9).T @ matrix(9), torch.eye(6).double(), rtol=0, atol=1e-6)
    assert float(matrix(1)[3, 0]) == pytest.approx(math.sin(1), abs=1e-6)  # turns by plus theta
    assert float(matrix(1)[0, 3]) == pytest.approx(-math.sin(1), abs=1e-6)


@pytest.mark.rows("R4")
def test_the_layouts_are_equal_up_to_a_permutation_of_channels():
    x, positions = random(2, 9, 3, 8), torch.arange(9)[None]
    order = torch.arange(8).view(2, 4).T.flatten()  # 0 4 1 5 2 6 3 7
    half, interleaved = turn(positions, x), turn(positions, x[..., order], layout="interleaved")
    torch.testing.assert_close(half[..., order], interleaved, rtol=0, atol=1e-12)


@pytest.mark.rows("R4")
def test_trap_e5_a_checkpoint_changes_layout_by_permuting_rows_of_q_and_k():
    """E5: the notes have mathematics of neighbouring pairs and code of half-split ones.

    Interleaved mathematics on weights of half-split code is another model, until q and k are permuted.
    """
    half, other = model({"kind": "rope"}), model({"kind": "rope", "layout": "interleaved"})
    tokens = torch.randint(19, (2, 8))
    wanted = half(Inputs(tokens)).logits
    assert not torch.allclose(other(Inputs(tokens)).logits, wanted, atol=1e-3)
    order = torch.arange(8).view(2, 4).T.flatten()
    with torch.no_grad():
        for block in other.blocks:
            mixer = block.layers["mixer"].mixer
            for p in (mixer.q, mixer.k):
                p.weight.copy_(p.weight.view(2, 8, 16)[:, order].reshape(16, 16))
    torch.testing.assert_close(other(Inputs(tokens)).logits, wanted, rtol=0, atol=1e-10)


@pytest.mark.rows("R4")
def test_tables_grow_past_max_seq_len():
    short, long = model({"kind": "rope"}, 8), model({"kind": "rope"}, 64)
    tokens = torch.randint(19, (1, 50))
    torch.testing.assert_close(short(Inputs(tokens)).logits, long(Inputs(tokens)).logits, rtol=0, atol=0)
    state = short.new_state(1, 50)
    parts = [short(Inputs(part), state=state).logits for part in tokens.split(7, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), long(Inputs(tokens)).logits, rtol=0, atol=1e-10)


@pytest.mark.rows("R4")
def test_part_of_the_head_turns():
    x = random(1, 5, 2, 8)
    turned = turn(torch.arange(5)[None], x, fraction=0.5)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    torch.testing.assert_close(turned[..., :4], turn(torch.arange(5)[None], x[..., :4]), rtol=0, atol=1e-12)


def test_frequencies_stay_exact_when_the_model_is_cast():
    scheme = model({"kind": "rope"}).positions
    before = scheme.frequencies.clone()
    scheme.bfloat16()
    assert scheme.frequencies.dtype == torch.float32
    assert torch.equal(scheme.frequencies, before)


def test_a_model_built_without_weights_has_its_frequencies():
    config = model({"kind": "rope"}).config
    assert torch.equal(build(config, device="meta").positions.frequencies, build(config).positions.frequencies)


# ---------------------------------------------------------------------------------------------- longrope

LONG = {"kind": "longrope", "short": [1.0, 2.0, 1.0, 4.0], "long": [2.0, 3.0, 5.0, 7.0], "original": 8, "extended": 64}


@pytest.mark.rows("R10")
def test_longrope_divides_each_frequency_and_scales_the_tables():
    plain = model({"kind": "rope"}, 8).positions
    short, long = (model({"kind": "rope", "scaling": LONG}, n).positions for n in (8, 9))
    torch.testing.assert_close(short.frequencies, plain.frequencies / torch.tensor(LONG["short"]), rtol=1e-6, atol=0)
    torch.testing.assert_close(long.frequencies, plain.frequencies / torch.tensor(LONG["long"]), rtol=1e-6, atol=0)
    magnitude = math.sqrt(1 + math.log(8) / math.log(8))  # sqrt(1 + ln(64 / 8) / ln(8))
    x, at = torch.zeros(1, 1, 1, 8), torch.tensor([[0]])
    x[..., 0] = 1
    for scheme in (short, long):
        assert float(scheme.rotation(at)(x)[0, 0, 0, 0]) == pytest.approx(magnitude)
    told = model({"kind": "rope", "scaling": LONG | {"magnitude": 1.25}}).positions
    assert float(told.rotation(at)(x)[0, 0, 0, 0]) == pytest.approx(1.25)
    shrunk = model({"kind": "rope", "scaling": LONG | {"extended": 4}}).positions
    assert float(shrunk.rotation(at)(x)[0, 0, 0, 0]) == 1.0


def test_the_short_factors_end_where_the_long_ones_are_meant():
    short, long = (model({"kind": "rope", "scaling": LONG}, n) for n in (8, 64))
    nine = torch.zeros(1, 9, dtype=torch.long)
    with pytest.raises(UnsupportedError, match=r"position 8 is beyond the 8 .* max_seq_len above 8"):
        short(Inputs(nine))
    with pytest.raises(UnsupportedError, match="8 trained positions"):
        short.new_state(1, 9)
    assert long(Inputs(nine)).logits.shape == (1, 9, 19)
    assert long.new_state(1, 100).max_tokens == 100


# ----------------------------------------------------------------------------------------------- learned


@pytest.mark.rows("R2")
def test_a_learned_table_ends_with_an_error():
    learned = model({"kind": "learned"}, 8)
    assert learned(Inputs(torch.zeros(1, 8, dtype=torch.long))).logits.shape == (1, 8, 19)
    with pytest.raises(UnsupportedError, match="position 8 is beyond the 8 trained positions"):
        learned(Inputs(torch.zeros(1, 9, dtype=torch.long)))
    with pytest.raises(UnsupportedError, match="8 trained positions"):
        learned.new_state(1, 9)
    with pytest.raises(UnsupportedError, match="position 8"):  # packed, but one document is too long
        learned(Inputs(torch.zeros(1, 12, dtype=torch.long), doc_ids=(torch.arange(12) >= 9).long()[None]))


@pytest.mark.rows("R2")
def test_long_rows_of_short_texts_fit_a_learned_table():
    learned = model({"kind": "learned"}, 8)
    tokens = torch.randint(19, (1, 12))
    packed = learned(Inputs(tokens, doc_ids=(torch.arange(12) >= 6).long()[None])).logits
    torch.testing.assert_close(packed[:, 6:], learned(Inputs(tokens[:, 6:])).logits, rtol=0, atol=1e-12)
    padded = learned(Inputs(tokens, valid=torch.arange(12)[None] >= 4)).logits
    torch.testing.assert_close(padded[:, 4:], learned(Inputs(tokens[:, 4:])).logits, rtol=0, atol=1e-12)


@pytest.mark.rows("R2", "T8")
def test_learned_positions_are_a_sum_of_two_tables():
    learned, tokens = model({"kind": "learned"}), torch.randint(19, (2, 5))
    first = learned(Inputs(tokens), needs=("hidden_states",)).hidden_states[0]
    assert torch.equal(first, learned.embed.weight[tokens] + learned.positions.table.weight[:5])


def test_a_reversed_rotation_turns_back_and_gives_what_swapped_halves_give():
    x, positions = random(2, 5, 3, 8), torch.arange(5).expand(2, 5)
    there = turn(positions, x)
    torch.testing.assert_close(turn(positions, there, reverse=True), x, rtol=0, atol=1e-6)
    swap = lambda y: torch.cat([y[..., 4:], y[..., :4]], -1)  # noqa: E731
    assert torch.equal(turn(positions, x, reverse=True), swap(turn(positions, swap(x))))
