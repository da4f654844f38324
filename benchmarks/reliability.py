"""Run the fault tests, count what was tried, and write the table into docs/reliability.md.

    python benchmarks/reliability.py                 the counts of every change, some minutes
    python benchmarks/reliability.py --full          ten times as many, and the slow tests: an hour or more
    python benchmarks/reliability.py --kills 1000    and that many SIGKILLs of a training
    python benchmarks/reliability.py --write         put the table into the page
    python benchmarks/reliability.py --only S        only these rows, or S5 alone; --write leaves the others as they are

With no failure in n trials the failure rate is below 3/n (95 %). The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from train import processor

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- counted: begin -->", "<!-- counted: end -->"
FAULTS = {
    "R1": "SIGKILL at random moments of training; every loss and the final weights as without",
    "R3": "SIGKILL, errors and bugs at every named moment of a save; a whole step is always found",
    "R4": "power cuts: every crash state of saves and starts, unforced writes lost",
    "R5": "full, failing and read-only disks in a save; the old step stays whole",
    "R6": "bytes flipped, files cut, zeroed, swapped, missing, extra; each found and named",
    "R8": "SIGTERM and Ctrl-C at random moments of every stage; saved, exit 75, nothing left running",
    "R9": "numbers that are not finite in loss, gradient, weight, moments; no weight takes them",
    "R11": "two runs in one folder; one owner, the other leaves everything as it is",
    "R12": "memory that runs out; one line, the last step whole",
    "R13": "broken and hostile text files; refused by file and line, or read",
    "R14": "any Unicode there and back, long words, special tokens in text",
    "R15": "recipes misspelt, of wrong types, out of range, hostile; refused in one line, nothing written",
    "R16": "hostile model files; refused, nothing executed, little memory",
    "R17": "hostile chat templates; no way out, bounded time and memory",
    "R18": "order of the data; no row lost or doubled, resumed as uninterrupted",
    "R19": "masks and edge rows of tuning; counted, finite, equal to a reference",
    "S1": "requests drawn from the server's own schema, right and wrong; no 5xx, answers of the right form",
    "S2": "broken JSON, HTTP and values by hand; the exact status and field, nothing repeated",
    "S3": "clients that leave, in every way and moment; all they held is given back",
    "S4": "steps of the memory of decoding against a model of it; no block lost, doubled, mistaken",
    "S5": "answers under 64 streams, some given up; each as it would be alone, nothing left behind",
    "S6": "a thousand clients at once; whole answers or a 429 at once, little memory",
    "S7": "clients that send or read a byte now and then; cut off in time, others served",
    "S8": "networks that cut, reset, fragment, delay; a whole answer or a visible error",
    "S9": "signals under load; no answer short in silence, the exit code, the next server starts",
    "S10": "errors inside the server; only the guilty request fails, ready goes and comes back",
    "S11": "prompts at the limit and far beyond; exact codes, alive meanwhile",
    "S12": "hostile text in the page, in a browser; shown as text, nothing ran, nothing left",
    "S13": "wrong keys, hosts, origins, paths; all refused, every route classified",
    "S14": "checks of OpenAI's own client; answers, streams, error classes, coming back",
}


def counted(lines: list[dict[str, Any]]) -> str:
    """The table of what was tried."""
    by: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by[line["id"]].append(line)
    out = [
        "| id | fault, and what passing means | tried | failed | below, at 95 % | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for id in sorted(by, key=_order):
        n, failed = sum(x["n"] for x in by[id]), sum(x["failures"] for x in by[id])
        skipped = [x["skipped"] for x in by[id] if "skipped" in x]
        bound = f"{3 / n:.2%}" if n and not failed else ""
        note = f" (not here: {'; '.join(skipped)})" if skipped else ""
        seconds = sum(x["seconds"] for x in by[id])
        out.append(f"| {id} | {FAULTS.get(id, '')}{note} | {n:,} | {failed} | {bound} | {seconds:.0f} |")
    return "\n".join(out)


def is_of(id: str, only: str) -> bool:
    """Whether a row is meant by a letter, S, or by its name, S5."""
    return only in ("", id[0], id)


def chosen(only: str) -> list[str]:
    """The files of the tests of some rows: test_s05_soak.py has S5."""
    folder = ROOT / "tests" / "fault"
    if not only:
        return [str(folder)]
    number = f"{int(only[1:]):02d}" if only[1:] else ""
    return [str(path) for path in sorted(folder.glob(f"test_{only[0].lower()}{number}*.py"))]


def _order(id: str) -> tuple[str, int]:
    return id[0], int(id[1:])


def merged(old: str, new: str, only: str, machine: str) -> str:
    """The table ``old`` of a page with the rows of ``new`` in place of those of ``only``.

    Rows that stay were counted at another time; where that was on another machine, both are named.
    """
    head, rows = old.partition("\n\n")[::2]
    title, line, *kept = rows.strip().split("\n")
    kept = [row for row in kept if not is_of(row.split(" | ")[0].removeprefix("| "), only)]
    fresh = new.split("\n")[2:]
    listed = sorted([*kept, *fresh], key=lambda row: _order(row.split(" | ")[0].removeprefix("| ")))
    head = head.strip().partition(f" {only} rows: ")[0]
    if kept and machine != head.removeprefix("Machine: ").removesuffix("."):
        head += f" {only} rows: {machine}."
    return "\n".join([head if kept else f"Machine: {machine}.", "", title, line, *listed])


def kills(n: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", str(n), "--json"],
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    return {"id": "R1", "n": found["kills"], "failures": len(found["failures"]), "seconds": found["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="", metavar="ROWS", help="such as S, R, or S5")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--machine", default=processor(), help="what the page calls it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.jsonl"
        env = os.environ | {"OCTAVO_RELIABILITY": str(path), "OMP_NUM_THREADS": "1"}
        env |= {"OCTAVO_FAULT_SCALE": "10"} if args.full else {}
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(args.jobs), *chosen(args.only)]
        command += ["-m", "slow or not slow"] if args.full else []
        failed = subprocess.run(command, cwd=ROOT, env=env).returncode
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        lines = [line for line in lines if is_of(line["id"], args.only)]
    if args.kills:
        lines.append(kills(args.kills))
    rows, table = counted(lines), f"Machine: {args.machine}.\n\n{counted(lines)}"
    print(table)
    if args.json:
        args.json.write_text(json.dumps(lines, indent=1))
    if args.write:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        old, _, after = rest.partition(END)
        table = merged(old.strip(), rows, args.only, args.machine) if args.only else table
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", "utf-8")
    sys.exit(1 if failed or any(line["failures"] for line in lines) else 0)


if __name__ == "__main__":
    main()
