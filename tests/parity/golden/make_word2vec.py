"""Write word2vec.safetensors: what gensim 4.4's kernel makes of one sentence, with every prediction it made.

python tests/parity/golden/make_word2vec.py        (needs gensim; its random numbers are drawn again here)
"""

import warnings
from pathlib import Path

import numpy as np
from gensim.models import Word2Vec, word2vec_inner

HERE = Path(__file__).parent
SEED = 6
ALPHA, DIM, WINDOW, NEGATIVE = 0.05, 8, 3, 3
WORDS = [f"w{i:02}" for i in range(40)]
SENTENCE = [WORDS[i] for i in (3, 0, 17, 5, 0, 21, 9, 30, 2)]
TEXT = [[word] * (80 // (i + 1) + 1) for i, word in enumerate(WORDS)]


def predictions(model: Word2Vec, cbow: bool, seed: int) -> list[tuple[list[int], list[int], list[float]]]:
    """(sources, output rows, signs) of each prediction, by gensim's own rules and random numbers."""
    random = np.random.RandomState(seed)
    following = 0
    if model.negative:
        following = 2**24 * int(random.randint(0, 2**24)) + int(random.randint(0, 2**24))
    shrunk = random.randint(0, WINDOW, len(SENTENCE))
    ids = [model.wv.key_to_index[word] for word in SENTENCE]
    found = []

    def asked(target: int) -> tuple[list[int], list[float]]:
        nonlocal following
        if model.hs:
            codes = model.wv.get_vecattr(target, "code")
            return [int(p) for p in model.wv.get_vecattr(target, "point")], [1.0 - 2.0 * int(c) for c in codes]
        rows = [target]
        for _ in range(model.negative):
            drawn = int(np.searchsorted(model.cum_table, (following >> 16) % int(model.cum_table[-1])))
            following = (following * 25214903917 + 11) & 281474976710655
            if drawn != target:
                rows.append(drawn)
        assert len(set(rows)) == len(rows), "a word drawn twice: there gensim and we differ, take another seed"
        return rows, [1.0] + [-1.0] * (len(rows) - 1)

    for i, word in enumerate(ids):
        lo, hi = max(0, i - WINDOW + shrunk[i]), min(len(ids), i + WINDOW + 1 - shrunk[i])
        near = [ids[j] for j in range(lo, hi) if j != i]
        for sources in [near] if cbow else [[j] for j in near]:
            found.append((sources, *asked(word)))
    return found


def main() -> None:
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray] = {}
    for cbow in (False, True):
        for hs in (False, True):
            warnings.simplefilter("ignore")
            model = Word2Vec(
                TEXT, vector_size=DIM, window=WINDOW, min_count=1, sg=int(not cbow), hs=int(hs),
                negative=0 if hs else NEGATIVE, sample=0, alpha=ALPHA, workers=1, epochs=1, seed=1,
            )  # fmt: skip
            name = f"{'cbow' if cbow else 'skipgram'}.{'hierarchical' if hs else 'negative'}"
            output = model.syn1 if hs else model.syn1neg
            for matrix, seed in ((model.wv.vectors, 5), (output, 6)):
                matrix[:] = np.random.default_rng(seed).normal(0, 0.5, matrix.shape)
            arrays[f"{name}.input.before"], arrays[f"{name}.output.before"] = model.wv.vectors.copy(), output.copy()
            seed = SEED
            made = predictions(model, cbow, seed)
            model.random, work = np.random.RandomState(seed), np.zeros(DIM, np.float32)
            model.running_training_loss = 0.0
            if cbow:
                word2vec_inner.train_batch_cbow(model, [SENTENCE], ALPHA, work, np.zeros(DIM, np.float32), True)
            else:
                word2vec_inner.train_batch_sg(model, [SENTENCE], ALPHA, work, True)
            arrays[f"{name}.input.after"], arrays[f"{name}.output.after"] = model.wv.vectors.copy(), output.copy()
            arrays[f"{name}.loss"] = np.array([model.running_training_loss], np.float32)
            for part, key in enumerate(("sources", "rows", "signs")):
                flat = [row[part] for row in made]
                arrays[f"{name}.{key}"] = np.array(
                    [x for row in flat for x in row], np.float32 if part == 2 else np.int32
                )
                arrays[f"{name}.{key}.lengths"] = np.array([len(row) for row in flat], np.int32)
            counts = np.array([model.wv.get_vecattr(word, "count") for word in model.wv.index_to_key], np.int64)
            if hs:
                arrays["counts"] = counts
                arrays["code_lengths"] = np.array([len(model.wv.get_vecattr(w, "code")) for w in model.wv.index_to_key])
            else:
                arrays["cum_table"] = model.cum_table.astype(np.int64)
    sampled = Word2Vec(TEXT, vector_size=DIM, min_count=1, sample=0.02, workers=1, epochs=1)
    arrays["kept"] = np.array([sampled.wv.get_vecattr(w, "sample_int") for w in sampled.wv.index_to_key], np.int64)
    save_file(arrays, HERE / "word2vec.safetensors")
    print({k: v.shape for k, v in arrays.items()})


if __name__ == "__main__":
    main()
