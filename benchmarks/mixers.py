"""What a layer of each token mixer costs against the length of the text: training and decoding.

    python benchmarks/mixers.py                                 every mixer, 1,024 to 8,192 tokens, one thread
    python benchmarks/mixers.py --kinds attention mamba2 --rounds 5
    python benchmarks/mixers.py --write                         puts table and plot into docs/mixers.md and .svg

A training step is one layer's forward and backward pass over one row, by the process's CPU clock (or, with more
threads, the wall clock). Decoding is one token after a text of that length. Rounds are interleaved: every mixer and
length once, then all again; figures are medians. The last column of times is what 8 times the text costs: 8 is linear,
64 quadratic.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from train import processor

from octavo.models.cost import state_bytes
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs, Mixer
from octavo.nn.state import place
from octavo.nn.tables import TOKEN_MIXERS
from octavo.training.machine import tune_allocator

PAGE = Path(__file__).parents[1] / "docs" / "mixers.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"n_heads": 4},
    "attention, window 256": {"kind": "attention", "n_heads": 4, "window": 256},
}
LEFT_OUT = {"side_by_side"}  # made of the others
PREFILL = 1024


@dataclass
class Case:
    """One mixer: its model, and what was measured by length."""

    name: str
    model: Decoder
    train: dict[int, list[float]] = field(default_factory=dict)
    decode: dict[int, list[float]] = field(default_factory=dict)

    @property
    def mixer(self) -> Mixer:
        return self.model.mixers()["0.mixer"]


def config(kind: str, values: dict[str, Any], d_model: int, longest: int) -> Decoder.Config:
    mixer = {"kind": kind, **values}
    heads = {"n_heads": 4} if "n_heads" in TOKEN_MIXERS[mixer["kind"]].Config.model_fields else {}
    return Decoder.Config.model_validate(
        {
            "d_model": d_model, "n_layers": 1, "vocab_size": 256, "max_seq_len": longest + 64,
            "blocks": {"block": {"mixer": heads | mixer, "channel": None}},
        }
    )  # fmt: skip


def cases(kinds: list[str], d_model: int, longest: int) -> list[Case]:
    wanted = {kind: {"kind": kind} for kind in TOKEN_MIXERS if kind not in LEFT_OUT} | SETTINGS
    found = []
    for name, values in wanted.items():
        if kinds and name not in kinds:
            continue
        made = config(values.get("kind", name), {k: v for k, v in values.items() if k != "kind"}, d_model, longest)
        if TOKEN_MIXERS[made.blocks["block"].mixer.kind].capabilities.causal:
            found.append(Case(name, build(made)))
    return found


def training_seconds(case: Case, length: int, clock: Callable[[], float]) -> float:
    """Forward and backward of the layer alone over one row."""
    mixer, model = case.mixer.train(), case.model
    ctx = place(Inputs(torch.zeros(1, length, dtype=torch.long)))[0]
    ctx.rotations = {width: scheme.rotation(ctx.positions) for width, scheme in model.rotary[0].items()}
    x = torch.randn(1, length, model.config.d_model, requires_grad=True)
    start = clock()
    y, _ = mixer(x, ctx)
    y.sum().backward()
    taken = clock() - start
    mixer.zero_grad()
    return taken


@torch.inference_mode()
def decoding_seconds(case: Case, length: int, clock: Callable[[], float], steps: int = 8) -> float:
    """One token after ``length`` others, the mean of some."""
    model = case.model.eval()
    state = model.new_state(1, length + steps + 1)
    text = torch.randint(256, (1, length))
    for part in text.split(PREFILL, 1):
        model(Inputs(part), state, needs=("hidden",))
    step = torch.zeros(1, 1, dtype=torch.long)
    model(Inputs(step), state, needs=("hidden",))
    start = clock()
    for _ in range(steps):
        model(Inputs(step), state, needs=("hidden",))
    return (clock() - start) / steps


def measure(found: list[Case], lengths: list[int], rounds: int, clock: Callable[[], float]) -> None:
    for turn in range(rounds + 1):
        for case in found:
            for length in lengths:
                taken = training_seconds(case, length, clock)
                again = decoding_seconds(case, length, clock) if case.mixer.capabilities.incremental else None
                if turn:  # the first round warms up
                    case.train.setdefault(length, []).append(taken)
                    if again is not None:
                        case.decode.setdefault(length, []).append(again)
                gc.collect()
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)


def table(found: list[Case], lengths: list[int]) -> str:
    heads = [f"train, {n:,}" for n in lengths] + [f"{lengths[-1]:,} / {lengths[0]:,}"]
    heads += [f"decode, {n:,}" for n in (lengths[0], lengths[-1])] + [f"state, {lengths[-1]:,}"]
    lines = ["| mixer | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for case in found:
        middle = {n: statistics.median(case.train[n]) for n in lengths}
        cells = [f"{n / middle[n]:,.0f}" for n in lengths] + [f"{middle[lengths[-1]] / middle[lengths[0]]:.1f}"]
        for n in (lengths[0], lengths[-1]):
            cells.append(f"{1 / statistics.median(case.decode[n]):,.0f}" if case.decode else "-")
        held = state_bytes(case.model.state_specs(), lengths[-1], torch.float32)
        cells.append(f"{held / 1024:,.0f} KiB")
        lines.append(f"| {case.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: list[Case], lengths: list[int], to: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    from octavo.report.plots import STYLE

    with pyplot.rc_context(STYLE | {"svg.hashsalt": "mixers"}):
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 5.2), sharex=True)
        colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
        for i, case in enumerate(found):
            style: dict[str, Any] = {"color": colours[i % 20], "marker": "os^vD"[i // 5 % 5], "markersize": 3}
            axes[0].plot(lengths, [n / statistics.median(case.train[n]) for n in lengths], label=case.name, **style)
            if case.decode:
                axes[1].plot(lengths, [1 / statistics.median(case.decode[n]) for n in lengths], **style)
        for axis, title in zip(axes, ("training, tokens/s of one layer", "decoding, tokens/s"), strict=True):
            axis.set(title=title, xlabel="tokens of the text", xscale="log", yscale="log")
            axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axis.minorticks_off()
        figure.legend(loc="center right", fontsize=7)
        figure.tight_layout(rect=(0, 0, 0.83, 1))
        figure.savefig(to, metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--lengths", nargs="*", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tune_allocator()
    clock = time.process_time if args.threads == 1 else time.perf_counter
    found = cases(args.kinds, args.d_model, args.lengths[-1])
    measure(found, args.lengths, args.rounds, clock)
    by = "process CPU clock" if args.threads == 1 else "wall clock"
    said = f"{processor()}, {args.threads} thread(s), {by}, d_model {args.d_model}, 4 heads, fp32, one row, "
    text = f"{said}{args.rounds} rounds. Tokens per second of one layer:\n\n{table(found, args.lengths)}"
    print(text)
    if args.write:
        before, rest = PAGE.read_text("utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", "utf-8")
        plot(found, args.lengths, PAGE.with_suffix(".svg"))


if __name__ == "__main__":
    main()
