"""Counting and estimation against KenLM's lmplz: time, memory, and every number of the ARPA files.

    python benchmarks/kenlm.py input.txt --lmplz kenlm/build/bin/lmplz --orders 1 2 3 4 5 --rounds 3 --compare
    python benchmarks/kenlm.py big.txt --lmplz kenlm/build/bin/lmplz --orders 5 --memory 512

Both read the same text in turns, one after the other, each in a process of its own; time is the processor time of that
process (user and system). lmplz: from KenLM's source distribution, with cmake and boost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MIB = 1 << 20


def child(text: str, order: int, memory: int, arpa: str) -> None:
    """Ours: words, counts, estimates, and the ARPA file if it is wanted; prints seconds of each and peak memory."""
    from octavo.ngrams import NGram, NGramCounts, write_arpa
    from octavo.ngrams.counting import TokenStream
    from octavo.ngrams.scratch import Scratch
    from octavo.ngrams.text import BOS, Vocabulary, encode_files

    peak, stop = [0], threading.Event()
    threading.Thread(target=watch, args=(peak, stop), daemon=True).start()
    seconds, last = {}, time.process_time()

    def lap(name: str) -> None:
        nonlocal last
        now = time.process_time()
        seconds[name], last = round(now - last, 3), now

    bound = memory * MIB or None
    vocabulary, stream = Vocabulary("words"), TokenStream(Scratch(bound))
    for piece in encode_files(vocabulary, [text], grow=True):
        stream.append(*piece)
    lap("words")
    counts = NGramCounts.from_stream(stream, len(vocabulary), order)
    del stream
    lap("counts")
    model = NGram.of_counts(NGram.Config(order=order, never=BOS, memory_bytes=bound), counts)
    lap("estimates")
    if arpa:
        write_arpa(model, vocabulary.names, arpa)
        lap("arpa")
    stop.set()
    sizes = [len(keys) for keys in model.keys]
    print(json.dumps({"cpu": seconds, "anonymous_mib": peak[0] // 1024, "ngrams": sizes}))


def watch(peak: list[int], stop: threading.Event) -> None:
    """Keep the largest anonymous memory of this process, in KiB: what it allocated, mapped files left out."""
    while not stop.wait(0.05):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], int(line.split()[1]))


def timed(command: list[str]) -> tuple[float, float, int, str]:
    """(processor seconds, seconds, peak resident KiB, what it printed) of one process."""
    with tempfile.TemporaryFile() as out:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command[0]} failed: {status}")
        out.seek(0)
        return usage.ru_utime + usage.ru_stime, time.monotonic() - began, usage.ru_maxrss, out.read().decode()


def compare(ours: str, theirs: str) -> str:
    """The largest differences of two ARPA files, in log10."""
    import numpy as np

    from octavo.ngrams import read_arpa

    (a, words), (b, other) = read_arpa(ours), read_arpa(theirs)
    if words != other or any(not np.array_equal(x, y) for x, y in zip(a.keys, b.keys, strict=True)):
        return "the n-grams are not the same"
    with np.errstate(divide="ignore", invalid="ignore"):
        probs = [float(np.abs(np.nan_to_num(np.log10(x.prob) - np.log10(y.prob))).max())
                 for x, y in zip(a.levels, b.levels)]  # fmt: skip
        weights = [float(np.abs(np.log10(x.gamma) - np.log10(y.gamma)).max())
                   for x, y in zip(a.levels[1:], b.levels[1:])]  # fmt: skip
    n = sum(len(keys) for keys in a.keys)
    return f"{n} n-grams; largest difference of a probability {max(probs):.1e}, a weight {max(weights, default=0):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--lmplz")
    parser.add_argument("--orders", type=int, nargs="+", default=[5])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--memory", type=int, default=0, help="MiB for both; 0: no bound for ours, 512 for lmplz")
    parser.add_argument("--arpa", action="store_true", help="ours writes its ARPA file too, as lmplz always does")
    parser.add_argument("--compare", action="store_true", help="compare the files, number by number")
    parser.add_argument("--fallback", action="store_true", help="lmplz --discount_fallback, for little text")
    parser.add_argument("--child", action="store_true")
    args = parser.parse_args()
    if args.child:
        child(args.text, args.orders[0], args.memory, args.lmplz or "")
        return
    with tempfile.TemporaryDirectory() as folder:
        ours_arpa, theirs_arpa = f"{folder}/ours.arpa", f"{folder}/theirs.arpa"
        for order in args.orders:
            arpa = ["--lmplz", ours_arpa] if args.arpa or args.compare else []
            ours = [sys.executable, __file__, args.text, "--child", "--orders", str(order), *arpa]
            ours += ["--memory", str(args.memory)]
            theirs = [args.lmplz or "", "-o", str(order), "-T", folder, "--text", args.text, "--arpa", theirs_arpa]
            theirs += ["-S", f"{args.memory or 512}M"]
            theirs += ["--discount_fallback"] if args.fallback else []
            kept: dict[str, list[float]] = {"octavo": [], "lmplz": []}
            for _ in range(args.rounds):
                for name, command in {"octavo": ours, **({"lmplz": theirs} if args.lmplz else {})}.items():
                    cpu, wall, resident, said = timed(command)
                    kept[name].append(cpu)
                    print(f"order {order} {name}: {cpu:.2f} s of processor, {wall:.1f} s, resident {resident // 1024}"
                          f" MiB {said.strip()}", flush=True)  # fmt: skip
            if args.lmplz:
                mine, other = statistics.median(kept["octavo"]), statistics.median(kept["lmplz"])
                print(f"order {order}: octavo / lmplz = {mine:.2f} / {other:.2f} s = {mine / other:.2f}", flush=True)
                if args.compare:
                    print(f"order {order}: {compare(ours_arpa, theirs_arpa)}", flush=True)


if __name__ == "__main__":
    main()
