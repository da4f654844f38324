"""word2vec: its gradients, two backends, chances and tree, and what it learns from a text with a plan in it."""

import itertools
import random
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from octavo.errors import ConfigError, DataError, NumericError, StopRequested
from octavo.stop import StopSignal
from octavo.vectors import Training, VectorsConfig, corpus, native, plain
from octavo.vectors import train as train_vectors
from octavo.vectors.draws import Draws, alias, epoch_key, keep
from octavo.vectors.huffman import tree
from octavo.vectors.task import make_task

GOLDEN = Path(__file__).parents[2] / "parity" / "golden" / "word2vec.safetensors"
KINDS = [(kind, loss) for kind in ("skipgram", "cbow") for loss in ("negative", "hierarchical")]
BACKENDS = ["plain", pytest.param("native", marks=pytest.mark.skipif(native.library()[0] is None, reason="no C++"))]


def some_text(n: int = 12, seed: int = 0) -> corpus.Corpus:
    chance = random.Random(seed)
    words = "the cat dog bird house river sees finds red old small".split()
    weights = [1 / (i + 1) for i in range(len(words))]
    return corpus.read(["\n".join(" ".join(chance.choices(words, weights, k=7)) for _ in range(n))], min_count=1)


def trained(text: corpus.Corpus, **settings) -> Training:
    """A finished training whose output matrix began with random numbers, so that no first gradient is zero."""
    training = Training(text, VectorsConfig.model_validate({"dim": 7, "min_count": 1, **settings}))
    training.task.output[:, :7] = np.random.default_rng(9).normal(0, 0.4, (len(text.words), 7))
    while not training.done:
        training.step()
    return training


# ------------------------------------------------------------------------------------------ loss and gradient


def by_autograd(text: corpus.Corpus, config: VectorsConfig) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """The same training in float64, every gradient found by torch: matrices, and loss and answers of the last pass."""
    task = make_task(text, config)
    task.output[:, :7] = np.random.default_rng(9).normal(0, 0.4, (len(text.words), 7))
    x, o = (torch.tensor(m, dtype=torch.float64, requires_grad=True) for m in (task.input, task.output))
    total, answers = 0.0, 0
    for epoch, unit in itertools.product(range(config.epochs), range(len(text.starts) - 1)):
        if unit == 0:
            total, answers = 0.0, 0
        kept = []
        for place in range(text.starts[unit], text.starts[unit + 1]):
            draws = Draws(task.key(epoch), int(place))
            if draws.next() / 2**64 < task.keep[text.tokens[place]] / 2**32:
                kept.append((int(place), int(text.tokens[place]), draws))
        for i, (place, word, draws) in enumerate(kept):
            reach = 1 + draws.below(config.window)
            near = [kept[j][1] for j in range(len(kept)) if j != i and abs(i - j) <= reach]
            for sources, target in [(near, word)] if config.kind == "cbow" else [([word], other) for other in near]:
                if not sources:
                    continue
                rows, signs = plain.outputs(task, target, draws)
                score = torch.tensor(signs, dtype=torch.float64) * (o[rows.tolist()] @ x[sources].mean(0))
                loss = -torch.nn.functional.logsigmoid(score).sum()
                steps = torch.autograd.grad(loss, (x, o))
                with torch.no_grad():
                    for weight, step in zip((x, o), steps):
                        weight -= task.rate_at(epoch, place) * step
                total, answers = total + loss.item(), answers + len(rows)
    return x.detach(), o.detach(), total, answers


@pytest.mark.rows("N7")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "loss"), KINDS)
def test_every_step_is_the_gradient_that_autograd_finds(kind, loss, backend):
    text = some_text()
    settings = {"kind": kind, "loss": loss, "lr": 0.3, "epochs": 2, "sample": 0.2, "window": 3, "negative": 4}
    settings["cbow_step"] = "gradient"
    got = trained(text, **settings, backend=backend)
    config = VectorsConfig(dim=7, min_count=1, **settings)
    x, o, total, answers = by_autograd(text, config)
    began = make_task(text, config)
    assert (x - torch.tensor(began.input)).abs().max() > 0.1
    torch.testing.assert_close(torch.tensor(got.task.input, dtype=torch.float64), x, atol=3e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(got.task.output, dtype=torch.float64), o, atol=3e-6, rtol=0)
    assert got.loss == pytest.approx(total / answers, rel=1e-5)  # the text is one block: this is the last pass


