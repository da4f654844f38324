"""Closed forms from the notes, equality with transformers' processors, and what a seed means."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from transformers.generation import logits_process as reference

from octavo.errors import NumericError
from octavo.infer import annealing, sampling
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
        *[(lambda x, m=m: sampling.keep_typical(x, m), reference.TypicalLogitsWarper(m)) for m in (0.01, 0.2, 0.9)],
        (
            lambda x: sampling.keep_typical(sampling.keep_top_k(x, 9), 0.95),
            reference.LogitsProcessorList([reference.TopKLogitsWarper(9), reference.TypicalLogitsWarper(0.95)]),
        ),
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
    config = SamplingConfig(
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        min_p=0.02,
        typical_p=0.7,
        repetition_penalty=1.2,
        logit_bias={7: 2, 9: -3},
    )
    prompts, produced = [[1, 2, 3]] * 6, [[4, 4]] * 6
    ids = torch.tensor([[1, 2, 3, 4, 4]] * 6)
    scores = logits
    for processor in (
        reference.RepetitionPenaltyLogitsProcessor(1.2),
        reference.SequenceBiasLogitsProcessor({(7,): 2.0, (9,): -3.0}),
        reference.TemperatureLogitsWarper(0.8),
        reference.TopKLogitsWarper(20),
        reference.TopPLogitsWarper(0.9),
        reference.MinPLogitsWarper(0.02),
        reference.TypicalLogitsWarper(0.7),
    ):
        scores = processor(ids, scores)
    torch.testing.assert_close(probs(sampling.shape(logits, config, prompts, produced)), probs(scores))


def test_typical_can_leave_out_the_most_probable_token() -> None:
    """Meister et al.'s point: one very probable token says less than the text usually says."""
    usual = torch.tensor([[0.4] + [0.06] * 10]).log()
    kept = sampling.keep_typical(usual, 0.5)[0] > -math.inf
    assert not kept[0] and bool(kept[1:].all())


@pytest.mark.rows("I2")
def test_presence_and_frequency_are_the_published_formula(logits: torch.Tensor) -> None:
    """``mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence``, with ``c[j]`` how often j was produced."""
    produced = torch.randint(0, 9, (6, 12), generator=torch.Generator().manual_seed(1))
    counts = torch.stack([torch.bincount(row, minlength=97) for row in produced])
    for presence, frequency in ((0.5, 0.0), (0.0, 0.25), (-1.5, 2.0)):
        wanted = logits - counts * frequency - (counts > 0) * presence
        torch.testing.assert_close(sampling.penalise_produced(logits, produced.tolist(), presence, frequency), wanted)


@pytest.mark.rows("P3")
@pytest.mark.parametrize(
    ("path", "wanted"), [("linear", [2.0, 1.625, 1.25, 0.875, 0.5]), ("geometric", [2.0, 2**0.5, 1.0, 0.5**0.5, 0.5])]
)
def test_the_temperature_follows_its_path(logits: torch.Tensor, path, wanted: list[float]) -> None:
    config = SamplingConfig(temperature=2.0, temperature_end=0.5, temperature_tokens=4, temperature_path=path)
    assert [config.temperature_at(n) for n in range(5)] == pytest.approx(wanted)
    assert config.temperature_at(100) == 0.5
    produced = [[1] * n for n in range(6)]  # rows at different places of it are shaped together
    shaped = sampling.shape(logits, config, [[]] * 6, produced)
    for row, n in enumerate(range(6)):
        torch.testing.assert_close(shaped[row], sampling.with_temperature(logits[row], wanted[min(n, 4)]))


@pytest.mark.rows("P3")
def test_annealed_to_zero_the_text_ends_greedily(logits: torch.Tensor) -> None:
    config = SamplingConfig(temperature=3.0, temperature_end=0.0, temperature_tokens=2, seed=1)
    assert not config.greedy and SamplingConfig(temperature=0, temperature_end=0.0).greedy
    late = sampling.choose(logits, config, [[]] * 6, [[1, 2]] * 6, streams(config, 6))
    assert late == logits.argmax(-1).tolist()
    early = {
        tuple(sampling.choose(logits, config, [[]] * 6, [[]] * 6, streams(SamplingConfig(seed=s), 6))) for s in range(9)
    }
    assert len(early) > 1
    logits[2, 5] = math.nan
    with pytest.raises(NumericError, match="row 2"):
        sampling.choose(logits, config, [[]] * 6, [[1, 2]] * 6, streams(config, 6))


