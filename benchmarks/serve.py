"""Many streams at once: this server, llama.cpp's own, and transformers in batches, interleaved in one run.

    python benchmarks/serve.py input.txt --llama-server path/to/llama-server --streams 16 64
    python benchmarks/serve.py input.txt --weights int8 --rounds 5

Random weights of the 26 M shape with a vocabulary made from the text. Each stream asks for one completion after the
other over HTTP, prompts of 16 to 256 tokens cut from the text and 32 to 128 new ones, greedy; what counts is tokens
that arrive, by the wall clock, so nothing else should run. Servers that are not asked are idle. The plain batches of
transformers wait for their longest text, and take the same requests in the same order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from decode import SHAPES
from page import put
from train import processor

CONTEXT = 512
LLAMA_TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


@dataclass(frozen=True)
class Ask:
    prompt: str
    n_new: int


def asks(text: str, n: int, seed: int) -> list[Ask]:
    """Requests of mixed lengths; no two begin alike, so no cache of prompts helps."""
    draw = random.Random(seed)
    found = []
    for _ in range(n):
        length, start = draw.choice((48, 96, 192, 384, 640)), draw.randrange(len(text) - 1000)
        found.append(Ask(text[start : start + length], draw.choice((32, 64, 96, 128))))
    return found


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """A model folder and a GGUF file of the same weights."""
    import torch

    from octavo.hub.folder import save_model
    from octavo.models.decoder import Decoder, build
    from octavo.tokenizer import ByteBPE, train

    shape = SHAPES["p26"]
    tokenizer = train(ByteBPE(vocab_size=shape["vocab_size"]), [args.text.read_text("utf-8")])
    attention = {"kind": "attention", "n_heads": shape["n_heads"], "n_kv_heads": shape["n_kv_heads"]}
    block = {"mixer": attention, "channel": {"kind": "glu", "activation": "silu", "d_ff": shape["d_ff"]}}
    size = {name: shape[name] for name in ("d_model", "n_layers")}
    config = {**size, "vocab_size": tokenizer.vocab_size, "max_seq_len": CONTEXT, "blocks": {"block": block}}
    plain = folder / "model"
    save_model(build(Decoder.Config.model_validate(config), seed=1).to(torch.bfloat16), plain)
    tokenizer.save(plain)
    own = plain
    if args.weights != "bf16":
        own = folder / args.weights
        run("octavo", "quantize", str(plain), "--scheme", args.weights, "--group", "32", "--out", str(own))
    gguf = folder / "model.gguf"
    run("octavo", "convert", str(own), str(gguf), "--to", "gguf")
    return own, gguf


def run(*words: str) -> None:
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def served(command: list[str], port: int, ready: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers, until the end of the block."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            for _ in range(600):
                time.sleep(0.1)
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{command[0]} ended: {log.read()[-2000:].decode(errors='replace')}")
                if _answers(port, ready):
                    break
            yield process
        finally:
            process.terminate()
            process.wait(20)


def _answers(port: int, path: str) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as one:
            one.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
            return b" 200 " in one.recv(100)
    except OSError:
        return False


async def ask_one(port: int, ask: Ask) -> tuple[int, float]:
    """Tokens that came, and the seconds until the first."""
    body = json.dumps(
        {"model": "bench", "prompt": ask.prompt, "max_tokens": ask.n_new, "temperature": 0, "stream": True,
         "stream_options": {"include_usage": True}}
    ).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    began, first, tail = time.perf_counter(), 0.0, b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        while part := await reader.read(65536):
            if not first and b"data: " in part:
                first = time.perf_counter() - began
            tail = (tail + part)[-4096:]
    finally:
        writer.close()
    at = tail.rfind(b'"completion_tokens":')
    if at < 0 or b"[DONE]" not in tail:
        raise SystemExit(f"the server did not finish: {tail[-500:].decode(errors='replace')}")
    return int(tail[at:].split(b":", 1)[1].split(b",")[0].split(b"}")[0]), first


async def load(port: int, wanted: list[Ask], streams: int) -> tuple[float, list[float]]:
    """Tokens a second with so many streams, and the seconds to the first token of each request."""
    left, counts, firsts = iter(wanted), [], []

    async def stream() -> None:
        for ask in left:
            n, first = await ask_one(port, ask)
            counts.append(n)
            firsts.append(first)

    began = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return sum(counts) / (time.perf_counter() - began), firsts


class Batches:
    """transformers' generate, as many texts at a time as there are streams."""

    def __init__(self, folder: Path, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        from octavo import load

        torch.set_num_threads(threads)
        self.tokenizer = load(folder).tokenizer
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def load(self, wanted: list[Ask], streams: int) -> tuple[float, list[float]]:
        import torch

        began, n = time.perf_counter(), 0
        for start in range(0, len(wanted), streams):
            batch = wanted[start : start + streams]
            ids = [self.tokenizer.encode(ask.prompt) for ask in batch]
            widest, longest = max(map(len, ids)), max(ask.n_new for ask in batch)
            rows = torch.tensor([[0] * (widest - len(own)) + own for own in ids])
            mask = torch.tensor([[0] * (widest - len(own)) + [1] * len(own) for own in ids])
            with torch.inference_mode():
                self.model.generate(
                    rows, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, do_sample=False,
                    pad_token_id=0,
                )  # fmt: skip
            n += sum(ask.n_new for ask in batch)
        return n / (time.perf_counter() - began), []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--streams", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--each", type=int, default=4, help="requests of each stream in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--weights", choices=LLAMA_TYPES, default="bf16")
    parser.add_argument("--llama-server", help="the program, with its libraries where it finds them")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    text = args.text.read_text("utf-8")
    lines = list[str]()

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    with tempfile.TemporaryDirectory() as folder:
        own, gguf = prepare(args, Path(folder))
        batches = Batches(own, args.threads) if args.transformers else None
        say(f"{processor()}, {args.threads} threads, p26 in {args.weights}, {args.each} requests a stream, "
            f"{args.rounds} rounds.\n")  # fmt: skip
        say("| streams | server | tokens/s (least to most) | Octavo is x times | first token, median and p95, ms |")
        say("|--:|---|--:|--:|--:|")
        for streams in args.streams:
            with ExitStack() as both:
                ports = {"octavo": free_port()}
                serve = [sys.executable, "-m", "octavo", "serve", str(own), "--port", str(ports["octavo"])]
                serve += ["--max-sequences", str(streams), "--max-requests", str(2 * streams), "--name", "bench"]
                both.enter_context(served(serve, ports["octavo"], "/readyz"))
                if args.llama_server:
                    port = ports["llama-server"] = free_port()
                    words = [args.llama_server, "-m", str(gguf), "--port", str(port), "--host", "127.0.0.1"]
                    words += ["-np", str(streams), "-c", str(CONTEXT * streams), "-t", str(args.threads)]
                    words += ["-tb", str(args.threads), "-cb"]
                    both.enter_context(served(words, port, "/health"))
                for line in measure(args, text, streams, ports, batches):
                    say(line)
    if args.write:
        put("performance.md", "serve", "\n".join(lines))


