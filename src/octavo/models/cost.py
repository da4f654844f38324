"""Exact counts for any model configuration: parameters, floating-point operations, state bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.models.block import Block
from octavo.models.decoder import Decoder
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.moe import Mixture
from octavo.nn.state import StateSpec
from octavo.nn.tables import NORMS
from octavo.schema import component

Model = Decoder | EncoderDecoder


@dataclass(frozen=True)
class Cost:
    """What a model weighs and what a row of ``n_tokens`` costs it.

    parameters: all, tied weights once. embedding_parameters: token and position tables. forward_flops: matrix products
    of one row's forward pass, the language model's head included, two per multiply-add, attention counted over the full
    square. train_flops: three times that, and of what is only trained with (multi-token modules). state_bytes: decode
    state of one row.
    """

    parameters: int
    embedding_parameters: int
    forward_flops: int
    train_flops: int
    state_bytes: int


def cost(
    model: Model, n_tokens: int | None = None, dtype: torch.dtype = torch.float32, n_source: int | None = None
) -> Cost:
    """Count ``model`` (also one on the meta device) for a row of ``n_tokens`` (default: max_seq_len).

    Args:
        n_source: tokens of the source or memory, where the model reads one; default: as many as of its text.
    """
    T = n_tokens or model.max_seq_len
    S = n_source or T
    D, ends = model.config.d_model, model.decoder if isinstance(model, EncoderDecoder) else model
    head = 2 * T * D * (model.vocab_size + (D if ends.head_transform is not None else 0))
    read = 1 if isinstance(model, EncoderDecoder) and model.config.memory != "all" else S
    flops = sum(mixer.flops(*_lengths(name, T, S, read)) for name, mixer in model.mixers().items()) + head
    training = flops + sum(module.flops(T) + head for module in model.multi_token)  # type: ignore[operator]
    halves = [model.encoder, model.decoder] if isinstance(model, EncoderDecoder) else [model]
    tables = [p for half in halves for part in (half.embed, half.token_types, half.positions) if part is not None
              for p in part.parameters()]  # fmt: skip
    embedding = sum({id(p): p.numel() for p in tables}.values())
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding_parameters=embedding,
        forward_flops=flops,
        train_flops=3 * training,
        state_bytes=state_bytes(model.state_specs(), T, dtype, read),
    )


def _lengths(name: str, n_tokens: int, n_source: int, n_read: int) -> tuple[int, int]:
    """Queries and keys of the mixer of that name; ``n_read`` of a source's states are handed on."""
    if name.startswith("encoder."):
        return n_source, n_source
    return n_tokens, n_read if name.endswith(".cross") else n_tokens


def active_parameters(model: Model) -> int:
    """Those that one token's pass reads: of each mixture only the experts that are asked, and no further module.

    Tables count whole, as they do in the figures of papers; a pass looks up one row of them.
    """
    further = {part for module in model.multi_token for part in module.modules()}
    found = sum(p.numel() for p in model.parameters()) - further_parameters(model)
    for part in model.modules():
        if isinstance(part, Mixture) and part not in further:
            experts, asked = part.mixture.n_experts, part.mixture.experts_per_token
            found -= part.experts.n_parameters() // experts * (experts - asked)
    return found


def further_parameters(model: Model) -> int:
    """Those of the modules that predict further tokens."""
    return sum(p.numel() for module in model.multi_token for p in module.parameters())


def state_bytes(specs: dict[str, StateSpec], max_tokens: int, dtype: torch.dtype, n_source: int = 0) -> int:
    """Bytes of one row's decode state holding ``max_tokens`` tokens, and what was read of a source of ``n_source``."""
    return sum(field.n_bytes(max_tokens, dtype, n_source) for spec in specs.values() for field in spec.values())


def predicted_parameters(model: Model) -> int:
    """The parameter count by formula, without looking at a tensor; a law holds it equal to the count."""
    if isinstance(model, EncoderDecoder):
        one, two, config = model.encoder, model.decoder, model.config
        shared = model.vocab_size * config.d_model if config.share_embedding else 0
        shared += two.positions.predicted_parameters() if config.share_positions else 0
        return predicted_parameters(one) + predicted_parameters(two) - shared
    config, D, V = model.config, model.config.d_model, model.vocab_size
    with torch.device("meta"):
        norm = component(NORMS, config.norm.kind)(config.norm, D).predicted_parameters()
    blocks = [*model.blocks, *(module.block for module in model.multi_token)]
    total = V * D + model.positions.predicted_parameters() + len(model.multi_token) * (3 * norm + 2 * D * D)
    for block in blocks:
        assert isinstance(block, Block)
        per_layer = 2 if block.config.norm_placement == "sandwich" else 1
        total += norm * (
            1 if block.config.shared_norm else per_layer * len(block.layers) - (not block.config.mixer_norm)
        )
        total += sum(layer.mixer.predicted_parameters() for _, layer in block.sub_layers())
    total += norm * (config.final_norm + config.embed_norm)
    total += 0 if config.tie_embeddings else V * D
    total += (config.n_token_types or 0) * D
    total += sum(part.predicted_parameters() for part in (model.head_transform, model.classes) if part is not None)
    return total + (V if config.head_bias else 0)
