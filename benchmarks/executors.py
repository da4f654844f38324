"""What the native decode step gives beside the plain one, and the compiled one where the native does not serve.

    python benchmarks/executors.py                         Gemma 2 and 3, mamba2, MLA and MoE, 1 and 8 texts
    python benchmarks/executors.py --kinds mla --batch 1
    python benchmarks/executors.py --write                 put the table into docs/performance.md

One thread, process CPU clock, random weights in fp32, greedy, through the engine; rounds of both executors interleaved,
after a prompt of 128 tokens. Compiling is timed too, by this process and by the compilers that it starts.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from train import processor

from octavo.infer.engine import Engine
from octavo.infer.native import unsuitable
from octavo.infer.request import EngineConfig, Request
from octavo.infer.sampling import SamplingConfig
from octavo.models.decoder import Decoder, build
from octavo.tokenizer import Byte, train

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- executors: begin -->", "<!-- executors: end -->"
ATTENTION = {"kind": "attention", "n_heads": 8, "n_kv_heads": 2}
GLU = {"kind": "glu", "activation": "silu", "d_ff": 1408}
OFFSET = {"kind": "rmsnorm", "offset": True}
GEMMA = {"norm": OFFSET, "embed_scale": 22.6, "pattern": ["local", "full"]}


def gemma(mixer: dict[str, Any], **local: Any) -> dict[str, Any]:
    """Blocks of Gemma 2 or 3: windows in every other layer."""
    block = {"channel": GLU | {"activation": "gelu_tanh"}, "norm_placement": "sandwich"}
    window = {"mixer": ATTENTION | mixer | {"window": 64}, **block, **local}
    return {"local": window, "full": {"mixer": ATTENTION | mixer, **block}}


MODELS: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA | {"logit_softcap": 30.0, "blocks": gemma({"softcap": 50.0})},
    "gemma3": GEMMA | {"blocks": gemma({"qk_norm": OFFSET}, positions={"kind": "rope", "theta": 1e4})},
    "mamba2": {"blocks": {"block": {"mixer": {"kind": "mamba2", "n_heads": 16}, "channel": GLU}}},
    "mla": {"blocks": {"block": {"mixer": {"kind": "mla", "n_heads": 8}, "channel": GLU}}},
    "moe": {"blocks": {"block": {"mixer": ATTENTION, "channel": {"kind": "moe", "n_experts": 8, "d_ff": 704}}}},
}


def cpu() -> float:
    """CPU seconds of this process and of those that it waited for."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


class Decoding:
    """Some texts that go on in an engine of one kind."""

    def __init__(self, model: Decoder, executor: str, batch: int, args: argparse.Namespace):
        n = args.tokens * (args.rounds + 1) + 1
        config = EngineConfig(max_sequences=batch, executor=executor, share_prefixes=False, step_tokens=128 * batch)  # type: ignore[arg-type]
        self.engine = Engine(model, train(Byte(), []), config)
        draw = torch.Generator().manual_seed(0)
        for _ in range(batch):
            prompt = torch.randint(256, (128,), generator=draw).tolist()
            self.engine.add(Request(prompt, SamplingConfig(max_new_tokens=n, temperature=0)))
        self.said = [event.id for _, event in self.engine.step()]  # type: ignore[union-attr]
        self.seconds: list[float] = []

    def go_on(self, n: int) -> None:
        begun = time.process_time()
        for _ in range(n):
            self.said += [event.id for _, event in self.engine.step()]  # type: ignore[union-attr]
        self.seconds.append((time.process_time() - begun) / n)


def measure(kind: str, args: argparse.Namespace) -> list[str]:
    lines, values = [], {"vocab_size": 6400, "d_model": args.d_model, "n_layers": args.n_layers, "max_seq_len": 512}
    model = build(Decoder.Config.model_validate(values | MODELS[kind])).eval()
    other = "compiled" if unsuitable(model) else "native"
    for batch in args.batch:
        sides = {executor: Decoding(model, executor, batch, args) for executor in ("plain", other)}
        begun, spent = cpu(), 0.0
        for turn in range(args.rounds + 1):  # the first compiles
            for side in sides.values() if turn % 2 else reversed(sides.values()):
                side.go_on(args.tokens)
            spent = spent or cpu() - begun
        plain, fast = sides.values()
        assert plain.said == fast.said and not getattr(fast.engine.executor, "broken", False)
        a, b = plain.seconds[1:], fast.seconds[1:]
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        times = [f"{1e3 * statistics.median(x):.2f}" for x in (a, b)]
        gain = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        cells = (kind, str(batch), other, *times, gain, f"{spent:.0f}" if other == "compiled" else "")
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--n-layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"{processor()}, one thread, process CPU clock, fp32, d_model {args.d_model}, {args.n_layers} layers, "
        f"{args.rounds} rounds of {args.tokens} steps:\n",
        "| model | texts | executor | plain, ms a step | its ms a step | faster by | CPU seconds until compiled |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in args.kinds:
        lines += measure(kind, args)
        if args.write:  # each as soon as it is known: compiling takes long
            before, after = PAGE.read_text("utf-8").split(BEGIN)
            PAGE.write_text("\n".join([before + BEGIN, *lines, END]) + after.split(END)[1], "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
