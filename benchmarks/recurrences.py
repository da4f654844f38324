"""Mamba-2 and retention beside other implementations: a training step and a forward pass of one layer, interleaved.

    python benchmarks/recurrences.py                 Mamba-2 beside transformers' torch path
    python benchmarks/recurrences.py --torchscale    retention beside torchscale (chunkwise), if installed

One thread, process CPU clock, fp32, one row of 4,096 tokens, 256 wide. Both sides have the same shape; chunks are each
side's default (torchscale: 512) unless given. The ratio depends on the shape: many narrow heads suit our form most.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from train import processor

from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.nn.state import place
from octavo.training.machine import tune_allocator

D, T = 256, 4096
Layer = Callable[[Tensor], Tensor]


def ours(mixer: dict[str, Any]) -> tuple[nn.Module, Layer]:
    blocks = {"block": {"mixer": mixer, "channel": None}}
    small = {"d_model": D, "n_layers": 1, "vocab_size": 16, "max_seq_len": T, "blocks": blocks}
    model = build(Decoder.Config.model_validate(small))
    ctx = place(Inputs(torch.zeros(1, T, dtype=torch.long)))[0]
    ctx.rotations = {width: scheme.rotation(ctx.positions) for width, scheme in model.rotary[0].items()}
    layer = model.mixers()["0.mixer"]
    return layer, lambda x: layer(x, ctx)[0]


def mamba2_of_transformers(n_heads: int, d_state: int) -> tuple[nn.Module, Layer]:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=D, num_heads=n_heads, head_dim=2 * D // n_heads, state_size=d_state, n_groups=1,
        num_hidden_layers=1, vocab_size=16,
    )  # fmt: skip
    layer = Mamba2Mixer(config, 0)
    return layer, layer


def retention_of_torchscale(n_heads: int, chunk: int) -> tuple[nn.Module, Layer]:
    # It imports drop_path of timm, which it does not use here.
    stub = types.ModuleType("timm.models.layers")
    stub.drop_path = None  # type: ignore[attr-defined]
    for name in ("timm", "timm.models"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules.setdefault("timm.models.layers", stub)
    from torchscale.architecture.retnet import RetNetRelPos  # type: ignore[import-not-found]
    from torchscale.component.multiscale_retention import MultiScaleRetention  # type: ignore[import-not-found]

    settings = types.SimpleNamespace(
        multiway=False, layernorm_eps=1e-6, decoder_embed_dim=D, decoder_retention_heads=n_heads,
        recurrent_chunk_size=chunk,
    )  # fmt: skip
    layer, places = MultiScaleRetention(settings, D, 2 * D, n_heads), RetNetRelPos(settings)
    at = places(T, chunkwise_recurrent=True)
    return layer, lambda x: layer(x, at, chunkwise_recurrent=True)


def compare(name: str, sides: dict[str, tuple[nn.Module, Layer]], rounds: int) -> None:
    x = torch.randn(1, T, D, requires_grad=True)
    taken: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        for side, (layer, run) in sides.items():
            start = time.process_time()
            run(x).sum().backward()
            middle = time.process_time()
            with torch.no_grad():
                run(x)
            ended = time.process_time()
            layer.zero_grad()
            if turn:  # the first round warms up
                taken.setdefault((side, "step"), []).append(middle - start)
                taken.setdefault((side, "forward"), []).append(ended - middle)
    own, other = list(sides)
    for what in ("step", "forward"):
        ratios = [b / a for a, b in zip(taken[own, what], taken[other, what], strict=True)]
        a, b = (statistics.median(taken[side, what]) * 1e3 for side in (own, other))
        told = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {what} | {a:,.0f} | {other} | {b:,.0f} | {told} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torchscale", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tune_allocator()
    print(f"{processor()}, one thread, process CPU clock, {args.rounds} rounds, 1 x {T} tokens, {D} wide\n")
    print("| layer | what | ours, ms | beside | theirs, ms | ratio |\n|---|---|---|---|---|---|")
    if args.torchscale:
        for n_heads, chunk in ((32, 512), (16, 512), (8, 512), (8, 64)):
            sides = {
                "ours": ours({"kind": "retention", "n_heads": n_heads}),
                f"torchscale, chunk {chunk}": retention_of_torchscale(n_heads, chunk),
            }
            compare(f"retention, {n_heads} heads", sides, args.rounds)
        return
    for n_heads, d_state in ((32, 128), (16, 128), (8, 64)):
        mixer = {"kind": "mamba2", "n_heads": n_heads, "d_state": d_state}
        sides = {"ours": ours(mixer), "transformers": mamba2_of_transformers(n_heads, d_state)}
        compare(f"mamba2, {n_heads} heads, state {d_state}", sides, args.rounds)


if __name__ == "__main__":
    main()
