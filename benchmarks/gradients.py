"""How far back an error reaches and what is remembered: recurrent networks beside attention on a copy task.

    python benchmarks/gradients.py [--steps 500] [--seeds 1] [--results FILE.json]
    python benchmarks/gradients.py --write          puts figures into docs/recurrent.md and docs/gradients.png

A row is noise with one letter of eight in it, and a question at the end: which letter was it? The letter stands at any
distance, all equally often. Every model is one layer, 64 wide, without positions and without a channel mixer; all see
the same rows. Measured by distance, at the start and after training: the gradient of the answer's loss at the letter,
in units of its gradient at the logits; and the share of right answers on rows that were not trained on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from train import processor

from octavo.eval.gradients import gradient_by_position
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.training.machine import tune_allocator

PAGE = Path(__file__).parents[1] / "docs" / "recurrent.md"
BEGIN, END = "<!-- gradients: begin -->", "<!-- gradients: end -->"
LETTERS, NOISE, ASK, LENGTH, WIDTH, ROWS = 8, 16, 24, 128, 64, 32
DISTANCES = (1, 2, 4, 8, 16, 32, 64, 96, LENGTH - 1)
TOLD = (1, 8, 32, 64, LENGTH - 1)
MODELS: dict[str, dict[str, Any]] = {
    "rnn": {"kind": "rnn"},
    "lstm": {"kind": "lstm"},
    "lstm, forget bias 3": {"kind": "lstm"},
    "gru": {"kind": "gru"},
    "attention": {"kind": "attention", "n_heads": 2},
}


@dataclass
class Found:
    """By distance, one list for every seed."""

    before: list[list[float]] = field(default_factory=list)
    after: list[list[float]] = field(default_factory=list)
    right: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def model_of(name: str, seed: int) -> Decoder:
    """Weights as large as keep a signal's size (the width to the power -1/2), for all alike."""
    config = {
        "vocab_size": ASK + 1, "d_model": WIDTH, "n_layers": 1, "max_seq_len": LENGTH, "positions": "none",
        "blocks": {"block": {"mixer": MODELS[name], "channel": None}}, "init": {"std": WIDTH**-0.5},
    }  # fmt: skip
    model = build(Decoder.Config.model_validate(config), seed=seed)
    if "forget" in name:
        with torch.no_grad():
            model.mixers()["0.mixer"].get_parameter("there.up.bias")[WIDTH : 2 * WIDTH] = 3.0
    return model


