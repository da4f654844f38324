"""Exact counts for any model configuration: parameters, floating-point operations, state bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.models.block import Block
from octavo.models.decoder import Decoder
from octavo.nn.state import StateSpec
from octavo.nn.tables import NORMS
from octavo.schema import component


@dataclass(frozen=True)
class Cost:
    """What a model weighs and what a row of ``n_tokens`` costs it.

    parameters: all, tied weights once. embedding_parameters: token and position tables. forward_flops:
    matrix products of one row's forward pass, head included, two per multiply-add, attention counted over
    the full square. train_flops: three times that, and of what is only trained with (multi-token modules).
    state_bytes: decode state of one row.
    """

    parameters: int
    embedding_parameters: int
    forward_flops: int
    train_flops: int
    state_bytes: int


def cost(model: Decoder, n_tokens: int | None = None, dtype: torch.dtype = torch.float32) -> Cost:
    """Count ``model`` (also one on the meta device) for a row of ``n_tokens`` (default: max_seq_len)."""
    T = n_tokens or model.max_seq_len
    mixers = model.mixers().values()
    head = 2 * T * model.config.d_model * model.vocab_size
    flops = sum(mixer.flops(T, T) for mixer in mixers) + head
    training = flops + sum(module.flops(T) + head for module in model.multi_token)  # type: ignore[operator]
    embedding = model.embed.weight.numel() + model.positions.predicted_parameters()
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding_parameters=embedding,
        forward_flops=flops,
        train_flops=3 * training,
        state_bytes=state_bytes(model.state_specs(), T, dtype),
    )


def state_bytes(specs: dict[str, StateSpec], max_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one row's decode state holding ``max_tokens`` tokens."""
    return sum(field.n_bytes(max_tokens, dtype) for spec in specs.values() for field in spec.values())


def predicted_parameters(model: Decoder) -> int:
    """The parameter count by formula, without looking at a tensor; a law holds it equal to the count."""
    config, D, V = model.config, model.config.d_model, model.vocab_size
    with torch.device("meta"):
        norm = component(NORMS, config.norm.kind)(config.norm, D).predicted_parameters()
    blocks = [*model.blocks, *(module.block for module in model.multi_token)]
    total = V * D + model.positions.predicted_parameters() + len(model.multi_token) * (3 * norm + 2 * D * D)
    for block in blocks:
        assert isinstance(block, Block)
        per_layer = 2 if block.config.norm_placement == "sandwich" else 1
        total += norm * (1 if block.config.shared_norm else per_layer * len(block.layers))
        total += sum(layer.mixer.predicted_parameters() for _, layer in block.sub_layers())
    total += norm * (config.final_norm + config.embed_norm)
    total += 0 if config.tie_embeddings else V * D
    return total + (V if config.head_bias else 0)
