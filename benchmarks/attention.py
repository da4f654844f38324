"""Causal attention for training: the library's kernel against torch's, forward and backward, interleaved.

    python benchmarks/attention.py                          one thread, by the process's CPU clock
    python benchmarks/attention.py --threads 2              wall clock: on a quiet machine
    python benchmarks/attention.py --dtype bf16 --rounds 9

Times are medians over the rounds, with the lowest. GFLOP/s count the readable pairs of tokens alone (4 K a pair and
head forward, 10 K backward); the share is of a large matrix product's rate in the same dtype and threads. "documents"
are packed rows of about 100 tokens each: torch then needs a mask of all pairs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from train import processor

from octavo.nn.attend import sdpa
from octavo.nn.contracts import Context, Inputs
from octavo.nn.kernels import attention, build
from octavo.nn.state import place
from octavo.training.machine import DTYPES, tune_allocator

SHAPES = ((16, 512, 8, 2, 64), (16, 256, 6, 6, 64), (4, 2048, 8, 2, 64), (4, 1024, 8, 8, 128))  # B T H G K
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def row(B: int, T: int, packed: bool) -> Context:
    doc_ids = (torch.rand(B, T) < 1 / 100).cumsum(1) if packed else None
    return place(Inputs(torch.zeros(B, T, dtype=torch.long), doc_ids=doc_ids))[0]


def product_rate(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOP/s of the fastest of some large matrix products."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    taken = []
    for _ in range(20):
        start = clock()
        torch.mm(a, b)
        taken.append(clock() - start)
    return 2 * 1024**3 / min(taken)


def once(attend: Attend, inputs: list[Tensor], grad: Tensor, clock: Callable[[], float]) -> tuple[float, float]:
    start = clock()
    y = attend(*inputs)
    middle = clock()
    torch.autograd.grad(y, inputs, grad)
    return middle - start, clock() - middle


def compare(shape: tuple[int, ...], packed: bool, args: argparse.Namespace, peak: float) -> None:
    B, T, H, G, K = shape
    dtype = DTYPES[args.dtype]
    inputs = [torch.randn(B, T, n, K, dtype=dtype).transpose(1, 2).requires_grad_() for n in (H, G, G)]
    grad = torch.randn(B, T, H, K, dtype=dtype).transpose(1, 2)
    ctx = row(B, T, packed)
    first = ctx.first_keys() if packed else None
    mask = ctx.mask(ctx.keys) if packed else None
    pairs = H * (int((torch.arange(T) - ctx.first_keys() + 1).sum()))
    ways: dict[str, Attend] = {
        "torch": lambda q, k, v: sdpa(q, k, v, mask, causal=not packed),
        "kernel": lambda q, k, v: attention.causal(q, k, v, first),
    }
    clock = time.process_time if args.threads == 1 else time.perf_counter
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(args.rounds + 1):
        for name, attend in ways.items():
            taken = once(attend, inputs, grad, clock)
            if turn:  # the first round fills the allocator
                times[name].append(taken)
    medians = {}
    for name, values in times.items():
        both = [forward + backward for forward, backward in values]
        forward, backward = (statistics.median(part) for part in zip(*values))
        medians[name] = statistics.median(both)
        rate = 14 * K * pairs / medians[name]
        print(
            f"  {name:7} forward {forward * 1e3:7.1f}  backward {backward * 1e3:7.1f}  both {medians[name] * 1e3:7.1f} "
            f"(lowest {min(both) * 1e3:.1f}) ms  {rate / 1e9:6.0f} GFLOP/s  {rate / peak:5.0%}"
        )
    print(f"  ratio   {medians['torch'] / medians['kernel']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    args = parser.parse_args()
    library, reason = build.attempt()
    if library is None:
        sys.exit(f"no kernel: {reason}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tune_allocator()
    peak = product_rate(DTYPES[args.dtype], time.process_time if args.threads == 1 else time.perf_counter)
    unit = "AMX tiles" if args.dtype == "bf16" and library.attention_tiles() else "vectors"
    clock = "process CPU clock" if args.threads == 1 else "wall clock"
    print(f"{processor()}, {args.threads} threads, {clock}, {args.dtype} on {unit}")
    print(f"matrix product {peak / 1e9:.0f} GFLOP/s")
    for shape in SHAPES:
        for packed in (False, True):
            names = " ".join(f"{letter}={n}" for letter, n in zip("BTHGK", shape))
            print(f"{names} {'documents' if packed else 'causal'}")
            compare(shape, packed, args, peak)


if __name__ == "__main__":
    main()
