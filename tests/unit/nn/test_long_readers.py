"""Readers for long texts against loops that say what each query reads and at which distance, in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from octavo.errors import UnsupportedError
from octavo.models.decoder import Decoder, build
from octavo.nn.attend import plain
from octavo.nn.attention import use_reader
from octavo.nn.contracts import Inputs
from octavo.nn.position import Rotation
from octavo.nn.reader import Reading
from octavo.nn.reader_blocks import InfLlmReader, LongHeadsReader
from octavo.nn.reader_lambda import LambdaReader
from octavo.nn.reader_memory import ExternalMemoryReader
from octavo.nn.reader_parallel import ParallelWindowsReader
from octavo.nn.readers import READERS
from octavo.nn.state import place

H, G, K, BASE = 4, 2, 6, 50.0
RATES = BASE ** -(torch.arange(K // 2, dtype=torch.float64) / (K // 2))
NAMES = ["lambda", "external_memory", "longheads", "infllm", "parallel_windows"]
SMALL = {
    "lambda": {"n_sinks": 2, "window": 4},
    "external_memory": {"window": 4, "top_k": 2},
    "longheads": {"chunk": 2, "n_chunks": 3, "recent": 1},
    "infllm": {"n_sinks": 1, "window": 3, "block": 2, "top_k": 1},
    "parallel_windows": {"window": 3, "n_windows": 3},
}


def rotation(positions):
    """RoPE with float64 tables: a limit case is then exact to rounding."""
    angles = positions[..., None].double() * RATES
    return Rotation(angles.cos(), angles.sin(), "half", rotation)


def turned(x, distance):
    return rotation(torch.tensor([[distance]]))(x[None, None, None])[0, 0, 0]


def tensors(T, seed=0, rows=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, T, n, K, generator=generator, dtype=torch.float64) for n in (H, G, G))


def reader_of(kind, **settings):
    return READERS[kind](READERS[kind].Config(**settings), 64)


def read(reader, q, k, v, doc_ids=None, turn=True):
    ctx = place(Inputs(torch.zeros(q.shape[:2], dtype=torch.long), doc_ids=doc_ids))[0]
    return reader.read(q, k, v, ctx, None, Reading(rotation(ctx.positions) if turn else None, plain, "plain"))


def by_hand(q, k, v, reads):
    """The output of a row where ``reads(t, h)`` gives (key, distance) of all that head h of token t reads."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    for t in range(q.shape[1]):
        for h in range(H):
            pairs, g = reads(t, h), h // (H // G)
            scores = torch.stack([turned(q[0, t, h], d) @ k[0, s, g] for s, d in pairs]) / math.sqrt(K)
            out[0, t, h] = scores.softmax(0) @ torch.stack([v[0, s, g] for s, _ in pairs])
    return out


def close(got, wanted):
    assert torch.allclose(got, wanted, rtol=0, atol=1e-11), float((got - wanted).abs().max())


def everything(t, h):
    return [(s, t - s) for s in range(t + 1)]


@pytest.mark.rows("R12")
@pytest.mark.parametrize("window", [1, 4, 5])
@pytest.mark.parametrize("positions", ["cache", "capped"])
def test_lambda_reads_first_and_last_tokens_at_places_of_the_cache(window, positions):
    n, limit, (q, k, v) = 3, 6, tensors(19)
    reader = reader_of("lambda", n_sinks=n, window=window, positions=positions, limit=limit)

    def reads(t, h):
        last = [(s, t - s) for s in range(max(0, t - window + 1), t + 1)]
        first = range(min(n, max(0, t - window + 1)))
        if positions == "capped":
            return last + [(s, min(t - s, limit)) for s in first]
        cache = [*first, *(s for s, _ in last)]  # the newest stands at the end, the first ones where they always were
        return last + [(s, len(cache) - 1 - cache.index(s)) for s in first]

    close(read(reader, q, k, v), by_hand(q, k, v, reads))


