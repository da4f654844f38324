"""The encoder-decoder: one decoder class twice, the first to read a source both ways, the second to write and read it.

The encoder of a source is a memory (``nn.contracts.Memory``), and that is all the second half knows of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from octavo.errors import ConfigError, UnsupportedError
from octavo.models.block import Block, BlockConfig, add_up
from octavo.models.decoder import NEEDS, Decoder
from octavo.models.heads import Pooling, pool
from octavo.nn.contracts import Capabilities, Head, Inputs, Memory, Mixer, Outputs
from octavo.nn.cross_attention import CrossAttention
from octavo.nn.projection import Embedding
from octavo.nn.state import ContiguousState, State, StateSpec
from octavo.schema import Config

OF_ENCODER = ("encoder_hidden_states", "encoder_attention")


class EncoderDecoder(nn.Module):
    """``p(y_t | y_<t, encode(x))``: a source x is encoded once, and every token of the target reads what came of it.

    Both halves are decoders in this package's sense: ``encoder`` one that reads both ways and has no head of its own,
    ``decoder`` one whose blocks have ``cross``. With share_embedding they have one table of tokens (and with a tied
    head one matrix in three places: Vaswani et al. 2017, section 3.4), with share_positions one of positions.
    ``memory`` is what of the encoder's states is handed on: all of them, or one vector a source, its last state as in
    Sutskever et al. 2014 and Cho et al. 2014, its first or their mean: the bottleneck that attention was invented to
    widen. start_id is the token that a target begins with; by default the tokenizer's beginning of text.
    """

    class Config(Config):
        kind: Literal["encoder_decoder"] = "encoder_decoder"
        vocab_size: int | None = Field(default=None, ge=2)
        encoder: Decoder.Config = Decoder.Config(causal=False)
        decoder: Decoder.Config = Decoder.Config(blocks={"block": BlockConfig(cross=CrossAttention.Config())})
        share_embedding: bool = True
        share_positions: bool = False
        memory: Literal["all"] | Pooling = Field(default="all", description="which of the encoder's states are read")
        start_id: int | None = Field(default=None, ge=0, description="the target's first token; default: bos")

        @model_validator(mode="after")
        def _possible(self) -> EncoderDecoder.Config:
            one, two = self.encoder, self.decoder
            if one.vocab_size is not None or two.vocab_size is not None:
                raise ValueError("vocab_size is said once, for the whole model; leave it out in encoder and decoder")
            if not one.tie_embeddings or one.head_bias or one.multi_token or one.classes or one.head_transform:
                raise ValueError("encoder has no head; leave out what belongs to one")
            if any(block.cross for block in one.blocks.values()):
                raise ValueError("encoder has a block with cross, and nothing that it could read")
            used = {name: two.blocks[name] for name in two.layer_names()}
            if not any(block.cross for block in used.values()):
                raise ValueError("decoder has no block with cross: it would not see the source")
            for name, block in used.items():
                wanted = getattr(block.cross, "memory_width", None) or two.d_model
                if block.cross and wanted != one.d_model:
                    raise ValueError(
                        f"decoder.blocks.{name}.cross reads a memory of width {wanted}, the encoder has {one.d_model}; "
                        f"use memory_width {one.d_model}"
                    )
            if self.share_embedding and one.d_model != two.d_model:
                raise ValueError(f"share_embedding needs one d_model, not {one.d_model} and {two.d_model}")
            same = (one.positions, one.max_seq_len, one.d_model) == (two.positions, two.max_seq_len, two.d_model)
            if self.share_positions and not same:
                raise ValueError("share_positions needs the same positions, max_seq_len and d_model in both halves")
            return self

        def halves(self) -> tuple[Decoder.Config, Decoder.Config]:
            """Encoder and decoder, each with the vocabulary."""
            told = {"vocab_size": self.vocab_size}
            return self.encoder.model_copy(update=told), self.decoder.model_copy(update=told)

        def first_token(self, special: Any) -> int:
            """The token that targets begin with, given the tokenizer's special ids.

            Raises:
                ConfigError: there is none that could be meant.
            """
            found = next((i for i in (self.start_id, special.bos, special.eos) if i is not None), None)
            if found is None:
                raise ConfigError("the tokenizer has neither bos nor eos to begin targets with", fix="set start_id")
            return found

        @property
        def positions(self) -> Any:
            return self.decoder.positions

        @property
        def d_model(self) -> int:
            return self.decoder.d_model

        @property
        def n_layers(self) -> int:
            return self.decoder.n_layers

        @property
        def max_seq_len(self) -> int:
            return self.decoder.max_seq_len

        @property
        def n_token_types(self) -> int | None:
            return self.decoder.n_token_types

        @property
        def tie_embeddings(self) -> bool:
            return self.decoder.tie_embeddings

    def __init__(self, config: EncoderDecoder.Config, generator: torch.Generator | None = None):
        super().__init__()
        if config.vocab_size is None:
            raise UnsupportedError("model.vocab_size is not set", fix="give it, or take it from a tokenizer")
        self.config, (one, two) = config, config.halves()
        self.decoder = Decoder(two, generator)  # first, so that what is shared has its names
        self.encoder = Decoder(one, generator)
        self.vocab_size, self.max_seq_len = self.decoder.vocab_size, self.decoder.max_seq_len
        if config.share_embedding:
            self.encoder.embed = self.decoder.embed
        if config.share_positions:
            self.encoder.positions, self.encoder.rotary = self.decoder.positions, self.decoder.rotary

    def forward(self, inputs: Inputs, state: State | None = None, needs: Iterable[str] = ("logits",)) -> Outputs:
        """Write ``inputs.tokens`` (B, T) for ``inputs.source`` (B, S), or for a ``memory`` that ``encode`` gave.

        With ``state`` the source is given with the first tokens alone: what is read of it is kept. Beside the
        decoder's outputs encoder_hidden_states and encoder_attention can be asked for, where there is a source.

        Raises:
            UnsupportedError: no source, or something asked for that there is not.
        """
        needs = frozenset(needs)
        of_encoder = needs & set(OF_ENCODER)
        if unknown := needs.difference(NEEDS, OF_ENCODER):
            known = ", ".join((*NEEDS, *OF_ENCODER))
            raise UnsupportedError(f"the model has no output {sorted(unknown)}", fix=f"ask for some of {known}")
        found, memory, aux = Outputs(), inputs.memory, dict[str, Tensor]()
        if memory is None and inputs.source is not None:
            memory, found = self._encoded(inputs, {name.removeprefix("encoder_") for name in of_encoder})
            aux = found.aux
        elif of_encoder:
            raise UnsupportedError(f"{sorted(of_encoder)[0]} needs a source in this pass", fix="give Inputs.source")
        target = Inputs(
            inputs.tokens, inputs.valid, inputs.doc_ids, inputs.positions, inputs.padding, inputs.token_types,
            inputs.prefix, memory,
        )  # fmt: skip
        out = self.decoder(target, state, needs - of_encoder)
        add_up(out.aux, aux)
        out.encoder_hidden_states, out.encoder_attention = found.hidden_states, found.attention
        return out

    def encode(self, source: Tensor, valid: Tensor | None = None, doc_ids: Tensor | None = None) -> Memory:
        """What the decoder reads of a source (B, S), padded where not ``valid``, packed where ``doc_ids`` differ."""
        given = Inputs(source, source=source, source_valid=valid, source_doc_ids=doc_ids)
        return self._encoded(given, set())[0]

    def _encoded(self, inputs: Inputs, wanted: set[str]) -> tuple[Memory, Outputs]:
        source, valid, doc_ids = inputs.source, inputs.source_valid, inputs.source_doc_ids
        if source is None or not source.shape[1]:
            raise UnsupportedError("the source has no tokens", fix="give at least one")
        out = self.encoder(Inputs(source, valid=valid, doc_ids=doc_ids), needs={"hidden", *wanted})
        hidden, how = out.hidden, self.config.memory
        assert hidden is not None
        valid = torch.ones_like(source, dtype=torch.bool) if valid is None else valid
        if how == "all":
            return Memory(hidden, valid, doc_ids), out
        if doc_ids is not None:
            raise UnsupportedError(f"memory = {how} is one vector a row", fix="give one pair a row, or memory = all")
        return Memory(pool(hidden, valid, how)[:, None], valid.any(1, keepdim=True)), out

    def logits(self, hidden: Tensor) -> Tensor:
        """The head on the decoder's normed hidden states (..., D): (..., V)."""
        return self.decoder.logits(hidden)

    def output_head(self) -> Head:
        """The weights behind ``logits``."""
        return self.decoder.output_head()

    def new_state(self, rows: int, max_tokens: int | None = None) -> ContiguousState:
        """An empty decode state; the target's tokens are counted, the source's memory comes with the first of them."""
        return self.decoder.new_state(rows, max_tokens)

    def state_specs(self) -> dict[str, StateSpec]:
        return self.decoder.state_specs()

    def mixers(self) -> dict[str, Mixer]:
        """Every layer's mixers of both halves, by half, depth and place."""
        halves = {"encoder": self.encoder, "decoder": self.decoder}
        return {f"{half}.{name}": mixer for half, model in halves.items() for name, mixer in model.mixers().items()}

    def stack(self) -> list[Block]:
        """The blocks, the encoder's first."""
        return [*self.encoder.stack(), *self.decoder.stack()]

    @property
    def blocks(self) -> list[Any]:
        return [*self.encoder.blocks, *self.decoder.blocks]

    @property
    def multi_token(self) -> nn.ModuleList:
        return self.decoder.multi_token

    @property
    def classes(self) -> nn.Module | None:
        return self.decoder.classes

    @property
    def embed(self) -> Embedding:
        return self.decoder.embed

    @property
    def positions(self) -> nn.Module:
        return self.decoder.positions

    @property
    def capabilities(self) -> Capabilities:
        """What the decoder promises; packed rows both halves must keep apart."""
        one, two = self.encoder.capabilities, self.decoder.capabilities
        return Capabilities(
            causal=two.causal,
            packed=one.packed and two.packed,
            incremental=two.incremental,
            batch_independent=one.batch_independent and two.batch_independent,
            constant_state=two.constant_state,
            compilable=one.compilable and two.compilable,
        )
