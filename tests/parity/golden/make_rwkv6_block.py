"""What the rwkv package's own RWKV-6 layers give on random weights: rwkv6_block.safetensors here.

    pip download --no-deps rwkv==0.8.32 && unzip the wheel into FOLDER
    RWKV_JIT_ON=0 RWKV_CUDA_ON=0 PYTHONPATH=FOLDER python make_rwkv6_block.py

Its layers are methods of a class that wants a checkpoint file, but use nothing of it: they are called without one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rwkv.model import RWKV
from safetensors.torch import save_file
from torch import Tensor

D, H, T, F, MIX_RANK, DECAY_RANK = 16, 4, 29, 24, 3, 5


def normal(*shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return scale * torch.randn(shape, generator=GENERATOR) + offset


GENERATOR = torch.Generator().manual_seed(0)
time = {
    "ln_w": normal(D, scale=0.2, offset=1.0), "ln_b": normal(D, scale=0.2),
    "lx_w": normal(D, scale=0.2, offset=1.0), "lx_b": normal(D, scale=0.2),
    **{f"{name}_maa": torch.rand(D, generator=GENERATOR) for name in "xwkvrg"},
    "tm_w1": normal(D, 5 * MIX_RANK, scale=0.3), "tm_w2": normal(5, MIX_RANK, D, scale=0.3),
    "td_w1": normal(D, DECAY_RANK, scale=0.3), "td_w2": normal(DECAY_RANK, D, scale=0.3),
    "t_decay": normal(H, D // H, 1), "t_first": normal(H, D // H, 1),
    **{f"{name}w": normal(D, D, scale=0.3) for name in "kvrgo"},
}  # fmt: skip
channel = {
    "ln_w": normal(D, scale=0.2, offset=1.0), "ln_b": normal(D, scale=0.2),
    "k_maa": torch.rand(D, generator=GENERATOR), "r_maa": torch.rand(D, generator=GENERATOR),
    "kw": normal(D, F, scale=0.3), "vw": normal(F, D, scale=0.3), "rw": normal(D, D, scale=0.3),
}  # fmt: skip
rest = {f"{name}m{axis}": None for name in "kvrgo" for axis in "xy"} | {
    f"{name}r{axis}": None for name in "kvrgo" for axis in "xy"
}
x, zero = normal(T, D), torch.zeros(D)
y, _, state = RWKV.att_seq_v6_0(None, x, zero, torch.zeros(H, D // H, D // H), **time, **rest)
few = {name: value for name, value in rest.items() if name[0] in "kvr"}
z, _ = RWKV.ffn_seq_v6(None, x, zero, **channel, **few)
tensors = {f"time.{name}": t for name, t in time.items()} | {f"channel.{name}": t for name, t in channel.items()}
tensors |= {"x": x, "time.y": y, "time.state": state, "channel.y": z}
save_file(
    {name: t.clone().contiguous() for name, t in tensors.items()}, Path(__file__).parent / "rwkv6_block.safetensors"
)
