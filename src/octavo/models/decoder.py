"""The decoder-only language model: embedding, a pattern of blocks, final norm, head."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from octavo.errors import UnsupportedError
from octavo.models.block import Block, BlockConfig, add_up
from octavo.models.multi_token import MultiToken, MultiTokenConfig, looking_ahead
from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Head, Heads, Inputs, Mixer, Outputs
from octavo.nn.norm import RMSNorm
from octavo.nn.position import PositionDims
from octavo.nn.projection import Embedding, InitConfig, Projection, initialise
from octavo.nn.rope import RotaryPositions
from octavo.nn.state import ContiguousState, State, StateSpec, place
from octavo.nn.tables import NORMS, POSITIONS, TOKEN_MIXERS
from octavo.schema import Config, component, one_of

NEEDS = ("logits", "hidden", "hidden_states", "attention", "head", "multi_token")


class Decoder(nn.Module):
    """A causal language model of any pattern of blocks.

    ``pattern`` names blocks and is cycled over ``n_layers``: {local: ..., global: ...} with pattern
    [local, local, global] is a hybrid. vocab_size comes from the tokenizer where a recipe leaves it out.
    embed_scale multiplies the token embeddings (sqrt(d_model): Vaswani et al. 2017, section 3.4), embed_norm
    normalises them (BLOOM: Le Scao et al. 2022, section 3.2.3; nanochat); logit_softcap c keeps logits within (-c, c)
    by c tanh(logits / c) (Gemma 2: Gemma Team 2024, section 2). All layers of a block named in ``shared`` use one set
    of weights, each with a state of its own (ALBERT: Lan et al. 2019, section 3.1). multi_token adds modules that
    predict further tokens.
    """

    class Config(Config):
        kind: Literal["decoder"] = "decoder"
        d_model: int = Field(default=256, ge=1)
        n_layers: int = Field(default=4, ge=1)
        max_seq_len: int = Field(default=256, ge=1)
        vocab_size: int | None = Field(default=None, ge=2)
        blocks: dict[str, BlockConfig] = Field(default={"block": BlockConfig()})
        pattern: tuple[str, ...] | None = None
        shared: tuple[str, ...] = Field(default=(), description="blocks whose layers have the same weights")
        multi_token: MultiTokenConfig | None = None
        norm: one_of(NORMS) = RMSNorm.Config()  # type: ignore[valid-type]
        positions: one_of(POSITIONS) = RotaryPositions.Config()  # type: ignore[valid-type]
        causal: bool = Field(default=True, description="false: every token reads the whole document")
        final_norm: bool = True
        tie_embeddings: bool = True
        head_bias: bool = False
        embed_scale: float = Field(default=1.0, gt=0)
        embed_norm: bool = False
        logit_softcap: float | None = Field(default=None, gt=0, description="bound of the logits, by tanh")
        embed_dropout: float = Field(default=0.0, ge=0, lt=1)
        padding_id: int | None = Field(default=None, ge=0, description="this row of the embedding gets no gradient")
        init: InitConfig = InitConfig()

        @model_validator(mode="after")
        def _possible(self) -> Decoder.Config:
            if not self.blocks:
                raise ValueError("blocks must name at least one block")
            if unknown := [name for name in self.pattern or () if name not in self.blocks]:
                raise ValueError(f"pattern names unknown blocks {unknown}; blocks has {sorted(self.blocks)}")
            further = self.multi_token.block if self.multi_token else None
            if unknown := [name for name in (*self.shared, *([further] if further else ())) if name not in self.blocks]:
                raise ValueError(
                    f"shared and multi_token name unknown blocks {unknown}; there is {sorted(self.blocks)}"
                )
            widths = {heads.rotary_width for heads in self.heads() if heads.rotary_width}
            for width in widths if self.positions.kind == "rope" else ():
                self.positions.check(width)
            if self.padding_id is not None and self.vocab_size is not None and self.padding_id >= self.vocab_size:
                raise ValueError(f"padding_id = {self.padding_id} must be below vocab_size = {self.vocab_size}")
            return self

        def heads(self) -> list[Heads]:
            """The heads of the blocks that have any.

            Raises:
                ValueError: a block whose heads do not fit d_model.
            """
            found = []
            for name, block in self.blocks.items():
                try:
                    found.append(component(TOKEN_MIXERS, block.mixer.kind).heads(block.mixer, self.d_model))
                except ValueError as error:
                    raise ValueError(f"blocks.{name}.mixer.{error}") from None
            return [heads for heads in found if heads is not None]

        def position_dims(self) -> list[PositionDims]:
            """What the position scheme is told: once, or once for each width of what is rotated."""
            numbers = {heads.n_heads for heads in self.heads()}
            n_heads = numbers.pop() if len(numbers) == 1 else None
            widths = list(dict.fromkeys(heads.rotary_width for heads in self.heads() if heads.rotary_width))
            rotated = widths if self.positions.kind == "rope" else widths[:1]
            return [PositionDims(self.d_model, w, self.max_seq_len, n_heads) for w in rotated or [self.d_model]]

        def layer_names(self) -> list[str]:
            """The block of each layer, first to last."""
            return list(itertools.islice(itertools.cycle(self.pattern or tuple(self.blocks)), self.n_layers))

    def __init__(self, config: Decoder.Config, generator: torch.Generator | None = None):
        super().__init__()
        if config.vocab_size is None:
            raise UnsupportedError("model.vocab_size is not set", fix="give it, or take it from a tokenizer")
        self.config, D, V = config, config.d_model, config.vocab_size
        self.vocab_size, self.max_seq_len = V, config.max_seq_len
        self.embed = Embedding(V, D, "embed", padding_id=config.padding_id)
        self.use_positions(config)
        # Layers of a shared block are its first layer again: the place in ``blocks`` of what each layer uses.
        names, self.uses = config.layer_names(), list[int]()
        first: dict[str, int] = {}
        for name in names:
            another = len(set(self.uses))
            self.uses.append(first.setdefault(name, another) if name in config.shared else another)
        own = [self.uses.index(i) for i in range(len(set(self.uses)))]  # the depth at which each is first used
        dims = [Dims(D, config.n_layers, config.max_seq_len, depth) for depth in range(config.n_layers + 1)]
        self.blocks = nn.ModuleList(Block(config.blocks[names[depth]], config.norm, dims[depth]) for depth in own)
        norm = component(NORMS, config.norm.kind)
        self.embed_norm = norm(config.norm, D) if config.embed_norm else None
        self.norm = norm(config.norm, D) if config.final_norm else nn.Identity()
        self.head = None if config.tie_embeddings else Projection(D, V, "head", bias=config.head_bias)
        self.head_bias = nn.Parameter(torch.zeros(V)) if config.tie_embeddings and config.head_bias else None
        wanted = config.multi_token
        further = config.blocks[(wanted.block if wanted else None) or names[-1]]
        modules = range(wanted.n_modules if wanted else 0)
        self.multi_token = nn.ModuleList(MultiToken(further, config.norm, dims[-1]) for _ in modules)
        if config.causal and (name := self._unable("causal")):
            raise UnsupportedError(f"{name} reads ahead", fix="set causal to false, or use another mixer")
        if self.embed.weight.device.type != "meta":
            initialise(self, config.init, config.n_layers, generator)

    def use_positions(self, config: Decoder.Config) -> None:
        """Make the position schemes of ``config``: one, and for further head widths another rotary table each."""
        make = component(POSITIONS, config.positions.kind)
        self.positions, *others = (make(config.positions, dims) for dims in config.position_dims())
        widths = [dims.head_dim for dims in config.position_dims()]
        self.rotary = dict(zip(widths, (self.positions, *others), strict=True))

    def forward(self, inputs: Inputs, state: State | None = None, needs: Iterable[str] = ("logits",)) -> Outputs:
        """Run the model over ``inputs.tokens`` (B, T); see ``Outputs`` for what can be asked for.

        With ``state`` the tokens continue what each row has seen, and the state is updated in place.

        Raises:
            UnsupportedError: an unknown name in ``needs``, or more tokens than a learned table has rows.
        """
        needs = frozenset(needs)
        if unknown := needs.difference(NEEDS):
            raise UnsupportedError(
                f"the decoder has no output {sorted(unknown)}", fix=f"ask for some of {', '.join(NEEDS)}"
            )
        if state is not None and (name := self._unable("incremental")):
            raise UnsupportedError(f"{name} cannot decode with a state", fix="read whole texts instead")
        if inputs.doc_ids is not None and (name := self._unable("packed")):
            raise UnsupportedError(f"{name} cannot keep packed documents apart", fix="give one a row")
        inputs, moved = inputs.with_padding_last()
        ctx = state.begin(inputs) if state is not None else place(inputs)[0]
        ctx.record, ctx.causal = needs & {"attention"}, self.config.causal
        self._check_length(inputs.tokens.shape[1], ctx.positions)
        ctx.rotations = {width: scheme.rotation(ctx.positions) for width, scheme in self.rotary.items()}
        ctx.bias = self.positions.bias if self.positions.biased else None
        embedded = self._embedded(inputs.tokens)
        x = self.positions.embed(embedded, ctx.positions)
        x = F.dropout(x, self.config.embed_dropout, self.training)
        states, aux = [x], {}
        x, aux = self._stack(x, ctx, state, states if "hidden_states" in needs else None)
        hidden, maps = self.norm(x), tuple(ctx.recorded.get("attention", ()))
        further: list[Tensor] = []
        if "multi_token" in needs:
            further, aux = self._further(hidden, embedded, ctx, state, aux)
        if moved is not None:  # padding back to where it was
            hidden, *rest = (h.gather(1, moved[:, :, None].expand_as(h)) for h in (hidden, *states, *further))
            states, further = rest[: len(states)], rest[len(states) :]
            maps = tuple(_move_back(weights, moved, both=state is None) for weights in maps)
        return Outputs(
            logits=self.logits(hidden) if "logits" in needs else None,
            hidden=hidden if "hidden" in needs else None,
            hidden_states=(*states[:-1], hidden) if "hidden_states" in needs else None,
            attention=maps if "attention" in needs else None,
            head=self.output_head() if "head" in needs else None,
            multi_token=tuple(further) if "multi_token" in needs else None,
            aux=aux,
        )

    def _unable(self, promise: str) -> str:
        """The first mixer that does not promise something, by name."""
        unable = (n for n, mixer in self.mixers().items() if not getattr(mixer.capabilities, promise))
        name = next(unable, None)
        return f"{type(self.mixers()[name]).__name__} ({name})" if name else ""

    def _embedded(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.config.embed_scale != 1:  # rounded to the stream's dtype first, as checkpoints were trained
            x = x * torch.full((), self.config.embed_scale, dtype=x.dtype, device=x.device)
        return self.embed_norm(x) if self.embed_norm is not None else x

    def _stack(self, x: Tensor, ctx: Context, state: State | None, keep: list[Tensor] | None) -> tuple[Tensor, Aux]:
        aux: Aux = {}
        for depth, block in enumerate(self.stack()):
            x, new = block(x, ctx, state, depth)
            add_up(aux, new)
            if keep is not None:
                keep.append(x)
        return x, aux

    def _further(
        self, hidden: Tensor, embedded: Tensor, ctx: Context, state: State | None, aux: Aux
    ) -> tuple[list[Tensor], Aux]:
        """What each module of multi-token prediction gives to the head, (B, T, D) each."""
        if state is not None:
            raise UnsupportedError("multi_token is an output of whole texts", fix="ask for it without a state")
        normed = []
        for by, module in enumerate(self.multi_token, 1):
            hidden, ready, new = module(hidden, looking_ahead(embedded, by), ctx)
            normed.append(ready)
            add_up(aux, new)
        return normed, aux

    def logits(self, hidden: Tensor) -> Tensor:
        """The language-model head on normed hidden states (..., D): (..., V)."""
        if self.head is not None:
            logits = self.head(hidden)
        else:
            logits = F.linear(hidden, self.embed.weight, self.head_bias)
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def output_head(self) -> Head:
        """The weights behind ``logits``."""
        if self.head is not None:
            return Head(self.head.weight, self.head.bias, self.config.logit_softcap)
        return Head(self.embed.weight, self.head_bias, self.config.logit_softcap)

    def _check_length(self, n_new: int, positions: Tensor) -> None:
        limit = self.positions.max_positions
        # A longer row may still fit: padded, or packed with short documents. Only then is the device asked.
        if limit is not None and n_new > limit and (highest := int(positions.max())) >= limit:
            raise UnsupportedError(
                f"position {highest} is beyond the {limit} trained positions", fix=self.positions.beyond
            )

    def new_state(self, rows: int, max_tokens: int | None = None) -> ContiguousState:
        """An empty decode state for ``rows`` rows of up to ``max_tokens`` tokens (default: max_seq_len)."""
        max_tokens = max_tokens or self.max_seq_len
        limit = self.positions.max_positions
        if limit is not None and max_tokens > limit:
            raise UnsupportedError(
                f"a state of {max_tokens} tokens exceeds the {limit} trained positions", fix="ask for fewer tokens"
            )
        weight = self.embed.weight
        return ContiguousState(self.state_specs(), rows, max_tokens, weight.dtype, weight.device)

    def state_specs(self) -> dict[str, StateSpec]:
        return {name: mixer.state_spec() for name, mixer in self.mixers().items()}

    def mixers(self) -> dict[str, Mixer]:
        """Every layer's mixers by the name of their state, ``depth.mixer`` or ``depth.channel``."""
        layers = enumerate(self.stack())
        return {f"{depth}.{name}": layer.mixer for depth, block in layers for name, layer in block.sub_layers()}

    def stack(self) -> list[Block]:
        """The block of each layer, first to last; layers that share weights have the same."""
        return [self.blocks[i] for i in self.uses]  # type: ignore[misc]

    @property
    def capabilities(self) -> Capabilities:
        """What all mixers promise together."""
        all_of = [mixer.capabilities for mixer in self.mixers().values()]
        return Capabilities(**{f: all(getattr(c, f) for c in all_of) for f in Capabilities.__dataclass_fields__})


def _move_back(weights: Tensor, moved: Tensor, *, both: bool) -> Tensor:
    """Attention maps (B, H, T, S) of rows whose padding was moved, in the order of the inputs; keys too if ``both``."""
    weights = weights.gather(2, moved[:, None, :, None].expand_as(weights))
    return weights.gather(3, moved[:, None, None, :].expand_as(weights)) if both else weights


MODELS: dict[str, type[Decoder]] = {"decoder": Decoder}


def build(config: Config, *, seed: int = 0, device: str = "cpu") -> Decoder:
    """A model with freshly initialised weights; ``device="meta"`` makes one without any, for counting."""
    with torch.device(device):
        return component(MODELS, config.kind)(config, torch.Generator("cpu").manual_seed(seed))  # type: ignore[attr-defined]
