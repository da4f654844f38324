"""Closed forms from the notes, equality with transformers' processors, and what a seed means."""

import math

import pytest
import torch
from pydantic import ValidationError
from transformers.generation import logits_process as reference

from octavo.errors import NumericError
from octavo.infer import sampling
from octavo.infer.sampling import SamplingConfig

CHEESE_MOUSE = torch.tensor([[0.4, 0.6]]).log()


def streams(config: SamplingConfig, rows: int) -> list[torch.Generator]:
    return [sampling.generator(config, row) for row in range(rows)]


def probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(6, 97, generator=torch.Generator().manual_seed(3)) * 3


@pytest.mark.rows("P2")
@pytest.mark.parametrize(("temperature", "cheese"), [(1.0, 0.4), (0.5, 0.308), (0.2, 0.116)])
def test_temperature_is_the_renormalised_power(temperature: float, cheese: float) -> None:
    got = probs(sampling.with_temperature(CHEESE_MOUSE, temperature))[0]
    assert got.tolist() == pytest.approx([cheese, 1 - cheese], abs=6e-4)
    power = torch.tensor([0.4, 0.6]) ** (1 / temperature)
    torch.testing.assert_close(got, power / power.sum())


@pytest.mark.rows("P2")
def test_temperature_limits(logits: torch.Tensor) -> None:
    for zero in (0.0, 1e-300):
        cold = probs(sampling.with_temperature(logits, zero))
        assert torch.equal(cold.argmax(-1), logits.argmax(-1)) and torch.equal(cold.amax(-1), torch.ones(6))
    torch.testing.assert_close(probs(sampling.with_temperature(logits, math.inf)), torch.full((6, 97), 1 / 97))
    logits[:, 5] = -math.inf
    for temperature in (1e-5, 1.0, 1e30, math.inf):  # small ones must not overflow, none may bring a token back
        kept = probs(sampling.with_temperature(logits * 1e36, temperature))
        assert bool(kept.isfinite().all()) and float(kept[:, 5].sum()) == 0


@pytest.mark.rows("I2")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: sampling.with_temperature(x, 0.7), reference.TemperatureLogitsWarper(0.7)),
        (lambda x: sampling.keep_top_k(x, 7), reference.TopKLogitsWarper(7)),
        (lambda x: sampling.keep_top_k(x, 500), reference.TopKLogitsWarper(500)),
        (lambda x: sampling.keep_top_p(x, 0.8), reference.TopPLogitsWarper(0.8)),
        (lambda x: sampling.keep_top_p(x, 0.01), reference.TopPLogitsWarper(0.01)),
        (lambda x: sampling.keep_min_p(x, 0.1), reference.MinPLogitsWarper(0.1)),
    ],
)
def test_warpers_equal_transformers(logits: torch.Tensor, ours, theirs) -> None:
    a, b = ours(logits), theirs(torch.zeros(6, 1, dtype=torch.long), logits)
    assert torch.equal(a == -math.inf, b == -math.inf)
    torch.testing.assert_close(probs(a), probs(b))


@pytest.mark.rows("I2")
@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(logits: torch.Tensor, penalty: float) -> None:
    seen = torch.randint(0, 97, (6, 12), generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    ours = sampling.penalise_repetition(logits, seen.tolist(), penalty)
    torch.testing.assert_close(ours, reference.RepetitionPenaltyLogitsProcessor(penalty)(seen, before))
    assert torch.equal(logits, before), "the caller's logits were changed"


@pytest.mark.rows("I2")
def test_the_whole_chain_equals_transformers(logits: torch.Tensor) -> None:
    config = SamplingConfig(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2)
    prompts, produced = [[1, 2, 3]] * 6, [[4, 4]] * 6
    ids = torch.tensor([[1, 2, 3, 4, 4]] * 6)
    scores = logits
    for processor in (
        reference.RepetitionPenaltyLogitsProcessor(1.2),
        reference.TemperatureLogitsWarper(0.8),
        reference.TopKLogitsWarper(20),
        reference.TopPLogitsWarper(0.9),
        reference.MinPLogitsWarper(0.02),
    ):
        scores = processor(ids, scores)
    torch.testing.assert_close(probs(sampling.shape(logits, config, prompts, produced)), probs(scores))


def test_presence_frequency_and_bias() -> None:
    flat = torch.zeros(1, 4)
    assert sampling.penalise_produced(flat, [[1, 2, 2]], 0.5, 0.25).tolist() == [[0, -0.75, -1.0, 0]]
    assert sampling.add_bias(flat, {3: 2.5, 0: -1.0}).tolist() == [[-1.0, 0, 0, 2.5]]
    assert flat.tolist() == [[0, 0, 0, 0]]


def test_draw_follows_the_distribution() -> None:
    drawn_from = streams(SamplingConfig(seed=7), 1)
    wanted = torch.tensor([0.1, 0.0, 0.6, 0.3])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sampling.draw(wanted.log()[None], drawn_from)] += 1
    assert counts[1] == 0
    chi_square = ((counts - 4000 * wanted) ** 2 / (4000 * wanted))[wanted > 0].sum()
    assert chi_square < 13.8  # two degrees of freedom, one in a thousand; the seed is fixed


def test_an_impossible_token_is_not_drawn_even_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.zeros((), dtype=torch.float64))
    drawn_from = streams(SamplingConfig(seed=1), 1)
    assert int(sampling.draw(torch.tensor([[-math.inf, -math.inf, 0.0, 1.0]]), drawn_from)) == 2


def test_one_token_always_stays(logits: torch.Tensor) -> None:
    for kept in (sampling.keep_top_p(logits, 1e-12), sampling.keep_min_p(logits, 1.0), sampling.keep_top_k(logits, 1)):
        assert torch.equal((kept > -math.inf).sum(-1), torch.ones(6, dtype=torch.long))
        assert torch.equal(kept.argmax(-1), logits.argmax(-1))


def test_a_seeded_row_does_not_depend_on_its_batch(logits: torch.Tensor) -> None:
    config = SamplingConfig(seed=11)
    together = sampling.draw(logits, streams(config, 6))
    assert torch.equal(together, sampling.draw(logits, streams(config, 6)))
    for row in range(6):
        alone = sampling.draw(logits[row : row + 1], streams(SamplingConfig(seed=11 + row), 1))
        assert int(alone[0]) == int(together[row])


@pytest.mark.parametrize("bad", [torch.full((1, 3), math.nan), torch.full((1, 3), -math.inf)])
def test_logits_that_are_not_numbers_are_an_error(bad: torch.Tensor) -> None:
    with pytest.raises(NumericError, match="row 1 has no token"):
        sampling.draw(torch.cat([torch.zeros(1, 3), bad]), streams(SamplingConfig(seed=0), 2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.inf},
        {"max_new_tokens": 0},
        {"stop": ("",)},
        {"seed": -1},
        {"temprature": 1},
    ],
)
def test_nonsense_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig(**wrong)
