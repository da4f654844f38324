"""What small weights cost: bits per byte, KL to the model as it was, agreement on the first word, and size, by scheme.

    python benchmarks/quantize.py MODEL TEXT                        every scheme
    python benchmarks/quantize.py MODEL TEXT --schemes int8 int4+   only these; + means calibrated

The first half of the text is calibrated on, the second half is scored: pieces of one context, at even distances, each
token but a piece's first given those before it. Everything is computed in float32, the model as it was too.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from pathlib import Path
from typing import Any

CASES = ("int8", "int8/row", "int8-dynamic", "fp8", "fp8-e5m2", "fp8-blocks", "int4/128", "int4/64", "int4/32",
         "int4/64+", "int4/32+")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="one file, plain or .gz")
    parser.add_argument("--schemes", nargs="+", default=list(CASES), help="scheme[/group or /row][+ if calibrated]")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens")
    parser.add_argument("--scored", type=int, default=4096, help="tokens")
    parser.add_argument("--context", type=int, default=512, help="tokens of a piece, at most the model's context")
    args = parser.parse_args()
    import torch

    from octavo.language_model import load
    from octavo.quantize.text import calibration_rows

    lm = load(args.model, torch.float32)
    opened = gzip.open if args.text.suffix == ".gz" else open
    with opened(args.text, "rt", encoding="utf-8") as file:
        text = file.read()
    length = min(args.context, lm.max_seq_len)
    halves = text[: len(text) // 2], text[len(text) // 2 :]
    rows = calibration_rows([halves[0]], lm.tokenizer, args.calibration, length)
    scored = torch.tensor(calibration_rows([halves[1]], lm.tokenizer, args.scored, length))
    n_bytes = sum(len(lm.tokenizer.token_bytes(token)) for token in scored[:, 1:].flatten().tolist())
    references = [log_probs(lm.network, row) for row in scored]
    print(f"{scored[:, 1:].numel():,} tokens scored, {sum(map(len, rows)):,} calibrated on, pieces of {length}\n")
    print("| scheme | MB | bits per byte | nats per token | KL, nats | same first word | CPU s |")
    print("|---|---|---|---|---|---|---|")
    base = show("as it was", lm.network, references, scored, n_bytes, None, 0.0)
    for case in args.schemes:
        start = time.process_time()
        made = quantized(lm.network, case, rows)
        show(case, made, references, scored, n_bytes, base, time.process_time() - start)


def quantized(model: Any, case: str, rows: list[list[int]]) -> Any:
    from octavo.quantize.model import quantize
    from octavo.quantize.scheme import scheme_of

    name, _, group = case.removesuffix("+").partition("/")
    scheme = scheme_of(name, group=(0 if group == "row" else int(group)) if group else None)
    return quantize(model, scheme, rows if case.endswith("+") else None)


def log_probs(model: Any, row: Any) -> Any:
    import torch

    from octavo.nn.contracts import Inputs

    with torch.inference_mode():
        return model(Inputs(row[None])).logits[0, :-1].float().log_softmax(-1)


def show(
    name: str, model: Any, references: list[Any], scored: Any, n_bytes: int, base: float | None, seconds: float
) -> float:
    """Print a line of the table; the nats of a token."""
    from octavo.hub.small_weights import stored_tensors
    from octavo.quantize.model import dequantized

    nats = kl = same = 0.0
    plain = model if name.startswith("int8-dyn") or name == "fp8-blocks" else dequantized(model)  # made once
    for reference, row in zip(references, scored, strict=True):
        found = log_probs(plain, row)
        nats -= float(found.gather(1, row[1:, None]).double().sum())
        kl += float((reference.exp() * (reference - found)).double().sum())
        same += float((reference.argmax(-1) == found.argmax(-1)).sum())
    n = scored[:, 1:].numel()
    # What is not quantised counts as bf16.
    small = sum(t.numel() * t.element_size() for t in stored_tensors(model).values())
    size = small + 2 * sum(p.numel() for p in model.parameters())
    change = "" if base is None else f" ({nats / n / base - 1:+.2%})"
    print(
        f"| {name} | {size / 1e6:,.1f} | {nats / math.log(2) / n_bytes:.4f} | {nats / n:.4f}{change} | {kl / n:.5f} "
        f"| {same / n:.1%} | {seconds:.0f} |",
        flush=True,
    )
    return nats / n


if __name__ == "__main__":
    main()
