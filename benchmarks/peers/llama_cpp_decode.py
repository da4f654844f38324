"""Decoding with llama-cpp-python on random weights: reads numbers of tokens, writes the seconds that they took.

Run by ``benchmarks/decode.py --llama-cpp`` in an interpreter that has llama-cpp-python, numpy and gguf.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
from typing import Any

import gguf
import llama_cpp as lc
import numpy as np


def write(path: str, s: dict[str, Any]) -> None:
    """A file of that shape and format with random weights, tied, without a tokenizer."""
    arch = "qwen2" if s["qkv_bias"] else "llama"
    out = gguf.GGUFWriter(path, arch)
    out.add_block_count(s["n_layers"])
    out.add_context_length(512)
    out.add_embedding_length(s["d_model"])
    out.add_feed_forward_length(s["d_ff"])
    out.add_head_count(s["n_heads"])
    out.add_head_count_kv(s["n_kv_heads"])
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(s["vocab_size"])
    out.add_tokenizer_model("no_vocab")
    kind, random = getattr(gguf.GGMLQuantizationType, s["format"]), np.random.default_rng(0)
    D, K = s["d_model"], s["d_model"] // s["n_heads"]
    wide, narrow = s["n_heads"] * K, s["n_kv_heads"] * K

    def matrix(name: str, n: int, k: int) -> None:
        weight = random.standard_normal((n, k), dtype=np.float32) * np.float32(0.02)
        if kind is gguf.GGMLQuantizationType.F32:
            out.add_tensor(name, weight)
        else:
            out.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    matrix("token_embd.weight", s["vocab_size"], D)
    out.add_tensor("output_norm.weight", np.ones(D, np.float32))
    for i in range(s["n_layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{i}.{norm}.weight", np.ones(D, np.float32))
        for name, n, k in (("q", wide, D), ("k", narrow, D), ("v", narrow, D), ("output", D, wide)):
            matrix(f"blk.{i}.attn_{name}.weight", n, k)
            if arch == "qwen2" and name != "output":
                out.add_tensor(f"blk.{i}.attn_{name}.bias", np.zeros(n, np.float32))
        for name, n, k in (("gate", s["d_ff"], D), ("up", s["d_ff"], D), ("down", D, s["d_ff"])):
            matrix(f"blk.{i}.ffn_{name}.weight", n, k)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main() -> None:
    s = json.loads(sys.argv[1])
    clock = time.perf_counter if s["threads"] > 1 else time.process_time
    lc.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "random.gguf")
        write(path, s)
        options = lc.llama_model_default_params()
        options.n_gpu_layers, options.use_mmap = 0, False
        model = lc.llama_model_load_from_file(path.encode(), options)
    assert model, "llama.cpp does not load the file"
    batch, context, V = s["batch"], s["context"], s["vocab_size"]
    options = lc.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_seq_max = 512 * batch, 512, batch
    options.n_threads = options.n_threads_batch = s["threads"]
    run = lc.llama_init_from_model(model, options)
    assert run, "llama.cpp makes no context"
    rows = lc.llama_batch_init(512, 0, 1)
    prompt = np.random.default_rng(1).integers(0, V, (batch, context))

    def decode(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Tokens after entries of (token, position, sequence, whether its token is wanted)."""
        rows.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            rows.token[i], rows.pos[i], rows.n_seq_id[i] = token, position, 1
            rows.seq_id[i][0], rows.logits[i] = sequence, wanted
        assert lc.llama_decode(run, rows) == 0
        found = []
        for i, entry in enumerate(entries):
            if entry[3]:
                address = ctypes.cast(lc.llama_get_logits_ith(run, i), ctypes.POINTER(ctypes.c_float))
                found.append(int(np.ctypeslib.as_array(address, (V,)).argmax()))
        return found

    for line in sys.stdin:
        lc.llama_memory_clear(lc.llama_get_memory(run), True)
        start = clock()
        tokens = [
            decode([(int(t), i, row, i == context - 1) for i, t in enumerate(prompt[row])])[0] for row in range(batch)
        ]
        first, start = clock() - start, clock()
        for n in range(int(line) - 1):
            tokens = decode([(token, context + n, row, True) for row, token in enumerate(tokens)])
        print(json.dumps([first, clock() - start]), flush=True)


if __name__ == "__main__":
    main()
