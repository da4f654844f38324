"""What the engine's deterministic mode costs: the same requests with it and without, interleaved.

    python benchmarks/deterministic.py                    16 requests at once, the 26 M shape and a tiny one
    python benchmarks/deterministic.py --threads 2        wall clock; with one thread it is the process CPU clock
    python benchmarks/deterministic.py --write            put the table into docs/decoding.md

Random weights in fp32, prompts of 16 to 256 random tokens without a beginning in common. A rate counts the tokens that
were produced, over the time from the first prompt's first token to the last text's end. Each ratio is of two rounds
that follow one another, and the table gives their median.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from train import P26, processor

PAGE = Path(__file__).parents[1] / "docs" / "decoding.md"
BEGIN, END = "<!-- deterministic: begin -->", "<!-- deterministic: end -->"
SHAPES = {
    "26 M": P26,
    "tiny": {"vocab_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 176},
}
CONTEXT = 512


class Bare:
    """As much of a tokenizer as decoding needs."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def stream(self) -> Bare:
        return self

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def built(shape: dict[str, Any]) -> Any:
    from octavo.models.decoder import Decoder, build

    mixer = {"kind": "attention", "n_heads": shape["n_heads"], "n_kv_heads": shape["n_kv_heads"]}
    block = {"mixer": mixer, "channel": {"kind": "glu", "activation": "silu", "d_ff": shape["d_ff"]}}
    size = {name: shape[name] for name in ("d_model", "n_layers", "vocab_size")}
    return build(Decoder.Config.model_validate(size | {"max_seq_len": CONTEXT, "blocks": {"block": block}})).eval()


def prompts_of(vocab_size: int, n: int, longest: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(min(16, longest), longest, n).long().tolist()
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def engines(model: Any, requests: int) -> dict[str, dict[bool, Any]]:
    """By executor, an engine without and one with the mode."""
    from octavo.infer import native
    from octavo.infer.engine import Engine
    from octavo.infer.executors import PlainExecutor
    from octavo.infer.request import EngineConfig

    def made(deterministic: bool, plain: bool) -> Any:
        config = EngineConfig(max_sequences=requests, max_tokens=requests * CONTEXT, deterministic=deterministic)
        how = (lambda model, pool: PlainExecutor(model, pool, deterministic=deterministic)) if plain else None
        return Engine(model, Bare(model.vocab_size), config, executor=how)  # type: ignore[arg-type]

    kinds = {"plain": True} if native.library()[1] else {"native": False, "plain": True}
    return {name: {mode: made(mode, plain) for mode in (False, True)} for name, plain in kinds.items()}


def rate(engine: Any, prompts: list[list[int]], n: int, clock: Callable[[], float]) -> float:
    from octavo.infer.request import Request
    from octavo.infer.sampling import SamplingConfig

    engine.reset()
    for prompt in prompts:
        engine.add(Request(prompt, SamplingConfig(temperature=0, max_new_tokens=n)))
    start = clock()
    n_made = sum(1 for _ in engine.run())
    return n_made / (clock() - start)


def compare(name: str, shape: dict[str, Any], args: argparse.Namespace, clock: Callable[[], float]) -> list[str]:
    model = built(shape)
    prompts, lines = prompts_of(model.vocab_size, args.requests, args.longest), []
    for executor, pair in engines(model, args.requests).items():
        for engine in pair.values():
            rate(engine, prompts[:2], 2, clock)
        rates: dict[bool, list[float]] = {False: [], True: []}
        for i in range(args.rounds):
            for mode in (False, True) if i % 2 == 0 else (True, False):
                rates[mode].append(rate(pair[mode], prompts, args.tokens, clock))
        usual, bitwise = (statistics.median(rates[mode]) for mode in (False, True))
        ratio = statistics.median(b / a for a, b in zip(rates[False], rates[True], strict=True))
        lines.append(f"| {name} | {executor} | {usual:,.0f} | {bitwise:,.0f} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.threads > 1 else time.process_time
    head = ["| model | read by | tokens/s | deterministic, tokens/s | of the usual |", "|---|---|---|---|---|"]
    print("\n".join(head), flush=True)
    lines = [line for name in args.shapes for line in compare(name, SHAPES[name], args, clock)]
    about = (
        f"{processor()}, {args.threads} thread{'s' * (args.threads > 1)}, fp32, {args.requests} requests at once, "
        f"prompts of 16 to {args.longest} tokens, {args.tokens} new ones, {args.rounds} rounds."
    )
    print(f"\n{about}")
    if args.write:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        table = "\n".join([*head, *lines, "", about])
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