def looked_up(score: float) -> float:
    """The score in the table that gensim takes the logistic function and its logarithm from: 1000 entries from -6 to 6,
    found at (score + 6) * 83 (1000 / 6 / 2 in whole numbers), up to 0.04 away."""
    return (int((score + 6) * 83) / 1000 * 2 - 1) * 6


def in_gensims_words(x, output, rows, signs, rate, table=looked_up) -> tuple[float, np.ndarray]:
    """``plain.predict`` as gensim's kernel goes about it: one output after the other, label and logistic function."""
    step, loss = np.zeros_like(x), 0.0
    for row, sign in zip(rows, signs):
        dot = output[row] @ x
        g = np.float32(((sign + 1) / 2 - 1 / (1 + np.exp(-table(dot)))) * rate)
        loss += np.log1p(np.exp(-table(sign * dot)))
        step += g * output[row]
        output[row] += g * x
    return loss, step


@pytest.mark.rows("N7")
@pytest.mark.parametrize(("kind", "loss"), KINDS)
def test_a_sentence_of_gensims_kernel_comes_out_the_same(kind, loss):
    """Its formulas are ours: with its table they give its numbers, with the exact function those of our backends."""
    golden, name = load_file(GOLDEN), f"{kind}.{loss}"

    def parts(key: str) -> list[np.ndarray]:
        lengths = golden[f"{name}.{key}.lengths"]
        return np.split(golden[f"{name}.{key}"], np.cumsum(lengths)[:-1])

    def through(predict) -> tuple[np.ndarray, np.ndarray, float]:
        x, o, total = golden[f"{name}.input.before"].copy(), golden[f"{name}.output.before"].copy(), 0.0
        for sources, rows, signs in zip(parts("sources"), parts("rows"), parts("signs"), strict=True):
            lost, step = predict(x[sources].mean(0), o, rows, signs, 0.05)
            np.add.at(x, sources, step)  # the whole step for every neighbour: cbow_step
            total += lost
        return x, o, total

    x, o, total = through(in_gensims_words)
    np.testing.assert_allclose(x, golden[f"{name}.input.after"], atol=2e-6)
    np.testing.assert_allclose(o, golden[f"{name}.output.after"], atol=2e-6)
    assert np.abs(x - golden[f"{name}.input.before"]).max() > 0.05
    assert total == pytest.approx(float(golden[f"{name}.loss"][0]), rel=1e-5)
    exact = through(lambda *given: in_gensims_words(*given, table=float))
    for ours, theirs in zip(through(plain.predict), exact, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=1e-6)


def test_chances_and_path_lengths_are_gensims():
    golden = load_file(GOLDEN)
    counts = golden["counts"]
    lengths = np.diff(tree(counts).starts)
    assert (lengths * counts).sum() == (golden["code_lengths"] * counts).sum()
    assert np.abs(keep(counts, 0.02) / 2**32 - np.minimum(golden["kept"] / 2**32, 1)).max() < 1e-6
    weights = counts**0.75 / (counts**0.75).sum()
    assert np.abs(np.diff(golden["cum_table"], prepend=0) / golden["cum_table"][-1] - weights).max() < 1e-6


@pytest.mark.skipif(native.library()[0] is None, reason="no C++")
@pytest.mark.rows("N7")
@pytest.mark.parametrize(("kind", "loss"), KINDS)
@pytest.mark.parametrize(("dim", "cbow_step"), [(1, "whole"), (16, "gradient"), (33, "whole")])
def test_the_kernel_and_its_plain_twin_give_the_same(kind, loss, dim, cbow_step):
    text = some_text(30, seed=3)
    both = []
    for backend in ("native", "plain"):
        config = VectorsConfig(
            kind=kind,
            loss=loss,
            dim=dim,
            min_count=1,
            epochs=3,
            lr=0.4,
            sample=0.1,
            seed=11,
            backend=backend,
            cbow_step=cbow_step,
        )
        training = Training(text, config)
        losses = [(training.step(), training.loss)[1] for _ in range(3)]
        assert training.done
        both.append((training.task.input, training.task.output, np.array(losses)))
    for ours, twin in zip(*both, strict=True):
        np.testing.assert_allclose(ours, twin, atol=1e-5)
    assert np.abs(both[0][1][:, dim:]).max(initial=0) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_word_that_is_drawn_twice_takes_both_steps(backend):
    text = corpus.read(["a b\n" * 3 + "b"], min_count=1)
    got = trained(text, negative=40, sample=0, lr=0.2, backend=backend, seed=2)
    x, _, _, _ = by_autograd(text, got.config)
    np.testing.assert_allclose(got.task.input, x, atol=1e-5)


