"""What each matrix of attention is for: tiny models trained with one thing changed, and their loss on held-out text.

    python benchmarks/ablations.py                             the standard library's sources, three seeds
    python benchmarks/ablations.py --text book.txt --steps 1000 --seeds 5
    python benchmarks/ablations.py --only sinks "one key head"

Bytes are the tokens. All ways read the same batches; a seed sets the first weights and the order of the text, so that
differences are taken seed by seed, and their spread is the noise they are to be judged by. Losses are nats a byte on
the last tenth of the text, after a learning rate that falls to zero. With --equal, what a way leaves out is given to
its MLP: no way has fewer parameters than the usual one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs

D, LAYERS, HEADS, T, ROWS = 96, 3, 4, 128, 16
WAYS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "queries are keys (tied Q and K)": {"keys": "query"},
    "values are keys (Q and V alone)": {"keys": "value"},
    "x is the values (no V)": {"values": "input"},
    "a third matrix as gate, per channel": {"gate": "channel"},
    "a third matrix as gate, per head": {"gate": "head"},
    "low-rank values, rank 24": {"v_rank": 24},
    "one key head": {"n_kv_heads": 1},
    "sinks": {"sinks": True},
    "scores not scaled": {"scale": 1.0},
}


def text(path: str | None) -> torch.Tensor:
    """Bytes of a file, or of the standard library's modules in a fixed order."""
    if path is not None:
        data = Path(path).read_bytes()
    else:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        data = b"".join(file.read_bytes() for file in files)
    if len(data) < 20 * T * ROWS:
        sys.exit(f"{len(data)} bytes are too few; give a text of at least {20 * T * ROWS}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def model(way: dict[str, Any], seed: int, equal: bool) -> Decoder:
    """The small model, with a wider MLP where ``equal`` asks for as many parameters as usual."""

    def made(way: dict[str, Any], d_ff: int, device: str = "cpu") -> Decoder:
        mixer = {"kind": "attention", "n_heads": HEADS, **way}
        block = {"mixer": mixer, "channel": {"kind": "mlp", "d_ff": d_ff}}
        config = {"d_model": D, "n_layers": LAYERS, "vocab_size": 256, "max_seq_len": T, "blocks": {"block": block}}
        return build(Decoder.Config.model_validate(config), seed=seed, device=device)

    usual, own = (sum(p.numel() for p in made(w, 4 * D, "meta").parameters()) for w in ({}, way))
    missing = max(0, usual - own) if equal else 0
    return made(way, 4 * D + math.ceil(missing / (LAYERS * 2 * D)))


def batch(data: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    begin = torch.randint(len(data) - T - 1, (ROWS,), generator=generator)[:, None] + torch.arange(T + 1)
    rows = data[begin]
    return rows[:, :-1], rows[:, 1:]


def loss(one: Decoder, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(one(Inputs(tokens)).logits.flatten(0, 1), targets.flatten())  # type: ignore[union-attr]


def train(way: dict[str, Any], data: torch.Tensor, seed: int, args: argparse.Namespace) -> tuple[float, int]:
    """The loss on held-out text after training, and the number of parameters."""
    one = model(way, seed, args.equal).train()
    cut = len(data) * 9 // 10
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(one.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 20) * (1 - step / args.steps)
        optimizer.zero_grad()
        loss(one, *batch(data[:cut], generator)).backward()
        torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
        optimizer.step()
    held = torch.Generator().manual_seed(0)  # the same rows for every seed and way
    with torch.no_grad():
        found = [float(loss(one.eval(), *batch(data[cut:], held))) for _ in range(args.held)]
    return statistics.fmean(found), sum(p.numel() for p in one.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a file; default: the standard library's sources")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held", type=int, default=20, help="batches of held-out text")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--equal", action="store_true", help="as many parameters for all, in the MLP")
    parser.add_argument("--only", nargs="+", choices=list(WAYS))
    args = parser.parse_args()
    data = text(args.text)
    names = ["as usual", *(name for name in args.only or WAYS if name != "as usual")]
    found: dict[str, list[float]] = {name: [] for name in names}
    counts: dict[str, int] = {}
    began = time.perf_counter()
    for seed in range(args.seeds):  # seed by seed: broken off, what is printed is whole rounds
        for name in names:
            value, counts[name] = train(WAYS[name], data, seed, args)
            found[name].append(value)
            print(f"# seed {seed}, {name}: {value:.4f}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    print(f"{len(data):,} bytes, {args.steps} steps of {ROWS} x {T}, {args.seeds} seeds, {seconds:.0f} s")
    print(f"{'':38}{'parameters':>11}{'nats/byte':>11}{'against usual':>15}{'+-':>8}")
    for name in names:
        gaps = [a - b for a, b in zip(found[name], found["as usual"], strict=True)]
        spread = statistics.stdev(gaps) if len(gaps) > 1 else float("nan")
        mean = statistics.fmean(found[name])
        print(f"{name:38}{counts[name]:>11,}{mean:>11.4f}{statistics.fmean(gaps):>+15.4f}{spread:>8.4f}")


if __name__ == "__main__":
    main()