@pytest.mark.rows("R12")
def test_lambda_as_long_as_the_text_is_full_attention_and_state_stays_constant():
    q, k, v = tensors(12)
    close(read(reader_of("lambda", n_sinks=1, window=12), q, k, v), by_hand(q, k, v, everything))
    config = Decoder.Config(d_model=16, n_layers=1, vocab_size=19, max_seq_len=400)
    model = build(config)
    use_reader(model, LambdaReader.Config(n_sinks=2, window=8), 400)
    assert model.new_state(1, 16).payload_bytes == model.new_state(1, 400).payload_bytes
    state = model.new_state(1, 400)
    model(Inputs(torch.zeros(1, 20, dtype=torch.long)), state)
    assert not state.truncate(torch.tensor([10]))
    assert state.lengths.tolist() == [20]


@pytest.mark.rows("R12")
def test_lambda_in_single_precision_is_as_exact_after_a_hundred_million_tokens():
    """Angles of such positions have no correct digit in float32; places in the cache stay small."""
    reader, (q, k, v) = reader_of("lambda", n_sinks=2, window=5), (x.float() for x in tensors(12))

    def single(positions):
        angles = positions[..., None].float() * RATES.float()
        return Rotation(angles.cos(), angles.sin(), "half", single)

    ctx = place(Inputs(torch.zeros(1, 12, dtype=torch.long)))[0]
    outputs = []
    for seen in (20, 100_000_000):
        later = dataclasses.replace(
            ctx, slots=ctx.slots + seen, positions=ctx.positions + seen, starts=torch.zeros_like(ctx.starts)
        )
        outputs.append(reader.read(q, k, v, later, None, Reading(single(later.positions), plain, "plain")))
    assert torch.allclose(*outputs, rtol=0, atol=1e-6)


@pytest.mark.rows("R13")
def test_external_memory_is_full_attention_where_all_is_read_in_its_place():
    q, k, v = tensors(15)
    reader = reader_of("external_memory", window=4, top_k=None, positions="true")
    close(read(reader, q, k, v), by_hand(q, k, v, everything))
    more_than_there_are = reader_of("external_memory", window=4, top_k=11, positions="true")
    close(read(more_than_there_are, q, k, v), by_hand(q, k, v, everything))