# ------------------------------------------------------------------------------------------ chance


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """In standard deviations above what chance alone gives on average."""
    df = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - df) / (2 * df) ** 0.5)


@pytest.mark.rows("N7")
@pytest.mark.parametrize("exponent", [0.75, 0.0, 1.0, -0.5])
def test_wrong_words_are_drawn_in_proportion_to_a_power_of_their_count(exponent):
    counts = np.array([5000, 900, 400, 100, 60, 20, 5, 1])
    share, other = alias(counts, exponent)
    expected = counts**exponent / (counts**exponent).sum()
    table = share / 2**32 + np.bincount(other, 1 - share / 2**32, len(counts))
    np.testing.assert_allclose(table / len(counts), expected, atol=1e-8)
    n = 40_000
    drawn = np.bincount([Draws(epoch_key(7, 0), i).word(share, other) for i in range(n)], minlength=len(counts))
    assert chi_square(drawn, n * expected) < 4
    assert chi_square(drawn, n * np.roll(expected, 1)) > 100 or exponent == 0


@pytest.mark.rows("N7")
def test_frequent_words_are_left_out_as_often_as_the_formula_says():
    counts = np.array([50_000, 9_000, 800, 100])
    share = counts / counts.sum()
    expected = np.minimum((np.sqrt(share / 1e-2) + 1) * 1e-2 / share, 1)
    assert expected[0] < 0.2 and expected[2] == 1
    chance, n = keep(counts, 1e-2), 20_000
    for word in range(4):
        kept = sum(Draws(epoch_key(3, word), i).next() >> 32 < chance[word] for i in range(n))
        assert abs(kept - n * expected[word]) <= 4 * (n * expected[word] * (1 - expected[word])) ** 0.5
    assert (keep(counts, 0) == 2**32).all()


def test_the_window_of_a_word_is_any_size_up_to_the_largest():
    n, window = 20_000, 5
    reach = [(draws := Draws(epoch_key(5, 1), i)).next() and 1 + draws.below(window) for i in range(n)]
    assert set(reach) == {1, 2, 3, 4, 5}
    assert chi_square(np.bincount(reach)[1:], np.full(window, n / window)) < 4


def test_words_epochs_and_seeds_have_streams_of_their_own():
    streams = {Draws(epoch_key(s, e), p).next() for s in range(9) for e in range(9) for p in range(9)}
    assert len(streams) == 729


# ------------------------------------------------------------------------------------------ the tree


@cache
def least(weights: tuple[int, ...]) -> int:
    """The least sum of weight times depth over all binary trees, by trying every division."""
    if len(weights) < 2:
        return 0
    rest = range(1, len(weights))
    best = min(
        least(tuple(weights[i] for i in side)) + least(tuple(w for i, w in enumerate(weights) if i not in side))
        for size in range(len(weights) - 1)
        for side in ((0, *others) for others in itertools.combinations(rest, size))
    )
    return best + sum(weights)


@pytest.mark.rows("N7")
def test_no_tree_is_shorter_than_huffmans():
    chance = random.Random(1)
    for n in range(2, 8):
        for _ in range(4):
            counts = np.array(sorted((chance.choice([1, 2, 3, 8, 50]) for _ in range(n)), reverse=True))
            made = tree(counts)
            lengths = np.diff(made.starts)
            assert (lengths * counts).sum() == least(tuple(sorted(counts.tolist())))
            assert (lengths[:-1] <= lengths[1:]).all()
            ways = [
                tuple(zip(made.nodes[a:b].tolist(), made.signs[a:b].tolist()))
                for a, b in itertools.pairwise(made.starts)
            ]
            assert len(set(ways)) == n
            assert {way[0][0] for way in ways} == {0}
            assert {node for way in ways for node, _ in way} == set(range(n - 1))
            # Both answers lead somewhere at every node: the probabilities of all words add up to 1.
            assert len({step for way in ways for step in way}) == 2 * (n - 1)


def test_words_on_the_tree_are_a_distribution():
    counts = np.array([40, 20, 9, 7, 3, 1])
    made, chance = tree(counts), np.random.default_rng(0)
    x, o = chance.normal(size=4), chance.normal(size=(5, 4))
    yes = 1 / (1 + np.exp(-made.signs * (o[made.nodes] @ x)))
    assert sum(yes[a:b].prod() for a, b in itertools.pairwise(made.starts)) == pytest.approx(1)


# ------------------------------------------------------------------------------------------ what is learnt

THINGS, FORMS = 14, 3


