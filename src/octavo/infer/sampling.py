"""From logits to the next token: temperature, truncation, penalties, one seeded choice.

All functions are pure and work on logits (B, V); a token that cannot be chosen has logit ``-inf``. The order
is the one of transformers' ``generate``: penalties, bias, temperature, top-k, top-p, min-p, typical.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from octavo.errors import NumericError
from octavo.infer.said import counts, distinct, further
from octavo.schema import Config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GREEDY_BELOW = 1e-6
"""Temperatures under this are argmax: the limit, without dividing by a number float32 calls zero."""


class SamplingConfig(Config):
    """How tokens are chosen and when to stop."""

    temperature: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=True,
        description="0: argmax, 1: the model's own distribution, inf: uniform.",
    )
    temperature_end: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Anneal: the temperature moves to this one."
    )
    temperature_tokens: int = Field(default=64, ge=1, description="Tokens after which temperature_end is reached.")
    temperature_path: Literal["linear", "geometric"] = Field(
        default="linear", description="Equal steps of the temperature, or of its logarithm."
    )
    top_k: int = Field(default=0, ge=0, description="Keep the k most probable tokens; 0 keeps all.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Keep the fewest tokens with this much probability.")
    min_p: float = Field(default=0.0, ge=0, le=1, description="Drop tokens below this share of the best one.")
    typical_p: float = Field(
        default=1.0, gt=0, le=1, description="Keep the tokens of the most usual surprise with this much probability."
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="CTRL's; 1: off, above 1 repels."
    )
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, description="Subtracted once from produced tokens.")
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, description="Subtracted for every time it was produced.")
    logit_bias: dict[int, float] = Field(default_factory=dict, description="Added to the logit of a token id.")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Row i draws from seed + i; none: random.")
    max_new_tokens: int = Field(default=256, ge=1, description="Tokens to produce at most.")
    stop: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = Field(default=(), description="End texts.")

    @model_validator(mode="after")
    def _path(self) -> Self:
        if self.temperature_end is None:
            return self
        if math.isinf(self.temperature):
            raise ValueError("temperature must be finite where temperature_end is given")
        if self.temperature_path == "geometric" and min(self.temperature, self.temperature_end) < GREEDY_BELOW:
            raise ValueError("a geometric path never reaches 0: give two temperatures above 0, or a linear path")
        return self

    def temperature_at(self, n_produced: int) -> float:
        """The temperature at which the token after ``n_produced`` others is chosen."""
        if self.temperature_end is None:
            return self.temperature
        share = min(n_produced / self.temperature_tokens, 1.0)
        if self.temperature_path == "geometric":
            return self.temperature ** (1 - share) * self.temperature_end**share
        return self.temperature + (self.temperature_end - self.temperature) * share

    @property
    def greedy(self) -> bool:
        """Whether every token is the most probable one."""
        return max(self.temperature, self.temperature_end or 0.0) < GREEDY_BELOW


def with_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits whose softmax is ``p ** (1 / T)``, renormalised; excluded tokens stay excluded.

    T = 0 leaves only the most probable token (the first of equals), T = inf makes all that are left equal.
    """
    if temperature < GREEDY_BELOW:
        best, at = logits.max(-1, keepdim=True)
        return logits.new_full(logits.shape, -math.inf).scatter(-1, at, best - best)  # 0, or NaN where there is one
    above = logits - logits.amax(-1, keepdim=True)  # at most 0, so that a small T cannot overflow
    return (above / temperature).masked_fill(logits == -math.inf, -math.inf)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Exclude all but the ``k`` largest logits; ties with the k-th stay. 0 keeps all."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k, -1).values[..., -1:], -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus: keep the most probable tokens until their probability reaches ``p``; at least one stays.

    Source: Holtzman et al. 2019, section 3.1.
    """
    if p >= 1:
        return logits
    ascending, order = logits.sort(-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Exclude tokens less probable than ``p`` times the most probable one. Source: Nguyen et al. 2024."""
    if p <= 0:
        return logits
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -math.inf)


