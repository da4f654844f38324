"""Decode state: room per row, what stays after cutting back, who owns what."""

from __future__ import annotations

import pytest
import torch

from octavo.errors import ResourceError
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.nn.state import ContiguousState, StateField, place

TOKEN = {"k": StateField("token", (2,))}
RING = {"k": StateField("ring", (2,), length=3)}
ROW = {"h": StateField("row", (4,))}


def held(spec, rows: int = 2, n: int = 6) -> ContiguousState:
    return ContiguousState({"0.mixer": spec}, rows, n, torch.float32)


def feed(state: ContiguousState, values: list[list[float]], valid=None, doc_ids=None):
    """Append one number a token; returns its keys and what can be read."""
    tokens = torch.tensor(values)
    ok = None if valid is None else torch.tensor(valid).bool()
    ids = None if doc_ids is None else torch.tensor(doc_ids)
    ctx = state.begin(Inputs(tokens.long(), valid=ok, doc_ids=ids))
    return ctx, *state.layer("0.mixer").append(ctx, k=tokens[..., None].expand(*tokens.shape, 2))


def test_positions_slots_and_starts_of_a_padded_packed_row():
    inputs = Inputs(
        torch.zeros(1, 7, dtype=torch.long),
        valid=torch.tensor([[False, True, True, False, True, True, False]]),
        doc_ids=torch.tensor([[-1, 5, 5, -1, 8, 8, -1]]),
    )
    ctx, lengths, last_doc, doc_start = place(inputs)
    assert ctx.slots[ctx.valid].tolist() == [0, 1, 2, 3]
    assert ctx.positions[ctx.valid].tolist() == [0, 1, 0, 1]
    assert ctx.starts.tolist() == [[False, True, False, False, True, False, False]]
    assert ctx.keys.slots.tolist() == [[-1, 0, 1, -1, 2, 3, -1]]
    assert (lengths.tolist(), last_doc.tolist(), doc_start.tolist()) == ([4], [8], [2])
    assert not ctx.plain


def test_padding_takes_no_room_and_every_row_has_its_own():
    state = held(TOKEN, n=4)
    feed(state, [[1, 2, 3], [0, 0, 9]], valid=[[1, 1, 1], [0, 0, 1]])
    assert state.lengths.tolist() == [3, 1]
    feed(state, [[4, 0], [0, 8]], valid=[[1, 0], [0, 1]])
    assert state.lengths.tolist() == [4, 2]
    # The first row is full, the second is not: together they would be over the limit, each alone is not.
    _, keys, read = feed(state, [[0, 0], [7, 6]], valid=[[0, 0], [1, 1]])
    assert state.lengths.tolist() == [4, 4]
    assert read["k"][:, :, 0].tolist() == [[1, 2, 3, 4], [9, 8, 7, 6]]
    assert keys.slots.tolist() == [[0, 1, 2, 3]] * 2
    with pytest.raises(ResourceError, match="holds 4 tokens a row, 5 are needed"):
        feed(state, [[0], [5]], valid=[[0], [1]])


def test_a_ring_keeps_the_last_tokens_whatever_the_chunks():
    for chunks in ([5], [1] * 5, [2, 3], [4, 1]):
        state, at = held(RING, rows=1, n=20), 0
        for n in chunks:
            feed(state, [[float(v) for v in range(at, at + n)]])
            at += n
        _, keys, read = feed(state, [[5.0]])
        kept = {int(s): float(v) for s, v in zip(keys.slots[0], read["k"][0, :, 0]) if s >= 0}
        assert kept == {2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}, chunks


def test_bytes_are_those_of_the_specs():
    state = ContiguousState({"0": TOKEN, "1": RING, "2": ROW, "3": {}}, 3, 10, torch.bfloat16)
    assert state.payload_bytes == 3 * (10 * 2 + 3 * 2 + 4) * 2
    assert state.n_bytes > state.payload_bytes
    assert state.layer("3") is None
    wide = {"h": StateField("row", (4,), dtype=torch.float32)}
    assert ContiguousState({"0": wide}, 1, 10, torch.bfloat16).payload_bytes == 16


def test_truncate_finds_the_document_again():
    state = held(TOKEN, rows=1, n=8)
    feed(state, [[1, 2, 3, 4, 5]], doc_ids=[[0, 0, 1, 1, 2]])
    assert state.truncate(torch.tensor([4]))
    ctx, *_ = feed(state, [[6]], doc_ids=[[1]])
    assert ctx.positions.tolist() == [[2]]
    assert not ctx.starts.any()
    assert state.truncate(torch.tensor([0]))
    ctx, *_ = feed(state, [[7]], doc_ids=[[0]])
    assert ctx.positions.tolist() == [[0]]
    assert ctx.starts.all()


@pytest.mark.parametrize("spec", [RING, ROW], ids=["ring", "row"])
def test_what_cannot_go_back_says_so(spec):
    state = held(spec)
    state.begin(Inputs(torch.zeros(2, 3, dtype=torch.long)))
    assert not state.truncate(torch.tensor([3, 2]))
    assert state.lengths.tolist() == [3, 3]
    assert state.truncate(torch.tensor([3, 3]))


def test_row_fields_are_replaced_and_snapshots_are_copies():
    state = held(ROW)
    layer = state.layer("0.mixer")
    assert (layer.read("h") == 0).all()
    saved = state.snapshot()
    layer.write(h=torch.ones(2, 4))
    assert (layer.read("h") == 1).all()
    state.restore(saved)
    assert (layer.read("h") == 0).all()


def test_a_ring_is_never_longer_than_the_row_can_become():
    window = {"mixer": {"kind": "attention", "n_heads": 2, "window": 1000}}
    made = build(Decoder.Config.model_validate(
        {"d_model": 8, "n_layers": 1, "vocab_size": 13, "max_seq_len": 2000, "blocks": {"block": window}}
    )).eval()  # fmt: skip
    state = made.new_state(1, 6)
    ids = torch.randint(13, (1, 6))
    with torch.inference_mode():
        whole = made(Inputs(ids)).logits
        found = torch.cat([made(Inputs(ids[:, i : i + 1]), state=state).logits for i in range(6)], 1)
    torch.testing.assert_close(found, whole)
    assert state.layers["0.mixer"].buffers["k"].shape[1] == 7
    assert state.payload_bytes == sum(
        f.n_bytes(6, torch.float32) for s in made.state_specs().values() for f in s.values()
    )