def planted(n: int = 5000, seed: int = 4) -> list[str]:
    """Each word w3x1 stands among words of its thing (3) and of its form (1), as the name of a capital stands among
    words of its country and words about capitals."""
    chance = random.Random(seed)
    lines = []
    for _ in range(n):
        thing, form = chance.randrange(THINGS), chance.randrange(FORMS)
        about = [f"topic{thing}{c}" for c in "abc"] + [f"form{form}{c}" for c in "abc"]
        others = chance.sample(about, 4)
        lines.append(" ".join([*others[:2], f"w{thing}x{form}", *others[2:]]))
    return ["\n".join(lines)]


def analogies() -> list[list[str]]:
    """``a is to b as c is to d`` for all things and forms."""
    return [
        [f"w{i}x{p}", f"w{i}x{q}", f"w{j}x{p}", f"w{j}x{q}"]
        for i, j in itertools.permutations(range(THINGS), 2)
        for p, q in itertools.permutations(range(FORMS), 2)
    ]


@pytest.mark.rows("N7")
@pytest.mark.skipif(native.library()[0] is None, reason="no C++")
@pytest.mark.parametrize(("kind", "loss"), KINDS)
def test_analogies_planted_in_a_text_are_found(kind, loss):
    text = corpus.read(planted(), min_count=1)
    config = VectorsConfig(kind=kind, loss=loss, dim=24, epochs=12, min_count=1, lr=0.05, sample=0, seed=1)
    vectors = train_vectors(text, config)
    for method in ("add", "mul"):
        right, asked = vectors.answer(analogies(), method)
        assert asked == THINGS * (THINGS - 1) * FORMS * (FORMS - 1)
        assert right / asked > 0.6, f"{method}: {right} of {asked}; by chance 1 of {len(text.words)}"
    shuffled = text.tokens.copy()
    np.random.default_rng(0).shuffle(shuffled)
    nothing = train_vectors(corpus.Corpus(text.words, text.counts, shuffled, text.starts), config)
    right, asked = nothing.answer(analogies())
    assert right / asked < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_seed_gives_the_same_bits_and_another_seed_others(backend):
    text = some_text(8)
    first, again, other = (
        train_vectors(text, VectorsConfig(dim=8, min_count=1, backend=backend, seed=seed)).matrix for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.skipif(native.library()[0] is None, reason="no C++")
def test_two_threads_go_through_the_whole_text(monkeypatch):
    monkeypatch.setattr("octavo.vectors.training.BLOCK", {"native": 500, "plain": 500})
    text = corpus.read(planted(1500), min_count=1)
    steps = []
    config = VectorsConfig(dim=24, min_count=1, threads=2, epochs=20, lr=0.05, sample=0)
    vectors = train_vectors(text, config, progress=lambda words, loss: steps.append(words))
    assert sum(steps) == 20 * len(text.tokens)
    right, asked = vectors.answer(analogies())
    assert right / asked > 0.3


def test_the_rate_falls_to_its_end_and_no_further():
    task = make_task(some_text(), VectorsConfig(min_count=1, epochs=2, lr=0.1, lr_end=0.02))
    n = len(task.tokens)
    rates = [task.rate_at(epoch, place) for epoch in (0, 1) for place in range(n)]
    np.testing.assert_allclose(rates, 0.1 - 0.08 * np.arange(2 * n) / (2 * n))


def test_numbers_that_grow_without_end_are_refused():
    text = some_text(40)
    config = VectorsConfig(dim=4, min_count=1, epochs=40, lr=10, window=8, negative=20, kind="cbow")
    training = Training(text, config)
    training.task.output[:] = 3e38
    with pytest.raises(NumericError, match=r"epoch 1.*"), np.errstate(all="ignore"):
        while not training.done:
            training.step()


# ------------------------------------------------------------------------------------------ stopping and going on


class _StopAfter(StopSignal):
    def __init__(self, questions: int):
        super().__init__()
        self.left = questions

    @property
    def reason(self) -> str:
        self.left -= 1
        return "" if self.left >= 0 else "enough"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stopped_training_ends_with_the_bits_of_one_that_went_through(backend, tmp_path, monkeypatch):
    monkeypatch.setattr("octavo.vectors.training.BLOCK", {"native": 50, "plain": 50})
    text, config = some_text(20), VectorsConfig(dim=6, min_count=1, epochs=3, backend=backend)
    whole, left = train_vectors(text, config), tmp_path / "unfinished"
    lines = []
    for questions in (1, 3, 1):
        with pytest.raises(StopRequested) as stopped:
            train_vectors(text, config, stop=_StopAfter(questions), unfinished=left, fingerprint="f")
        assert str(left) in str(stopped.value) and stopped.value.exit_code == 75
    done = []
    resumed = train_vectors(
        text, config, unfinished=left, fingerprint="f", notice=lines.append, progress=lambda n, loss: done.append(n)
    )
    assert (resumed.matrix == whole.matrix).all()
    assert "going on" in lines[0] and sum(done) == 3 * len(text.tokens) and done[0] > 100


def test_what_was_left_of_another_training_is_not_taken_up(tmp_path):
    text, config = some_text(20), VectorsConfig(dim=6, min_count=1, backend="plain", epochs=1)
    left = tmp_path / "unfinished"
    training = Training(text, config)
    training.save(left, "text one")
    whole = left.read_bytes()
    others = [
        Training(text, config.model_copy(update={"seed": 2})),
        Training(some_text(21), config),
        Training(text, config.model_copy(update={"threads": 2})),
    ]
    assert [other.go_on(left, "text one") for other in others] == [False, False, True]
    assert not training.go_on(left, "text two")
    for damaged in (whole[:-1], whole + b"x", b"", b"[]\n", b"\xff\xfe\n"):
        left.write_bytes(damaged)
        assert not training.go_on(left, "text one")
    left.write_bytes(whole)
    assert training.go_on(left, "text one")


def test_without_a_compiler_one_line_says_so(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: (None, "no C++ compiler found on PATH"))
    lines = []
    training = Training(some_text(), VectorsConfig(dim=4, min_count=1), lines.append)
    training.step()
    assert training.backend == "plain"
    assert lines == [
        "word vectors are trained without the kernel, some hundred times slower: no C++ compiler found on PATH"
    ]
    with pytest.raises(ConfigError, match="no kernel"):
        Training(some_text(), VectorsConfig(min_count=1, backend="native"))


# ------------------------------------------------------------------------------------------ text


def test_text_becomes_words():
    split = corpus.SPLITS["words"]
    assert split("Don't stop, re-read snake_case: 3.5 cafés!") == "Don't stop re read snake case 3 5 cafés".split()
    assert split("我爱LLM，三0。カナ") == ["我", "爱", "LLM", "三", "0", "カ", "ナ"]
    assert corpus.SPLITS["spaces"](" a,b  c\t") == ["a,b", "c"]
    assert corpus.SPLITS["characters"]("春 眠\u3000不") == ["春", "眠", "不"]


def test_a_corpus_is_numbered_by_frequency_and_cut_by_lines(monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 5)
    texts = ["b a a\nrare\n\na b c", "c a"]
    text = corpus.read(texts, min_count=2)
    assert text.words == ["a", "b", "c"] and text.counts.tolist() == [4, 2, 2]
    assert text.tokens.tolist() == [1, 0, 0, 0, 1, 2, 2, 0] and text.starts.tolist() == [0, 3, 6, 8]
    assert text.left_out == 1
    whole = corpus.read(texts, min_count=1, unit="document")
    assert whole.starts.tolist() == [0, 7, 9]
    assert corpus.read(texts, min_count=1, max_words=2).words == ["a", "b"]
    assert corpus.read(["A a B"], min_count=1, lower=True).words == ["a", "b"]
    long = [" ".join(random.Random(i).choices("abcdefg", k=40)) for i in range(9)]
    read = corpus.read(long, min_count=1)
    units = [[read.words[i] for i in read.tokens[a:b]] for a, b in itertools.pairwise(read.starts)]
    assert units == [line.split() for line in long]
    assert dict(zip(read.words, read.counts.tolist())) == Counter(" ".join(long).split())


@pytest.mark.parametrize(("texts", "what"), [([], "0 of 0"), (["a a a"], "1 of 1"), (["a b c"], "0 of 3")])
def test_text_without_enough_words_is_refused(texts, what):
    with pytest.raises(DataError, match=what):
        corpus.read(texts, min_count=2)


def test_a_tokenizer_splits_text_into_its_tokens():
    from octavo.tokenizer import ByteBPE, Word, train

    text = "the cat sat on the mat\nthe dog sat on the log"
    tokenizer = train(ByteBPE(vocab_size=290), [text] * 3)
    read = corpus.read([text], split=tokenizer, min_count=1)
    units = [[read.words[i] for i in read.tokens[a:b]] for a, b in itertools.pairwise(read.starts)]
    assert units == [[tokenizer.tokens[i] for i in tokenizer.encode(line)] for line in text.split("\n")]
    words = corpus.read([text + "\nunknown"], split=train(Word(), [text]), min_count=1)
    assert set(words.words) == set(text.split())  # neither white space nor unknown words
