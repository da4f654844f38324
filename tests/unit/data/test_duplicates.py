import random
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.data import duplicates
from octavo.data.duplicates import CJK, NearDuplicatesConfig, NearIndex, band_rows, shingles, signature, unit_ids

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


UNITS = re.compile(rf"[{CJK}]|[^\W{CJK}]+")
ANY_TEXT = st.text(st.one_of(st.sampled_from("aB1_ß é-\n。中文漢한ひ\u0301\u180e\ud800"), st.characters()), max_size=80)


def units_of(text):
    """The definition: one call for every unit."""
    return UNITS.findall(text.casefold()) or [text.casefold()]


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_a_hash_for_each_unit_and_the_same_for_the_same(one, other):
    found = dict.fromkeys(units_of(one)) | dict.fromkeys(units_of(other))
    ids = [*unit_ids(one).tolist(), *unit_ids(other).tolist()]
    units = units_of(one) + units_of(other)
    assert len(ids) == len(units)
    for unit, i in zip(units, ids, strict=True):
        assert found[unit] in (None, i)
        found[unit] = i
    assert len(set(found.values())) == len(found)


def test_large_texts_are_hashed_block_by_block(monkeypatch):
    rng = random.Random(3)
    text = text_of([*WORDS, *HAN, "x" * 3000, "...", "\n"], rng, 5000, " ")
    whole = unit_ids.__wrapped__(text)
    for block in (1, 7, 512):
        monkeypatch.setattr(duplicates, "_BLOCK", block)
        assert np.array_equal(unit_ids.__wrapped__(text), whole)
    assert len(whole) == len(units_of(text))
    long = [unit_ids.__wrapped__("x" * 3000 + end)[0] for end in ("y", "z", "yx", "xy", "")]
    assert len(set(long)) == 5


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30), st.integers(1, 8))
def test_shingles_are_the_runs(numbers, size):
    ids = np.array(numbers, dtype=np.uint64)
    found = shingles(ids, size).tolist()
    size = min(size, len(numbers))
    runs = [tuple(numbers[i : i + size]) for i in range(len(numbers) - size + 1)]
    assert len(found) == len(runs)
    assert len(set(found)) == len(set(runs)) == len(set(zip(found, runs, strict=True)))
    assert np.array_equal(ids, np.array(numbers, dtype=np.uint64))


def test_a_signature_is_of_the_set_of_shingles():
    """However often a shingle comes, and in which order."""
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

    rng = np.random.default_rng(0)
    for n in (1, 3, 200):
        marks = rng.integers(0, 2**64, n, dtype=np.uint64)
        often = rng.permutation(np.concatenate([marks, rng.choice(marks, 5 * n)]))
        flat = np.concatenate([marks, often])
        ends = np.array([0, n, len(flat)], dtype=np.uint64)
        one, other = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, 128, 1).to_rows()
        assert one == other


def exact_similarity(a, b):
    """Jaccard similarity of the sets of five units, without a hash."""
    sets = []
    for text in (a, b):
        units = units_of(text)
        sets.append({tuple(units[i : i + 5]) for i in range(len(units) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize(("units", "joint"), [(WORDS, " "), (HAN, "")], ids=["words", "chinese"])
def test_planted_copies_against_the_exact_similarity(units, joint):
    """Recall and precision where the exact similarity is known: documents with one copy each, changed more or less."""
    rng = random.Random(7)
    originals = [text_of(units, rng, 300, joint) for _ in range(400)]
    index = NearIndex(CONFIG)
    for text in originals:
        index.add(signature(text, CONFIG))
    clear = right = clear_found = found = 0
    for i, text in enumerate(originals):
        copy = text.split(" ") if joint else list(text)
        for at in rng.sample(range(300), rng.randrange(16)):
            copy[at] = rng.choice(units)
        exact = exact_similarity(text, joint.join(copy))
        twin = find(index, joint.join(copy))
        if exact >= 0.88:
            clear += 1
            clear_found += twin is not None
        if twin is not None:
            found += 1
            right += twin[0] == i and exact >= 0.7
            assert abs(twin[1] - exact) < 0.15
    assert clear > 60 and 150 < found < 250  # it says something
    assert clear_found >= 0.99 * clear
    assert right >= 0.99 * found


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