def measure(
    args: argparse.Namespace, text: str, streams: int, ports: dict[str, int], batches: Batches | None
) -> Iterator[str]:
    rates: dict[str, list[float]] = {name: [] for name in (*ports, *(["transformers"] if batches else []))}
    firsts: dict[str, list[float]] = {name: [] for name in rates}
    for port in ports.values():
        asyncio.run(load(port, asks(text, streams, -1), streams))  # the first requests find nothing warm
    for i in range(args.rounds):
        wanted = asks(text, streams * args.each, i)
        for name in rates if i % 2 == 0 else reversed(rates):
            if name in ports:
                rate, waited = asyncio.run(load(ports[name], wanted, streams))
            else:
                assert batches is not None
                rate, waited = batches.load(wanted, streams)
            rates[name].append(rate)
            firsts[name] += waited
    for name, own in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["octavo"], own, strict=True))
        waited = sorted(firsts[name])
        first = f"{1e3 * statistics.median(waited):.0f}, {1e3 * waited[int(0.95 * len(waited))]:.0f}" if waited else ""
        yield (f"| {streams} | {name} | {statistics.median(own):,.0f} ({min(own):,.0f} to {max(own):,.0f}) "
               f"| {ratio:.2f} | {first} |")  # fmt: skip


if __name__ == "__main__":
    main()
