"""The tables of components: what a ``kind`` in a recipe can be. A new component is one file and one line here."""

from __future__ import annotations

from octavo.nn.attention import Attention
from octavo.nn.bengio import Bengio
from octavo.nn.contracts import Mixer
from octavo.nn.convolution import Convolution
from octavo.nn.cross_attention import CrossAttention
from octavo.nn.deltanet import DeltaNet, GatedDeltaNet
from octavo.nn.gla import Gla
from octavo.nn.hyena import Hyena
from octavo.nn.latent import LatentAttention
from octavo.nn.linear_attention import LinearAttention
from octavo.nn.mamba import Mamba
from octavo.nn.mamba2 import Mamba2
from octavo.nn.mlp import Glu, Mlp
from octavo.nn.moe import DenseMoe, ExpertChoice, Moe
from octavo.nn.norm import LayerNorm, NoNorm, Norm, RMSNorm
from octavo.nn.position import LearnedPositions, NoPositions, Positions, SinusoidalPositions
from octavo.nn.position_bias import AlibiPositions, T5Positions
from octavo.nn.recurrent import Gru, Lstm, Rnn
from octavo.nn.relative import Shaw, TransformerXl
from octavo.nn.retention import Retention
from octavo.nn.rope import RotaryPositions
from octavo.nn.rwkv4 import Rwkv4
from octavo.nn.rwkv6 import Rwkv6
from octavo.nn.rwkv_channel import RwkvChannel
from octavo.nn.s4d import S4d
from octavo.nn.side_by_side import SideBySide

TOKEN_MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "mla": LatentAttention,
    "shaw": Shaw,
    "transformer_xl": TransformerXl,
    "side_by_side": SideBySide,
    "gla": Gla,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "rwkv4": Rwkv4,
    "rwkv6": Rwkv6,
    "linear_attention": LinearAttention,
    "retention": Retention,
    "mamba2": Mamba2,
    "mamba": Mamba,
    "s4d": S4d,
    "rnn": Rnn,
    "lstm": Lstm,
    "gru": Gru,
    "bengio": Bengio,
    "convolution": Convolution,
    "hyena": Hyena,
}
SideBySide.table = TOKEN_MIXERS  # a mixer made of mixers
CROSS_MIXERS: dict[str, type[Mixer]] = {"cross_attention": CrossAttention}
CHANNEL_MIXERS: dict[str, type[Mixer]] = {
    "mlp": Mlp,
    "glu": Glu,
    "rwkv_channel": RwkvChannel,
    "dense_moe": DenseMoe,
    "moe": Moe,
    "expert_choice": ExpertChoice,
}
NORMS: dict[str, type[Norm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm, "none": NoNorm}
POSITIONS: dict[str, type[Positions]] = {
    "none": NoPositions,
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
    "rope": RotaryPositions,
    "alibi": AlibiPositions,
    "t5": T5Positions,
}
