"""Retention by torchscale 0.3 in its three forms, written to retention.safetensors.

Needs ``pip install --no-deps torchscale==0.3.0 fairscale``; of timm it wants one name that is not used here.
"""

import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

layers = types.ModuleType("timm.models.layers")
layers.drop_path = None  # type: ignore[attr-defined]
sys.modules |= {
    "timm": types.ModuleType("timm"),
    "timm.models": types.ModuleType("timm.models"),
    layers.__name__: layers,
}

from torchscale.architecture.retnet import RetNetRelPos  # noqa: E402
from torchscale.component.multiscale_retention import MultiScaleRetention  # noqa: E402

D, VALUES, HEADS, T, CHUNK = 16, 24, 2, 24, 8

torch.manual_seed(0)
args = types.SimpleNamespace(
    multiway=False, layernorm_eps=1e-9, decoder_embed_dim=D, decoder_retention_heads=HEADS, recurrent_chunk_size=CHUNK
)
layer, places = MultiScaleRetention(args, D, VALUES, HEADS), RetNetRelPos(args)
with torch.no_grad():
    for parameter in layer.parameters():
        parameter.normal_(std=0.5)
x = torch.randn(2, T, D)
with torch.no_grad():
    kept: dict = {}
    steps = [layer(x[:, t : t + 1], places(t + 1, activate_recurrent=True), False, kept) for t in range(T)]
    found = {
        "x": x,
        "recurrent": torch.cat(steps, 1),
        "parallel": layer(x, places(T)),
        "chunkwise": layer(x, places(T, chunkwise_recurrent=True), chunkwise_recurrent=True),
    }
weights = {f"weight.{name}": value.detach() for name, value in layer.state_dict().items()}
save_file({k: v.contiguous() for k, v in (found | weights).items()}, Path(__file__).parent / "retention.safetensors")
