"""A layer of experts against a dense layer of equal active parameters: one training step of each, interleaved.

    python benchmarks/moe.py                                  16 experts, 2 a token, one thread, process CPU clock
    python benchmarks/moe.py --experts 64 --per-token 8 --d-ff 128
    python benchmarks/moe.py --dtype bf16 --rounds 15

Both are GLUs; the dense one is as wide as the experts of one token together. A step is the forward and backward pass
over a batch, gradients added to those there are. "update" adds AdamW's on all weights, of which the experts have E / k
times as many. The router starts as training starts it: near even, which is printed. The ratio is the median over the
rounds of experts / dense in the same round, with the lowest and highest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from train import processor

from octavo.nn.contracts import Context, Dims, Inputs, Mixer
from octavo.nn.mlp import Glu
from octavo.nn.moe import Moe
from octavo.nn.projection import InitConfig, initialise
from octavo.nn.state import place
from octavo.training.machine import DTYPES, tune_allocator
from octavo.training.optim import AdamW


class Layer:
    """One layer with its optimizer, and what its steps took."""

    def __init__(self, mixer: Mixer, dtype: torch.dtype):
        initialise(mixer, InitConfig(), 12, torch.Generator().manual_seed(0))
        self.mixer: nn.Module = mixer.train()
        self.optimizer = AdamW(AdamW.Config(), mixer, dtype)
        self.steps: list[float] = []
        self.updates: list[float] = []

    def step(self, x: Tensor, grad: Tensor, ctx: Context, clock: Any) -> dict[str, Tensor]:
        start = clock()
        y, aux = self.mixer(x, ctx)
        losses = [value for name, value in aux.items() if name.startswith("loss.")]
        torch.autograd.backward([y, *losses], [grad, *(torch.ones_like(value) for value in losses)])
        self.steps.append(clock() - start)
        self.optimizer.gather()
        self.optimizer.step(1e-6)
        self.updates.append(clock() - start)
        x.grad = None
        return aux


def compare(args: argparse.Namespace) -> None:
    dtype, E, k, D = DTYPES[args.dtype], args.experts, args.per_token, args.d_model
    B, T = args.rows, args.seq_len
    dims, wide = Dims(D, 12, T), k * args.d_ff
    values = {"n_experts": E, "experts_per_token": k, "d_ff": args.d_ff, "balance": args.balance}
    layers = {
        "dense": Layer(Glu(Glu.Config(d_ff=wide), dims), dtype),
        "experts": Layer(Moe(Moe.Config(**values), dims), dtype),
    }
    if args.plain:
        layers["plain"] = Layer(Moe(Moe.Config(**values, backend="plain"), dims), dtype)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    ctx = place(Inputs(torch.zeros(B, T, dtype=torch.long)))[0]
    x, grad = torch.randn(B, T, D).to(dtype).requires_grad_(), torch.randn(B, T, D).to(dtype)
    aux: dict[str, Tensor] = {}
    for turn in range(args.rounds + 2):
        for name, layer in layers.items():
            said = layer.step(x, grad, ctx, clock)
            aux = said if name == "experts" else aux
            if turn < 2:  # the first fills the allocator and wakes the processor
                layer.steps.clear(), layer.updates.clear()
    load = aux["moe.load.0"].double()
    print(f"B={B} T={T} D={D}: dense F={wide}, {E} experts of F={args.d_ff}, {k} a token, balance {args.balance}")
    print(f"busiest expert {float(load.max() / load.mean()):.2f} of the mean load")
    for name, layer in layers.items():
        step, update = statistics.median(layer.steps), statistics.median(layer.updates)
        own = sum(p.numel() for p in layer.mixer.parameters())
        print(f"  {name:8} {own:>12,} weights  step {step * 1e3:7.1f} ms  with update {update * 1e3:7.1f} ms")
    for name in [name for name in layers if name != "dense"]:
        for what in ("steps", "updates"):
            pairs = zip(getattr(layers[name], what), getattr(layers["dense"], what), strict=True)
            ratios = sorted(a / b for a, b in pairs)
            said = "step" if what == "steps" else "step and update"
            print(f"  {name} / dense, {said}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"threads": 1, "rounds": 11, "rows": 16, "seq_len": 256, "d_model": 256, "d_ff": 352}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--per-token", type=int, default=2)
    parser.add_argument("--balance", default="switch", choices=["none", "sum", "switch", "sequence"])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--plain", action="store_true", help="every expert on every token, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tune_allocator()
    clock = "process CPU clock" if args.threads == 1 else "wall clock"
    print(f"{processor()}, {args.threads} threads, {clock}, {args.dtype}, {args.rounds} rounds")
    compare(args)


if __name__ == "__main__":
    main()
