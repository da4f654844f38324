"""What a recurrent encoder-decoder remembers: words spelt backwards, with attention and through one vector.

``python benchmarks/bottleneck.py [--seconds 60] [--cell lstm] [--out bottleneck.json] [--plot FILE.png]``

Both models have the same encoder and decoder of one recurrent layer each and one cross-attention head. The first reads
all of the encoder's states; the second its last one alone, a vector of fixed size however long the word is (Sutskever
et al. 2014), which is what attention was invented to widen (Bahdanau et al. 2015). Words are of 1 to ``--longest``
random letters, as many of each length; accuracy is exact match of whole words never seen in training, by length.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.models.decoder import build
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.contracts import Inputs

PAD, START, END, FIRST, LETTERS = 0, 1, 2, 3, 26


def model_of(cell: str, width: int, longest: int, memory: str) -> EncoderDecoder:
    half = {"d_model": width, "n_layers": 1, "max_seq_len": longest + 2, "positions": "none"}
    mixer = {"kind": cell}
    cross = {"kind": "cross_attention", "n_heads": 1}
    config = {
        "vocab_size": FIRST + LETTERS,
        "encoder": {**half, "causal": False, "blocks": {"block": {"mixer": mixer, "channel": None}}},
        "decoder": {**half, "blocks": {"block": {"mixer": mixer, "cross": cross, "channel": None}}},
        "memory": memory,
    }
    return build(EncoderDecoder.Config.model_validate(config), seed=1)


def words(n: int, longest: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Letters (n, longest), PAD after the end, and lengths (n,)."""
    lengths = torch.randint(1, longest + 1, (n,), generator=generator) if length is None else torch.full((n,), length)
    letters = torch.randint(FIRST, FIRST + LETTERS, (n, longest), generator=generator)
    return letters.masked_fill(torch.arange(longest) >= lengths[:, None], PAD), lengths


def backwards(letters: Tensor, lengths: Tensor) -> Tensor:
    """The target with its end, (n, longest + 1)."""
    at = (lengths[:, None] - 1 - torch.arange(letters.shape[1])).clamp(min=0)
    turned = letters.gather(1, at).masked_fill(letters == PAD, PAD)
    return F.pad(turned, (0, 1)).scatter(1, lengths[:, None], END)


def train(model: EncoderDecoder, seconds: float, longest: int, rows: int) -> int:
    """Processor seconds, so that a busy machine trains no less; returns the steps."""
    generator, steps, begun = torch.Generator().manual_seed(0), 0, time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    model.train()
    while (share := (time.process_time() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (steps + 1) / 50, 2 * (1 - share))
        letters, lengths = words(rows, longest, generator)
        targets = backwards(letters, lengths)
        tokens = F.pad(targets, (1, 0), value=START)[:, :-1]
        logits = model(Inputs(tokens, source=letters, source_valid=letters != PAD)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return steps


@torch.no_grad()
def accuracy(model: EncoderDecoder, longest: int, n: int = 200) -> list[float]:
    """The share of words written without a mistake, greedily, by length."""
    model.eval()
    found = []
    for length in range(1, longest + 1):
        letters, lengths = words(n, longest, torch.Generator().manual_seed(10_000 + length), length)
        targets, state = backwards(letters, lengths), model.new_state(n, longest + 2)
        right, last = torch.ones(n, dtype=torch.bool), torch.full((n, 1), START)
        source: dict[str, Any] = {"source": letters, "source_valid": letters != PAD}
        for t in range(length + 1):
            last = model(Inputs(last, **source), state).logits[:, -1:].argmax(-1)
            right &= last[:, 0] == targets[:, t]
            source = {}
        found.append(float(right.float().mean()))
    return found


def plot(result: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4))
    for name, found in result["models"].items():
        axes.plot(range(1, len(found["exact"]) + 1), found["exact"], marker="o", markersize=3, label=name)
    axes.set(xlabel="letters", ylabel="words right", ylim=(-0.03, 1.03))
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cell", choices=["rnn", "gru", "lstm"], default="lstm")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--longest", type=int, default=16)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "settings": {k: v for k, v in vars(asked).items() if k not in ("out", "plot")},
        "models": {},
    }
    for name, memory in {"attention over all states": "all", "the last state alone": "last"}.items():
        model = model_of(asked.cell, asked.width, asked.longest, memory)
        steps = train(model, asked.seconds, asked.longest, asked.rows)
        exact = accuracy(model, asked.longest)
        parameters = sum(p.numel() for p in model.parameters())
        result["models"][name] = {"parameters": parameters, "steps": steps, "exact": exact}
        print(
            f"{name}: {parameters:,} parameters, {steps} steps;",
            " ".join(f"{share:.2f}" for share in exact),
            flush=True,
        )
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=2) + "\n")
    if asked.plot:
        plot(result, asked.plot)


if __name__ == "__main__":
    main()