def rows(n: int, generator: torch.Generator, distance: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (n, LENGTH), the letters and where they stand (n,)."""
    tokens = torch.randint(LETTERS, LETTERS + NOISE, (n, LENGTH), generator=generator)
    letters = torch.randint(LETTERS, (n,), generator=generator)
    far = torch.randint(1, LENGTH, (n,), generator=generator) if distance is None else torch.full((n,), distance)
    at = LENGTH - 1 - far
    tokens[torch.arange(n), at], tokens[:, -1] = letters, ASK
    return tokens, letters, at


def train(model: Decoder, steps: int, seed: int) -> float:
    """Returns processor seconds."""
    generator, begun = torch.Generator().manual_seed(seed), time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50, 2 * (1 - step / steps))
        tokens, letters, _ = rows(ROWS, generator)
        hidden = model(Inputs(tokens), needs=("hidden",)).hidden
        assert hidden is not None
        loss = F.cross_entropy(model.logits(hidden[:, -1]), letters)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return time.process_time() - begun


def reaching(model: Decoder) -> list[float]:
    """The gradient at the letter, by its distance; in float64, for small figures."""
    model.double()
    found = []
    for distance in DISTANCES:
        tokens, letters, at = rows(16, torch.Generator().manual_seed(10_000 + distance), distance)
        norms = gradient_by_position(model, Inputs(tokens), letters, relative=True)
        found.append(float(norms.gather(1, at[:, None]).mean()))
    model.float()
    return found


@torch.no_grad()
def remembered(model: Decoder) -> list[float]:
    found = []
    for distance in DISTANCES:
        tokens, letters, _ = rows(256, torch.Generator().manual_seed(20_000 + distance), distance)
        logits = model(Inputs(tokens)).logits
        assert logits is not None
        found.append(float((logits[:, -1].argmax(-1) == letters).float().mean()))
    return found


def run(names: list[str], steps: int, seeds: int, results: Path | None) -> dict[str, Found]:
    """Seeds that ``results`` has already are not run again."""
    every = {name: Found() for name in names}
    if results is not None and results.exists():
        every |= {name: Found(**values) for name, values in json.loads(results.read_text("utf-8")).items()}
    for name in names:
        found = every[name]
        for seed in range(len(found.seconds) + 1, seeds + 1):
            model = model_of(name, seed)
            found.before.append(reaching(model))
            found.seconds.append(train(model, steps, seed))
            found.after.append(reaching(model))
            found.right.append(remembered(model))
            told = " ".join(f"{share:.2f}" for share in found.right[-1])
            print(f"{name}, seed {seed}, {found.seconds[-1]:.0f} s: {told}", file=sys.stderr, flush=True)
            if results is not None:
                results.write_text(json.dumps({name: asdict(found) for name, found in every.items()}), "utf-8")
    return {name: every[name] for name in MODELS if name in every}


def middle(of: list[list[float]]) -> list[float]:
    """The geometric mean over seeds, by distance."""
    return [statistics.geometric_mean(max(x, 1e-300) for x in values) for values in zip(*of, strict=True)]


def table(every: dict[str, Found]) -> str:
    def lines(title: str, cells: dict[str, list[str]]) -> list[str]:
        heads = [f"{distance}" for distance in TOLD]
        return [
            f"| {title} | " + " | ".join(heads) + " |",
            "|---|" + "---|" * len(heads),
            *(f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()),
            "",
        ]

    def small(values: list[list[float]]) -> list[str]:
        by = dict(zip(DISTANCES, middle(values), strict=True))
        return [f"{by[d]:.0e}" if by[d] < 0.01 else f"{by[d]:.2f}" for d in TOLD]

    def share(values: list[list[float]]) -> list[str]:
        by = dict(zip(DISTANCES, zip(*values, strict=True), strict=True))
        spans = {d: (round(100 * min(by[d])), round(100 * max(by[d]))) for d in TOLD}
        return [f"{a}" if a == b else f"{a} to {b}" for a, b in spans.values()]

    said = lines("gradient at the start, distance", {n: small(f.before) for n, f in every.items()})
    said += lines("gradient after training", {n: small(f.after) for n, f in every.items()})
    said += lines("right answers, % (chance 12.5)", {n: share(f.right) for n, f in every.items()})
    return "\n".join(said).rstrip()


def plot(every: dict[str, Found], to: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from octavo.report.plots import STYLE

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.6))
        for i, (name, found) in enumerate(every.items()):
            style: dict[str, Any] = {"marker": "os^vDP"[i % 6], "markersize": 3.5, "color": f"C{i}", "label": name}
            axes[0].plot(DISTANCES, middle(found.before), **style)
            axes[1].plot(DISTANCES, middle(found.after), **style)
            axes[2].plot(DISTANCES, [statistics.mean(v) for v in zip(*found.right, strict=True)], **style)
        for axis, title in zip(axes, ("gradient, at the start", "gradient, trained", "right answers"), strict=True):
            axis.set(title=title, xlabel="tokens between letter and answer")
        for axis in axes[:2]:
            axis.set(yscale="log", ylim=(1e-28, 30))
        axes[2].axhline(1 / LETTERS, color="grey", linewidth=0.8, linestyle=":")
        axes[2].set(ylim=(0, 1.03))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.savefig(to, dpi=90)
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--results", type=Path, help="JSON: what was measured already, and what is measured now")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tune_allocator()
    every = run(args.models, args.steps, args.seeds, args.results)
    seconds = sum(sum(found.seconds) for found in every.values())
    text = (
        f"{processor()}, one thread, {args.steps} steps of {ROWS} rows of {LENGTH} tokens, {args.seeds} seed(s), "
        f"{seconds:.0f} processor seconds of training in all.\n\n{table(every)}"
    )
    print(text)
    if args.write:
        before, rest = PAGE.read_text("utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", "utf-8")
    if args.write or args.plot:
        plot(every, args.plot or PAGE.with_name("gradients.png"))


if __name__ == "__main__":
    main()
