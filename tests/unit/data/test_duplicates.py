import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.data.duplicates import NearDuplicatesConfig, NearIndex, band_rows, signature, unit_ids

CONFIG = NearDuplicatesConfig()
HAN = [chr(c) for c in range(0x4E00, 0x4E00 + 2000)]
WORDS = [f"{a}{b}{c}" for a in "bcdfgklmnprst" for b in "aeiou" for c in "bdgkmnrst"]


def text_of(units, rng, n, joint):
    return joint.join(rng.choice(units) for _ in range(n))


def find(index, text):
    return index.find(signature(text, index.config))


@pytest.mark.parametrize(("units", "joint"), [(WORDS, " "), (HAN, "")], ids=["words", "chinese"])
def test_near_copies_are_found_and_others_are_not(units, joint):
    rng = random.Random(1)
    originals = [text_of(units, rng, 200, joint) for _ in range(150)]
    index = NearIndex(CONFIG)
    for text in originals:
        assert find(index, text) is None
        index.add(signature(text, CONFIG))
    caught = 0
    for i, text in enumerate(originals):
        changed = text.split(" ") if joint else list(text)
        for _ in range(2):  # 2 of 200 units: about 10 of 196 shingles, similarity 0.90
            changed[rng.randrange(200)] = rng.choice(units)
        twin = find(index, joint.join(changed))
        caught += twin is not None and twin[0] == i
    assert caught >= 148
    for text in originals[:50]:
        half = text[: len(text) // 2] + text_of(units, rng, 100, joint)
        assert find(index, half) is None


def test_chinese_counts_in_characters_and_latin_in_words():
    assert len(unit_ids("静夜思 by Li Bai, 李白")) == 3 + 3 + 2
    assert len(unit_ids("???")) == 1


def test_the_estimate_is_the_jaccard_similarity():
    rng = random.Random(0)
    shared = [rng.choice(WORDS) for _ in range(3000)]
    config = NearDuplicatesConfig(hashes=1024, shingle_units=1)
    a, b = set(shared[:400]), set(shared[200:600])
    estimate = (signature(" ".join(a), config) == signature(" ".join(b), config)).mean()
    assert abs(estimate - len(a & b) / len(a | b)) < 0.06


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 1.0), st.sampled_from([64, 128, 256]))
def test_bands_find_a_pair_at_the_threshold(threshold, hashes):
    config = NearDuplicatesConfig(threshold=threshold, hashes=hashes)
    rows = band_rows(config)
    assert rows == 1 or 1 - (1 - threshold**rows) ** (hashes // rows) >= 0.9


def test_the_first_stays_whatever_comes_between():
    index = NearIndex(CONFIG)
    rng = random.Random(2)
    texts = [text_of(WORDS, rng, 100, " ") for _ in range(20)]
    for text in texts:
        index.add(signature(text, CONFIG))
    assert find(index, texts[7]) == (7, 1.0)


@pytest.mark.slow
def test_time_grows_with_the_number_of_documents_not_with_its_square():
    rng = np.random.default_rng(0)
    boilerplate = rng.integers(0, 2**32, 128, dtype=np.uint32)

    def seconds(n):
        index = NearIndex(CONFIG)
        start = time.process_time()
        for _ in range(n):
            marks = rng.integers(0, 2**32, 128, dtype=np.uint32)
            marks[:40] = boilerplate[:40]  # a header that all documents share: five bands in common
            if index.find(marks) is None:
                index.add(marks)
        return time.process_time() - start

    seconds(500)
    assert seconds(16_000) < 8 * seconds(4_000)