@pytest.mark.rows("R13")
@pytest.mark.parametrize("top_k", [1, 3, None])
@pytest.mark.parametrize("turn", [True, False])
def test_external_memory_merges_the_nearest_keys_before_the_softmax(top_k, turn):
    window, (q, k, v) = 4, tensors(15, seed=1)

    def reads(t, h):
        far = window if turn else 0
        outside = range(max(0, t - window + 1))
        fit = {s: float(turned(q[0, t, h], far) @ k[0, s, h // (H // G)]) for s in outside}
        best = sorted(fit, key=fit.__getitem__)[len(fit) - (len(fit) if top_k is None else min(top_k, len(fit))) :]
        last = [(s, t - s if turn else 0) for s in range(max(0, t - window + 1), t + 1)]
        return [(s, far) for s in best] + last

    reader = reader_of("external_memory", window=window, top_k=top_k)
    close(read(reader, q, k, v, turn=turn), by_hand(q, k, v, reads))


@pytest.mark.rows("R14")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("longheads", {"chunk": 3, "n_chunks": None}),
        ("longheads", {"chunk": 4, "n_chunks": 5}),
        ("longheads", {"chunk": 100, "n_chunks": 2, "recent": 1}),
        ("infllm", {"window": 3, "block": 2, "top_k": None, "positions": "true"}),
        ("infllm", {"window": 3, "block": 2, "top_k": 20, "positions": "true"}),
    ],
)
def test_with_all_blocks_it_is_full_attention(kind, settings):
    q, k, v = tensors(17, seed=2)
    close(read(reader_of(kind, **settings), q, k, v), by_hand(q, k, v, everything))


@pytest.mark.rows("R14")
def test_infllm_with_all_blocks_is_full_attention_with_distances_that_end_at_the_window():
    q, k, v = tensors(17, seed=3)
    reader = reader_of("infllm", n_sinks=2, window=4, block=3, top_k=None)
    close(read(reader, q, k, v), by_hand(q, k, v, lambda t, h: [(s, min(t - s, 4)) for s in range(t + 1)]))


def chunk_vector(q, k, v, chunk, length):
    """LongHeads' vector of one full chunk for each key head, (G, K), token by token."""
    steps = range(chunk * length, (chunk + 1) * length)
    keys = torch.stack([turned(k[0, s, g], i) for g in range(G) for i, s in enumerate(steps)]).view(G, length, K)
    mean = q[0].view(-1, G, H // G, K).mean(2)
    queries = torch.stack([turned(mean[s, g], i) for g in range(G) for i, s in enumerate(steps)]).view(G, length, K)
    values = v[0, list(steps)].transpose(0, 1)
    inside = (queries @ keys.transpose(1, 2) / math.sqrt(K)).softmax(-1) @ values
    return ((inside.mean(1, keepdim=True) @ keys.transpose(1, 2)) / math.sqrt(K)).softmax(-1)[:, 0, None] @ keys


@pytest.mark.rows("R14")
@pytest.mark.parametrize(("length", "n_chunks", "recent"), [(3, 4, 2), (2, 3, 1)])
def test_longheads_chooses_chunks_per_head_and_counts_positions_along_them(length, n_chunks, recent):
    q, k, v = tensors(23, seed=4)
    vectors = [chunk_vector(q, k, v, c, length)[:, 0] for c in range(23 // length)]
    choices = set()

    def reads(t, h):
        own = t // length
        always = {0, *range(max(0, own - recent + 1), own + 1)}
        fit = {c: float(q[0, t, h] @ vectors[c][h // (H // G)]) for c in range(own + 1) if c not in always}
        free = max(0, n_chunks - len(always))
        chosen = sorted(always | set(sorted(fit, key=fit.__getitem__)[max(0, len(fit) - free) :]))
        choices.add((t, tuple(chosen)))
        here = (len(chosen) - 1) * length + t % length
        found = [(c * length + i, r * length + i) for r, c in enumerate(chosen) for i in range(length)]
        return [(s, here - position) for s, position in found if s <= t]

    wanted = by_hand(q, k, v, reads)
    assert len(choices) > 23 and all(d < n_chunks * length for h in range(H) for _, d in reads(22, h))
    close(read(reader_of("longheads", chunk=length, n_chunks=n_chunks, recent=recent), q, k, v), wanted)


@pytest.mark.rows("R14")
@pytest.mark.parametrize("per_head", [True, False])
def test_infllm_chooses_blocks_by_the_tokens_that_were_attended_to(per_head):
    n, window, length, top_k, r, (q, k, v) = 2, 4, 3, 2, 2, tensors(26, seed=5)
    mean = q[0].view(-1, G, H // G, K).mean(2)

    def vector(block, g):
        tokens = range(n + block * length, n + (block + 1) * length)
        attended = {m: float(sum(mean[m + j, g] @ k[0, m, g] for j in range(1, window + 1))) for m in tokens}
        best = sorted(tokens, key=attended.__getitem__)[-r:]
        return torch.stack([k[0, m, g] for m in best]).mean(0)

    def reads(t, h):
        gone = max(0, (t - window + 1 - n) // length)  # blocks that have left the window altogether
        heads = [h] if per_head else range(H)
        fit = {b: float(sum(turned(q[0, t, i], window) @ vector(b, i // (H // G)) for i in heads)) for b in range(gone)}
        chosen = sorted(fit, key=fit.__getitem__)[max(0, gone - top_k) :]
        kept = [s for s in range(t + 1) if s < n or s >= n + gone * length or (s - n) // length in chosen]
        return [(s, min(t - s, window)) for s in kept]

    reader = reader_of(
        "infllm", n_sinks=n, window=window, block=length, top_k=top_k, representatives=r, per_head=per_head
    )
    assert len(reads(25, 0)) < 20
    close(read(reader, q, k, v), by_hand(q, k, v, reads))


@pytest.mark.rows("R14")
def test_bytes_that_could_be_kept_apart_are_those_no_query_must_read():
    assert reader_of("infllm", n_sinks=4, window=96, block=16, top_k=4).apart(4096) == 4096 - 4 - 96 - 16 * 5
    assert reader_of("infllm", top_k=None).apart(4096) == 0
    assert reader_of("longheads", chunk=32, n_chunks=8).apart(4096) == 4096 - 256
    assert reader_of("external_memory", window=128).apart(100) == 0


def published_positions(windows, n_task):
    """The rule of PCW's generate_pcw_position_ids: windows count from 0, the task from the longest window's length."""
    counted = [i for length in windows for i in range(length)]
    return counted + list(range(max(windows), max(windows) + n_task))


@pytest.mark.rows("R11")
@pytest.mark.parametrize(("window", "n_windows"), [(4, 3), (5, 1), (1, 6)])
def test_parallel_windows_have_the_published_positions_and_do_not_see_each_other(window, n_windows):
    T, task, (q, k, v) = 17, window * n_windows, tensors(17, seed=6)
    reader = reader_of("parallel_windows", window=window, n_windows=n_windows)
    wanted = published_positions([window] * n_windows, T - task)
    assert reader.positions(torch.arange(T)).tolist() == wanted

    def reads(t, h):
        seen = [s for s in range(t + 1) if t >= task or s // window == t // window]
        return [(s, wanted[t] - wanted[s]) for s in seen]

    close(read(reader, q, k, v), by_hand(q, k, v, reads))


@pytest.mark.rows("R11")
def test_one_parallel_window_is_full_attention():
    q, k, v = tensors(11)
    for n_windows, window in ((1, 4), (0, 4), (1, 30)):
        reader = reader_of("parallel_windows", window=window, n_windows=n_windows)
        close(read(reader, q, k, v), by_hand(q, k, v, everything))


@pytest.mark.parametrize("kind", NAMES)
def test_parts_of_a_long_text_and_documents_of_a_row_give_the_same(kind, monkeypatch):
    """The queries of a pass are read some at a time: where they are cut changes nothing."""
    import octavo.nn.reader_lambda

    q, k, v = tensors(23, seed=7)
    whole = read(reader_of(kind, **SMALL[kind]), q, k, v)
    monkeypatch.setattr(octavo.nn.reader_lambda, "QUERIES", 5)
    for part in (5, 1):
        monkeypatch.setattr(READERS[kind], "queries", part, raising=False)
        close(read(reader_of(kind, **SMALL[kind]), q, k, v), whole)
    doc_ids = (torch.arange(23) >= 10).long()[None]
    together = read(reader_of(kind, **SMALL[kind]), q, k, v, doc_ids)
    close(together[:, :10], whole[:, :10])
    close(together[:, 10:], read(reader_of(kind, **SMALL[kind]), q[:, 10:], k[:, 10:], v[:, 10:]))


@pytest.mark.parametrize("kind", NAMES)
def test_a_state_filled_to_its_last_place_by_a_padded_chunk_is_read_whole(kind, monkeypatch):
    """Then there are fewer keys than queries and tokens before: where keys may be cut must be asked, not counted."""
    import octavo.nn.reader_lambda

    model = build(Decoder.Config(d_model=16, n_layers=2, vocab_size=19, max_seq_len=16)).double().eval()
    use_reader(model, READERS[kind].Config(**SMALL[kind]), 16)
    tokens = torch.randint(19, (1, 14), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(14)[None] < 4
    with torch.no_grad():
        whole = model(Inputs(torch.cat([tokens[:, :10], tokens[:, :4]], 1))).logits
        monkeypatch.setattr(octavo.nn.reader_lambda, "QUERIES", 3)
        monkeypatch.setattr(READERS[kind], "queries", 3, raising=False)
        state = model.new_state(1, 14)
        model(Inputs(tokens[:, :10]), state)
        out = model(Inputs(tokens, valid=valid), state).logits
    assert torch.allclose(out[:, :4], whole[:, 10:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", NAMES)
def test_a_loaded_model_reads_otherwise_and_shows_its_maps(kind):
    block = {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}}
    model = build(Decoder.Config(d_model=16, n_layers=2, vocab_size=19, max_seq_len=16, blocks={"b": block})).double()
    tokens = torch.randint(19, (2, 12), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(12).expand(2, 12) >= torch.tensor([[0], [4]])
    full = model(Inputs(tokens)).logits
    use_reader(model, READERS[kind].Config(**SMALL[kind]), 16)
    out = model(Inputs(tokens, valid=valid), needs=("logits", "attention"))
    short = 3  # nothing has left the windows yet
    assert torch.allclose(out.logits[0, :short], full[0, :short], atol=1e-6)
    assert not torch.allclose(out.logits[0, -1], full[0, -1], atol=1e-6)
    for weights in (w.detach() for w in out.attention):
        assert weights.shape == (2, 4, 12, 12)
        assert torch.allclose(weights.sum(-1)[0], torch.ones(4, 12).double())
        assert float(weights[0].triu(1).abs().max()) == 0 == float(weights[1, :, 4:, :4].abs().max())


@pytest.mark.parametrize("kind", NAMES)
def test_what_sets_distances_itself_refuses_biases_and_models_that_read_both_ways(kind):
    reader, (q, k, v) = reader_of(kind, **SMALL[kind]), tensors(4)
    ctx = place(Inputs(torch.zeros(1, 4, dtype=torch.long)))[0]
    reading = Reading(None, plain, "plain")
    with pytest.raises(UnsupportedError, match=f"the reader {kind} sets distances itself"):
        reader.read(q, k, v, dataclasses.replace(ctx, bias=lambda ctx, keys: q), None, reading)
    with pytest.raises(UnsupportedError, match="left to right"):
        reader.read(q, k, v, dataclasses.replace(ctx, causal=False), None, reading)


@pytest.mark.parametrize("kind", NAMES)
def test_caps_and_sinks_of_attention_hold_in_every_reader(kind):
    """A learned sink takes its share of every softmax; capped scores stay capped."""
    reader, (q, k, v) = reader_of(kind, **SMALL[kind]), tensors(9, seed=8)
    ctx = place(Inputs(torch.zeros(1, 9, dtype=torch.long)))[0]
    free = Reading(rotation(ctx.positions), plain, "plain")
    nothing = dataclasses.replace(free, sinks=torch.full((H,), 60.0).double())
    assert float(reader.read(q, k, v, ctx, None, nothing).abs().max()) < 1e-15
    flat = dataclasses.replace(free, softcap=1e-9)  # all scores are equal then
    sums = reader.read(q, k, torch.ones_like(v), ctx, None, flat)
    assert torch.allclose(sums, torch.ones_like(sums))
    first = reader.read(q, k, v, ctx, None, flat)[:, 1]
    assert torch.allclose(first, v[:, :2].mean(1).repeat_interleave(H // G, 1))


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="must exceed recent"):
        LongHeadsReader.Config(n_chunks=2, recent=2)
    assert {READERS[kind] for kind in NAMES} == {
        LambdaReader, ExternalMemoryReader, LongHeadsReader, InfLlmReader, ParallelWindowsReader,
    }  # fmt: skip
