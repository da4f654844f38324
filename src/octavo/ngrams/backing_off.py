"""Katz back-off and linear interpolation, the two older ways to use shorter contexts; the table of all smoothings."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from octavo.errors import ConfigError, DataError
from octavo.ngrams.smoothing import (
    AddK,
    Arpa,
    KneserNey,
    MaximumLikelihood,
    ModifiedKneserNey,
    Smoothing,
    StupidBackoff,
    histogram,
    totals,
)
from octavo.schema import Config, one_of

FULL = 1e-9  # a rest of mass below this is rounding


class Katz(Smoothing):
    """``p(w | h) = d_c c(h w) / c(h)  if seen, else  alpha(h) p(w | h')``, with Good-Turing discounts d_c for small c.

    ``d_c = (c*/c - (m+1) n_{m+1}/n_1) / (1 - (m+1) n_{m+1}/n_1)`` with ``c* = (c+1) n_{c+1}/n_c`` for c up to m, 1
    above; alpha(h) gives the mass that is left to the tokens not seen after h. Text too small for these has m lowered,
    and in the end half a count taken from each. Where no count is discounted the total is raised by one, so that
    something is left; where every token was seen nothing is taken.

    Source: Katz 1987, "Estimation of probabilities from sparse data"; the total raised by one: SRILM,
    ngram-discount(7).
    """

    class Config(Config):
        """Good-Turing discounts, and the mass that is left to shorter contexts."""

        kind: Literal["katz"] = "katz"
        largest: int = Field(default=7, ge=1, le=9, description="The largest count that is discounted.")

    interpolated = False

    def prepare(self, counts, order, held_out, outcomes):
        self.outcomes = outcomes
        self.discounts = [
            good_turing(histogram(counts.levels[k - 1].raw, counts), self.config.largest) for k in range(1, order + 1)
        ]

    def mix(self, order, counts, context, n_contexts, lower):
        discounts = self.discounts[order - 1]
        total = totals(counts, context, n_contexts)
        continued = total > 0
        n_seen = np.bincount(context[counts > 0], minlength=n_contexts)
        small = np.bincount(context[(counts > 0) & (counts < len(discounts))], minlength=n_contexts)
        rest = 1 - totals(np.where(counts > 0, lower, 0.0), context, n_contexts)
        full = (n_seen >= self.outcomes.n) | (rest < FULL)
        total += continued & (small == 0) & ~full
        discount = discounts[np.minimum(counts, len(discounts) - 1)]
        discount = np.where((counts >= len(discounts)) | full[context], 1.0, discount)
        prob = discount * counts / total[context]
        left = np.clip(1 - totals(prob, context, n_contexts), 0, None)
        gamma = np.ones(n_contexts)
        np.divide(left, rest, out=gamma, where=continued & ~full)
        gamma[continued & full] = 0.0
        return prob, gamma

    def unigrams(self, counts, outcomes):
        prob, gamma = super().unigrams(counts, outcomes)
        return np.where(counts > 0, prob, gamma * outcomes.uniform), gamma

    def said(self):
        return {"discounts": [discounts[1:].tolist() for discounts in self.discounts]}


def good_turing(of_counts: np.ndarray, largest: int) -> np.ndarray:
    """(m + 1,) factors of counts 0..m (that of 0 is 1), m <= ``largest``; every one in (0, 1]."""
    n = of_counts[:11].astype(np.float64)
    for m in range(largest, 1, -1):
        if np.any(n[1 : m + 2] == 0):
            continue
        c = np.arange(1, m + 1)
        common = (m + 1) * n[m + 1] / n[1]
        factors = ((c + 1) * n[2 : m + 2] / (n[1 : m + 1] * c) - common) / (1 - common) if common < 1 else np.zeros(1)
        if np.all((factors > 0) & (factors <= 1)):
            return np.concatenate([[1.0], factors])
    c = np.arange(1, largest + 1)
    return np.concatenate([[1.0], (c - 0.5) / c])


class Interpolated(Smoothing):
    """``p(w | h) = m_k c(h w) / c(h) + (1 - m_k) p(w | h')``: every order mixed in, weights learned on held-out text.

    With all contexts seen this is the linear mixture of all orders with weights that sum to 1. After a context never
    seen the order below stands alone. The weights are found by EM: how far down a token's probability was likely to
    come from gives the next weights, and the likelihood of the held-out text never falls.

    Source: Jelinek & Mercer 1980; EM: Chen & Goodman 1998, section 2.4 (one weight an order, no buckets).
    """

    class Config(Config):
        """Relative frequencies of all orders, mixed with weights learned on held-out text."""

        kind: Literal["interpolated"] = "interpolated"
        weights: tuple[float, ...] | None = Field(
            default=None, description="Given weights of orders 1, 2, ... against those below; then nothing is learned."
        )
        steps: int = Field(default=100, ge=1, description="Steps of EM at most.")

    def prepare(self, counts, order, held_out, outcomes):
        self.trace: list[float] = []
        if self.config.weights is not None:
            if len(self.config.weights) < order or not all(0 <= w < 1 for w in self.config.weights):
                raise ConfigError(
                    f"weights = {self.config.weights} do not serve order {order}", fix="give each order one in 0..1"
                )
            self.weights = np.array(self.config.weights[:order])
            return
        if held_out is None or len(held_out[0]) < 2:
            raise ConfigError(
                "smoothing interpolated learns its weights on held-out text, and was given none",
                fix="give held_out documents, or smoothing.weights",
            )
        seen, probs = _relative_frequencies(counts, order, held_out, outcomes)
        self.weights, self.trace = learn_weights(seen, probs, self.config.steps)

    def mix(self, order, counts, context, n_contexts, lower):
        total = totals(counts, context, n_contexts)
        gamma = np.where(total > 0, 1 - self.weights[order - 1], 1.0)
        return (1 - gamma)[context] * counts / total[context] + gamma[context] * lower, gamma

    def said(self):
        return {"weights": self.weights.tolist(), "held_out_nats_per_token": [-value for value in self.trace]}


def _relative_frequencies(counts, order, held_out, outcomes) -> tuple[np.ndarray, np.ndarray]:
    """(orders + 1, T) whether the context was continued in training, and c(h w) / c(h); row 0 is uniform."""
    from octavo.ngrams.counting import places
    from octavo.ngrams.model import NGram

    model = NGram.of_counts(NGram.Config(order=order, smoothing="mle", never=outcomes.never), counts)
    tokens, place = held_out[0].astype(np.int64), places(held_out[1])
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= counts.vocab_size):
        raise DataError("held-out text has a token id outside the vocabulary", fix="encode it anew")
    seen, probs = np.zeros((order + 1, len(tokens)), bool), np.zeros((order + 1, len(tokens)))
    seen[:2] = True
    probs[0], probs[1] = outcomes.uniform[tokens], model.levels[0].prob[tokens]
    for k, at, context, found in model.walk(tokens, place):
        if len(model.levels[k - 1].prob):
            seen[k, at] = (context >= 0) & (model.levels[k - 1].gamma[context] == 0)
            probs[k, at] = np.where(found >= 0, model.levels[k - 1].prob[found], 0.0)
    target = (place > 0) & (probs[0] > 0)
    return seen[:, target], probs[:, target]


def learn_weights(seen: np.ndarray, probs: np.ndarray, steps: int) -> tuple[np.ndarray, list[float]]:
    """EM for ``q_k = m_k probs_k + (1 - m_k) q_{k-1}`` where seen, else q_{k-1}.

    Args:
        seen, probs: (orders + 1, T); row 0 is the distribution the recursion ends in.

    Returns:
        (orders,) weights, and the mean log-likelihood before each step and after the last.
    """
    order = len(probs) - 1
    weights = np.full(order, 0.5)
    trace: list[float] = []
    for step in range(steps + 1):
        q = [probs[0]]
        for k in range(1, order + 1):
            m = weights[k - 1]
            q.append(np.where(seen[k], m * probs[k] + (1 - m) * q[-1], q[-1]))
        trace.append(float(np.log(q[-1]).mean()))
        if step == steps or (step and trace[-1] - trace[-2] < 1e-7):
            break
        reach = np.ones(probs.shape[1])
        new = weights.copy()
        for k in range(order, 0, -1):
            arrived = float(reach[seen[k]].sum())
            stopped = np.where(seen[k], reach * weights[k - 1] * probs[k] / q[k], 0.0)
            if arrived > 0:
                new[k - 1] = min(float(stopped.sum()) / arrived, 1 - 1e-9)
            reach = reach - stopped
        weights = new
    return weights, trace


SMOOTHINGS: dict[str, type[Smoothing]] = {
    "mle": MaximumLikelihood,
    "add_k": AddK,
    "katz": Katz,
    "stupid_backoff": StupidBackoff,
    "interpolated": Interpolated,
    "kneser_ney": KneserNey,
    "modified_kneser_ney": ModifiedKneserNey,
    "arpa": Arpa,
}
SmoothingConfig = one_of(SMOOTHINGS)
