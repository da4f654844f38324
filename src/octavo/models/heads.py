"""Heads beside the language model's: of a whole text or of each token; and what stands before the logits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from octavo.nn.activation import ACTIVATIONS, ActivationName
from octavo.nn.contracts import Context
from octavo.nn.dropout import dropout
from octavo.nn.projection import Projection
from octavo.nn.tables import NORMS
from octavo.schema import Config, component

Pooling = Literal["first", "last", "mean"]
Problem = Literal["single_label", "multi_label", "regression"]


class TransformConfig(Config):
    """A dense layer of d_model channels, an activation, and perhaps the model's norm after it."""

    activation: ActivationName = "gelu"
    norm: bool = True
    bias: bool = True


class HeadTransform(nn.Module):
    """``N(a(W x + b))``, what BERT puts between its last layer and a head (Devlin et al. 2019; its code)."""

    def __init__(self, config: TransformConfig, norm: Config, d_model: int):
        super().__init__()
        self.dense = Projection(d_model, d_model, "transform", bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = component(NORMS, norm.kind)(norm, d_model) if config.norm else None  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.dense(x))
        return x if self.norm is None else self.norm(x)

    def predicted_parameters(self) -> int:
        return self.dense.n_parameters() + (0 if self.norm is None else self.norm.predicted_parameters())


class ClassesConfig(Config):
    """A head that says a class, several classes or numbers, of a text or of each of its tokens.

    ``labels`` names the classes; ``n_classes`` alone counts them. ``over`` a sequence, ``pooling`` says what is read:
    the first token (BERT's [CLS]), the last (a decoder, whose last token has seen all), or the mean of all. Before the
    product may stand a ``transform``: with tanh and no norm it is BERT's pooler. ``problem`` is what the scores mean:
    one class (softmax), any number of classes (sigmoid each), or numbers themselves.
    """

    labels: tuple[str, ...] | None = Field(default=None, min_length=1)
    n_classes: int | None = Field(default=None, ge=1, description="default: as many as labels")
    over: Literal["sequence", "token"] = "sequence"
    pooling: Pooling = "first"
    transform: TransformConfig | None = None
    bias: bool = True
    dropout: float = Field(default=0.0, ge=0, lt=1)
    problem: Problem = "single_label"

    @model_validator(mode="after")
    def _counted(self) -> ClassesConfig:
        if self.labels is None and self.n_classes is None:
            raise ValueError("classes need labels or n_classes")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels name a class twice")
        if self.labels is not None and self.n_classes not in (None, len(self.labels)):
            raise ValueError(f"n_classes = {self.n_classes}, but there are {len(self.labels)} labels; leave it out")
        return self

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.labels) if self.labels is not None else self.n_classes or 0


class Classes(nn.Module):
    """``W transform(pooled) + b``: (B, C) of a sequence, (B, T, C) of tokens, from the normed last hidden state."""

    def __init__(self, config: ClassesConfig, norm: Config, d_model: int):
        super().__init__()
        self.config = config
        self.transform = HeadTransform(config.transform, norm, d_model) if config.transform else None
        self.out = Projection(d_model, config.n, "head", bias=config.bias)

    def forward(self, hidden: Tensor, ctx: Context) -> Tensor:
        return self.out(dropout(self.read(hidden, ctx), self.config.dropout, self.training))

    def read(self, hidden: Tensor, ctx: Context) -> Tensor:
        """What the classes are read from, (B, D) or (B, T, D); padding stands at the end of each row."""
        x = hidden if self.config.over == "token" else pool(hidden, ctx.valid, self.config.pooling)
        return x if self.transform is None else self.transform(x)

    def predicted_parameters(self) -> int:
        return self.out.n_parameters() + (0 if self.transform is None else self.transform.predicted_parameters())


def pool(hidden: Tensor, valid: Tensor, pooling: Pooling) -> Tensor:
    """One vector a row, (B, D), of ``hidden`` (B, T, D) where ``valid`` (B, T); padding may stand anywhere."""
    if pooling == "mean":
        weights = valid[:, :, None].to(hidden.dtype)
        # Selected, not multiplied: what stands at padding may be anything.
        return hidden.where(valid[:, :, None], hidden.new_zeros(())).sum(1) / weights.sum(1).clamp(min=1)
    flags = valid.int()
    at = flags.argmax(1) if pooling == "first" else flags.shape[1] - 1 - flags.flip(1).argmax(1)
    return hidden.gather(1, at[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)
