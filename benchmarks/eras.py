"""The history of the field on one text, and why some of it stands where it does: docs/eras.md.

    python benchmarks/eras.py input.txt --pairs BLiMP.zip --write

runs ``octavo compare eras`` and the further runs of FURTHER in ``--out`` (what is there already is not trained again)
and writes tables and drawings into the page. About 13 models x 3 seeds x ``--seconds`` of training, as much again for
the scores, and the further runs: 90 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from train import processor

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "eras.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
DRAWINGS = ("tokens", "flops", "seconds", "parameters", "state")
# What is asked, the models, and how it differs from the first comparison; seconds are times those of the first.
SMALL_STEPS = ("base.train.step_tokens=512",)
FURTHER = (
    ("Updates of a quarter of the tokens", ("GPT-2", "Llama", "LSTM", "Mamba-2"), SMALL_STEPS, 1),
    ("Five times the time", ("Llama", "Mamba-2"), (), 5),
    ("Both", ("Llama",), SMALL_STEPS, 5),
)


def compare(args: argparse.Namespace, out: Path, *words: str, seconds: float, seeds: int, pairs: bool) -> dict:
    """One ``octavo compare eras``; its results.json."""
    command = [sys.executable, "-m", "octavo", "compare", "eras", *words, "--data", str(args.text)]
    command += ["--seconds", f"{seconds:g}", "--seeds", str(seeds), "--jobs", str(args.jobs), "--out", str(out)]
    if pairs and args.pairs:
        command += ["--pairs", str(args.pairs), "--pairs-at-most", str(args.pairs_at_most)]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)
    return json.loads((out / "results.json").read_text("utf-8"))


def further_table(found: list[tuple[str, dict]], first: dict) -> str:
    """Bits per byte of the further runs beside those of the first comparison."""
    before = {model["model"]: model["bits_per_byte"] for model in first["models"]}
    lines = ["| what | model | updates | tokens | bits per byte | before |", "|---|---|--:|--:|--:|--:|"]
    for what, result in found:
        for model in result["models"]:
            one = model["results"][0]
            cells = [what, model["model"], f"{one['steps']:,}", f"{one['tokens']:,}"]
            cells += [f"{model['bits_per_byte']:.3f}", f"{before[model['model']]:.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--pairs", type=Path, help="minimal pairs, such as BLiMP.zip")
    parser.add_argument("--pairs-at-most", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/eras"))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    first = compare(args, args.out / "first", seconds=args.seconds, seeds=args.seeds, pairs=True)
    found = []
    for i, (what, models, changes, times) in enumerate(FURTHER, 1):
        words = [*changes, *(word for model in models for word in ("--only", model))]
        out = args.out / f"further-{i}"
        found.append((what, compare(args, out, *words, seconds=args.seconds * times, seeds=1, pairs=False)))
    said = (
        f"{processor()}, one thread a training, {args.seconds:g} CPU seconds a model and seed, {args.seeds} seeds, "
        f"torch {torch.__version__}, Python {platform.python_version()}; text: {args.text.stat().st_size:,} bytes, a "
        "tenth of it held out. ± is half a 95 % interval over seeds (Student's t); pairs right with Wilson's interval, "
        "chance 50 %."
    )
    table = (args.out / "first" / "table.md").read_text("utf-8").strip()
    text = f"{said}\n\n{table}\n\nFurther runs, one seed:\n\n{further_table(found, first)}"
    print(f"\n{text}")
    if args.write:
        (DOCS / "eras").mkdir(exist_ok=True)
        for name in DRAWINGS:
            drawing = Image.open(args.out / "first" / f"{name}.png").convert("RGB")
            drawing.quantize(48, dither=Image.Dither.NONE).save(DOCS / "eras" / f"{name}.png", optimize=True)
        before, rest = PAGE.read_text("utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
