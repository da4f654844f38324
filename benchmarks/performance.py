"""Where a training step goes, what bounds it, and what each lever gives: writes docs/performance.md's figures.

    python benchmarks/performance.py                      the 26 M shape, all levers, about 15 minutes
    python benchmarks/performance.py --write              puts the tables between the marks in docs/performance.md
    python benchmarks/performance.py --rounds 3 --rows 4  smaller and quicker

A lever is measured by leaving it out: one process a variant, all held open, rounds interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from train import P26, processor

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
FULL: dict[str, Any] = {"compile": "step", "attention": "kernel", "chunk": 512, "micro": 4, "allocator": True,
                        "flat": True, "precision": "fp32"}  # fmt: skip
LEVERS: dict[str, dict[str, Any]] = {
    "all levers": {},
    "without torch.compile": {"compile": "off"},
    "without the attention kernel (torch's, dense mask)": {"attention": "sdpa"},
    "without micro-batches (16 rows at once)": {"micro": 16},
    "without the chunked loss": {"chunk": None},
    "without the allocator's setting": {"allocator": False},
    "without flat buffers (torch's AdamW, parameter by parameter)": {"flat": False},
    "in bf16 instead": {"precision": "bf16"},
}
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_"),
    "attention": ("octavo::attention", "aten::_scaled_dot_product"),
    "optimizer": ("aten::_fused_adamw_", "aten::linalg_vector_norm"),
    "pointwise and norms, compiled": ("## Call CompiledFxGraph",),
}


def child(shape: dict[str, Any], variant: dict[str, Any], threads: int) -> None:
    """Build the variant, then run a step for each line read: `time` or `profile`."""
    import torch

    from octavo.batch import Batch
    from octavo.models.decoder import Decoder, build
    from octavo.objectives.likelihood import CausalLikelihood
    from octavo.stop import StopSignal
    from octavo.training.loop import Held, Trainer
    from octavo.training.machine import tune_allocator
    from octavo.training.progress import Console
    from octavo.training.settings import TrainConfig

    if variant["allocator"]:
        tune_allocator()
    rows, T = shape["rows"], shape["seq_len"]
    model = build(Decoder.Config.model_validate({
        "d_model": shape["d_model"], "n_layers": shape["n_layers"], "max_seq_len": T, "vocab_size": shape["vocab_size"],
        "blocks": {"block": {
            "mixer": {"kind": "attention", "n_heads": shape["n_heads"], "n_kv_heads": shape["n_kv_heads"]},
            "channel": {"kind": "glu", "activation": "silu", "d_ff": shape["d_ff"]}}},
    }))  # fmt: skip
    train = TrainConfig(
        precision=variant["precision"], compile=variant["compile"], attention=variant["attention"], threads=threads,
        micro_batch_rows=min(variant["micro"], rows), objective=CausalLikelihood.Config(chunk_tokens=variant["chunk"]),
    )  # fmt: skip
    held = Held(Path("/nonexistent"), "", Console("quiet"), StopSignal())
    objective = CausalLikelihood(train.objective)  # type: ignore[arg-type]
    trainer = Trainer(model, None, objective, train, held, 0)  # type: ignore[arg-type]
    ids = torch.randint(shape["vocab_size"], (rows, T + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(
        ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(rows, T), torch.zeros(rows, T, dtype=torch.long),
        torch.arange(T).expand(rows, T).contiguous(), torch.ones(rows, T, dtype=torch.bool),
    )  # fmt: skip
    model.train()
    if not variant["flat"]:
        trainer.optimizer.release()
        plain = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=False)

    def step() -> None:
        if variant["flat"]:
            trainer.gradient(batch)
            trainer.optimizer.step(1e-4, 1.0)
            return
        plain.zero_grad(set_to_none=True)
        for part in batch.split(train.micro_batch_rows or rows):
            (trainer.forward(part)[0] / (rows * T)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        plain.step()

    step()
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "profile":
            with torch.profiler.profile() as profiled:
                step()
            found = {event.key: event.self_cpu_time_total / 1e6 for event in profiled.key_averages()}
            print(json.dumps(found), flush=True)
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(x.split()[1]) for x in status if x.startswith("VmHWM")) * 1024
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, peak]), flush=True)


class Variant:
    def __init__(self, name: str, changes: dict[str, Any], shape: dict[str, Any], threads: int):
        self.name, self.times, self.peak = name, [], 0
        command = [sys.executable, __file__, "--child", json.dumps([shape, FULL | changes, threads])]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )

    def ask(self, line: str = "time") -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with {self.process.wait()}")
        return None if line.strip() == "ready" else json.loads(line)


def bound(shape: dict[str, Any], threads: int) -> tuple[float, float]:
    """Tokens/s if nothing but the step's matrix products were done, at these shapes; and their FLOP/s."""
    import torch

    torch.set_num_threads(threads)
    tokens, D, L = 4 * shape["seq_len"], shape["d_model"], shape["n_layers"]
    K = D // shape["n_heads"]
    widths = [
        (D, D, 2 * L),
        (D, shape["n_kv_heads"] * K, 2 * L),
        (D, shape["d_ff"], 3 * L),
        (D, shape["vocab_size"], 1),
    ]
    seconds = flops = 0.0
    for d_in, d_out, times in widths:
        x, w, g = torch.randn(tokens, d_in), torch.randn(d_out, d_in), torch.randn(tokens, d_out)
        for product in (lambda x=x, w=w: x @ w.T, lambda g=g, w=w: g @ w, lambda g=g, x=x: g.T @ x):
            product()
            trials = []
            for _ in range(7):
                start = time.perf_counter() if threads > 1 else time.process_time()
                product()
                trials.append((time.perf_counter() if threads > 1 else time.process_time()) - start)
            seconds += times * statistics.median(trials)
            flops += times * 2 * tokens * d_in * d_out
    return tokens / seconds, flops / seconds