def keep_typical(logits: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose surprise is nearest to the expected one until their probability reaches ``mass``.

    The surprise of a token is ``-ln p``, the expected one is the entropy ``H``; the nearest by ``|-ln p - H|`` come
    first, those as near as the last stay too. The most probable token may go. Source: Meister et al. 2023, section 4.
    """
    import torch

    if mass >= 1:
        return logits
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    distance = (-log_p - torch.special.entr(p).sum(-1, keepdim=True)).abs()  # inf where a token is excluded
    ascending, order = distance.sort(-1)
    last = (p.gather(-1, order).cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > ascending.gather(-1, last), -math.inf)


def penalise_repetition(logits: Tensor, seen: Sequence[Sequence[int] | Tensor], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of the ids ``seen`` in each row (prompt included), once each.

    Source: Keskar et al. 2019 (CTRL), section 4.1, in transformers' form that always repels.
    """
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, seen, strict=True):
        index = _index(row, ids)
        values = row[index]
        row[index] = values.where(values <= 0, values / penalty).where(values > 0, values * penalty)
    return logits


def penalise_produced(logits: Tensor, produced: Sequence[Sequence[int]], presence: float, frequency: float) -> Tensor:
    """Subtract ``presence + frequency * count`` from the logit of every produced token (the OpenAI definition)."""
    if not presence and not frequency:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, produced, strict=True):
        if said := counts(ids):
            row[_index(row, list(said))] -= row.new_tensor([presence + frequency * n for n in said.values()])
    return logits


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Add a number to the logits of some ids."""
    if not bias:
        return logits
    logits = logits.clone()
    logits[..., list(bias)] += logits.new_tensor(list(bias.values()))
    return logits


def with_penalties(
    logits: Tensor, config: SamplingConfig, prompts: Sequence[Sequence[int]], produced: Sequence[Sequence[int]]
) -> Tensor:
    """What comes before the temperature: penalties and bias."""
    if config.repetition_penalty != 1:
        seen = [_together(distinct(prompt), distinct(ids)) for prompt, ids in zip(prompts, produced, strict=True)]
        logits = penalise_repetition(logits, seen, config.repetition_penalty)
    logits = penalise_produced(logits, produced, config.presence_penalty, config.frequency_penalty)
    return add_bias(logits, config.logit_bias)


def shape(
    logits: Tensor, config: SamplingConfig, prompts: Sequence[Sequence[int]], produced: Sequence[Sequence[int]]
) -> Tensor:
    """All of the above in order: logits (B, V) -> logits (B, V) whose softmax is drawn from."""
    import torch

    logits = with_penalties(logits, config, prompts, produced)
    if config.temperature_end is None:
        logits = with_temperature(logits, config.temperature)
    else:
        at = [config.temperature_at(len(ids)) for ids in produced]
        logits = torch.stack([with_temperature(row, t) for row, t in zip(logits, at, strict=True)])
    logits = keep_top_p(keep_top_k(logits, config.top_k), config.top_p)
    return keep_typical(keep_min_p(logits, config.min_p), config.typical_p)


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row: logits (B, V) -> (B,) int64, by inverting the cumulative distribution.

    Each row takes exactly one number from its own generator, so its tokens do not depend on its neighbours
    in the batch. In float64, where the largest uniform number times the total stays below the total.

    Raises:
        NumericError: a row has a NaN, or nothing that can be chosen.
    """
    return draw_from(logits.double().softmax(-1), generators)


def draw_from(weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """``draw`` by weights that need not sum to one: (B, V) float64 -> (B,) int64."""
    import torch

    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    if not bool((total > 0).all()):  # a NaN fails this too
        raise _nothing(int((~(total > 0)).nonzero()[0]))
    uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    threshold = uniform.to(total.device) * total
    return torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]


def choice_settings(config: SamplingConfig) -> tuple[object, ...]:
    """All by which ``choose`` tells configurations apart: rows with equal ones can be chosen for together."""
    apart = {"seed", "max_new_tokens", "stop"}
    values = {name: getattr(config, name) for name in type(config).model_fields if name not in apart}
    return tuple(tuple(value.items()) if isinstance(value, dict) else value for value in values.values())


