"""How good is the forecast? `octavo plan` on recipes, then the trainings themselves: memory and time, side by side.

    python benchmarks/plan.py                          six trainings of about half a minute each, on a quiet machine
    python benchmarks/plan.py --text input.txt --only 0 3

Forecast and run are processes of their own. The time is that of the training stage alone, from its first to its last
step, as the forecast says it; the memory is the peak of the whole process. Exit code 1 unless the median error is at
most 20 % of the memory and 25 % of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from train import processor, standard_library

MLP = {"kind": "mlp", "activation": "gelu", "bias": True}
RECIPES: dict[str, dict[str, Any]] = {
    "GPT-2's block, 4 layers of 256": {
        "model": {
            "d_model": 256, "n_layers": 4, "max_seq_len": 256, "norm": "layernorm", "positions": "learned",
            "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 4}, "channel": MLP}},
        },
        "train": {"steps": 40, "step_tokens": 4096},
    },
    "Llama's block, 6 layers of 320, short steps": {
        "model": {
            "d_model": 320, "n_layers": 6, "max_seq_len": 128,
            "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 5, "n_kv_heads": 1}}},
        },
        "train": {"steps": 60, "step_tokens": 1024},
    },
    "wide and shallow, 2 layers of 640, Muon": {
        "model": {
            "d_model": 640, "n_layers": 2, "max_seq_len": 256,
            "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 10, "n_kv_heads": 2}}},
        },
        "train": {"steps": 40, "step_tokens": 2048, "optimizer": "muon"},
    },
    "long rows, 3 layers of 192, 1,024 tokens": {
        "model": {
            "d_model": 192, "n_layers": 3, "max_seq_len": 1024,
            "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 3}}},
        },
        "train": {"steps": 40, "step_tokens": 4096},
    },
    "micro-batches with activation checkpointing, 8 layers of 256": {
        "model": {
            "d_model": 256, "n_layers": 8, "max_seq_len": 256,
            "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}}},
        },
        "train": {"steps": 24, "step_tokens": 4096, "micro_batch_rows": 4, "activation_checkpointing": True},
    },
    "a large vocabulary, chunked loss, 2 layers of 256": {
        "tokenizer": {"kind": "byte_bpe", "vocab_size": 16000},
        "model": {
            "d_model": 256, "n_layers": 2, "max_seq_len": 256,
            "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 4}}},
        },
        "train": {"steps": 30, "step_tokens": 4096, "objective": {"kind": "causal", "chunk_tokens": 512}},
    },
}  # fmt: skip


def recipe(name: str, text: Path, work: Path) -> Path:
    """The recipe's file; nothing but training is asked for."""
    whole = {"name": "plan", "seed": 1, "eval": None, "tokenizer": {"kind": "byte_bpe", "vocab_size": 2048}}
    whole |= {"data": {"sources": [{"path": str(text), "document_bytes": 4000}], "split": {"held_out": 0.02}}}
    whole |= RECIPES[name]
    # Without validation: the log says what its steps took, and the forecast would count validation too.
    whole["train"] = {"sample_prompts": [], "valid_batches": 0, **RECIPES[name]["train"]}
    path = work / f"{list(RECIPES).index(name)}.json"
    path.write_text(json.dumps(whole), "utf-8")
    return path


def octavo(*words: str) -> list[str]:
    return [sys.executable, "-m", "octavo", *words]


def real(path: Path, out: Path, frozen: Path) -> tuple[float, int]:
    """Seconds of the training's steps and the peak of resident memory in bytes, with what the forecast chose."""
    process = subprocess.Popen(octavo("train", str(frozen), "--out", str(out), "--quiet"), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{path} did not train: status {status}")
    lines = [json.loads(line) for line in (out / "pretrain" / "metrics.jsonl").read_text("utf-8").splitlines()]
    seconds = sum(line["seconds"] for line in lines if "seconds" in line)
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--work", type=Path, default=Path("bench-plan"))
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    text = (args.text or standard_library(work / "text.txt")).resolve()
    print(f"{processor()}\n\n| recipe | memory, MiB: forecast, real | error | seconds: forecast, real | error |")
    print("|---|---|---|---|---|", flush=True)
    errors: dict[str, list[float]] = {"memory": [], "time": []}
    for i, name in enumerate(RECIPES):
        if args.only is not None and i not in args.only:
            continue
        path, frozen = recipe(name, text, work), work / f"{i}.yaml"
        done = subprocess.run(
            octavo("plan", str(path), "--write", str(frozen), "--json"), capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        told = json.loads(done.stdout)
        seconds, peak = real(path, work / f"run-{i}", frozen)
        memory = told["bytes"]["total"]
        errors["memory"].append(memory / peak - 1)
        errors["time"].append(told["seconds"] / seconds - 1)
        sizes, times = f"{memory / 2**20:,.0f}, {peak / 2**20:,.0f}", f"{told['seconds']:.0f}, {seconds:.0f}"
        print(f"| {name} | {sizes} | {errors['memory'][-1]:+.0%} | {times} | {errors['time'][-1]:+.0%} |", flush=True)
    medians = {what: statistics.median(map(abs, found)) for what, found in errors.items()}
    print(f"| median error | | {medians['memory']:.0%} | | {medians['time']:.0%} |")
    sys.exit(medians["memory"] > 0.2 or medians["time"] > 0.25)


if __name__ == "__main__":
    main()
