"""A training step of rnn, lstm and gru layers beside torch.nn's of the same shape, rounds interleaved.

    python benchmarks/recurrent.py [--rounds 5]
    python benchmarks/recurrent.py --write          puts the table into docs/recurrent.md

One thread, process CPU clock, fp32, rows of 256 tokens, forward and backward pass with the gradients of input and
weights. Ours has a product on the way out (``o``); torch.nn's side is given the same one, with the same weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from train import processor

from octavo.nn.contracts import Dims, Inputs
from octavo.nn.recurrent import Recurrent
from octavo.nn.state import place
from octavo.nn.tables import TOKEN_MIXERS
from octavo.training.machine import tune_allocator

PAGE = Path(__file__).parents[1] / "docs" / "recurrent.md"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
T = 256
THEIRS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
Layer = Callable[[Tensor], Tensor]


def sides(kind: str, width: int, n_rows: int) -> dict[str, tuple[nn.Module, Layer]]:
    """Both with the same weights."""
    make = TOKEN_MIXERS[kind]
    mixer = make(make.Config(kind=kind), Dims(width, 1, T))
    assert isinstance(mixer, Recurrent)
    theirs = nn.ModuleList([THEIRS[kind](width, width, batch_first=True), nn.Linear(width, width, bias=False)])
    with torch.no_grad():
        for own, other in zip([*mixer.there.weights(), mixer.o.weight], theirs.parameters(), strict=True):
            own.copy_(other)
    ctx = place(Inputs(torch.zeros(n_rows, T, dtype=torch.long)))[0]
    return {"ours": (mixer, lambda x: mixer(x, ctx)[0]), "torch.nn": (theirs, lambda x: theirs[1](theirs[0](x)[0]))}


def compare(kind: str, width: int, n_rows: int, rounds: int) -> str:
    both, taken = sides(kind, width, n_rows), dict[str, list[float]]()
    x = torch.randn(n_rows, T, width, requires_grad=True)
    repeats = max(1, 512 // (width * n_rows))
    for turn in range(rounds + 1):
        for side, (layer, run) in both.items():
            begun = time.process_time()
            for _ in range(repeats):
                run(x).sum().backward()
            if turn:  # the first round warms up
                taken.setdefault(side, []).append((time.process_time() - begun) / repeats)
            layer.zero_grad()
            x.grad = None
    ratios = [b / a for a, b in zip(taken["ours"], taken["torch.nn"], strict=True)]
    a, b = (statistics.median(taken[side]) * 1e3 for side in both)
    told = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {kind} | {width} | {n_rows} | {a:,.1f} | {b:,.1f} | {told} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", choices=list(THEIRS), default=list(THEIRS))
    parser.add_argument("--widths", nargs="*", type=int, default=[128, 256, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tune_allocator()
    lines = [
        f"{processor()}, one thread, process CPU clock, fp32, {args.rounds} rounds; milliseconds of a training step:\n",
        f"| layer | d_model | rows of {T} | ours | torch.nn | torch.nn / ours |",
        "|---|---|---|---|---|---|",
    ]
    for kind in args.kinds:
        for width in args.widths:
            for n_rows in (1, 16):
                lines.append(compare(kind, width, n_rows, args.rounds))
                print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines)
    print(text)
    if args.write:
        before, rest = PAGE.read_text("utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
