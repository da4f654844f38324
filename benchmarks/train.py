"""Tokens per second of `octavo train` beside other training loops: same batches, same shape, interleaved.

    python benchmarks/train.py                                   the 26 M Llama shape, peers that are installed
    python benchmarks/train.py --threads 1                       one thread, process CPU clock: for a busy machine
    python benchmarks/train.py --shape char                      nanoGPT's shakespeare-char shape, dropout 0.2
    python benchmarks/train.py --losses 200                      each to 200 steps, one after the other: equal losses?
    python benchmarks/train.py --python litgpt=~/litgpt/bin/python

Each peer is a process of its own (in another virtual environment where they conflict), stopped and continued by
signals, so that rounds interleave and no start-up or compilation is timed. What is timed of Octavo is the
command line on a recipe file, its metrics and guards included. The step a process was stopped in is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
P26 = {"vocab_size": 6400, "d_model": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "d_ff": 1408, "seq_len": 512,
       "rows": 16, "dropout": 0.0}  # fmt: skip
CHAR = {"vocab_size": 6400, "d_model": 384, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "d_ff": 1536, "seq_len": 256,
        "rows": 64, "dropout": 0.2}  # fmt: skip
SHAPES = {"p26": P26, "char": CHAR}
PEERS = {
    "octavo": "",
    "litgpt-bf16": "peers/lit.py bf16",
    "litgpt-fp32": "peers/lit.py fp32",
    "transformers-bf16": "peers/hf.py bf16",
    "transformers-fp32": "peers/hf.py fp32",
    "plain-llama": "peers/plain.py llama",
    "plain-gpt": "peers/plain.py gpt",
}
NEEDS = {"litgpt": "litgpt", "transformers": "transformers", "plain": "torch", "octavo": "octavo"}
FITTING = {"p26": [p for p in PEERS if p != "plain-gpt"], "char": ["octavo", "plain-gpt"]}


@dataclass
class Peer:
    """A training process that can be let run for some steps and stopped again."""

    name: str
    process: subprocess.Popen[bytes]
    metrics: Path
    losses: dict[int, float] = field(default_factory=dict)
    seconds: list[list[float]] = field(default_factory=list)
    read: int = 0
    peak: int = 0

    def steps(self) -> int:
        """Steps done so far, from its metrics file."""
        if self.metrics.exists():
            with open(self.metrics) as file:
                file.seek(self.read)
                for line in iter(file.readline, ""):
                    if not line.endswith("\n"):
                        break
                    self.read += len(line)
                    record = json.loads(line)
                    if record.get("kind") == "train":
                        self.losses[record["step"]] = record["loss"]
        return max(self.losses, default=0)

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def clock(self, threads: int) -> float:
        if threads > 1:
            return time.perf_counter()
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_for(self, step: int, limit: float = 1800.0) -> None:
        end = time.monotonic() + limit
        while self.steps() < step:
            if self.process.poll() is not None:
                sys.exit(f"{self.name} ended with {self.process.returncode}: see {self.metrics.parent}/log")
            if time.monotonic() > end:
                sys.exit(f"{self.name} did not reach step {step} in {limit:.0f} s: see {self.metrics.parent}/log")
            time.sleep(0.01)

    def run(self, steps: int, threads: int) -> None:
        """Go on for ``steps`` whole steps beyond the one that the last stop broke into."""
        self.send(signal.SIGCONT)
        first = self.steps() + 1
        self.wait_for(first)
        times = [self.clock(threads)]
        for n in range(1, steps + 1):
            self.wait_for(first + n)
            times.append(self.clock(threads))
        self.send(signal.SIGSTOP)
        self.seconds.append([b - a for a, b in zip(times, times[1:], strict=False)])
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        self.peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def recipe(shape: dict, text: Path, steps: int, threads: int, precision: str, compiled: str, micro: int) -> dict:
    """The recipe of a shape, as a user would write it."""
    llama = not shape["dropout"]
    gpt = {"kind": "mlp", "activation": "gelu", "d_ff": shape["d_ff"], "bias": True}
    glu = {"kind": "glu", "activation": "silu", "d_ff": shape["d_ff"]}
    mixer = {"kind": "attention", "n_heads": shape["n_heads"], "n_kv_heads": shape["n_kv_heads"]}
    if not llama:
        mixer |= {"dropout": shape["dropout"], "qkv_bias": True, "o_bias": True}
    return {
        "name": "bench",
        "eval": None,
        "seed": 1,
        "data": {"sources": [{"path": str(text), "document_bytes": 500_000}], "split": {"held_out": 0.05}},
        "tokenizer": {"kind": "byte_bpe", "vocab_size": shape["vocab_size"]},
        "model": {
            "d_model": shape["d_model"],
            "n_layers": shape["n_layers"],
            "max_seq_len": shape["seq_len"],
            "embed_dropout": shape["dropout"],
            "norm": "rmsnorm" if llama else "layernorm",
            "positions": "rope" if llama else "learned",
            "blocks": {"block": {"mixer": mixer, "channel": glu if llama else gpt, "dropout": shape["dropout"]}},
            "init": {"scale_residual": False},
        },
        "train": {
            "steps": steps,
            "step_tokens": shape["rows"] * shape["seq_len"],
            "micro_batch_rows": micro,
            "threads": threads,
            "precision": precision,
            "compile": compiled,
            "objective": {"kind": "causal", "chunk_tokens": 512},
            "optimizer": {"kind": "adamw", "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1,
                          "no_decay_roles": []},
            "schedule": {"kind": "constant"},
            "clip_norm": 1.0,
            "log_every": 1,
            "valid_every": 1_000_000,
            "save_every": 1_000_000,
            "sample_every": 1_000_000,
            "valid_batches": 0,
        },
    }  # fmt: skip


def standard_library(path: Path) -> Path:
    """Python's own sources as one text of about 8 MB: a corpus that every machine has."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) + sorted(
        Path(sysconfig.get_path("stdlib")).glob("[a-s]*/*.py")
    )
    text = "".join(source.read_text("utf-8", "ignore") for source in sources if "site-packages" not in str(source))
    path.write_text(text[:8_000_000], "utf-8")
    return path


