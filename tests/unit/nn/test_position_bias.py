"""ALiBi and T5's buckets: numbers added to scores by distance, whatever a cache, padding or packing does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from octavo.errors import UnsupportedError
from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs, Keys
from octavo.nn.position import PositionDims
from octavo.nn.position_bias import AlibiPositions, T5Positions, alibi_slopes, t5_bucket
from octavo.nn.state import place


def model(positions, n_layers: int = 2, d_model: int = 16, vocab_size: int = 19, max_seq_len: int = 16, **mixer):
    block = {"mixer": {"kind": "attention", "n_heads": 2, **mixer}}
    config = {"d_model": d_model, "n_layers": n_layers, "vocab_size": vocab_size, "max_seq_len": max_seq_len,
              "positions": positions, "blocks": {"block": block}}  # fmt: skip
    return build(Decoder.Config.model_validate(config))


def alibi(n_heads: int = 2) -> AlibiPositions:
    return AlibiPositions(AlibiPositions.Config(), PositionDims(0, 0, 0, n_heads))


def context(T: int, **named):
    return place(Inputs(torch.zeros(1, T, dtype=torch.long), **named))[0]


@pytest.mark.rows("R5")
def test_slopes_by_hand():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]  # two heads' own, then the first of four heads'
    assert alibi_slopes(6).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


@pytest.mark.rows("R5")
@torch.no_grad()
def test_trap_e8_alibi_is_added_to_scores():
    """E8: the notes write a product, x_i W W^T x_j^T (-m (i - j)); the bias -m (i - j) is added to the scaled score."""
    built = model("alibi", n_layers=1).double().eval()
    randomise(built, 0)
    tokens = torch.randint(19, (1, 9), generator=torch.Generator().manual_seed(0))
    got = built(Inputs(tokens), needs=("attention",)).attention[0][0]
    block = built.blocks[0].layers["mixer"]
    x = block.norm_in(built.embed(tokens))[0]
    q, k = (p(x).view(9, 2, 8).transpose(0, 1) for p in (block.mixer.q, block.mixer.k))
    scores = q @ k.mT / 8**0.5
    distance = torch.arange(9)[:, None] - torch.arange(9)
    slopes = torch.tensor([2.0**-4, 2.0**-8])[:, None, None]
    hidden = distance < 0
    wanted = (scores - slopes * distance).masked_fill(hidden, float("-inf")).softmax(-1)
    product = (scores * (-slopes * distance)).masked_fill(hidden, float("-inf")).softmax(-1)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert float((got - product).abs().max()) > 0.05


@pytest.mark.rows("R3", "R5")
def test_distances_are_counted_in_slots():
    """Padding and other documents before a text change nothing; positions of a caller's own are not looked at."""
    scheme, plain = alibi(), context(4)
    wanted = scheme.bias(plain, plain.keys)
    assert wanted.shape == (1, 2, 4, 4)
    assert wanted[0, 0, 3].tolist() == [-3 / 16, -2 / 16, -1 / 16, 0.0]
    packed = context(7, doc_ids=torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    assert torch.equal(scheme.bias(packed, packed.keys)[:, :, 3:, 3:], wanted)
    padded = context(6, valid=torch.tensor([[True, False, True, True, False, True]]))
    seen = [0, 2, 3, 5]
    assert torch.equal(scheme.bias(padded, padded.keys)[:, :, seen][..., seen], wanted)
    moved = context(4, positions=torch.tensor([[7, 3, 9, 1]]))
    assert torch.equal(scheme.bias(moved, moved.keys), wanted)
    later = Keys(torch.tensor([[5, 2]]), torch.zeros(1, 2, dtype=torch.long))  # the order of a ring
    assert scheme.bias(plain, later)[0, 0, 3].tolist() == [-2 / 16, -1 / 16]


@pytest.mark.rows("R3")
@pytest.mark.parametrize(
    ("positions", "mixer"),
    [
        ("alibi", {}),
        ({"kind": "t5", "n_buckets": 8, "max_distance": 9}, {}),
        ("rope", {}),
        ("rope", {"kind": "shaw", "clip": 3}),
        ("none", {"kind": "transformer_xl"}),
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_do_not_depend_on_where_a_text_stands(positions, mixer):
    built = model(positions, max_seq_len=40, **mixer).double().eval()
    randomise(built, 1)
    tokens = torch.randint(19, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = built(Inputs(tokens)).logits
    before = torch.randint(19, (2, 21), generator=torch.Generator().manual_seed(1))
    doc_ids = (torch.arange(33) >= 21).long().expand(2, 33)
    shifted = built(Inputs(torch.cat([before, tokens], 1), doc_ids=doc_ids)).logits[:, 21:]
    torch.testing.assert_close(shifted, wanted, rtol=0, atol=1e-10)
    further = built(Inputs(tokens, positions=torch.arange(12).expand(2, 12) + 1000)).logits
    torch.testing.assert_close(further, wanted, rtol=0, atol=2e-3 if positions == "rope" else 1e-10)  # float32 angles
    swapped = built(Inputs(tokens[:, [1, 0, *range(2, 12)]])).logits
    assert float((swapped[:, -1] - wanted[:, -1]).abs().max()) > 1e-3  # but on the order


@pytest.mark.rows("R3")
def test_buckets_by_hand():
    """Eight buckets up to 16: 0 1 2 3 one each, then 4-5, 6-7, 8-11, and all from 12 on."""
    behind = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 500])
    assert t5_bucket(-behind, 8, 16, causal=True).tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7]
    assert t5_bucket(behind, 8, 16, causal=True).tolist() == [0] * 13  # later tokens, which no mask lets through
    both = t5_bucket(torch.tensor([-9, -1, 0, 1, 9]), 8, 16, causal=False)
    assert both.tolist() == [3, 1, 0, 5, 7]


def test_one_number_of_heads_is_needed():
    blocks = {name: {"mixer": {"kind": "attention", "n_heads": n}} for name, n in (("a", 2), ("b", 4))}
    config = {"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 16, "blocks": blocks}
    for positions in ("alibi", "t5"):
        with pytest.raises(UnsupportedError, match=f"positions {positions} add to the scores of every head"):
            build(Decoder.Config.model_validate(config | {"positions": positions}))


def test_slopes_stay_exact_when_the_model_is_cast():
    built = model("alibi", n_heads=4).bfloat16()
    assert built.positions.slopes.dtype == torch.float32
    assert built.positions.predicted_parameters() == 0


def test_t5_refuses_ranges_that_are_none():
    with pytest.raises(ValueError, match="must exceed half"):
        T5Positions.Config(n_buckets=32, max_distance=16)


@pytest.mark.rows("R5")
def test_alibi_reads_texts_eight_times_as_long_as_it_was_trained_on():
    """Trained on 16 tokens of a text in which each token follows from the two before, nine times of ten; read at 128.

    The loss of the last 64 tokens is that of the trained length; with sinusoids, trained alike, it breaks down.
    """
    after = torch.randint(5, (5, 5), generator=torch.Generator().manual_seed(99))

    def texts(rows: int, T: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        text = [torch.randint(5, (rows,), generator=generator) for _ in range(2)]
        for _ in range(T - 2):
            noise = torch.rand(rows, generator=generator) < 0.1
            text.append(torch.where(noise, torch.randint(5, (rows,), generator=generator), after[text[-2], text[-1]]))
        return torch.stack(text, 1)

    def loss(built: Decoder, tokens: torch.Tensor, first: int) -> torch.Tensor:
        logits = built(Inputs(tokens[:, :-1])).logits[:, first:]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, first + 1 :].flatten())

    trained, long = {}, {}
    for positions in ("alibi", "sinusoidal"):
        torch.manual_seed(0)
        built = model(positions, n_layers=1, d_model=32, vocab_size=5, n_heads=4)
        optimizer = torch.optim.AdamW(built.parameters(), 1e-2)
        for batch in texts(32 * 150, 17, 1).split(32):
            optimizer.zero_grad()
            loss(built, batch, 2).backward()
            optimizer.step()
        with torch.no_grad():
            trained[positions] = float(loss(built, texts(64, 17, 2), 2))
            long[positions] = float(loss(built, texts(64, 129, 2), 64))
    assert max(trained.values()) < 0.8  # both learned it: knowing nothing is ln 5 = 1.61
    assert long["alibi"] < trained["alibi"] + 0.1
    assert long["sinusoidal"] > trained["sinusoidal"] + 0.8
