"""The contracts every component keeps: Mixer, Context, Capabilities, Dims, Inputs, Outputs.

Letters used for tensor axes everywhere: B rows, T query tokens, S key tokens, D d_model, F d_ff,
H query heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from octavo.nn.position import Rotation
    from octavo.nn.state import LayerState, State, StateSpec
    from octavo.schema import Config

Aux = dict[str, Tensor]


@dataclass(frozen=True)
class Dims:
    """What a component may know about the model around it when it is built."""

    d_model: int
    n_layers: int
    max_seq_len: int
    depth: int = 0


@dataclass(frozen=True)
class Capabilities:
    """What a component promises. The laws test every promise; what is not promised is refused by name.

    causal: the output at a token depends on no later token. packed: documents in one row do not mix.
    incremental: prefill and decode in any cut equal one full pass. batch_independent: a row alone equals
    the row in a batch. constant_state: state bytes do not grow with the length. compilable: torch.compile
    traces it without a graph break. What is not causal works only in a model that reads both ways.
    """

    causal: bool = True
    packed: bool = True
    incremental: bool = True
    batch_independent: bool = True
    constant_state: bool = False
    compilable: bool = True


class Keys(NamedTuple):
    """Which token each key is: ``slots`` (B, S) its place in the row, -1 where there is none; ``doc_ids`` (B, S)."""

    slots: Tensor
    doc_ids: Tensor


class Memory(NamedTuple):
    """What cross-attention reads beside a text: ``hidden`` (B, S, D), ``valid`` (B, S), False on padding anywhere.

    ``doc_ids`` (B, S), for packed rows: a token reads the memory of its own document alone. Without them every
    document of a row reads all of the row's memory.
    """

    hidden: Tensor
    valid: Tensor
    doc_ids: Tensor | None = None


@dataclass
class Context:
    """What every layer may know about the tokens; built once per forward by the backbone.

    positions (B, T) feed rotary tables and biases; slots (B, T) count the valid tokens of a row and order them (the two
    differ in packed rows, where positions restart); doc_ids (B, T); valid (B, T) is False on padding; starts (B, T) is
    True where a token begins another document than the valid token before it, the one place where a recurrence resets.
    Padding stands at the end of each row, whatever the inputs were. ``plain`` says that nothing is packed, padded or
    cached, so that a causal flag can stand for the mask; without ``restarts`` no document begins but at a row's first
    token. ``causal`` is False in a model that reads both ways. ``memory`` is there where this pass brings one;
    ``prefix`` (B, T) is the first slot beyond the prefix of each token's document, where there are prefixes.
    ``rotations`` by head width and ``bias`` are what the position scheme gives to attention.
    """

    positions: Tensor
    slots: Tensor
    doc_ids: Tensor
    valid: Tensor
    starts: Tensor
    plain: bool
    keys: Keys
    restarts: bool = True
    causal: bool = True
    memory: Memory | None = None
    prefix: Tensor | None = None
    rotations: Mapping[int, Rotation | None] = field(default_factory=dict)
    bias: Callable[[Context, Keys], Tensor] | None = None
    record: frozenset[str] = frozenset()
    recorded: dict[str, list[Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[bool, int | None], Tensor] = field(default_factory=dict)
    _first_keys: dict[int | None, Tensor] = field(default_factory=dict)
    _bias: Tensor | None = None

    def mask(self, keys: Keys, *, causal: bool = True, window: int | None = None) -> Tensor:
        """The mask rule: who may read whom, (B, 1, T, S), True where reading is allowed.

        A query reads keys of its own document that are not later than itself and, with a ``window``, not
        further back than ``window - 1`` tokens; where it is not ``causal``, not further ahead either. The prefix of
        its document is read by all of it. Queries on padding read everything: their output is discarded, and a softmax
        over nothing would be NaN.
        """
        shared = keys is self.keys  # every layer over the same keys asks for the same mask
        if shared and (causal, window) in self._masks:
            return self._masks[causal, window]
        query, key = self.slots[:, :, None], keys.slots[:, None, :]
        allowed = (key >= 0) & (keys.doc_ids[:, None, :] == self.doc_ids[:, :, None])
        if causal and self.prefix is None:
            allowed = allowed & (key <= query)
        elif causal and self.prefix is not None:
            allowed = allowed & ((key <= query) | (key < self.prefix[:, :, None]))
        if window is not None:
            allowed = allowed & (key > query - window)
            allowed = allowed if causal else allowed & (key < query + window)
        mask = (allowed | ~self.valid[:, :, None])[:, None]
        if shared:
            self._masks[causal, window] = mask
        return mask

    def rotation(self, width: int) -> Rotation | None:
        """What turns heads of ``width`` channels; None where nothing is turned."""
        return self.rotations.get(width)

    def score_bias(self, keys: Keys) -> Tensor | None:
        """What the position scheme adds to scaled scores, (1 or B, H, T, S), or None."""
        if self.bias is None:
            return None
        if keys is not self.keys:
            return self.bias(self, keys)
        if self._bias is None:  # every layer over the same keys asks for the same
            self._bias = self.bias(self, keys)
        return self._bias

    def first_keys(self, window: int | None = None) -> Tensor:
        """The mask rule as ranges, (B, T) int32: token t may read the tokens from the one given to itself.

        -1 on padding, which reads nothing and is read by nothing. Only where the keys are the row's own tokens
        (no state) and every document of a row is in one piece.
        """
        if window in self._first_keys:
            return self._first_keys[window]
        order = torch.arange(self.slots.shape[1], device=self.slots.device)
        first = torch.where(self.starts, order, 0).cummax(1).values
        if window is not None:  # it counts valid tokens, wherever padding is
            first = torch.maximum(first, torch.searchsorted(self.slots, (self.slots - (window - 1)).contiguous()))
        first = self._first_keys[window] = torch.where(self.valid, first, -1).int()
        return first


@dataclass
class Inputs:
    """The named tensors of a forward pass.

    tokens (B, T) int64. Optional: valid (B, T) bool, False on padding, on either side; doc_ids (B, T) for
    packed rows, another for each document of a row; positions (B, T), by default counted from each
    document's start; token_types (B, T), by default 0, where the model has types. ``padding`` "end" is the caller's
    word that padding stands at the end of every row.

    ``prefix`` (B, T) bool marks the tokens that all of their document may read, those before them too: a prefix
    language model (Raffel et al. 2020, section 3.2.1). A prefix comes whole, in one pass.

    For models that read something beside their text: ``memory``, or for an encoder-decoder the ``source`` (B, S)
    that it makes one of, source_valid (B, S) and, for packed rows, source_doc_ids (B, S). With a state it is given
    with the first tokens only.
    """

    tokens: Tensor
    valid: Tensor | None = None
    doc_ids: Tensor | None = None
    positions: Tensor | None = None
    padding: Literal["anywhere", "end"] = "anywhere"
    token_types: Tensor | None = None
    prefix: Tensor | None = None
    memory: Memory | None = None
    source: Tensor | None = None
    source_valid: Tensor | None = None
    source_doc_ids: Tensor | None = None

    def with_padding_last(self) -> tuple[Inputs, Tensor | None]:
        """The same rows with padding moved to the end, and where each token went, (B, T); None if nothing moved."""
        if self.valid is None or self.padding == "end":
            return self, None
        order = (~self.valid).byte().argsort(dim=1, stable=True)
        names = ("valid", "doc_ids", "positions", "token_types", "prefix")
        moved = {name: t.gather(1, order) for name in names if (t := getattr(self, name)) is not None}
        return Inputs(self.tokens.gather(1, order), **moved, padding="end", memory=self.memory), order.argsort(1)


class Head(NamedTuple):
    """How hidden states become logits: ``softcap(transform(hidden) weight^T + bias)``, weight (V, D), bias (V,).

    softcap c stands for ``c tanh(logits / c)`` (Gemma Team 2024, section 2); transform is the identity where None.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    transform: Callable[[Tensor], Tensor] | None = None


