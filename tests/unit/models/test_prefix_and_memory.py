"""Prefix language models, what a memory does to a state, and what is refused where neither can be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.errors import UnsupportedError
from octavo.infer import native
from octavo.models.decoder import Decoder, build
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.contracts import Inputs, Memory

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "vocab_size": 23, "max_seq_len": 32}
ATTENTION = {"kind": "attention", "n_heads": 4}
CROSS = {"kind": "cross_attention", "n_heads": 4}


def decoder(mixer: Any = ATTENTION, cross: Any = None, **settings: Any) -> Decoder:
    blocks = {"block": {"mixer": mixer, "cross": cross}}
    return build(Decoder.Config.model_validate({**SMALL, "blocks": blocks, **settings}), seed=3).double().eval()


def tokens(rows: int = 2, n: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(23, (rows, n), generator=torch.Generator().manual_seed(seed))


def reads(model: Decoder, inputs: Inputs) -> Tensor:
    """Which tokens the output at each token depends on, (B, T, T), by gradient."""
    leaves: list[Tensor] = []

    def replace(module: object, args: object, out: Tensor) -> Tensor:
        leaves.append(out.detach().requires_grad_())
        return leaves[0]

    with model.embed.register_forward_hook(replace):
        logits = model(inputs).logits
    found = []
    for t in range(logits.shape[1]):
        (gradient,) = torch.autograd.grad(logits[:, t].square().sum(), leaves[0], retain_graph=True)
        found.append((gradient != 0).any(-1))
    return torch.stack(found, 1)


@pytest.mark.rows("A5")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("positions", ["rope", "t5", "alibi"])
def test_a_prefix_is_read_both_ways_and_nothing_else_ahead(positions, mode):
    """No output depends on a later token unless both stand in one prefix; by gradient, so that no leak hides."""
    model, T = decoder(positions=positions).train(mode == "train"), 10
    n = torch.tensor([4, 0, 10])
    got = reads(model, Inputs(tokens(3), prefix=torch.arange(T) < n[:, None]))
    order = torch.arange(T)
    wanted = (order[None] <= order[:, None]) | (order < n[:, None])[:, None, :]
    assert torch.equal(got, wanted)


@pytest.mark.rows("A5")
def test_a_packed_prefix_is_its_own_documents():
    model, T = decoder(), 10
    doc_ids = (torch.arange(T) >= 6).long()[None]
    prefix = torch.tensor([[True, True, True, False, False, False, True, True, False, False]])
    got = reads(model, Inputs(tokens(1), doc_ids=doc_ids, prefix=prefix))[0]
    for a, b, n in ((0, 6, 3), (6, 10, 2)):
        order = torch.arange(b - a)
        wanted = torch.zeros(b - a, T, dtype=torch.bool)
        wanted[:, a:b] = (order[None] <= order[:, None]) | (order < n)
        assert torch.equal(got[a:b], wanted)
        alone = model(Inputs(tokens(1)[:, a:b], prefix=prefix[:, a:b])).logits
        assert torch.allclose(alone, model(Inputs(tokens(1), doc_ids=doc_ids, prefix=prefix)).logits[:, a:b])


@pytest.mark.rows("A5")
@torch.no_grad()
def test_a_prefix_is_kept_in_a_state_and_padding_is_invisible():
    model, text = decoder(), tokens(2)
    prefix = torch.arange(10).expand(2, -1) < 4
    whole = model(Inputs(text, prefix=prefix)).logits
    assert not torch.allclose(whole, model(Inputs(text)).logits)
    state = model.new_state(2, 10)
    parts = [model(Inputs(text[:, :5], prefix=prefix[:, :5]), state).logits]
    parts += [model(Inputs(text[:, t : t + 1]), state).logits for t in range(5, 10)]
    assert torch.allclose(torch.cat(parts, 1), whole)
    valid = torch.tensor([[False, True, False, *[True] * 9, False]]).expand(2, -1)
    padded, marks = torch.zeros(2, 13, dtype=torch.long), torch.ones(2, 13, dtype=torch.bool)
    padded[valid], marks[valid] = text.flatten(), prefix.flatten()
    out = model(Inputs(padded, valid=valid, prefix=marks)).logits[valid].view_as(whole)
    assert torch.allclose(out, whole)


def test_what_cannot_read_a_prefix_says_so():
    for mixer in ({"kind": "lstm"}, {**ATTENTION, "reader": {"kind": "lambda", "window": 4}}):
        with pytest.raises(UnsupportedError, match=r"0.mixer cannot read a prefix"):
            decoder(mixer)(Inputs(tokens(), prefix=torch.ones(2, 10, dtype=torch.bool)))


# ------------------------------------------------------------------------------------------------- memory


def memory(rows: int = 2, n: int = 5) -> Memory:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, n, 16, generator=generator, dtype=torch.float64)
    return Memory(hidden, torch.ones(rows, n, dtype=torch.bool))


@pytest.mark.rows("B3")
@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_a_row_without_any_memory_is_finite_with_finite_gradients(backend):
    model = decoder(cross={**CROSS, "backend": backend, "o_bias": True})
    given = memory()
    given.valid[0] = False
    hidden = given.hidden.requires_grad_()
    out = model(Inputs(tokens(), memory=given), needs=("logits", "cross_attention"))
    assert torch.isfinite(out.logits).all() and (out.cross_attention[0][0] == 0).all()
    out.logits.square().sum().backward()
    assert torch.isfinite(hidden.grad).all() and (hidden.grad[0] == 0).all() and (hidden.grad[1] != 0).any()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.rows("B3")
def test_trap_e15_only_cross_attention_reads_keys_of_the_encoder():
    """The notes give a decoder's every attention the encoder's keys; its own attention reads its own text alone."""
    model = decoder(cross=CROSS)
    for block in model.blocks:
        torch.nn.init.zeros_(block.layers["cross"].mixer.o.weight)
    one, two = memory(), memory()
    two = two._replace(hidden=two.hidden + 1)
    with torch.no_grad():
        same = [model(Inputs(tokens(), memory=m)).logits for m in (one, two)]
        assert torch.equal(*same)  # with the cross-attention silent nothing of the memory arrives
        state = model.new_state(2, 10)
        model(Inputs(tokens(), memory=one), state)
    fields = {name: set(spec) for name, spec in model.state_specs().items() if spec}
    assert fields["0.mixer"] == {"k", "v"} and fields["0.cross"] == {"k", "v", "valid"}
    assert state.layer("0.mixer").read("k").shape[1] == 11 and state.layer("0.cross").read("k").shape[1] == 5


@torch.no_grad()
def test_a_memory_is_filled_once_kept_and_copied():
    model, text, given = decoder(cross=CROSS), tokens(), memory()
    whole = model(Inputs(text, memory=given)).logits
    state = model.new_state(2, 10)
    before, empty = state.snapshot(), state.payload_bytes
    first = model(Inputs(text[:, :4], memory=given), state).logits
    assert state.payload_bytes == empty + 2 * 2 * 5 * (2 * 16 * 8 + 1)
    held = state.snapshot()
    rest = model(Inputs(text[:, 4:]), state).logits
    assert torch.allclose(torch.cat([first, rest], 1), whole)
    assert state.truncate(torch.tensor([4, 4]))
    assert torch.allclose(model(Inputs(text[:, 4:]), state).logits, rest)
    state.restore(before)
    with pytest.raises(UnsupportedError, match="no memory to read"):
        model(Inputs(text[:, :1]), state)
    state.restore(held)
    state.select(torch.tensor([1, 1, 0]))
    turned = text[[1, 1, 0]]
    assert torch.allclose(model(Inputs(turned[:, 4:]), state).logits, rest[[1, 1, 0]])


@torch.no_grad()
def test_packed_pairs_read_their_own_source():
    config = EncoderDecoder.Config.model_validate(
        {
            "vocab_size": 23,
            "encoder": {**{k: v for k, v in SMALL.items() if k != "vocab_size"}, "causal": False,
                        "blocks": {"block": {"mixer": ATTENTION}}},
            "decoder": {**{k: v for k, v in SMALL.items() if k != "vocab_size"},
                        "blocks": {"block": {"mixer": ATTENTION, "cross": CROSS}}},
        }
    )  # fmt: skip
    model = build(config, seed=1).double().eval()
    source, text = tokens(1, 9, seed=4), tokens(1, 7, seed=5)
    owner, doc_ids = torch.tensor([[0] * 4 + [1] * 5]), torch.tensor([[0] * 3 + [1] * 4])
    both = model(Inputs(text, doc_ids=doc_ids, source=source, source_doc_ids=owner)).logits
    for document in (0, 1):
        alone = model(Inputs(text[doc_ids == document][None], source=source[owner == document][None])).logits
        assert torch.allclose(both[:, doc_ids[0] == document], alone)
    with pytest.raises(UnsupportedError, match="one pair a row"):
        model(Inputs(text, doc_ids=doc_ids, source=source, source_doc_ids=owner), model.new_state(1, 9))


def test_what_has_no_memory_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="no block of this model reads a memory"):
        decoder()(Inputs(tokens(), memory=memory()))
    with pytest.raises(UnsupportedError, match="no memory to read"):
        decoder(cross=CROSS)(Inputs(tokens()))
    with pytest.raises(UnsupportedError, match="a memory of 3 rows for 2"):
        decoder(cross=CROSS)(Inputs(tokens(), memory=memory(3)))
    model = decoder(cross=CROSS).float()
    assert native.unsuitable(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decoder": {"blocks": {"b": {}}}}, "no block with cross"),
        ({"encoder": {"tie_embeddings": False}}, "encoder has no head"),
        ({"encoder": {"blocks": {"b": {"cross": CROSS}}}}, "nothing that it could read"),
        ({"encoder": {"d_model": 64}}, "use memory_width 64"),
        ({"encoder": {"vocab_size": 9}}, "vocab_size is said once"),
        ({"encoder": {"positions": "learned", "causal": False}, "share_positions": True}, "share_positions needs"),
    ],
    ids=str,
)
def test_impossible_halves(change, said):
    with pytest.raises(ValueError, match=said):
        EncoderDecoder.Config.model_validate(change)
