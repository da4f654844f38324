"""Tokens per second of cached decoding at batch 1, beside transformers' generate: same shape, dtype and context.

    python benchmarks/decode.py                     the 26 M shape, 256 tokens of context, fp32 and bf16
    python benchmarks/decode.py --threads 1         process CPU clock: for a busy machine

One process, the same random weights size, interleaved rounds. The rate is of the tokens after the first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from train import P26, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.threads > 1 else time.process_time
    print(
        f"{processor()}, {args.threads} threads, context {args.context}, {args.tokens} tokens, {args.rounds} rounds\n"
    )
    print("| dtype | loop | tokens/s (least to most) | first token, ms |\n|---|---|---|---|")
    for name in ("fp32", "bf16"):
        loops = build_loops(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[name]), args.context)
        for loop in loops.values():
            loop(4)
        times: dict[str, list[tuple[float, float]]] = {key: [] for key in loops}
        for n in range(args.rounds):
            for key in loops if n % 2 == 0 else reversed(loops):
                start = clock()
                loops[key](1)
                first = clock() - start
                start = clock()
                loops[key](args.tokens)
                times[key].append((first, clock() - start))
        rates = {k: [(args.tokens - 1) / (whole - first) for first, whole in v] for k, v in times.items()}
        for key, found in rates.items():
            first = statistics.median(first for first, _ in times[key])
            spread = f"{statistics.median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f})"
            print(f"| {name} | {key} | {spread} | {1e3 * first:.1f} |")
        ratios = [a / b for a, b in zip(rates["octavo"], rates["transformers"], strict=True)]
        print(
            f"| {name} | ratio | {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) | |",
            flush=True,
        )


def build_loops(dtype, context: int) -> dict[str, Callable[[int], object]]:  # type: ignore[no-untyped-def]
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from octavo.infer.generate import pieces
    from octavo.infer.sampling import SamplingConfig
    from octavo.models.decoder import Decoder, build

    size = {"max_position_embeddings": 512, "tie_word_embeddings": True}
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=P26["vocab_size"], hidden_size=P26["d_model"], num_hidden_layers=P26["n_layers"],
        num_attention_heads=P26["n_heads"], num_key_value_heads=P26["n_kv_heads"],
        intermediate_size=P26["d_ff"], **size,
    )).eval().to(dtype)  # fmt: skip
    block = {
        "mixer": {"kind": "attention", "n_heads": P26["n_heads"], "n_kv_heads": P26["n_kv_heads"]},
        "channel": {"kind": "glu", "activation": "silu", "d_ff": P26["d_ff"]},
    }
    ours = build(Decoder.Config.model_validate({
        "d_model": P26["d_model"], "n_layers": P26["n_layers"], "max_seq_len": 512, "vocab_size": P26["vocab_size"],
        "blocks": {"block": block}})).eval().to(dtype)  # fmt: skip
    ids = torch.randint(P26["vocab_size"], (1, context), generator=torch.Generator().manual_seed(0))
    tokenizer = Ids(P26["vocab_size"])

    def transformers(n: int) -> object:
        with torch.inference_mode():
            return theirs.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)

    def octavo(n: int) -> object:
        config = SamplingConfig(temperature=0.0, max_new_tokens=n)
        return list(pieces(ours, tokenizer, [ids[0].tolist()], config, stop_ids=()))

    return {"octavo": octavo, "transformers": transformers}


class Ids:
    """A tokenizer that turns nothing into text: both loops are timed on ids."""

    stop_ids: tuple[int, ...] = ()

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def stream(self) -> Ids:
        return self

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


if __name__ == "__main__":
    main()
