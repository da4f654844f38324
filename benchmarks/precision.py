"""Does training in bf16 end where fp32 ends? Held-out loss of both at equal tokens, over several seeds.

    python benchmarks/precision.py                                     the standard library's sources as text
    python benchmarks/precision.py --text input.txt --steps 400 --seeds 3

Runs `octavo train shakespeare` with each precision and seed. The gate is a mean difference within 0.5 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from train import processor, standard_library


def run(text: Path, out: Path, precision: str, seed: int, steps: int, threads: int) -> float:
    """The last held-out loss, nats a token."""
    command = [
        sys.executable, "-m", "octavo", "train", "shakespeare", "--out", str(out), "--quiet",
        f"data.sources=[{{path: {text}, document_bytes: 4000}}]", f"seed={seed}", f"train.steps={steps}",
        f"train.precision={precision}", f"train.threads={threads}", "eval=null", "train.sample_prompts=[]",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (out / "pretrain" / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "valid"][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("bench-precision"))
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    text = (args.text or standard_library(work / "text.txt")).resolve()
    print(
        f"{processor()}, {args.steps} steps\n\n| seed | fp32 | bf16 | bf16 is worse by |\n|---|---|---|---|", flush=True
    )
    differences = []
    for seed in range(1, args.seeds + 1):
        losses = {
            precision: run(text, work / f"{precision}-{seed}", precision, seed, args.steps, args.threads)
            for precision in ("fp32", "bf16")
        }
        differences.append(losses["bf16"] / losses["fp32"] - 1)
        print(f"| {seed} | {losses['fp32']:.4f} | {losses['bf16']:.4f} | {differences[-1]:+.3%} |", flush=True)
    mean = statistics.mean(differences)
    print(f"| mean | | | {mean:+.3%} |")
    sys.exit(abs(mean) > 0.005)


if __name__ == "__main__":
    main()