def choose(
    logits: Tensor,
    config: SamplingConfig,
    prompts: Sequence[Sequence[int]],
    produced: Sequence[Sequence[int]],
    streams: Sequence[torch.Generator],
) -> list[int]:
    """The next token of each row: logits (B, V) shaped by ``config``, then drawn; the best one at temperature 0.

    Raises:
        NumericError: as ``draw``.
    """
    import torch

    if not config.greedy:
        return draw(shape(logits, config, prompts, produced), streams).tolist()
    best, tokens = with_penalties(logits, config, prompts, produced).max(-1)
    if not bool(torch.isfinite(best).all()):  # max gives NaN where there is one
        raise _nothing(int((~torch.isfinite(best)).nonzero()[0]))
    return tokens.tolist()


def guess(
    logits: Tensor,
    config: SamplingConfig,
    prompts: Sequence[Sequence[int]],
    produced: Sequence[Sequence[int]],
    streams: Sequence[torch.Generator],
) -> tuple[list[int], Tensor | None]:
    """``choose`` for a draft: the tokens, and what they were drawn from, (B, V) float64; None where nothing is drawn.

    Raises:
        NumericError: as ``draw``.
    """
    if config.greedy:
        return choose(logits, config, prompts, produced, streams), None
    probs = shape(logits, config, prompts, produced).double().softmax(-1)
    return draw_from(probs, streams).tolist(), probs


def judge(
    logits: Tensor,
    draft: Sequence[int],
    config: SamplingConfig,
    prompt: Sequence[int],
    produced: Sequence[int],
    stream: torch.Generator,
    drawn_from: Tensor | None = None,
) -> list[int]:
    """The tokens that a draft leads to: as many of it as are accepted, and one more.

    A draft token is accepted with probability min(1, p/q), p the model's probability of it and q the one it was drawn
    with; where one is not, the next is drawn in proportion to max(0, p - q) over all tokens. So every token has exactly
    the distribution that it has without a draft (Leviathan et al. 2023, section 2.3 and appendix A.1). At temperature 0
    the draft is accepted as far as it is what would be chosen.

    Args:
        logits: (len(draft) + 1, V), after the last known token and after each of the draft.
        stream: takes one number for each token that is judged, and one for the last.
        drawn_from: (len(draft) or more, V), q; None where the draft was not drawn: q is then 1 for each of its tokens.

    Raises:
        NumericError: as ``draw``.
    """
    import torch

    said = [further(produced, draft[:i]) for i in range(len(draft) + 1)]
    prompts = [prompt] * len(said)
    if config.greedy:
        best = choose(logits, config, prompts, said, [stream] * len(said))
        n = next((i for i, token in enumerate(draft) if best[i] != token), len(draft))
        return best[: n + 1]
    probs = shape(logits, config, prompts, said).double().softmax(-1)
    for i, token in enumerate(draft):
        q = 1.0 if drawn_from is None else float(drawn_from[i, token])
        if not float(torch.rand((), generator=stream, dtype=torch.float64)) * q < float(probs[i, token]):
            rest = probs[i].clone()
            if drawn_from is None:
                rest[token] = 0
            else:
                rest = (rest - drawn_from[i]).clamp(min=0)
            if not bool(rest.sum() > 0):  # the two are equal but for rounding
                rest = probs[i]
            return [*draft[:i], int(draw_from(rest[None], [stream])[0])]
    return [*draft, int(draw_from(probs[-1:], [stream])[0])]


def generator(config: SamplingConfig, row: int) -> torch.Generator:
    """The random stream of a row: seed + row, or fresh entropy without a seed."""
    import torch

    stream = torch.Generator()
    if config.seed is None:
        stream.seed()
    else:
        stream.manual_seed((config.seed + row) % 2**63)
    return stream


def _nothing(row: int) -> NumericError:
    return NumericError(
        f"row {row} has no token with a finite logit", fix="check the weights: the model's output is not a number"
    )


def _together(a: Tensor, b: Tensor) -> Tensor:
    import torch

    return torch.cat([a, b])


def _index(row: Tensor, ids: Sequence[int] | Tensor) -> Tensor:
    """The ids as an index into ``row``; one that is there twice does no harm, as it is read before it is written."""
    import torch

    return (ids if isinstance(ids, torch.Tensor) else distinct(ids)).to(row.device)
