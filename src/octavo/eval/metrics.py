"""Bits per byte, perplexity and token accuracy on held-out documents, for any model that predicts tokens.

What is scored: every text token of a document given ``bos`` and the tokens before it. ``eos`` is scored too but
reported apart, because it has no bytes. Neural models and n-grams are scored on the same tokens.

Bytes are counted through ``Tokenizer.token_bytes``: a token that is half of a Chinese character counts its own
raw bytes, never those of a replacement character, so the sum over a document is the length of its UTF-8 text.

    bits per byte = nats / ln 2 / bytes        perplexity = exp(nats / tokens) = (prod p)^(-1 / tokens)

Bits per byte compares across tokenizers; perplexity does not, so it always stands next to its token count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from octavo.errors import ConfigError, DataError, NumericError
from octavo.ngrams.counting import flatten
from octavo.ngrams.model import NGram

if TYPE_CHECKING:
    from torch import Tensor

Scorer = Callable[[Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]]
"""Documents ``[bos] tokens [eos]`` -> (log-probability in nats, was it the most probable token), both one value
per token but each document's first, documents one after the other."""

GROUP_TOKENS = 1 << 18
BATCH_LOGITS = 1 << 25
CHUNK_LOGITS = 1 << 23


class TokenBytes(Protocol):
    """The part of a tokenizer that counting bytes needs."""

    vocab_size: int

    def token_bytes(self, id: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over scored documents; every figure is derived from them.

    Attributes:
        n_documents: documents scored.
        n_tokens, n_bytes: text tokens (``eos`` not counted) and their UTF-8 bytes.
        nats: minus the sum of ln p over the text tokens.
        n_hits: text tokens that were the most probable one.
        n_eos, eos_nats: the same sum for the ``eos`` that ends each document.
    """

    n_documents: int = 0
    n_tokens: int = 0
    n_bytes: int = 0
    nats: float = 0.0
    n_hits: int = 0
    n_eos: int = 0
    eos_nats: float = 0.0

    def __add__(self, other: Scores) -> Scores:
        return Scores(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    @property
    def bits_per_byte(self) -> float:
        """Bits needed per UTF-8 byte of text; NaN without bytes."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.n_tokens if self.n_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean of -ln p over the text tokens: the branching factor."""
        return math.exp(self.nats_per_token)

    @property
    def accuracy(self) -> float:
        """Share of text tokens that were the most probable one."""
        return self.n_hits / self.n_tokens if self.n_tokens else math.nan

    def figures(self) -> dict[str, Any]:
        """All figures and the counts they stand on, ready for JSON."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "perplexity_per_token": self.perplexity,
            "token_accuracy": self.accuracy,
            "nats_per_token": self.nats_per_token,
            "eos_nats": self.eos_nats / self.n_eos if self.n_eos else None,
            "documents": self.n_documents,
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
        }


def token_byte_lengths(tokenizer: TokenBytes) -> np.ndarray:
    """(V,) int64: how many bytes of text each token id stands for (0 for specials)."""
    return np.array([len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)], np.int64)


def score_documents(scorer: Scorer, documents: Iterable[np.ndarray], byte_lengths: np.ndarray, eos: int) -> Scores:
    """Score documents ``[bos] tokens [eos]`` (the ``eos`` may be missing), a bounded number at a time.

    Args:
        scorer: ``ngram_scorer`` or ``neural_scorer``.
        documents: (T,) integer arrays; the first token of each is given, not scored.
        byte_lengths: (V,) from ``token_byte_lengths``.
        eos: id of the token that ends a document, -1 where there is none.

    Raises:
        DataError: no token to score.
        NumericError: a log-probability that is not a finite number.
    """
    total = Scores()
    for group in _groups(documents):
        log_probs, hits = scorer(group)
        tokens, offsets = flatten(group)
        if not np.all(np.isfinite(log_probs)):
            raise NumericError("a held-out token has a log-probability that is not finite", fix="check the model")
        first = np.zeros(len(tokens), bool)
        first[offsets[:-1]] = True
        last = np.zeros(len(tokens), bool)
        last[offsets[1:] - 1] = True
        end = (last & (tokens == eos))[~first]
        text = ~end
        total += Scores(
            n_documents=len(group),
            n_tokens=int(text.sum()),
            n_bytes=int(byte_lengths[tokens[~first][text]].sum()),
            nats=-float(log_probs[text].sum(dtype=np.float64)),
            n_hits=int(hits[text].sum()),
            n_eos=int(end.sum()),
            eos_nats=-float(log_probs[end].sum(dtype=np.float64)),
        )
    if not total.n_tokens:
        raise DataError("the held-out documents have no text to score", fix="hold out more documents")
    return total


def ngram_scorer(model: NGram) -> Scorer:
    """The scorer of an n-gram model."""
    return lambda documents: model.score(*flatten(documents))


def own_scorer(model: Any) -> Scorer | None:
    """The scorer of a predictor that has a ``score`` of its own; None of one whose logits have to be asked for."""
    score = getattr(model, "score", None)
    return None if score is None else lambda documents: score(*flatten(documents))


def neural_scorer(
    logits_fn: Callable[[Tensor], Tensor], max_seq_len: int, stride: int | None = None, *, vocab_size: int
) -> Scorer:
    """The scorer of a causal neural model.

    A document longer than ``max_seq_len`` is read in windows that advance by ``stride`` tokens (the last one ends
    with the document). Every token is scored once, in the first window that holds it, so beyond the first window it
    has at least ``max_seq_len - stride`` tokens of context. Rows of a batch are padded on the right, which a causal
    model does not see.

    Args:
        logits_fn: tokens (B, T) int64 -> logits (B, T, V), T <= max_seq_len.
        max_seq_len: the longest input in tokens.
        stride: 1..max_seq_len; half of ``max_seq_len`` by default.
        vocab_size: V, from which the size of a batch follows.

    Numerics: logits are widened to float32 before the softmax, its sum is taken in float32, totals in float64.
    """
    stride = max(1, max_seq_len // 2) if stride is None else stride
    if not 1 <= stride <= max_seq_len:
        raise ConfigError(
            f"eval.stride = {stride} must lie in 1..max_seq_len = {max_seq_len}", fix=f"use {max(1, max_seq_len // 2)}"
        )
    batch_tokens = max(max_seq_len, BATCH_LOGITS // vocab_size)

    def score(documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        tokens, offsets = flatten(documents)
        log_probs = np.empty(len(tokens) - len(documents), np.float64)
        hits = np.empty(len(log_probs), bool)
        rows = [
            Window(int(offset) + start, int(offset) + stop, skip, number)
            for number, (offset, length) in enumerate(zip(offsets, np.diff(offsets)))
            for start, stop, skip in windows(int(length) - 1, max_seq_len, stride)
        ]
        rows.sort(key=lambda row: row.start - row.stop)
        while rows:
            n_rows = max(1, batch_tokens // (rows[0].stop - rows[0].start))
            _score_batch(logits_fn, tokens, rows[:n_rows], log_probs, hits)
            rows = rows[n_rows:]
        return log_probs, hits

    return score


class Window(NamedTuple):
    """Input tokens start..stop of the stream; predictions are taken from ``start + skip`` on."""

    start: int
    stop: int
    skip: int
    document: int


def windows(n_inputs: int, max_seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, skip) of the windows over ``n_inputs`` tokens; the parts after ``skip`` tile them."""
    scored, start = 0, 0
    while scored < n_inputs:
        stop = min(start + max_seq_len, n_inputs)
        start = max(0, stop - max_seq_len)
        yield start, stop, scored - start
        scored = stop
        start += stride


def _score_batch(
    logits_fn: Callable[[Tensor], Tensor],
    tokens: np.ndarray,
    rows: Sequence[Window],
    log_probs: np.ndarray,
    hits: np.ndarray,
) -> None:
    """Fill in the values of one batch of windows."""
    import torch

    inputs = torch.zeros(len(rows), max(row.stop - row.start for row in rows), dtype=torch.int64)
    for row, window in zip(inputs, rows):
        row[: window.stop - window.start] = torch.from_numpy(tokens[window.start : window.stop])
    with torch.inference_mode():
        logits = logits_fn(inputs)
        step = max(1, CHUNK_LOGITS // logits.shape[-1])
        for row, window in zip(logits, rows):
            for at in range(window.start + window.skip, window.stop, step):
                stop = min(at + step, window.stop)
                piece = row[at - window.start : stop - window.start].float()
                target = torch.from_numpy(tokens[at + 1 : stop + 1].astype(np.int64)).to(piece.device)
                value = piece.gather(-1, target[:, None])[:, 0] - piece.logsumexp(-1)
                # The result has no entry for a document's first token, so a target at p of document d is at p - d - 1.
                out = slice(at - window.document, stop - window.document)
                log_probs[out] = value.cpu().numpy()
                hits[out] = (piece.argmax(-1) == target).cpu().numpy()


def _groups(documents: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Lists of documents with something to score, of about ``GROUP_TOKENS`` tokens each."""
    group: list[np.ndarray] = []
    size = 0
    for document in documents:
        if len(document) < 2:
            continue
        group.append(document)
        size += len(document)
        if size >= GROUP_TOKENS:
            yield group
            group, size = [], 0
    if group:
        yield group
