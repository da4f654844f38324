"""Mixtures of experts: many channel mixers, and a router that says which of them read a token."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from octavo.nn import router
from octavo.nn.activation import ACTIVATIONS, ActivationName
from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer, full_precision
from octavo.nn.dropout import dropout
from octavo.nn.grouped import add_rows, take_rows
from octavo.nn.mlp import Glu, Mlp
from octavo.nn.projection import GroupedProjection, Projection
from octavo.nn.router import Assigned
from octavo.nn.state import LayerState
from octavo.schema import Config as Base


class ExpertsConfig(Base):
    """The experts of a mixture, and those that read every token beside it.

    ``d_ff`` is the width of one expert. Shared experts are one channel mixer of ``n_shared_experts`` widths
    (DeepSeekMoE: Dai et al. 2024, section 3.2), of ``shared_d_ff`` if given; ``shared_gate`` weights its output with a
    sigmoid of its own (Qwen2-MoE). ``z_loss`` z adds ``z log(sum exp logits)^2`` a token to what is trained on.
    """

    n_experts: int = Field(default=8, ge=2)
    experts_per_token: int = Field(default=2, ge=1)
    d_ff: int | None = Field(default=None, ge=1, description="default: a dense layer's width / experts_per_token")
    gated: bool = Field(default=True, description="each expert a GLU, else an MLP")
    activation: ActivationName = "silu"
    n_shared_experts: int = Field(default=0, ge=0)
    shared_d_ff: int | None = Field(default=None, ge=1, description="default: n_shared_experts d_ff")
    shared_gate: bool = False
    z_loss: float = Field(default=0.0, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    backend: Literal["auto", "plain", "grouped"] = "auto"

    @model_validator(mode="after")
    def _experts_fit(self) -> ExpertsConfig:
        if self.experts_per_token > self.n_experts:
            raise ValueError(f"experts_per_token = {self.experts_per_token} is above n_experts = {self.n_experts}")
        if not self.n_shared_experts and (self.shared_gate or self.shared_d_ff):
            raise ValueError("shared_gate and shared_d_ff need n_shared_experts of at least 1")
        return self

    def width(self, d_model: int) -> int:
        """Of one expert."""
        dense = -(-8 * d_model // 3) if self.gated else 4 * d_model
        share = -(-dense // self.experts_per_token)
        return self.d_ff or (-(-share // 32) * 32 if self.gated else share)


class Experts(nn.Module):
    """``y_i = sum of w_ie down_e(act(gate_e(x_i)) * up_e(x_i))`` over the pairs that were assigned, x and y (N, D).

    Pairs are sorted by expert; each expert then is one matrix product on a slice, and tokens beyond capacity or on
    padding cost nothing. The plain form sends every token through every expert and weights most of it with zero.
    """

    def __init__(self, config: ExpertsConfig, d_model: int):
        super().__init__()
        E, D, F_ = config.n_experts, d_model, config.width(d_model)
        self.activation, self.dropout, self.backend = ACTIVATIONS[config.activation], config.dropout, config.backend
        self.gate = GroupedProjection(E, D, F_, "expert.gate") if config.gated else None
        self.up = GroupedProjection(E, D, F_, "expert.up")
        self.down = GroupedProjection(E, F_, D, "expert.down")

    def forward(self, x: Tensor, assigned: Assigned) -> Tensor:
        token, expert, weight = assigned
        if self.backend == "plain":
            gates = weight.new_zeros(len(x), self.up.n + 1).index_put((token, expert), weight, accumulate=True)
            outputs = self.every(x)
            return (outputs * gates[:, :-1].T[..., None].to(outputs.dtype)).sum(0)
        order = expert.argsort(stable=True)
        ends = router.counts(expert[None], self.up.n)[0].cumsum(0)
        at = token[order]
        rows = take_rows(x, at)
        hidden = self.activation((self.gate or self.up)(rows, ends))
        hidden = hidden * self.up(rows, ends) if self.gate else hidden
        y = self.down(dropout(hidden, self.dropout, self.training), ends)
        return add_rows(y * weight.gather(0, order)[:, None].to(y.dtype), at, len(x))

    def every(self, x: Tensor) -> Tensor:
        """Every expert on every token: (N, D) to (E, N, D)."""
        hidden = self.activation((self.gate or self.up).every(x))
        hidden = hidden * self.up.every(x) if self.gate else hidden
        return self.down.every(dropout(hidden, self.dropout, self.training))

    def n_parameters(self) -> int:
        return sum(product.n_parameters() for product in self._products())

    def flops_of_one(self) -> int:
        """Of one token in one expert."""
        return sum(2 * product.d_in * product.d_out for product in self._products())

    def _products(self) -> list[GroupedProjection]:
        return [product for product in (self.gate, self.up, self.down) if product is not None]


class Mixture(Mixer):
    """What mixtures share: ``experts(x) + shared(x)``, where ``assign`` says who reads what.

    The router's logits and scores are computed in float32 whatever the model is in (Fedus et al. 2022, section 2.4).
    """

    capabilities = Capabilities(constant_state=True)

    def __init__(self, config: ExpertsConfig, dims: Dims):
        super().__init__()
        self.mixture, self.depth, D = config, dims.depth, dims.d_model
        self.router = Projection(D, config.n_experts, "router")
        self.experts = Experts(config, D)
        self.shared: Mixer | None = None
        if config.n_shared_experts:
            width = config.shared_d_ff or config.n_shared_experts * config.width(D)
            same = {"d_ff": width, "activation": config.activation, "dropout": config.dropout}
            self.shared = Glu(Glu.Config(**same), dims) if config.gated else Mlp(Mlp.Config(**same), dims)
        self.shared_gate = Projection(D, 1, "router") if config.shared_gate else None

    @abstractmethod
    def assign(self, logits: Tensor, ctx: Context) -> tuple[Assigned, Aux]:
        """Who reads what, from logits (B, T, E); tokens are numbered through all rows."""

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        logits = F.linear(full_precision(x), full_precision(self.router.weight))
        assigned, aux = self.assign(logits, ctx)
        if self.mixture.z_loss:
            aux["loss.router_z"] = self.mixture.z_loss * router.router_z(logits, ctx.valid)
        y = self.experts(x.flatten(0, 1), assigned).view_as(x)
        if self.shared is not None:
            always = self.shared(x, ctx)[0]
            y = y + (always if self.shared_gate is None else always * self.shared_gate(x).sigmoid())
        return y, aux

    def routed_pairs(self, n_tokens: int) -> int:
        """Pairs of a token and an expert in a row of so many tokens."""
        return n_tokens * self.mixture.experts_per_token

    def flops(self, n_queries: int, n_keys: int) -> int:
        """Of the experts that are asked, at most; of all of them where the plain form asks all."""
        plain = self.mixture.backend == "plain"
        pairs = n_queries * self.mixture.n_experts if plain else self.routed_pairs(n_queries)
        routers = [product for product in (self.router, self.shared_gate) if product is not None]
        own = sum(2 * n_queries * product.d_in * product.d_out for product in routers)
        shared = self.shared.flops(n_queries, n_keys) if self.shared is not None else 0
        return own + shared + pairs * self.experts.flops_of_one()

    def predicted_parameters(self) -> int:
        routers = self.router.n_parameters() + (self.shared_gate.n_parameters() if self.shared_gate is not None else 0)
        shared = self.shared.predicted_parameters() if self.shared is not None else 0
        return routers + shared + self.experts.n_parameters()


class Moe(Mixture):
    """``y = s sum of w_e expert_e(x)`` over the k experts with the highest scores, plus shared experts.

    Shazeer et al. 2017, section 2.1; Fedus et al. 2022 (Switch), section 2; Jiang et al. 2024 (Mixtral), section 2.1;
    DeepSeek-V2, section 2.2, and V3, section 2.1.2. scores: softmax or sigmoid of ``router(x)``. ``order`` score_first
    weights with the chosen scores, divided by their sum if ``normalise``; top_first takes the softmax of the chosen
    logits alone. s is ``routed_scale``. With ``n_groups`` only the experts of the ``groups_per_token`` best groups can
    be chosen.

    Capacity: an expert reads at most ``ceil(capacity_factor k n / E)`` of the n tokens of a batch (or row:
    ``capacity_over``), first come, first served; what is beyond is left to the residual and counted. It holds in
    training; evaluation and decoding drop nothing unless ``eval_capacity_factor`` is given. Packed documents then share
    a row's capacity. ``first`` choice lets later tokens displace the second choices of earlier ones: no causal model
    takes it with more than one expert a token.

    Balance, times ``balance_weight``: ``sum`` is ``sum_e m_e c_e / n`` a token, with the counts c and their soft form m
    (no gradient through c); ``switch`` E times that (Fedus et al. 2022, equation 4); both over the tokens computed at
    once, a micro-batch. ``sequence`` is DeepSeek-V3's, each row for itself. ``selection_bias`` balances without a loss:
    a bias for the choice alone, which after each step moves by ``bias_rate`` up where an expert was read less than on
    average and down where more (Wang et al. 2024).
    """

    class Config(ExpertsConfig):
        kind: Literal["moe"] = "moe"
        score: router.Score = "softmax"
        order: router.Order = "score_first"
        normalise: bool = True
        routed_scale: float = Field(default=1.0, gt=0)
        n_groups: int = Field(default=1, ge=1)
        groups_per_token: int = Field(default=1, ge=1)
        group_score: router.GroupScore = "max"
        capacity_factor: float | None = Field(default=None, gt=0, description="in training; null: nothing is dropped")
        eval_capacity_factor: float | None = Field(default=None, gt=0)
        capacity_over: router.Over = "batch"
        first: router.First = "token"
        balance: Literal["none", "sum", "switch", "sequence"] = "none"
        balance_weight: float = Field(default=0.01, ge=0)
        selection_bias: bool = False
        bias_rate: float = Field(default=0.001, ge=0)

        @model_validator(mode="after")
        def _possible(self) -> Moe.Config:
            size, rest = divmod(self.n_experts, self.n_groups)
            if rest or self.groups_per_token > self.n_groups:
                raise ValueError(
                    f"n_groups = {self.n_groups} must divide n_experts = {self.n_experts} and "
                    f"groups_per_token = {self.groups_per_token} be at most n_groups"
                )
            if self.experts_per_token > size * self.groups_per_token:
                raise ValueError(
                    f"experts_per_token = {self.experts_per_token} is more than {self.groups_per_token} groups "
                    f"of {size} have"
                )
            if self.group_score == "two_largest" and size < 2:
                raise ValueError("group_score two_largest needs groups of at least two experts")
            if self.order == "top_first" and self.score == "sigmoid":
                raise ValueError("order top_first is a softmax over the chosen; with score sigmoid use score_first")
            return self

    def __init__(self, config: Moe.Config, dims: Dims):
        super().__init__(config, dims)
        self.config = config
        bias = nn.Parameter(torch.empty(config.n_experts), requires_grad=False) if config.selection_bias else None
        self.selection_bias = bias
        limited = config.capacity_factor is not None or config.eval_capacity_factor is not None
        evaluated = config.eval_capacity_factor is not None
        self.capabilities = replace(  # type: ignore[misc]
            type(self).capabilities,
            causal=not (limited and config.first == "choice" and config.experts_per_token > 1),
            batch_independent=not limited or config.capacity_over == "row",
            packed=not evaluated,
            incremental=not evaluated,
        )

    def reset(self) -> None:
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    def assign(self, logits: Tensor, ctx: Context) -> tuple[Assigned, Aux]:
        config, (B, T, E), k = self.config, logits.shape, self.config.experts_per_token
        scores = router.scores_of(logits, config.score)
        chosen = router.choose(
            scores.flatten(0, 1), k, bias=self.selection_bias, n_groups=config.n_groups,
            groups_per_token=config.groups_per_token, group_score=config.group_score,
        ).view(B, T, k)  # fmt: skip
        weights = router.weights_of(logits, scores, chosen, config.order, config.normalise) * config.routed_scale
        experts = torch.where(ctx.valid[..., None], chosen, E)
        count = router.counts(experts.flatten(1), E)
        aux = {f"moe.load.{self.depth}": count.sum(0), **self._balance(scores, count, ctx)}
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor is not None:
            kept = self._within(experts, ctx, factor)
            aux[f"moe.dropped.{self.depth}"] = (~kept & (experts < E)).sum()
            experts = torch.where(kept, experts, E)
        token = torch.arange(B * T, device=logits.device)[:, None].expand(B * T, k)
        return Assigned(token.reshape(-1), experts.flatten(), weights.flatten()), aux

    def _within(self, experts: Tensor, ctx: Context, factor: float) -> Tensor:
        """Which choices (B, T, k) are within their expert's capacity."""
        config, (B, T, k) = self.config, experts.shape
        queues = (B, T) if config.capacity_over == "row" else (1, B * T)
        limit = router.capacities(ctx.valid.view(queues).sum(1), factor, k, config.n_experts)
        place = router.places(experts.view(*queues, k), config.n_experts, config.first)
        return (place < limit[:, None, None]).view(B, T, k)

    def _balance(self, scores: Tensor, count: Tensor, ctx: Context) -> Aux:
        config = self.config
        if config.balance == "none" or not config.balance_weight:
            return {}
        shares = scores if config.score == "softmax" else scores / scores.sum(-1, keepdim=True)
        shares, n = shares * ctx.valid[..., None], ctx.valid.sum(1)
        if config.balance == "sequence":
            loss = router.sequence_balance(shares, count, n, config.experts_per_token)
        else:
            loss = router.batch_balance(shares.flatten(0, 1), count.sum(0), n.sum())
            loss = loss * config.n_experts if config.balance == "switch" else loss
        return {"loss.balance": config.balance_weight * loss}

    @torch.no_grad()
    def after_step(self, figures: Aux) -> None:
        load = figures.get(f"moe.load.{self.depth}")
        if self.selection_bias is not None and load is not None:
            self.selection_bias += self.config.bias_rate * (load.float().mean() - load).sign()

    def predicted_parameters(self) -> int:
        return super().predicted_parameters() + (self.config.n_experts if self.config.selection_bias else 0)