def measure(shape: dict[str, Any], threads: int, rounds: int) -> str:
    clock = 0 if threads > 1 else 1
    tokens = shape["rows"] * shape["seq_len"]
    variants = []
    try:
        for name, changes in LEVERS.items():
            variants.append(Variant(name, changes, shape, threads))
            variants[-1].answer()
            print(f"{name}: ready", file=sys.stderr)
        for n in range(rounds):
            for variant in variants if n % 2 == 0 else reversed(variants):
                found = variant.ask()
                variant.times.append(found[clock])
                variant.peak = found[2]
        profile = variants[0].ask("profile")
    finally:
        for variant in variants:
            variant.process.kill()
    most, rate = bound(shape, threads)
    full = variants[0].times
    what = "wall clock" if threads > 1 else "process CPU clock"
    machine = f"Machine: {processor()}, {threads} threads, torch {_torch()}"
    out = [f"{machine}; a step is {shape['rows']} rows; {rounds} interleaved rounds, {what}.", ""]
    out += ["| step | tokens/s (least to most) | time against all levers | peak memory |", "|---|---|---|---|"]
    for v in variants:
        rates = [tokens / t for t in v.times]
        ratios = [t / f for t, f in zip(v.times, full, strict=True)]
        spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        rate_text = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        out.append(f"| {v.name} | {rate_text} | {spread if v is not variants[0] else ''} | {v.peak / 1e9:.2f} GB |")
    out += ["", f"Matrix products alone, at these shapes: {most:,.0f} tokens/s ({rate / 1e9:,.0f} GFLOP/s).", ""]
    total = sum(profile.values())
    rest = total
    out += ["| part of a step | share |", "|---|---|"]
    for kind, names in KINDS.items():
        seconds = sum(t for key, t in profile.items() if key.startswith(names))
        rest -= seconds
        out.append(f"| {kind} | {seconds / total:.0%} |")
    out.append(f"| the rest | {rest / total:.0%} |")
    return "\n".join(out)


def _torch() -> str:
    from importlib.metadata import version

    return version("torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*json.loads(args.child))
        return
    tables = measure(P26 | {"rows": args.rows}, args.threads, args.rounds)
    print(tables)
    if args.write:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{tables}\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