def prepare(work: Path, file: Path, shape: dict, n: int) -> Path:
    """Octavo's data and tokenizer stages once; the first ``n`` batches as arrays for the peers."""
    import numpy as np

    from octavo import feed
    from octavo.config import Recipe

    out = work / "prepared"
    subprocess.run(
        [sys.executable, "-m", "octavo", "train", str(file), "train.steps=1", "train.compile=off",
         "--out", str(out), "--quiet"],
        check=True,
    )  # fmt: skip
    found = feed.of_stage(Recipe.load(str(file), []), out, "pretrain")
    batches = [found.source.batch(step) for step in range(n)]
    for name in ("tokens", "targets"):
        np.save(work / f"{name}.npy", np.stack([batch[name] for batch in batches]).astype(np.uint16))
    return out


def start(name: str, work: Path, file: Path, shape: dict, args: argparse.Namespace, steps: int) -> Peer:
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    python = args.python.get(name.partition("-")[0], sys.executable)
    if name == "octavo":
        command = [python, "-m", "octavo", "train", str(file), f"train.steps={steps}", "--out", str(folder / "run")]
        metrics = folder / "run" / "pretrain" / "metrics.jsonl"
    else:
        script, variant = PEERS[name].split()
        metrics = folder / "metrics.jsonl"
        command = [python, str(HERE / script), "--batches", str(work), "--shape", json.dumps(shape),
                   "--variant", variant, "--metrics", str(metrics), "--steps", str(steps),
                   "--threads", str(args.threads)]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )
    return Peer(name, process, metrics)


