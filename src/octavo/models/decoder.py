"""The decoder-only language model: embedding, a pattern of blocks, final norm, head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from octavo.errors import UnsupportedError
from octavo.models.block import Block, BlockConfig, add_up
from octavo.models.heads import Classes, ClassesConfig, HeadTransform, TransformConfig
from octavo.models.multi_token import MultiToken, MultiTokenConfig, looking_ahead
from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Head, Heads, Inputs, Memory, Mixer, Outputs
from octavo.nn.dropout import dropout
from octavo.nn.norm import RMSNorm
from octavo.nn.position import PositionDims, Positions
from octavo.nn.projection import Embedding, InitConfig, Projection, initialise
from octavo.nn.reader import FullReader
from octavo.nn.rope import RotaryPositions
from octavo.nn.state import ContiguousState, State, StateSpec, place
from octavo.nn.tables import NORMS, POSITIONS, TOKEN_MIXERS
from octavo.schema import Config, component, load_object, one_of

NEEDS = ("logits", "hidden", "hidden_states", "attention", "cross_attention", "head", "multi_token", "classes")


class Decoder(nn.Module):
    """A causal language model of any pattern of blocks.

    ``pattern`` names blocks and is cycled over ``n_layers``: {local: ..., global: ...} with pattern [local, local,
    global] is a hybrid. vocab_size comes from the tokenizer where a recipe leaves it out. embed_scale multiplies the
    token embeddings (sqrt(d_model): Vaswani et al. 2017, section 3.4), n_token_types adds one vector for each kind of
    token (BERT: Devlin et al. 2019, section 3), and embed_norm normalises what enters the first block, positions
    included (BERT; BLOOM: Le Scao et al. 2022, section 3.2.3; nanochat); logit_scale multiplies what the head reads
    (T5: Raffel et al. 2020, its code); logit_softcap c keeps logits within (-c, c) by c tanh(logits / c) (Gemma 2:
    Gemma Team 2024, section 2). All layers of a block named in ``shared`` use one set of weights, each with a state of
    its own (ALBERT: Lan et al. 2019, section 3.1). multi_token adds modules that predict further tokens, classes a head
    for texts or tokens; head_transform stands before the logits (BERT).
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
        classes: ClassesConfig | None = None
        head_transform: TransformConfig | None = None
        norm: one_of(NORMS) = RMSNorm.Config()  # type: ignore[valid-type]
        positions: one_of(POSITIONS) = RotaryPositions.Config()  # type: ignore[valid-type]
        causal: bool = Field(default=True, description="false: every token reads the whole document")
        final_norm: bool = True
        tie_embeddings: bool = True
        head_bias: bool = False
        embed_scale: float = Field(default=1.0, gt=0)
        embed_norm: bool = False
        logit_scale: float = Field(default=1.0, gt=0, description="on what the head reads")
        n_token_types: int | None = Field(default=None, ge=1, description="segments of a text: BERT has 2")
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
            self.heads()  # they must fit, whatever the positions are
            for scheme in self.schemes():
                for dims in self.position_dims(scheme) if scheme.kind == "rope" and self.heads(scheme) else ():
                    scheme.check(dims.head_dim)
            if self.classes and self.causal and self.classes.over == "sequence" and self.classes.pooling == "first":
                raise ValueError("classes.pooling first reads a token that has seen nothing else; use last or mean")
            if self.padding_id is not None and self.vocab_size is not None and self.padding_id >= self.vocab_size:
                raise ValueError(f"padding_id = {self.padding_id} must be below vocab_size = {self.vocab_size}")
            return self

        def schemes(self) -> list[Any]:
            """Every position scheme there is: the model's, then those that blocks have for themselves."""
            found = [self.positions]
            for block in self.blocks.values():
                found += [block.positions] if block.positions is not None and block.positions not in found else []
            return found

        def heads(self, scheme: Any = None) -> list[Heads]:
            """The heads of the blocks that have any, or of those that a position scheme serves.

            Raises:
                ValueError: a block whose heads do not fit d_model.
            """
            found = []
            for name, block in self.blocks.items():
                if scheme is not None and (block.positions or self.positions) != scheme:
                    continue
                try:
                    found.append(component(TOKEN_MIXERS, block.mixer.kind).heads(block.mixer, self.d_model))
                except ValueError as error:
                    raise ValueError(f"blocks.{name}.mixer.{error}") from None
            return [heads for heads in found if heads is not None]

        def position_dims(self, scheme: Any = None) -> list[PositionDims]:
            """What a position scheme, by default the model's, is told: once, or for each width that is rotated."""
            scheme = scheme or self.positions
            served = self.heads(scheme)
            numbers = {heads.n_heads for heads in served}
            n_heads = numbers.pop() if len(numbers) == 1 else None
            widths = list(dict.fromkeys(heads.rotary_width for heads in served if heads.rotary_width))
            rotated = widths if scheme.kind == "rope" else widths[:1]
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
        self.token_types = Embedding(config.n_token_types, D, "embed") if config.n_token_types else None
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
        self.head_transform = HeadTransform(config.head_transform, config.norm, D) if config.head_transform else None
        self.classes = Classes(config.classes, config.norm, D) if config.classes else None
        wanted = config.multi_token
        further = config.blocks[(wanted.block if wanted else None) or names[-1]]
        modules = range(wanted.n_modules if wanted else 0)
        self.multi_token = nn.ModuleList(MultiToken(further, config.norm, dims[-1]) for _ in modules)
        if config.causal and (name := self._unable("causal")):
            raise UnsupportedError(f"{name} reads ahead", fix="set causal to false, or use another mixer")
        if self.embed.weight.device.type != "meta":
            initialise(self, config.init, config.n_layers, generator)

    def use_positions(self, config: Decoder.Config) -> None:
        """Make the position schemes of ``config``: for each the rotary tables by head width, the model's first."""
        schemes = config.schemes()
        self.rotary: list[dict[int, Positions]] = []
        for scheme in schemes:
            make = component(POSITIONS, scheme.kind)
            self.rotary.append({dims.head_dim: make(scheme, dims) for dims in config.position_dims(scheme)})
        self.positions = next(iter(self.rotary[0].values()))
        self.turns = {n: schemes.index(block.positions or config.positions) for n, block in config.blocks.items()}

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
            fix = "read whole texts instead" if self.config.causal else "use octavo embed or octavo classify"
            raise UnsupportedError(f"{name} cannot decode with a state", fix=fix)
        if inputs.doc_ids is not None and (name := self._unable("packed")):
            raise UnsupportedError(f"{name} cannot keep packed documents apart", fix="give one a row")
        inputs, moved = inputs.with_padding_last()
        ctx = state.begin(inputs) if state is not None else place(inputs)[0]
        ctx.record, ctx.causal = needs & {"attention", "cross_attention"}, self.config.causal
        ctx.memory = self._checked(inputs.memory, inputs.tokens.shape[0])
        self._check_length(inputs.tokens.shape[1], ctx.positions)
        if inputs.prefix is not None:
            ctx.prefix, ctx.plain = self._prefix_ends(inputs.prefix, ctx), False
        contexts = self._contexts(ctx)
        embedded = self._embedded(inputs)
        x = self.positions.embed(embedded, ctx.positions)
        x = self.embed_norm(x) if self.embed_norm is not None else x
        x = dropout(x, self.config.embed_dropout, self.training)
        states, aux = [x], {}
        x, aux = self._stack(x, contexts, state, states if "hidden_states" in needs else None)
        hidden, maps = self.norm(x), tuple(ctx.recorded.get("attention", ()))
        crossed = tuple(ctx.recorded.get("cross_attention", ()))
        further: list[Tensor] = []
        if "multi_token" in needs:
            further, aux = self._further(hidden, embedded, contexts, state, aux)
        classes = self._classes(hidden, ctx, state) if "classes" in needs else None
        if classes is not None and classes.ndim == 3 and moved is not None:
            classes = classes.gather(1, moved[:, :, None].expand_as(classes))
        if moved is not None:  # padding back to where it was
            hidden, *rest = (h.gather(1, moved[:, :, None].expand_as(h)) for h in (hidden, *states, *further))
            states, further = rest[: len(states)], rest[len(states) :]
            maps = tuple(_move_back(weights, moved, both=state is None) for weights in maps)
            crossed = tuple(_move_back(weights, moved, both=False) for weights in crossed)
        return Outputs(
            logits=self.logits(hidden) if "logits" in needs else None,
            hidden=hidden if "hidden" in needs else None,
            hidden_states=(*states[:-1], hidden) if "hidden_states" in needs else None,
            attention=maps if "attention" in needs else None,
            cross_attention=crossed if "cross_attention" in needs else None,
            head=self.output_head() if "head" in needs else None,
            multi_token=tuple(further) if "multi_token" in needs else None,
            classes=classes,
            aux=aux,
        )

    def _prefix_ends(self, prefix: Tensor, ctx: Context) -> Tensor:
        """The slot after the last prefix token of each token's document, (B, T); 0 where it has none."""
        readers = {n: getattr(m, "reader", None) for n, m in self.mixers().items() if n.endswith(".mixer")}
        # What is a full reader by its mask alone reads by the mask rule, windows included.
        unable = (n for n, r in readers.items() if getattr(type(r), "mask", None) is not FullReader.mask)
        if (name := next(unable, None)) is not None:
            raise UnsupportedError(f"{name} cannot read a prefix both ways", fix="use attention that reads everything")
        same = ctx.doc_ids[:, :, None] == ctx.doc_ids[:, None]
        ends = torch.where(same & (prefix & ctx.valid)[:, None], ctx.slots[:, None] + 1, 0)
        return ends.amax(-1)

    def _checked(self, memory: Memory | None, rows: int) -> Memory | None:
        """A memory that fits the rows, and is read."""
        if memory is None:
            return None
        if not any(block.config.cross for block in self.stack()):
            raise UnsupportedError("no block of this model reads a memory", fix="give its blocks a cross mixer")
        if len(memory.hidden) != rows:
            raise UnsupportedError(
                f"a memory of {len(memory.hidden)} rows for {rows} rows of text", fix="give one each"
            )
        return memory

    def _unable(self, promise: str) -> str:
        """The first mixer that does not promise something, by name."""
        if promise == "incremental" and not self.config.causal:
            return "a model that reads both ways"
        unable = (n for n, mixer in self.mixers().items() if not getattr(mixer.capabilities, promise))
        name = next(unable, None)
        return f"{type(self.mixers()[name]).__name__} ({name})" if name else ""

    def _embedded(self, inputs: Inputs) -> Tensor:
        x = self.embed(inputs.tokens)
        if self.config.embed_scale != 1:  # rounded to the stream's dtype first, as checkpoints were trained
            x = x * torch.full((), self.config.embed_scale, dtype=x.dtype, device=x.device)
        if self.token_types is not None:
            types = inputs.token_types
            x = x + self.token_types(torch.zeros_like(inputs.tokens) if types is None else types)
        elif inputs.token_types is not None:
            raise UnsupportedError("the model has no token types", fix="leave token_types out, or set n_token_types")
        return x

    def _contexts(self, ctx: Context) -> dict[str, Context]:
        """The context of each block: one for every position scheme, which share all but what the scheme gives."""
        ctx.bias = self.positions.bias if self.positions.biased else None
        found = [ctx, *(replace(ctx, bias=None) for _ in self.rotary[1:])]
        for own, tables in zip(found, self.rotary, strict=True):
            own.rotations = {width: scheme.rotation(ctx.positions) for width, scheme in tables.items()}
        return {name: found[i] for name, i in self.turns.items()}

    def _stack(
        self, x: Tensor, contexts: dict[str, Context], state: State | None, keep: list[Tensor] | None
    ) -> tuple[Tensor, Aux]:
        aux: Aux = {}
        for depth, (name, block) in enumerate(zip(self.config.layer_names(), self.stack(), strict=True)):
            x, new = block(x, contexts[name], state, depth)
            add_up(aux, new)
            if keep is not None:
                keep.append(x)
        return x, aux

    def _further(
        self, hidden: Tensor, embedded: Tensor, contexts: dict[str, Context], state: State | None, aux: Aux
    ) -> tuple[list[Tensor], Aux]:
        """What each module of multi-token prediction gives to the head, (B, T, D) each.

        They read token embeddings before positions and embed_norm: each has a norm of its own for them.
        """
        if state is not None:
            raise UnsupportedError("multi_token is an output of whole texts", fix="ask for it without a state")
        wanted, normed = self.config.multi_token, []
        ctx = contexts[(wanted.block if wanted else None) or self.config.layer_names()[-1]]
        for by, module in enumerate(self.multi_token, 1):
            hidden, ready, new = module(hidden, looking_ahead(embedded, by), ctx)
            normed.append(ready)
            add_up(aux, new)
        return normed, aux

    def foretell(self, hidden: Tensor, following: Tensor, state: State) -> Tensor:
        """What the first module of multi-token prediction makes of tokens that were read, for ``logits``.

        Args:
            hidden: (B, T, D), the normed last hidden state at each token.
            following: (B, T) int64, the token after each.
            state: of the module's own (``multi_token[0].state_specs()``), one entry for each token.

        Returns:
            (B, T, D); the head's logits of it foretell the token after ``following``.

        Raises:
            UnsupportedError: the model has no such module.
        """
        if not len(self.multi_token):
            raise UnsupportedError("the model has no multi_token modules", fix="train one with multi_token")
        ctx, inputs = state.begin(Inputs(following)), Inputs(following)
        wanted = self.config.multi_token
        context = self._contexts(ctx)[(wanted.block if wanted else None) or self.config.layer_names()[-1]]
        return self.multi_token[0](hidden, self._embedded(inputs), context, state)[1]

    def _classes(self, hidden: Tensor, ctx: Context, state: State | None) -> Tensor:
        if self.classes is None:
            raise UnsupportedError("the model has no classes", fix="set model.classes, or ask for another output")
        if state is not None:
            raise UnsupportedError("classes are an output of whole texts", fix="ask for them without a state")
        return self.classes(hidden, ctx)

    def logits(self, hidden: Tensor) -> Tensor:
        """The language-model head on normed hidden states (..., D): (..., V)."""
        transform = self._before_head()
        hidden = hidden if transform is None else transform(hidden)
        if self.head is not None:
            logits = self.head(hidden)
        else:
            logits = F.linear(hidden, self.embed.weight, self.head_bias)
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def output_head(self) -> Head:
        """The weights behind ``logits``."""
        transform, cap = self._before_head(), self.config.logit_softcap
        if self.head is not None:
            return Head(self.head.weight, self.head.bias, cap, transform)
        return Head(self.embed.weight, self.head_bias, cap, transform)

    def _before_head(self) -> Callable[[Tensor], Tensor] | None:
        """What is done to hidden states before the product of the head."""
        scale = self.config.logit_scale
        if scale == 1:
            return self.head_transform
        inner = self.head_transform or nn.Identity()
        return lambda hidden: inner(hidden) * scale

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
        """Every layer's mixers by the name of their state, ``depth.mixer``, ``.cross`` or ``.channel``."""
        layers = enumerate(self.stack())
        return {f"{depth}.{name}": layer.mixer for depth, block in layers for name, layer in block.sub_layers()}

    def stack(self) -> list[Block]:
        """The block of each layer, first to last; layers that share weights have the same."""
        return [self.blocks[i] for i in self.uses]  # type: ignore[misc]

    @property
    def capabilities(self) -> Capabilities:
        """What all mixers promise together."""
        all_of = [mixer.capabilities for mixer in self.mixers().values()]
        together = {f: all(getattr(c, f) for c in all_of) for f in Capabilities.__dataclass_fields__}
        return Capabilities(**together | ({} if self.config.causal else {"causal": False, "incremental": False}))


def _move_back(weights: Tensor, moved: Tensor, *, both: bool) -> Tensor:
    """Attention maps (B, H, T, S) of rows whose padding was moved, in the order of the inputs; keys too if ``both``."""
    weights = weights.gather(2, moved[:, None, :, None].expand_as(weights))
    return weights.gather(3, moved[:, None, None, :].expand_as(weights)) if both else weights


def build(config: Config, *, seed: int = 0, device: str = "cpu") -> Any:
    """A model with freshly initialised weights; ``device="meta"`` makes one without any, for counting."""
    cls = load_object(f"{type(config).__module__}:{type(config).__qualname__.removesuffix('.Config')}")
    with torch.device(device):
        return cls(config, torch.Generator("cpu").manual_seed(seed))