@dataclass
class Outputs:
    """What a forward pass was asked for; the rest is None.

    logits (B, T, V). hidden (B, T, D): the normed last hidden state. hidden_states: the embedding output, the output of
    layers 1 to n-1, and the normed last, n+1 tensors. attention: one (B, H, T, S) per attention layer; cross_attention:
    one (B, H, T, S) per layer that reads a memory. encoder_hidden_states and encoder_attention: the same of an
    encoder-decoder's other half. head: what makes logits of ``hidden``, for a loss that never holds them all.
    multi_token: one (B, T, D) per module, read by the same head, whose token t foretells the token after the next k.
    classes: (B, C) of a text or (B, T, C) of its tokens, by the head of that name. aux: figures by name, each a sum
    over valid tokens, added up over layers: those whose name begins with ``loss.`` belong to what is trained on, the
    others (without gradient) to the metrics.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attention: tuple[Tensor, ...] | None = None
    cross_attention: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attention: tuple[Tensor, ...] | None = None
    head: Head | None = None
    multi_token: tuple[Tensor, ...] | None = None
    classes: Tensor | None = None
    aux: Aux = field(default_factory=dict)


class Heads(NamedTuple):
    """The heads of an attention layer; ``rotary_width`` channels of each are rotated, 0: none."""

    n_heads: int
    rotary_width: int


class Mixer(nn.Module, ABC):
    """The one contract of token mixers and channel mixers.

    A mixer holds parameters only. What it must remember between calls it describes in ``state_spec`` and
    receives as ``state``, which belongs to the caller. Every weight product inside is a ``Projection``.
    """

    Config: ClassVar[type[Config]]
    capabilities: ClassVar[Capabilities] = Capabilities()

    @abstractmethod
    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        """Mix ``x`` (B, T, D) into (B, T, D); ``aux`` holds figures that add up over layers, see ``Outputs``."""

    @classmethod
    def heads(cls, config: Any, d_model: int) -> Heads | None:
        """What the position scheme has to serve: rotated queries and keys, biased scores. None: neither."""
        return None

    def state_spec(self) -> StateSpec:
        """The fields this mixer keeps between calls, by name; none by default."""
        return {}

    def reset(self) -> None:
        """Set the starting values of parameters that are not inside a Projection."""

    def after_step(self, figures: Aux) -> None:
        """Change what no gradient changes, after an update: ``figures`` are the ``aux`` of the whole step.

        Only parameters that ask for no gradient may change here: they are saved, exported and restored as the others.
        """

    @abstractmethod
    def flops(self, n_queries: int, n_keys: int) -> int:
        """Multiply-adds times two of one row's forward pass, matrix products only."""

    @abstractmethod
    def predicted_parameters(self) -> int:
        """The parameter count by formula; a law holds it equal to the real count."""


class Predictor(Protocol):
    """What evaluation, decoding and serving need of a model, neural or not."""

    vocab_size: int
    max_seq_len: int

    def state_specs(self) -> dict[str, StateSpec]: ...

    def new_state(self, rows: int, max_tokens: int | None = None) -> State: ...

    def __call__(self, inputs: Inputs, state: Any = None, needs: tuple[str, ...] = ("logits",)) -> Outputs: ...


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged if it is wider: where reductions must not be done in 16 bits."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
