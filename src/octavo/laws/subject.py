"""The model a law examines: small, float64, with weights that hide nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from octavo.models.decoder import Decoder, build
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.contracts import Inputs, Memory
from octavo.nn.projection import Projection
from octavo.schema import Config

N_SOURCE = 5


@torch.no_grad()
def randomise(model: nn.Module, seed: int, std: float = 0.3) -> None:
    """Draw every parameter: a fresh model's zero biases and unit norms would hide what is done with them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
        if parameter.dim() == 1 and not name.endswith("bias"):
            drawn += 1  # the scale of a norm
        parameter.copy_(drawn)


@dataclass
class Subject:
    """A configuration and what laws ask of it; everything random follows ``seed``."""

    config: Config
    seed: int = 0

    @cached_property
    def model(self) -> Decoder:
        return self.fresh()

    def fresh(self, config: Config | None = None) -> Decoder:
        """Another model with the weights this one was given."""
        model = build(config or self.config).double().eval()
        randomise(model, self.seed)
        return model

    @property
    def n_tokens(self) -> int:
        """Tokens of a row in the laws."""
        return min(12, self.model.max_seq_len)

    def tokens(self, rows: int, n: int | None = None, seed: int = 0) -> Tensor:
        """Random ids (rows, n)."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        return torch.randint(self.model.vocab_size, (rows, n or self.n_tokens), generator=generator)

    def beside(self, tokens: Tensor, state: Any = None, doc_ids: Tensor | None = None) -> dict[str, Any]:
        """What a model that reads a source or a memory is given with its first ``tokens`` (B, T); else nothing.

        Every document of every row is given the same, so that what a text gets does not depend on its place; one of
        the N_SOURCE tokens is padding. In packed rows each document has its own copy of it.
        """
        crossed = any(block.config.cross for block in self.model.stack())
        if not crossed or (state is not None and bool((state.lengths > 0).any())):
            return {}
        generator, rows = torch.Generator().manual_seed(7), len(tokens)
        packs = doc_ids is not None and state is None and getattr(self.model.config, "memory", "all") == "all"
        ids = doc_ids.unique() if packs and doc_ids is not None else None
        copies = 1 if ids is None else len(ids)
        valid = (torch.arange(N_SOURCE) != 1).repeat(copies).expand(rows, -1)
        owner = None if ids is None else ids.repeat_interleave(N_SOURCE).expand(rows, -1)
        if isinstance(self.model, EncoderDecoder):
            source = torch.randint(self.model.vocab_size, (1, N_SOURCE), generator=generator).repeat(rows, copies)
            return {"source": source, "source_valid": valid, "source_doc_ids": owner}
        widths = {p.d_in for name, m in self.model.mixers().items() if name.endswith(".cross")
                  for p in m.modules() if isinstance(p, Projection) and p.role == "k"}  # fmt: skip
        hidden = torch.randn(1, N_SOURCE, widths.pop(), generator=generator, dtype=torch.float64)
        return {"memory": Memory(hidden.repeat(rows, copies, 1), valid, owner)}

    def inputs(self, tokens: Tensor, state: Any = None, **named: Any) -> Inputs:
        """``tokens`` (B, T) with whatever else the model has to be given."""
        return Inputs(tokens, **named, **self.beside(tokens, state, named.get("doc_ids")))

    @torch.no_grad()
    def logits(self, tokens: Tensor, state: Any = None, **named: Any) -> Tensor:
        """What the model says to ``tokens`` (B, T): (B, T, V), without gradients."""
        out = self.model(self.inputs(tokens, state, **named), state=state).logits
        if out is None:
            raise ValueError("the model gave no logits")
        return out
