"""Smoothings: how counts become probabilities. One class each, chosen by ``kind`` from the table in ``backing_off``.

All of them are written in one form. An order has a probability for every n-gram seen in the text, and a weight
``gamma`` for every context; with h' the context h without its first token,

    p_k(w | h) = prob(h w)  where h w was seen, else  gamma(h) p_{k-1}(w | h'),

and p_k(. | h) = p_{k-1}(. | h') for a context h that nothing was seen to follow. The recursion ends in the uniform
distribution p_0. What differs is prob and gamma.

Source: Chen & Goodman 1998, "An empirical study of smoothing techniques for language modeling", section 2; the others
are named where they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from octavo.errors import ConfigError
from octavo.ngrams.counting import NGramCounts
from octavo.schema import Config

BLOCK_BYTES = 160  # allocated per n-gram while one block of an order is smoothed


@dataclass(slots=True)
class Smoothed:
    """One order of a model.

    Attributes:
        prob: (n,) float64, p_k(last token | the tokens before it) of every seen n-gram.
        gamma: (contexts,) float64, weight of order k-1 after a context (order 1: of the uniform distribution).
        best: (contexts,) int32, the most probable next token after each context; -1 where that is not known.
        best_prob: (contexts,) its probability; an upper bound where it is not known.
    """

    prob: np.ndarray
    gamma: np.ndarray
    best: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    best_prob: np.ndarray = field(default_factory=lambda: np.empty(0))


class Smoothing:
    """What turns the counts of one order, and the probabilities of the order below, into probabilities."""

    class Config(Config):
        kind: str

    normalised: ClassVar[bool] = True
    """Whether the probabilities of all tokens after a context sum to 1."""
    continuation: ClassVar[bool] = False
    """Whether orders below the highest are counted by distinct tokens before them."""
    flat: ClassVar[bool] = False
    """Whether an unseen n-gram gets its share of the uniform distribution rather than of the order below."""
    interpolated: ClassVar[bool] = True
    """Whether a seen n-gram has at least what it would have if it were unseen."""
    missing: float = 1.0
    """Weight of the order below after a context that nothing was seen to follow."""

    def __init__(self, config: Any):
        self.config = config

    def prepare(self, counts: NGramCounts, order: int, held_out: Any, outcomes: Outcomes) -> None:
        """Estimate what the whole model shares: discounts, weights."""

    def unigrams(self, counts: np.ndarray, outcomes: Outcomes) -> tuple[np.ndarray, float]:
        """(V,) probabilities of single tokens, and the weight of the uniform distribution in them."""
        context = np.zeros(len(counts), np.int64)
        prob, gamma = self.mix(1, counts, context, 1, outcomes.uniform)
        return prob, float(gamma[0])

    def mix(
        self, order: int, counts: np.ndarray, context: np.ndarray, n_contexts: int, lower: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """prob (n,) and gamma (contexts,) of a block of whole contexts.

        Args:
            counts: (n,) of the n-grams seen (at order 1 also zeros).
            context: (n,) 0..n_contexts-1, ascending.
            lower: (n,) p_{k-1}(w | h').
        """
        raise ConfigError(f"smoothing {type(self).__name__} has no formula", fix="write its `mix`")

    def said(self) -> dict[str, Any]:
        """Figures estimated on the way, for people."""
        return {}


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The tokens that can be predicted: all of the vocabulary but ``never`` (the begin of a document).

    Attributes:
        uniform: (V,) float64, the distribution below order 1.
    """

    vocab_size: int
    never: int | None
    uniform: np.ndarray
    n: int

    @classmethod
    def of(cls, vocab_size: int, never: int | None) -> Outcomes:
        n = vocab_size - (never is not None)
        uniform = np.full(vocab_size, 1 / n)
        if never is not None:
            uniform[never] = 0
        return cls(vocab_size, never, uniform, n)

    @property
    def first(self) -> int:
        return int(self.uniform.argmax())


def totals(counts: np.ndarray, context: np.ndarray, n_contexts: int) -> np.ndarray:
    """(contexts,) float64: how often something followed each context (or what else ``counts`` says, summed)."""
    return np.bincount(context, weights=counts, minlength=n_contexts).astype(np.float64, copy=False)


class MaximumLikelihood(Smoothing):
    """``p(w | h) = c(h w) / c(h)``: relative frequencies.

    An unseen n-gram after a seen context has probability 0. After a context that was never seen the formula has no
    value; then the longest seen end of the context counts.
    """

    class Config(Config):
        """Relative frequencies."""

        kind: Literal["mle"] = "mle"

    def mix(self, order, counts, context, n_contexts, lower):
        total = totals(counts, context, n_contexts)
        return counts / total[context], np.where(total > 0, 0.0, 1.0)


class AddK(Smoothing):
    """``p(w | h) = (c(h w) + k) / (c(h) + k V)``: k = 1 is Laplace's rule, another k Lidstone's.

    Only the highest order counts (at a document's start the longest context there is); a context never seen gives the
    uniform distribution.
    """

    class Config(Config):
        """Every count raised by k."""

        kind: Literal["add_k"] = "add_k"
        k: float = Field(default=1.0, gt=0, description="Added to every count; 1 is Laplace's rule.")

    flat = True

    def prepare(self, counts, order, held_out, outcomes):
        self.added = self.config.k * outcomes.n
        self.never = outcomes.never

    def mix(self, order, counts, context, n_contexts, lower):
        total = totals(counts, context, n_contexts) + self.added
        return (counts + self.config.k) / total[context], self.added / total

    def unigrams(self, counts, outcomes):
        prob, gamma = super().unigrams(counts, outcomes)
        if outcomes.never is not None:
            prob[outcomes.never] = 0
        return prob, gamma


class StupidBackoff(Smoothing):
    """``S(w | h) = c(h w) / c(h)  if seen, else  alpha S(w | h')``: scores, not probabilities; they do not sum to 1.

    Source: Brants et al. 2007, "Large language models in machine translation", section 4.
    """

    class Config(Config):
        """Relative frequencies, and a constant times those of the shorter context: not normalised."""

        kind: Literal["stupid_backoff"] = "stupid_backoff"
        alpha: float = Field(default=0.4, gt=0, le=1, description="Weight of each shorter context.")

    normalised, interpolated = False, False

    def __init__(self, config):
        super().__init__(config)
        self.missing = config.alpha

    def mix(self, order, counts, context, n_contexts, lower):
        total = totals(counts, context, n_contexts)
        return counts / total[context], np.full(n_contexts, self.config.alpha)

    def unigrams(self, counts, outcomes):
        return counts / counts.sum(), 0.0


class KneserNey(Smoothing):
    """``p(w | h) = max(a(h w) - D, 0) / a(h .) + gamma(h) p(w | h')``, gamma(h) = sum of D / a(h .).

    The adjusted count a is the raw count at the highest order and the number of distinct preceding tokens below it; an
    n-gram that begins a document has nothing before it and keeps its raw count (as in KenLM).

    Source: Kneser & Ney 1995, "Improved backing-off for m-gram language modeling"; interpolated: Chen & Goodman 1998,
    section 2.7. Differs from ``nltk.lm.KneserNeyInterpolated``: there the discount is one constant (0.1) for every
    order, the unigram level is neither discounted nor mixed with the uniform distribution (an unseen token has
    probability 0), and lower-order n-grams that begin a document have continuation count 0. With
    ``discounts=(0, d, ..., d)`` both agree on every full context.
    """

    class Config(Config):
        """One discount per order, from the counts of counts."""

        kind: Literal["kneser_ney"] = "kneser_ney"
        discounts: tuple[float, ...] | None = Field(
            default=None, description="One given discount per order, from 1 on, in place of the estimated ones."
        )

    continuation = True
    modified: ClassVar[bool] = False

    def prepare(self, counts, order, held_out, outcomes):
        given = self.config.discounts
        if given is not None and len(given) < order:
            raise ConfigError(f"{len(given)} discounts do not serve order {order}", fix="give one for every order")
        self.discounts, self.fallback = [], []
        for k in range(1, order + 1):
            if given is not None:
                one = given[k - 1]
                self.discounts.append((one, one, one) if isinstance(one, float) else tuple(one))
                continue
            of_counts = histogram(counts.adjusted(k) if k < order else counts.levels[k - 1].raw, counts)
            found = closed_form(of_counts, self.modified)
            if found is None:
                self.fallback.append(k)
            self.discounts.append(found or ((0.5, 1.0, 1.5) if self.modified else (0.5, 0.5, 0.5)))

    def mix(self, order, counts, context, n_contexts, lower):
        discount = np.array([0.0, *self.discounts[order - 1]])[np.minimum(counts, 3)]
        total = totals(counts, context, n_contexts)
        continued = total > 0
        gamma = totals(discount, context, n_contexts)
        np.divide(gamma, total, out=gamma, where=continued)
        gamma[~continued] = 1.0
        return np.maximum(counts - discount, 0) / total[context] + gamma[context] * lower, gamma

    def said(self):
        return {"discounts": [list(d) for d in self.discounts], "fallback_orders": self.fallback}


class ModifiedKneserNey(KneserNey):
    """``p(w | h) = max(a(h w) - D_c, 0) / a(h .) + gamma(h) p(w | h')``, with discounts D_1, D_2 and D_3+ by the count.

    Source: Chen & Goodman 1998, section 3. It is what KenLM's ``lmplz`` estimates; where the text is too small for the
    discounts, 0.5, 1 and 1.5 are used (its ``--discount_fallback``).
    """

    class Config(Config):
        """Three discounts per order (adjusted counts 1, 2, 3 or more): the best of these on most text."""

        kind: Literal["modified_kneser_ney"] = "modified_kneser_ney"
        discounts: tuple[tuple[float, float, float], ...] | None = Field(
            default=None, description="Three given discounts per order, from 1 on, in place of the estimated ones."
        )

    modified = True


def histogram(values: np.ndarray, counts: NGramCounts) -> np.ndarray:
    """(12,) how many of ``values`` are 0, 1, ... 10, and more."""
    found = np.zeros(12, np.int64)
    step = counts.scratch.block(32, len(values))
    for first in range(0, len(values), step):
        found += np.bincount(np.minimum(values[first : first + step], 11), minlength=12)
    return found


def closed_form(of_counts: Sequence[int] | np.ndarray, modified: bool) -> tuple[float, float, float] | None:
    """Discounts from the counts of counts n1..n4: D = n1 / (n1 + 2 n2), or Chen & Goodman's three.

    None where too little text leaves some of them undefined or outside (0, c].
    """
    n1, n2, n3, n4 = (int(n) for n in of_counts[1:5])
    if not modified:
        d = n1 / (n1 + 2 * n2) if n1 and n2 else 0.0
        return (d, d, d) if d else None
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        three = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(0 < d <= c for c, d in enumerate(three, start=1)):
            return three
    return None


class Arpa(Smoothing):
    """``p(w | h) = prob(h w)  if listed, else  gamma(h) p(w | h')``: what an ARPA file says, however it was made."""

    class Config(Config):
        """Probabilities and back-off weights read from an ARPA file; nothing can be fitted with it."""

        kind: Literal["arpa"] = "arpa"

    interpolated = False

    def prepare(self, counts, order, held_out, outcomes):
        raise ConfigError("smoothing arpa is of models that were read, not fitted", fix="use modified_kneser_ney")
