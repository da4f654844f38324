"""Which expert reads which token: scores, choices, capacity, and the losses that spread the tokens.

Letters: N tokens of a batch, E experts, k experts a token. An expert numbered E stands for nobody: padding, and
choices beyond an expert's capacity.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Score = Literal["softmax", "sigmoid"]
Order = Literal["score_first", "top_first"]
GroupScore = Literal["max", "two_largest"]
Over = Literal["row", "batch"]
First = Literal["token", "choice"]


class Assigned(NamedTuple):
    """Who reads what, an entry a pair: ``token``, ``expert`` or E for nobody, ``weight`` of its output; all (M,)."""

    token: Tensor
    expert: Tensor
    weight: Tensor


def scores_of(logits: Tensor, score: Score) -> Tensor:
    """(..., E): softmax over the experts, or each expert's own sigmoid (DeepSeek-V3, equation 15)."""
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


def choose(
    scores: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    n_groups: int = 1,
    groups_per_token: int = 1,
    group_score: GroupScore = "max",
) -> Tensor:
    """The experts of each token, best first: scores (N, E) to (N, k) int64.

    With ``n_groups`` the experts stand in that many groups of neighbours, and only the ``groups_per_token`` best groups
    are open: a group is as good as its best expert (DeepSeek-V2, section 2.2.2) or the sum of its two best
    (DeepSeek-V3). ``bias`` (E,) is added for the choice alone and never reaches a weight (DeepSeek-V3, equation 16).
    """
    wanted = scores.detach() if bias is None else scores.detach() + bias
    if n_groups > 1:
        grouped = wanted.unflatten(-1, (n_groups, -1))
        best = grouped.amax(-1) if group_score == "max" else grouped.topk(2, -1).values.sum(-1)
        closed = torch.ones_like(best, dtype=torch.bool).scatter(-1, best.topk(groups_per_token, -1).indices, False)
        wanted = grouped.masked_fill(closed[..., None], -torch.inf).flatten(-2)
    return wanted.topk(k, -1).indices


def weights_of(logits: Tensor, scores: Tensor, experts: Tensor, order: Order, normalise: bool) -> Tensor:
    """What the chosen experts' outputs are weighted with, (N, k).

    ``score_first``: their scores among all experts, divided by their sum if ``normalise``. ``top_first``: the softmax
    over the chosen logits alone, which is the same only where the first is a normalised softmax.
    """
    if order == "top_first":
        return logits.gather(-1, experts).softmax(-1)
    weights = scores.gather(-1, experts)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) if normalise else weights


def capacities(n_tokens: Tensor, factor: float, k: int, n_experts: int) -> Tensor:
    """``ceil(factor k n / E)``: how many tokens an expert takes of n, (R,) to (R,) int64 (Fedus et al. 2022, eq. 3)."""
    return (n_tokens.double() * (factor * k) / n_experts).ceil().long()


def places(experts: Tensor, n_experts: int, first: First) -> Tensor:
    """Each choice's place in its expert's queue, from 0: experts (R, n, k) to (R, n, k), a queue for each of R.

    ``token``: a token's choices stand before those of later tokens. ``choice``: all first choices stand before all
    second ones (GShard: Lepikhin et al. 2021, algorithm 1), so that a later token can displace an earlier one's second.
    """
    queue = experts.transpose(1, 2) if first == "choice" else experts
    flat = queue.reshape(len(queue), -1)
    place = F.one_hot(flat, n_experts + 1).cumsum(1).gather(-1, flat[..., None]).view(queue.shape) - 1
    return place.transpose(1, 2) if first == "choice" else place


def counts(experts: Tensor, n_experts: int) -> Tensor:
    """How often each expert was chosen in each row, choices of nobody left out: (B, n) int64 to (B, E) int64."""
    total = experts.new_zeros(len(experts), n_experts + 1)
    return total.scatter_add(1, experts, torch.ones_like(experts))[:, :n_experts]


def batch_balance(shares: Tensor, chosen: Tensor, n_tokens: Tensor) -> Tensor:
    """``sum_e m_e c_e / n``: m_e = sum_i shares_ie is the soft, differentiable form of the count c_e.

    Args:
        shares: (N, E), each valid token's probabilities of the experts, zero on padding.
        chosen: (E,), how often each was chosen; no gradient.
        n_tokens: (), the valid ones.
    """
    return (shares.sum(0) * chosen).sum() / n_tokens.clamp(min=1)


def sequence_balance(shares: Tensor, chosen: Tensor, n_tokens: Tensor, k: int) -> Tensor:
    """``sum_b T_b sum_e f_be P_be``, with ``f = E c / (k T)`` and ``P = m / T`` of each row alone (DeepSeek-V3,
    equations 17 to 20, times the row's tokens): it adds up over rows, and is the number of tokens where all is even.

    Args:
        shares: (B, T, E), zero on padding.
        chosen: (B, E).
        n_tokens: (B,).
    """
    by_row = (shares.sum(1) * chosen).sum(-1) / n_tokens.clamp(min=1)
    return by_row.sum() * (shares.shape[-1] / k)


def router_z(logits: Tensor, valid: Tensor) -> Tensor:
    """``sum_i log(sum_e exp(logits_ie))^2`` over valid tokens (ST-MoE: Zoph et al. 2022, equation 5)."""
    return (logits.logsumexp(-1).square() * valid).sum()


def by_experts(scores: Tensor, valid: Tensor, k: float) -> Assigned:
    """Expert choice: each expert takes the ``ceil(k n / E)`` tokens of each of R rows that score highest for it.

    Args:
        scores: (R, n, E).
        valid: (R, n).
        k: how many experts a token has on average.

    Returns:
        R E C pairs; token counts through all rows, R n.
    """
    R, n, E = scores.shape
    most = min(n, int(-(-k * n // E)))
    limit = capacities(valid.sum(1), 1.0, k, E)  # type: ignore[arg-type]
    wanted = scores.detach().masked_fill(~valid[..., None], -torch.inf).transpose(1, 2)
    # Among equals the earlier is taken, whatever else is in the row: a stable order, which topk does not promise.
    ranked = wanted.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    weight = scores.transpose(1, 2).gather(-1, ranked)
    taken = torch.arange(most, device=scores.device) < limit[:, None, None]
    expert = torch.where(taken, torch.arange(E, device=scores.device)[:, None], E)
    token = ranked + n * torch.arange(R, device=scores.device)[:, None, None]
    return Assigned(token.flatten(), expert.flatten(), weight.flatten())
