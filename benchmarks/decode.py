"""Tokens per second of cached decoding beside other engines: same shape, number format, batch and context.

    python benchmarks/decode.py                                  the 26 M shape, batch 1, 8 and 32, all formats
    python benchmarks/decode.py --shape qwen2-0.5b --batch 1     the shape of Qwen2 0.5 B
    python benchmarks/decode.py --threads 1                      process CPU clock: for a busy machine
    python benchmarks/decode.py --llama-cpp ~/lc/bin/python      with llama-cpp-python of that interpreter

Random weights, greedy, and every token comes after at least ``--context`` others: an engine's own benchmark that begins
with an empty context measures something else. Rounds of all engines are interleaved. llama.cpp's int8 is Q8_0 and its
int4 Q4_0; it runs in a process of its own that waits for its turn (build it with GGML_NATIVE=OFF and the AVX-512
flags: its AMX code crashes on quantised files). Octavo is the native step itself with its argmax. The roof is what a
loop reads from huge pages in a second, to compare with the bytes of weights that the steps read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from page import put
from train import P26, processor

HERE = Path(__file__).parent
SHAPES = {
    "p26": P26 | {"qkv_bias": False},
    "qwen2-0.5b": {"vocab_size": 151936, "d_model": 896, "n_layers": 24, "n_heads": 14, "n_kv_heads": 2, "d_ff": 4864,
                   "qkv_bias": True},
    "smollm2-135m": {"vocab_size": 49152, "d_model": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "d_ff": 1536,
                     "qkv_bias": False},
}  # fmt: skip
MODES = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
# One round: n new tokens for each row; the seconds to the first, and of the others.
Round = Callable[[int], tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["p26"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", nargs="+", type=int, help="default: 1, 8 and 32 of p26, 1 of the others")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="*", default=["transformers", "transformers-static"])
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter with llama-cpp-python, numpy and gguf")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.threads > 1 else time.process_time
    lines = list[str]()

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{processor()}, {args.threads} threads, context {args.context}, {args.tokens} tokens, {args.rounds} rounds; "
        f"a plain loop over large pages reads {roof(args.threads, clock) / 1e9:.1f} GB/s.\n")  # fmt: skip
    say("| model | weights | texts | engine | tokens/s (least to most) | Octavo is x times | first token, ms "
        "| weights read, GB/s |")  # fmt: skip
    say("|---|---|--:|---|--:|--:|--:|--:|")
    for name in args.shape:
        for mode in args.modes:
            for batch in args.batch or ([1, 8, 32] if name == "p26" else [1]):
                engines, n_bytes = build_engines(mode, batch, SHAPES[name], args, clock)
                for line in measure(engines, batch, n_bytes, args):
                    say(f"| {name} | {mode} | {batch} {line}")
    if args.write:
        put("performance.md", "decode", "\n".join(lines))


def measure(engines: dict[str, Round], batch: int, n_bytes: int, args: argparse.Namespace) -> Iterator[str]:
    for engine in engines.values():
        engine(3)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for n in range(args.rounds):
        for name in engines if n % 2 == 0 else reversed(engines):
            times[name].append(engines[name](args.tokens))
    rates = {name: [batch * (args.tokens - 1) / rest for _, rest in found] for name, found in times.items()}
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["octavo"], found, strict=True))
        first = statistics.median(first for first, _ in times[name])
        rate = statistics.median(found)
        read = f"{rate / batch * n_bytes / 1e9:.1f}" if name == "octavo" else ""
        yield (f"| {name} | {rate:,.0f} ({min(found):,.0f} to {max(found):,.0f}) | {ratio:.2f} | {1e3 * first:.0f} "
               f"| {read} |")  # fmt: skip


def roof(threads: int, clock: Callable[[], float]) -> float:
    """Bytes a second that a plain loop reads from 256 MB in huge pages."""
    import ctypes

    from octavo.infer.native import library
    from octavo.infer.packing import Arena

    loaded, why = library()
    if loaded is None:
        raise SystemExit(f"no native step: {why}")
    buffer = Arena().take(1 << 28).fill_(1)
    loaded.decode_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    found = []
    for _ in range(5):
        start = clock()
        loaded.decode_read(buffer.data_ptr(), len(buffer), threads)
        found.append(len(buffer) / (clock() - start))
    return max(found)


def build_engines(
    mode: str, batch: int, shape: dict[str, Any], args: argparse.Namespace, clock: Callable[[], float]
) -> tuple[dict[str, Round], int]:
    import torch

    ids = torch.randint(shape["vocab_size"], (batch, args.context), generator=torch.Generator().manual_seed(0))
    engines: dict[str, Round] = {}
    engines["octavo"], n_bytes = octavo(mode, shape, ids, args, clock)
    if mode in ("fp32", "bf16"):
        for peer in args.peers:
            engines[peer] = transformers(mode, shape, ids, peer.endswith("static"), clock)
    if args.llama_cpp:
        engines["llama.cpp"] = llama_cpp(mode, batch, shape, args)
    return engines, n_bytes


def octavo(mode: str, shape: dict[str, Any], ids: Any, args: argparse.Namespace, clock: Callable[[], float]) -> Any:
    import torch

    from octavo.infer.native import Memory, NativeModel
    from octavo.infer.pages import zeros
    from octavo.models.decoder import Decoder, build

    attention = {"kind": "attention", "n_heads": shape["n_heads"], "n_kv_heads": shape["n_kv_heads"]}
    block = {
        "mixer": attention | {"qkv_bias": shape["qkv_bias"]},
        "channel": {"kind": "glu", "activation": "silu", "d_ff": shape["d_ff"]},
    }
    size = {name: shape[name] for name in ("d_model", "n_layers", "vocab_size")}
    config = Decoder.Config.model_validate(size | {"max_seq_len": 512, "blocks": {"block": block}})
    dtype = torch.float32 if mode == "fp32" else torch.bfloat16
    model = build(config).eval().to(dtype)
    made = NativeModel(model, "model" if mode in ("fp32", "bf16") else mode, threads=args.threads)  # type: ignore[arg-type]
    (batch, context), room = ids.shape, 512
    pool = (batch * room, *made.heads)
    keys, values = ([zeros(*pool, dtype=dtype, device=torch.device("cpu")) for _ in range(made.n_layers)] for _ in "kv")
    memory = Memory(made, keys, values)
    tables, rows = torch.arange(batch, dtype=torch.int32)[:, None], torch.arange(batch)

    def step(tokens: Any, sequence: Any, slots: Any, wanted: Any) -> Any:
        first = torch.zeros_like(slots)
        logits = made.step(tokens, sequence, slots, slots, tables, room, first, memory, wanted)
        return logits.argmax(-1)

    def run(n: int) -> tuple[float, float]:
        torch.set_num_threads(1)  # see NativeModel
        start = clock()
        for row in range(batch):
            last = torch.tensor([context - 1])
            found = step(ids[row], torch.full((context,), row), torch.arange(context), last)
        tokens = found.expand(batch).contiguous()
        first = clock() - start
        start = clock()
        for i in range(n - 1):
            tokens = step(tokens, rows, torch.full((batch,), context + i), rows)
        rest = clock() - start
        torch.set_num_threads(args.threads)
        return first, rest

    return run, made.n_bytes


def transformers(mode: str, shape: dict[str, Any], ids: Any, static: bool, clock: Callable[[], float]) -> Round:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "vocab_size": shape["vocab_size"], "hidden_size": shape["d_model"], "num_hidden_layers": shape["n_layers"],
        "num_attention_heads": shape["n_heads"], "num_key_value_heads": shape["n_kv_heads"],
        "intermediate_size": shape["d_ff"], "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    made = Qwen2ForCausalLM(Qwen2Config(**sizes)) if shape["qkv_bias"] else LlamaForCausalLM(LlamaConfig(**sizes))
    made = made.eval().to(torch.float32 if mode == "fp32" else torch.bfloat16)
    more = {"cache_implementation": "static"} if static else {}

    def generate(n: int) -> float:
        start = clock()
        with torch.inference_mode():
            made.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, **more)
        return clock() - start

    def run(n: int) -> tuple[float, float]:
        first = generate(1)
        return first, generate(n) - first

    return run


def llama_cpp(mode: str, batch: int, shape: dict[str, Any], args: argparse.Namespace) -> Round:
    settings = shape | {"format": MODES[mode], "batch": batch, "threads": args.threads, "context": args.context}
    command = [args.llama_cpp, str(HERE / "peers" / "llama_cpp_decode.py"), json.dumps(settings)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    ask, answer = process.stdin, process.stdout

    def run(n: int) -> tuple[float, float]:
        ask.write(f"{n}\n")
        ask.flush()
        line = answer.readline()
        if not line:
            raise SystemExit(f"{' '.join(command[:2])} ended with {process.wait()}")
        first, rest = json.loads(line)
        return first, rest

    return run


if __name__ == "__main__":
    main()
