"""Every law on readers for long texts: in grouped heads, rotated by either layout, in part, and not at all."""

from __future__ import annotations

import pytest

from octavo import laws

POSITIONS = {
    "half": {"kind": "rope"},
    "part": {"kind": "rope", "layout": "interleaved", "fraction": 0.5},
    "none": {"kind": "none"},
}
READERS = {
    "cache": ("half", {"kind": "lambda", "n_sinks": 2, "window": 3}),
    "capped": ("part", {"kind": "lambda", "n_sinks": 1, "window": 4, "positions": "capped", "limit": 5}),
    "memory": ("half", {"kind": "external_memory", "window": 3, "top_k": 2}),
    "whole memory": ("none", {"kind": "external_memory", "window": 3, "top_k": None, "positions": "true"}),
    "chunks": ("part", {"kind": "longheads", "chunk": 2, "n_chunks": 3, "recent": 1}),
    "all chunks": ("none", {"kind": "longheads", "chunk": 3, "n_chunks": None}),
    "blocks": ("half", {"kind": "infllm", "n_sinks": 1, "window": 3, "block": 2, "top_k": 1, "representatives": 1}),
    "blocks per head": ("none", {"kind": "infllm", "n_sinks": 0, "window": 2, "block": 3, "top_k": 1, "per_head": 1}),
    "windows": ("half", {"kind": "parallel_windows", "window": 3, "n_windows": 3}),
}
ROWS = {"lambda": "R12", "external_memory": "R13", "longheads": "R14", "infllm": "R14", "parallel_windows": "R11"}


def model(name: str) -> dict[str, object]:
    positions, reader = READERS[name]
    block = {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "reader": reader}, "channel": None}
    return {"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 16, "blocks": {"block": block},
            "positions": POSITIONS[positions]}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.rows(ROWS[reader["kind"]])) for name, (_, reader) in READERS.items()]
)
def test_every_law_on_a_reader_for_long_texts(name):
    found = laws.check(model(name), seed=len(name))
    assert not [str(result) for result in found if not result.ok]
    asked = {result.law for result in found if result.status == "holds"}
    assert {"causal", "packed", "padding", "rows", "gradients", "incremental", "state", "flops", "state_bytes"} <= asked
    assert ("constant_state" in asked) == (READERS[name][1]["kind"] == "lambda")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cache", "capped", "memory", "windows"])
def test_it_compiles_without_a_graph_break(name):
    assert [result.status for result in laws.check(model(name), ["compilable"])] == ["holds"]
