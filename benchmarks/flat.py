"""What a further token costs as the text before it grows: recurrent mixers beside attention, through the engine.

    python benchmarks/flat.py                            mamba2, retention, rwkv6, rwkv4 and attention, 1k to 32k tokens
    python benchmarks/flat.py --mixers mamba2 --prefill  read every token of the prompts
    python benchmarks/flat.py --penalty 1.1              with a repetition penalty, which looks at the whole text
    python benchmarks/flat.py --write                    put the table and the plot into docs/decoding.md

One thread, process CPU clock, random weights in fp32, greedy, one text at a time, the plain executor for all. Rounds of
all contexts are interleaved; a ratio is of two times of the same round. Without ``--prefill`` only the last part of a
prompt is read, so that the state before it is zeros: of the shape, at the positions and in the memory that reading
everything would give.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from train import processor

from octavo.infer.engine import Engine
from octavo.infer.executors import PlainExecutor
from octavo.infer.memory import Pool
from octavo.infer.request import EngineConfig, Request
from octavo.infer.sampling import SamplingConfig
from octavo.infer.scheduler import Work
from octavo.models.decoder import Decoder, build
from octavo.tokenizer import Byte, train

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PLOT = DOCS / "decoding.md", DOCS / "flat.svg"
BEGIN, END = "<!-- flat: begin -->", "<!-- flat: end -->"
CHUNK = 256


def mixers(d_model: int, d_ff: int) -> dict[str, tuple[dict[str, Any], str]]:
    """A block and the positions of each kind."""
    heads, glu = d_model // 64, {"kind": "glu", "activation": "silu", "d_ff": d_ff}
    rwkv = {"kind": "rwkv_channel", "d_ff": 3 * d_model}
    return {
        "mamba2": ({"mixer": {"kind": "mamba2", "n_heads": 2 * heads}, "channel": glu}, "none"),
        "retention": ({"mixer": {"kind": "retention", "n_heads": heads}, "channel": glu}, "rope"),
        "rwkv6": ({"mixer": {"kind": "rwkv6", "n_heads": heads}, "channel": rwkv}, "none"),
        "rwkv4": ({"mixer": {"kind": "rwkv4"}, "channel": rwkv}, "none"),
        "attention": ({"mixer": {"kind": "attention", "n_heads": heads, "n_kv_heads": 2}, "channel": glu}, "rope"),
    }


class Planted:
    """The plain executor, which of a prompt reads only what the next token is asked of."""

    def __init__(self, model: Decoder, pool: Pool):
        self.plain = PlainExecutor(model, pool)

    def __call__(self, works: Sequence[Work]) -> Iterable[tuple[Work, Tensor | None]]:
        last = [work for work in works if work.completes]  # asked before any of them is done
        yield from ((work, None) for work in works if work not in last)
        yield from self.plain(last)


class Decoding:
    """One text of a model with ``context`` tokens before those that are timed."""

    def __init__(self, model: Decoder, context: int, args: argparse.Namespace):
        room = context + args.tokens * (args.rounds + 1) + 1
        settings = EngineConfig(max_sequences=1, max_tokens=room, chunk=CHUNK, share_prefixes=False)
        executor = PlainExecutor if args.prefill else Planted
        self.engine = Engine(model, train(Byte(), []), settings, executor)
        how = SamplingConfig(max_new_tokens=room - context, temperature=0, repetition_penalty=args.penalty)
        prompt = torch.randint(256, (context,), generator=torch.Generator().manual_seed(0)).tolist()
        self.engine.add(Request(prompt, how))
        while not self.engine.step():  # the prompt
            pass
        pool, n_blocks = self.engine.pool, -(-context // self.engine.pool.block_size)
        self.megabytes = (pool.slot_bytes + (n_blocks * pool.block_bytes if pool.only_tokens else 0)) / 2**20

    def seconds(self, n: int) -> float:
        """Of a token, over ``n`` of them."""
        begun = time.process_time()
        for _ in range(n):
            (_,) = self.engine.step()
        return (time.process_time() - begun) / n


def measure(name: str, args: argparse.Namespace) -> tuple[list[str], list[list[float]]]:
    """Lines of the table, and the ratios to the shortest context by context."""
    block, positions = mixers(args.d_model, args.d_ff)[name]
    config = {
        "vocab_size": args.vocab_size, "d_model": args.d_model, "n_layers": args.n_layers,
        "max_seq_len": 2 * max(args.contexts), "blocks": {"block": block}, "positions": {"kind": positions},
    }  # fmt: skip
    model = build(Decoder.Config.model_validate(config)).eval()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    texts = [Decoding(model, context, args) for context in args.contexts]
    times: list[list[float]] = [[] for _ in texts]
    for turn in range(args.rounds + 1):
        order = list(enumerate(texts))
        for i, text in order if turn % 2 else reversed(order):
            spent = text.seconds(args.tokens)
            if turn:  # the first round warms up
                times[i].append(spent)
    ratios = [[b / a for a, b in zip(times[0], own, strict=True)] for own in times]
    lines = []
    for context, text, own, ratio in zip(args.contexts, texts, times, ratios, strict=True):
        lines.append(
            f"| {name}, {size:.1f} M | {context:,} | {1e3 * statistics.median(own):.2f} "
            f"| {statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f}) | {text.megabytes:.1f} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return lines, ratios


def draw(contexts: list[int], found: dict[str, list[list[float]]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "octavo", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.2))
        for name, ratios in found.items():
            middle = [statistics.median(own) for own in ratios]
            spread = [
                [m - min(own) for m, own in zip(middle, ratios)],
                [max(own) - m for m, own in zip(middle, ratios)],
            ]
            axes.errorbar(contexts, middle, spread, marker="o", markersize=3, linewidth=1.2, capsize=2, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [f"{n:,}" for n in contexts])
        axes.set_xlabel("tokens before")
        axes.set_ylabel(f"time of a token\n({contexts[0]:,}: 1)")
        axes.legend(fontsize="small", frameon=False)
        figure.tight_layout()
        figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="*", choices=list(mixers(64, 64)), default=list(mixers(64, 64)))
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 4096, 16384, 32768])
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--d-ff", type=int, default=1408)
    parser.add_argument("--n-layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=6400)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--penalty", type=float, default=1.0)
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"{processor()}, one thread, process CPU clock, fp32, d_model {args.d_model}, {args.n_layers} layers, "
        f"{args.rounds} rounds of {args.tokens} tokens:\n",
        f"| mixer, parameters | tokens before | ms a token | to {args.contexts[0]:,} (least to most) | state, MB |",
        "|---|---|---|---|---|",
    ]
    found = {}
    for name in args.mixers:
        rows, found[name] = measure(name, args)
        lines += rows
    text = "\n".join(lines)
    print(text)
    if args.write:
        draw(args.contexts, found)
        before, rest = PAGE.read_text("utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