@pytest.mark.rows("P3")
def test_annealing_sequences_is_not_tempering_each_step() -> None:
    """First a 0.4 or b 0.6; after a always a, after b evenly a or b.

    At T = 1/2 the sequences aa, ba, bb have the squares 0.16, 0.09, 0.09 in proportion, so a begins with 0.16 / 0.34;
    token by token it begins with 0.16 / (0.16 + 0.36).
    """
    after = {(): [0.4, 0.6], (0,): [1.0, 0.0], (1,): [0.5, 0.5]}

    def next_logits(prefixes: torch.Tensor) -> torch.Tensor:
        return torch.tensor([after[tuple(prefix)] for prefix in prefixes.tolist()], dtype=torch.float64).log()

    log_p = annealing.log_probs_of_all(next_logits, 2)
    torch.testing.assert_close(log_p.exp(), torch.tensor([[0.4, 0.0], [0.3, 0.3]], dtype=torch.float64))
    whole = annealing.annealed(log_p, 0.5)
    torch.testing.assert_close(whole, torch.tensor([[0.16, 0.0], [0.09, 0.09]], dtype=torch.float64) / 0.34)
    steps = annealing.log_probs_of_all(next_logits, 2, temperature=0.5).exp()
    assert whole[0].sum().item() == pytest.approx(0.16 / 0.34) and steps[0].sum().item() == pytest.approx(0.16 / 0.52)
    assert annealing.annealed(log_p, 0.0).argmax() == 0, "the most probable sequence is aa"
    assert annealing.log_probs_of_all(next_logits, 2, temperature=0.0).argmax() == 2, "the greedy one begins with b"
    torch.testing.assert_close(annealing.annealed(log_p, 1.0), log_p.exp())


@pytest.mark.rows("P3")
def test_the_annealed_first_token_has_the_closed_form() -> None:
    """``q(x1)`` is in proportion to ``p(x1)^(1/T)`` times the sum of ``p(rest | x1)^(1/T)``, on a random toy model."""
    table = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)  # by two tokens
    start = torch.randn(3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def next_logits(prefixes: torch.Tensor) -> torch.Tensor:
        if prefixes.shape[1] == 0:
            return start[None]
        before = prefixes[:, -2] if prefixes.shape[1] > 1 else torch.zeros_like(prefixes[:, 0])
        return table[before, prefixes[:, -1]]

    log_p = annealing.log_probs_of_all(next_logits, 3)
    whole = annealing.annealed(log_p, 0.6).sum((1, 2))
    first = start.log_softmax(-1)
    rest = log_p - first[:, None, None]
    closed = (first / 0.6).exp() * (rest / 0.6).exp().sum((1, 2))
    torch.testing.assert_close(whole, closed / closed.sum())
    assert (whole - (first / 0.6).softmax(-1)).abs().max() > 0.01
    by_hand = [
        first[a] + table[0, a].log_softmax(-1)[b] + table[a, b].log_softmax(-1)[c]
        for a, b, c in itertools.product(range(3), repeat=3)
    ]
    torch.testing.assert_close(log_p.flatten(), torch.stack(by_hand))


def test_what_is_chosen_for_together_has_the_same_settings() -> None:
    """Every setting that changes a choice keeps two requests apart; those that do not, do not."""
    other = {
        "temperature": 0.5, "temperature_end": 0.2, "temperature_tokens": 3, "temperature_path": "geometric",
        "top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5, "repetition_penalty": 2.0, "presence_penalty": 1.0,
        "frequency_penalty": 1.0, "logit_bias": {1: 1.0},
    }  # fmt: skip
    alike = {"seed": 5, "max_new_tokens": 3, "stop": ("x",)}
    assert {*other, *alike} == set(SamplingConfig.model_fields)
    plain = sampling.choice_settings(SamplingConfig())
    assert all(sampling.choice_settings(SamplingConfig(**{name: value})) != plain for name, value in other.items())
    assert sampling.choice_settings(SamplingConfig(**alike)) == plain


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
        {"typical_p": 0},
        {"temperature_end": -1},
        {"temperature_end": math.inf},
        {"temperature": math.inf, "temperature_end": 1.0},
        {"temperature_end": 0.0, "temperature_path": "geometric"},
        {"temperature_path": "steep"},
        {"temperature_tokens": 0},
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
