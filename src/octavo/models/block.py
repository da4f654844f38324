"""THE block: sub-layers on a residual stream, with every norm placement and topology as a value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from octavo.nn.contracts import Aux, Context, Dims, Mixer
from octavo.nn.dropout import dropout
from octavo.nn.projection import Projection
from octavo.nn.state import State
from octavo.nn.tables import CHANNEL_MIXERS, CROSS_MIXERS, NORMS, POSITIONS, TOKEN_MIXERS
from octavo.schema import Config, component, one_of

NormPlacement = Literal["pre", "branch", "sandwich", "post"]


class BlockConfig(Config):
    """One block: a token mixer, a channel mixer, and how they sit on the residual stream.

    ``cross`` stands between the two and reads a memory: what an encoder made of another text.

    norm_placement, with f a mixer: ``pre`` x + f(N(x)) (GPT-2, Llama); ``branch`` x + N(f(x)) (OLMo 2: Walsh
    et al. 2024, equations 1 and 2); ``sandwich`` x + N(f(N(x))) (CogView: Ding et al. 2021; Gemma 2: Gemma Team
    2024, section 2); ``post`` N(x + f(x)), the Transformer of 2017.
    residual_scale multiplies x in every sum (0 removes the residual). ``deepnorm``, for post, stands for Wang et al.
    2022, section 4: alpha = (2 n_layers)^(1/4) there, and values, outputs and the channel mixer's weights start
    (8 n_layers)^(-1/4) times as large. topology ``parallel`` adds both mixers to the same x (GPT-J), with one
    norm for both if ``shared_norm``. ``positions`` is a rotary scheme of this block's own, in place of the model's
    (Gemma 3: Gemma Team 2025, section 2; ModernBERT: Warner et al. 2024, section 2.1).
    """

    mixer: one_of(TOKEN_MIXERS, default="attention") = TOKEN_MIXERS["attention"].Config()  # type: ignore[valid-type]
    cross: one_of(CROSS_MIXERS) | None = Field(default=None, description="reads a memory")  # type: ignore[valid-type]
    channel: one_of(CHANNEL_MIXERS) | None = CHANNEL_MIXERS["glu"].Config()  # type: ignore[valid-type]
    norm_placement: NormPlacement = "pre"
    topology: Literal["sequential", "parallel"] = "sequential"
    shared_norm: bool = False
    residual_scale: Annotated[float, Field(ge=0)] | Literal["deepnorm"] = 1.0
    mixer_norm: bool = Field(default=True, description="false: no norm before the token mixer (ModernBERT's first)")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on each branch before it is added")
    positions: one_of(POSITIONS) | None = Field(default=None, description="rope or none; default: the model's")  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _possible(self) -> BlockConfig:
        if self.topology == "parallel" and self.norm_placement == "post":
            raise ValueError("norm_placement post normalises one sum after the other; topology parallel has one sum")
        if self.shared_norm and (self.topology != "parallel" or self.norm_placement != "pre"):
            raise ValueError("shared_norm needs topology parallel and norm_placement pre")
        if self.residual_scale == "deepnorm" and self.norm_placement != "post":
            raise ValueError("residual_scale deepnorm is made for norm_placement post")
        if not self.mixer_norm and (self.norm_placement != "pre" or self.shared_norm):
            raise ValueError("mixer_norm false leaves out a norm of its own that norm_placement pre puts there")
        if self.positions is not None and not component(POSITIONS, self.positions.kind).rotates_only():
            raise ValueError(f"positions {self.positions.kind} are the whole model's; a block's own are rope or none")
        return self


DEEPNORM_ROLES = frozenset({"v", "o", "gate", "up", "down"})


class SubLayer(nn.Module):
    """One mixer with its norms: the branch that is added to the stream."""

    def __init__(self, mixer: Mixer, placement: NormPlacement, norm: Config, d_model: int, *, own_norm: bool = True):
        super().__init__()
        kind = component(NORMS, norm.kind)  # type: ignore[attr-defined]
        make = lambda wanted: kind(norm, d_model) if wanted else None  # noqa: E731
        self.mixer = mixer
        self.norm_in = make(own_norm and placement in ("pre", "sandwich"))
        self.norm_out = make(placement in ("branch", "sandwich"))
        self.norm_sum = make(placement == "post")

    def forward(self, x: Tensor, ctx: Context, state: State | None, name: str) -> tuple[Tensor, Aux]:
        h = self.norm_in(x) if self.norm_in is not None else x
        y, aux = self.mixer(h, ctx, state.layer(name) if state is not None else None)
        return (self.norm_out(y) if self.norm_out is not None else y), aux


class Block(nn.Module):
    """A list of sub-layers applied to x (B, T, D). ``depth``, at which it is used, names its state."""

    def __init__(self, config: BlockConfig, norm: Config, dims: Dims):
        super().__init__()
        self.config = config
        deep = config.residual_scale == "deepnorm"
        self.residual_scale: float = (2 * dims.n_layers) ** 0.25 if deep else config.residual_scale  # type: ignore[assignment]
        mixers = {"mixer": component(TOKEN_MIXERS, config.mixer.kind)(config.mixer, dims)}  # type: ignore[attr-defined]
        if config.cross is not None:
            mixers["cross"] = component(CROSS_MIXERS, config.cross.kind)(config.cross, dims)  # type: ignore[attr-defined]
        if config.channel is not None:
            mixers["channel"] = component(CHANNEL_MIXERS, config.channel.kind)(config.channel, dims)  # type: ignore[attr-defined]
        bare = set(mixers) if config.shared_norm else {"mixer"} - ({"mixer"} if config.mixer_norm else set())
        self.layers = nn.ModuleDict(
            {
                name: SubLayer(mixer, config.norm_placement, norm, dims.d_model, own_norm=name not in bare)
                for name, mixer in mixers.items()
            }
        )
        self.norm = component(NORMS, norm.kind)(norm, dims.d_model) if config.shared_norm else None  # type: ignore[attr-defined]
        for module in self.modules() if deep else ():
            if isinstance(module, Projection) and module.role in DEEPNORM_ROLES:
                module.gain = (8 * dims.n_layers) ** -0.25

    def sub_layers(self) -> Iterable[tuple[str, SubLayer]]:
        """Name and sub-layer, in the order of application."""
        return self.layers.items()  # type: ignore[return-value]

    def forward(self, x: Tensor, ctx: Context, state: State | None = None, depth: int = 0) -> tuple[Tensor, Aux]:
        scale = self.residual_scale
        aux: Aux = {}
        shared = self.norm(x) if self.norm is not None else x
        total = x if scale == 1 else x * scale
        for name, layer in self.sub_layers():
            source = shared if self.config.topology == "parallel" else x
            y, new = layer(source, ctx, state, f"{depth}.{name}")
            add_up(aux, new)
            if self.config.topology == "parallel":
                total = dropout(y, self.config.dropout, self.training, onto=total)
            else:
                x = dropout(y, self.config.dropout, self.training, onto=x if scale == 1 else x * scale)
                x = layer.norm_sum(x) if layer.norm_sum is not None else x
        return (total if self.config.topology == "parallel" else x), aux


def add_up(total: Aux, new: Aux) -> None:
    """Add figures by name, in place."""
    for key, value in new.items():
        total[key] = total[key] + value if key in total else value
