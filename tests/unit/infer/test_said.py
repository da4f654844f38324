"""What a text said is counted as it grows, and choices by it are those by its tokens."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from octavo.infer.said import Said, counts, distinct, further
from octavo.infer.sampling import SamplingConfig, choose, generator, judge


def test_a_view_says_what_its_tokens_say():
    draw, tokens = random.Random(0), [3, 1, 3]
    prompt, produced, whole = Said(tokens, 0, 3), Said(tokens, 3), Said(tokens)
    for _ in range(60):
        tokens += [draw.randrange(9) for _ in range(draw.choice([0, 1, 3]))]
        for said, wanted in ((prompt, tokens[:3]), (produced, tokens[3:]), (whole, tokens)):
            assert (len(said), list(said), said[-2:]) == (len(wanted), wanted, wanted[-2:])
            assert counts(said) == counts(wanted) == Counter(wanted)
            assert (
                distinct(said).sort().values.tolist() == sorted(set(wanted)) == distinct(wanted).sort().values.tolist()
            )
            more = further(said, [3, 8])
            assert (len(more), more[-1], list(more)) == (len(wanted) + 2, 8, further(wanted, [3, 8]))
            assert counts(more) == Counter([*wanted, 3, 8])
            assert set(distinct(more).tolist()) == {*wanted, 3, 8}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_choices_by_a_view_are_those_by_the_tokens(temperature):
    config = SamplingConfig(
        temperature=temperature, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, seed=1
    )
    logits, tokens = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)), [1, 2, 2, 3]
    prompt, produced = Said(tokens, 0, 4), Said(tokens, 4)
    for step in range(20):
        one, other = generator(config, step), generator(config, step)
        ids = choose(logits[:1], config, [prompt], [produced], [one])
        assert ids == choose(logits[:1], config, [tokens[:4]], [tokens[4:]], [other])
        draft = [ids[0], 7, 2]
        got = judge(logits, draft, config, prompt, produced, one)
        assert got == judge(logits, draft, config, tokens[:4], tokens[4:], other)
        tokens += got


def test_a_long_text_is_gone_through_once():
    class Counting(list[int]):
        read = 0

        def __getitem__(self, at):
            got = super().__getitem__(at)
            Counting.read += len(got) if isinstance(at, slice) else 1
            return got

    config = SamplingConfig(temperature=0, repetition_penalty=1.1, frequency_penalty=0.1)
    tokens = Counting(i % 50 for i in range(4000))
    prompt, produced = Said(tokens, 0, 2000), Said(tokens, 2000)
    for _ in range(30):
        logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(len(tokens)))
        tokens += choose(logits, config, [prompt], [produced], [torch.Generator()])
    assert 4000 <= Counting.read < 4100