class ExpertChoice(Mixture):
    """``y = sum of softmax(router(x))_e expert_e(x)`` over the experts that chose x: each takes its best tokens.

    An expert takes ``ceil(k n / E)`` of the n tokens of a row (or of the ``batch``), so that all are read equally and k
    of them read a token on average; one that none takes is left to the residual and counted. Whether a token is
    taken depends on those after it: no causal model can use it. Source: Zhou et al. 2022, section 3.2.
    """

    capabilities = Capabilities(
        causal=False, packed=False, incremental=False, batch_independent=False, constant_state=True
    )

    class Config(ExpertsConfig):
        kind: Literal["expert_choice"] = "expert_choice"
        over: router.Over = Field(default="row", description="the tokens among which an expert chooses")

    def __init__(self, config: ExpertChoice.Config, dims: Dims):
        super().__init__(config, dims)
        self.config = config
        self.capabilities = replace(type(self).capabilities, batch_independent=config.over == "row")  # type: ignore[misc]

    def assign(self, logits: Tensor, ctx: Context) -> tuple[Assigned, Aux]:
        B, T, E = logits.shape
        rows = (B, T) if self.config.over == "row" else (1, B * T)
        scores, valid = logits.softmax(-1).view(*rows, E), ctx.valid.view(rows)
        assigned = router.by_experts(scores, valid, self.config.experts_per_token)
        taken = valid.new_zeros(B * T, dtype=torch.long).index_add(0, assigned.token, (assigned.expert < E).long())
        load = router.counts(assigned.expert[None], E)[0]
        left = (ctx.valid.flatten() & (taken == 0)).sum()
        return assigned, {f"moe.load.{self.depth}": load, f"moe.dropped.{self.depth}": left}

    def routed_pairs(self, n_tokens: int) -> int:
        E = self.config.n_experts
        return E * min(n_tokens, -(-self.config.experts_per_token * n_tokens // E))


class DenseMoe(Mixer):
    """``y = sum_e softmax(router(x))_e down_e(act(up_e(x)))`` over all E experts, a soft mixture.

    Jacobs et al. 1991, with ReLU experts. Its gradient is ``sum_e g_e (grad log g_e h_e + grad h_e)``, whatever
    parameter it is taken for: of the parameters of expert e only ``g_e grad h_e`` is left, as no gate depends on them.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Base):
        kind: Literal["dense_moe"] = "dense_moe"
        n_experts: int = Field(default=4, ge=2)
        d_ff: int | None = Field(default=None, ge=1, description="of one expert; default: 4 d_model / n_experts")
        activation: ActivationName = "relu"

    def __init__(self, config: DenseMoe.Config, dims: Dims):
        super().__init__()
        E, D = config.n_experts, dims.d_model
        own = ExpertsConfig(
            n_experts=E, d_ff=config.d_ff or -(-4 * D // E), gated=False, activation=config.activation,
            experts_per_token=E,
        )  # fmt: skip
        self.config, self.router, self.experts = config, Projection(D, E, "router"), Experts(own, D)

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        gates = F.linear(full_precision(x), full_precision(self.router.weight)).softmax(-1).to(x.dtype)
        outputs = self.experts.every(x.flatten(0, 1))
        return (outputs * gates.flatten(0, 1).T[..., None]).sum(0).view_as(x), {}

    def flops(self, n_queries: int, n_keys: int) -> int:
        gates = 2 * self.router.d_in * self.router.d_out
        return n_queries * (gates + self.config.n_experts * self.experts.flops_of_one())

    def predicted_parameters(self) -> int:
        return self.router.n_parameters() + self.experts.n_parameters()