def has(module: str, python: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec(module) is not None
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(peers: list[Peer], shape: dict, threads: int) -> str:
    tokens = shape["rows"] * shape["seq_len"]
    rates = {p.name: [tokens / statistics.median(r) for r in p.seconds] for p in peers}
    own = rates["octavo"]
    head = ("loop", "tokens/s, median (least to most)", "Octavo is faster by, median of rounds (spread)", "peak memory")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|"]
    for p in peers:
        r = rates[p.name]
        ratios = [a / b for a, b in zip(own, r, strict=True)]
        faster = (
            "" if p.name == "octavo" else f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        rate = f"{statistics.median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f})"
        lines.append(f"| {p.name} | {rate} | {faster} | {p.peak / 1e9:.2f} GB |")
    clock = "wall clock" if threads > 1 else "process CPU clock"
    return "\n".join([*lines, "", f"{processor()}, {threads} threads, {clock}, {len(own)} rounds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="p26")
    parser.add_argument("--peers", help="comma-separated; default: all of the shape that are installed")
    parser.add_argument("--python", action="append", default=[], help="NAME=PATH of the interpreter of litgpt, ...")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps a round")
    parser.add_argument("--rows", type=int, help="rows a batch; default: the shape's")
    parser.add_argument("--micro", type=int, default=4, help="rows that Octavo computes at once")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", default="step")
    parser.add_argument("--losses", type=int, default=0, help="compare losses at this step instead of rates")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--work", type=Path, default=Path("bench-train"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the peers are killed on the way out
    args.python = {k: str(Path(v).expanduser()) for k, v in (x.split("=", 1) for x in args.python)}
    shape = SHAPES[args.shape] | ({"rows": args.rows} if args.rows else {})
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    wanted = args.peers.split(",") if args.peers else FITTING[args.shape]
    names = [n for n in wanted if has(NEEDS[n.partition("-")[0]], args.python.get(n.partition("-")[0], sys.executable))]
    for name in set(wanted) - set(names):
        print(f"left out: {name} is not installed", file=sys.stderr)
    text = (args.text or standard_library(work / "text.txt")).resolve()
    made = recipe(shape, text, 1_000_000, args.threads, args.precision, args.compile, args.micro)
    file = work / "recipe.yaml"
    file.write_text(json.dumps(made, indent=1))
    prepare(work, file, shape, args.losses or 64)
    if args.losses:
        compare_losses(names, work, file, shape, args)
        return
    peers: list[Peer] = []
    try:
        for name in names:
            peers.append(start(name, work, file, shape, args, 1_000_000))
            peers[-1].wait_for(2)  # compilation and the first steps are over
            peers[-1].send(signal.SIGSTOP)
            print(f"{name} is ready", file=sys.stderr)
        for n in range(args.rounds):
            for peer in peers if n % 2 == 0 else reversed(peers):
                peer.run(args.steps, args.threads)
            print(f"round {n + 1} of {args.rounds} done", file=sys.stderr)
    finally:
        for peer in peers:
            peer.send(signal.SIGKILL)
    print(table(peers, shape, args.threads))
    if args.json:
        args.json.write_text(json.dumps({p.name: {"seconds": p.seconds, "peak": p.peak} for p in peers}))


def compare_losses(names: list[str], work: Path, file: Path, shape: dict, args: argparse.Namespace) -> None:
    """Mean loss of the last ten steps of each, after the same batches."""
    ends = {}
    for name in names:
        peer = start(name, work, file, shape, args, args.losses + 1)
        try:
            peer.wait_for(args.losses, 7200)
        finally:
            peer.send(signal.SIGKILL)
        last = [peer.losses[n] for n in range(args.losses - 9, args.losses + 1)]
        ends[name] = statistics.mean(last)
        print(f"{name:20} {ends[name]:.4f}  {100 * (ends['octavo'] / ends[name] - 1):+.2f} %", flush=True)


if __name__ == "__main__":
    main()
