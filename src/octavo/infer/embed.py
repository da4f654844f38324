"""Texts as vectors, and the classes a model gives them, batch by batch of texts of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from octavo.errors import UnsupportedError
from octavo.models.heads import Pooling, pool
from octavo.nn.contracts import Inputs
from octavo.tokenizer.frame import frame
from octavo.tokenizer.words import Aligner, rows_of

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

BATCH_TOKENS = 2048  # more do not fit into the cache, and are slower


@torch.no_grad()
def embed(
    model: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    pooling: Pooling = "mean",
    normalise: bool = False,
    max_tokens: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """One vector a text, (N, D) float32, in the order of ``texts``.

    Args:
        pooling: the mean over a text's tokens, or the first or last of them; special tokens stand around and count.
        normalise: to length 1, so that a product of two is their cosine.
        max_tokens: longer texts lose their end; default: what the model reads.
        progress: told how many texts are done.
    """
    limit = max_tokens or model.max_seq_len
    framed = [frame(tokenizer, ids.tolist(), max_tokens=limit) for ids in tokenizer.encode_batch(list(texts))]
    work = partial(_vectors, model, pooling=pooling, normalise=normalise)
    return _by_length(framed, work, model.config.d_model, tokenizer.special.pad or 0, progress)


def embed_in_batches(
    model: Any, texts: Sequence[Sequence[int]], *, pooling: Pooling = "mean", normalise: bool = False, pad: int = 0
) -> Iterator[tuple[list[int], np.ndarray]]:
    """As ``embed``, of token ids as they stand, a batch at a time: which texts, and their vectors (n, D).

    A text without a token is in no batch.
    """
    framed = [(list(ids), [0] * len(ids)) for ids in texts]
    return _batches(framed, partial(_vectors, model, pooling=pooling, normalise=normalise), pad)


def _vectors(model: Any, inputs: Inputs, pooling: Pooling, normalise: bool) -> torch.Tensor:
    assert inputs.valid is not None
    found = pool(model(replace(inputs, token_types=None), needs=("hidden",)).hidden.float(), inputs.valid, pooling)
    return torch.nn.functional.normalize(found, dim=-1) if normalise else found


@torch.no_grad()
def classify(
    model: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_tokens: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """The scores (N, C) float32 of a head of classes over whole texts, or over pairs of them.

    Raises:
        UnsupportedError: the model has no such head.
    """
    classes = model.config.classes
    if classes is None or classes.over != "sequence":
        raise UnsupportedError("the model says no classes of texts", fix="tune one: octavo run classifier")
    limit = max_tokens or model.max_seq_len
    firsts = tokenizer.encode_batch(list(texts))
    seconds = tokenizer.encode_batch(list(pairs)) if pairs is not None else [None] * len(firsts)
    framed = [
        frame(tokenizer, a.tolist(), None if b is None else b.tolist(), max_tokens=limit)
        for a, b in zip(firsts, seconds, strict=True)
    ]
    typed = (model.config.n_token_types or 0) > 1

    def scores(inputs: Inputs) -> torch.Tensor:
        inputs = inputs if typed else replace(inputs, token_types=None)
        return model(inputs, needs=("classes",)).classes.float()

    return _by_length(framed, scores, classes.n, tokenizer.special.pad or 0, progress)


@torch.no_grad()
def tag(
    model: Any,
    tokenizer: Tokenizer,
    sentences: Sequence[Sequence[str]],
    *,
    separator: str = " ",
    pieces: Literal["first", "last"] = "first",
    max_tokens: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[str]]:
    """The tag of every word of every sentence, by a head of classes over tokens.

    Args:
        sentences: as words. One that is too long is read in parts, each of whole words.
        separator: what stands between two words of the text, as in training.
        pieces: which of a word's tokens is asked, as in training.
        max_tokens: of a part, special tokens with it; default: what the model reads.
        progress: told how many sentences are done, or nearly so.

    A word that the vocabulary has no token for gets the first of the tags.

    Raises:
        UnsupportedError: the model has no such head.
    """
    classes = model.config.classes
    if classes is None or classes.over != "token":
        raise UnsupportedError("the model has no classes of tokens", fix="tune one: tune.data.kind=tagged")
    names = classes.labels or tuple(f"LABEL_{i}" for i in range(classes.n))
    rows = rows_of(Aligner(tokenizer, separator=separator), sentences, max_tokens or model.max_seq_len, pieces)

    def said(inputs: Inputs) -> torch.Tensor:
        found = model(replace(inputs, token_types=None), needs=("classes",)).classes.argmax(-1)
        return torch.nn.functional.pad(found, (0, longest - found.shape[1]))

    longest = max((len(row.ids) for row in rows), default=1)
    framed = [(row.ids, [0] * len(row.ids)) for row in rows]
    share = len(sentences) / max(1, len(rows))
    found = _by_length(
        framed, said, longest, tokenizer.special.pad or 0, lambda done: progress(min(len(sentences), int(done * share)))
    )
    out: list[list[str]] = [[names[0]] * len(words) for words in sentences]
    for row, numbers in zip(rows, found.astype(np.int64), strict=True):
        for word, at in zip(row.words, row.read_at, strict=True):
            if at >= 0:
                out[row.sentence][word] = names[numbers[at]]
    return out


def _by_length(
    framed: Sequence[tuple[list[int], list[int]]],
    work: Callable[[Inputs], torch.Tensor],
    width: int,
    pad: int,
    progress: Callable[[int], None],
) -> np.ndarray:
    """What ``work`` makes of each text, (N, width)."""
    out = np.zeros((len(framed), width), np.float32)
    done = sum(1 for ids, _ in framed if not ids)  # a text without a token has nothing but zeros
    for rows, found in _batches(framed, work, pad):
        out[rows] = found
        done += len(rows)
        progress(done)
    return out


def _batches(
    framed: Sequence[tuple[list[int], list[int]]], work: Callable[[Inputs], torch.Tensor], pad: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """What ``work`` makes of the texts, those of similar length together, the longest first."""
    order = sorted((i for i in range(len(framed)) if framed[i][0]), key=lambda i: len(framed[i][0]))
    while order:
        longest = len(framed[order[-1]][0])
        rows = order[-max(1, BATCH_TOKENS // longest) :]
        del order[-len(rows) :]
        tokens, types = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
        valid = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, i in enumerate(rows):
            ids, kinds = framed[i]
            tokens[row, : len(ids)], types[row, : len(ids)] = torch.tensor(ids), torch.tensor(kinds)
            valid[row, : len(ids)] = True
        with torch.no_grad():
            found = work(Inputs(tokens, valid=valid, padding="end", token_types=types)).numpy()
        yield rows, found
