"""Multi-token prediction: modules after the last layer that look one token further each.

Module k (1, 2, ...) reads, at token i, what the module before it (module 0: the model) made of the tokens up to i,
and the embedding of token i + k; it predicts token i + k + 1 through the model's own embedding and head. Source:
DeepSeek-AI 2024 (DeepSeek-V3), section 2.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from octavo.models.block import Block, BlockConfig
from octavo.nn.contracts import Aux, Context, Dims
from octavo.nn.norm import Norm
from octavo.nn.projection import Projection
from octavo.nn.state import State, StateSpec
from octavo.nn.tables import NORMS
from octavo.schema import Config, component


class MultiTokenConfig(Config):
    """How many tokens beyond the next are predicted, and by which of the model's blocks."""

    n_modules: int = Field(default=1, ge=1)
    block: str | None = Field(default=None, description="a name from blocks; default: the last layer's")


class MultiToken(nn.Module):
    """One module: ``block(W [norm(h_i); norm(embedding of token i + k)])``, (B, T, D), and its normed form.

    h of module 0 is the model's normed last hidden state, as the published checkpoint is used.
    """

    def __init__(self, block: BlockConfig, norm: Config, dims: Dims):
        super().__init__()
        make = component(NORMS, norm.kind)  # type: ignore[attr-defined]
        self.hidden_norm: Norm = make(norm, dims.d_model)
        self.embed_norm: Norm = make(norm, dims.d_model)
        self.project = Projection(2 * dims.d_model, dims.d_model, "mtp")
        self.block = Block(block, norm, dims)
        self.norm: Norm = make(norm, dims.d_model)

    def forward(
        self, hidden: Tensor, later: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Tensor, Tensor, Aux]:
        joined = torch.cat([self.hidden_norm(hidden), self.embed_norm(later)], -1)
        out, aux = self.block(self.project(joined), ctx, state)
        return out, self.norm(out), aux

    def state_specs(self) -> dict[str, StateSpec]:
        """What it keeps between calls of its own, by the names under which its block asks for it."""
        return {f"0.{name}": layer.mixer.state_spec() for name, layer in self.block.sub_layers()}

    def flops(self, n_tokens: int) -> int:
        """Multiply-adds times two of one row's pass, its share of the head left out."""
        mixers = sum(layer.mixer.flops(n_tokens, n_tokens) for _, layer in self.block.sub_layers())
        return mixers + 2 * n_tokens * self.project.d_in * self.project.d_out


def looking_ahead(embedded: Tensor, by: int) -> Tensor:
    """The embedding ``by`` tokens later, (B, T, D); zeros where the row ends, where nothing is trained."""
    return F.pad(embedded[:, by:], (0, 0, 0, by))
