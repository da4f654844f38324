"""ReRoPE and Leaky ReRoPE: the distance that scores see, pair by pair, and what both are at their limits."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.errors import UnsupportedError
from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.nn.attend import sdpa
from octavo.nn.attention import use_reader
from octavo.nn.contracts import Inputs
from octavo.nn.position import Rotation
from octavo.nn.reader import Reading
from octavo.nn.reader_rerope import LeakyReRopeReader, ReRopeReader

pytestmark = pytest.mark.rows("R8")
W, K = 6, 8
FREQUENCIES = torch.tensor([100.0 ** (-2 * i / K) for i in range(K // 2)], dtype=torch.float64)


def exact(positions: torch.Tensor) -> Rotation:
    angles = positions[..., None].double() * FREQUENCIES
    return Rotation(angles.cos(), angles.sin(), "half", exact)


def reader(leak: float | None = None, **values) -> ReRopeReader:
    if leak is None:
        return ReRopeReader(ReRopeReader.Config(window=W, **values))
    return LeakyReRopeReader(LeakyReRopeReader.Config(window=W, leak=leak, **values))


def g(t: int, leak: float | None) -> float:
    """The notes' piecewise distance, with 1 / k for (T_max - w) / (T'_max - w)."""
    return t if t <= W else W if leak is None else W + (t - W) / leak


def model(positions="rope", **mixer) -> Decoder:
    block = {"mixer": {"kind": "attention", "n_heads": 2, "n_kv_heads": 1, **mixer}}
    config = {"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 24, "positions": positions,
              "blocks": {"block": block}}  # fmt: skip
    built = build(Decoder.Config.model_validate(config)).double().eval()
    randomise(built, 3)
    return built


@pytest.mark.parametrize("leak", [None, 1.0, 2.0, 16.0])
def test_every_pair_turns_by_g_of_the_distance(leak):
    """A query and a key of one pair of channels alone score cos(theta_i g(t)); their quarter turn sin(theta_i g(t))."""
    T = 20
    order = torch.arange(T)[None]
    reading = Reading(exact(order), sdpa, "auto", scale=1.0)
    distance = (order[0][:, None] - order[0]).tril()
    wanted_g = torch.tensor([[g(int(t), leak) for t in row] for row in distance], dtype=torch.float64)
    for pair, frequency in enumerate(FREQUENCIES.tolist()):
        one = torch.zeros(1, T, 1, K, dtype=torch.float64)
        one[..., pair] = 1
        quarter = one.roll(K // 2, -1)
        for key, wave in ((one, torch.cos), (quarter, torch.sin)):
            scores = reader(leak).scores(one, key, order, order, reading)[0, 0].tril()
            wanted = wave(frequency * wanted_g).tril()
            torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["rerope", "leaky_rerope"])
@torch.no_grad()
def test_texts_within_the_window_are_read_as_by_rope(kind):
    tokens = torch.randint(19, (2, 20), generator=torch.Generator().manual_seed(0))
    plain, own = model(), model(reader={"kind": kind, "window": W})
    a, b = plain(Inputs(tokens)).logits, own(Inputs(tokens)).logits
    torch.testing.assert_close(b[:, :W], a[:, :W], rtol=0, atol=1e-12)
    assert float((b[:, W + 1 :] - a[:, W + 1 :]).abs().amax((0, 2)).min()) > 1e-4


@torch.no_grad()
def test_the_leak_has_rope_and_rerope_as_its_ends():
    tokens = torch.randint(19, (2, 24), generator=torch.Generator().manual_seed(0))
    logits = lambda chosen: model(reader=chosen)(Inputs(tokens)).logits  # noqa: E731
    leaky = {"kind": "leaky_rerope", "window": W}
    torch.testing.assert_close(logits(leaky | {"leak": 1.0}), model()(Inputs(tokens)).logits, rtol=0, atol=1e-5)
    rerope = logits({"kind": "rerope", "window": W})
    torch.testing.assert_close(logits(leaky | {"leak": 1e9}), rerope, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["rerope", "leaky_rerope"])
@torch.no_grad()
def test_a_loaded_model_reads_by_it_and_caches_unturned_keys(kind):
    tokens = torch.randint(19, (2, 24), generator=torch.Generator().manual_seed(0))
    built = model()
    config = (ReRopeReader if kind == "rerope" else LeakyReRopeReader).Config(window=W)
    use_reader(built, config, 24)
    wanted = built(Inputs(tokens)).logits
    state = built.new_state(2, 24)
    parts = [built(Inputs(t), state=state).logits for t in tokens.split([9, 1, 1, 6, 1, 6], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=0, atol=1e-10)
    mixer = built.blocks[0].layers["mixer"].mixer
    x = built.blocks[0].layers["mixer"].norm_in(built.embed(tokens))
    kept = state.layer("0.mixer").read("k")[:, :24]
    torch.testing.assert_close(kept, mixer.k(x).view(2, 24, 1, 8), rtol=0, atol=1e-12)


@torch.no_grad()
def test_queries_grow_with_the_logarithm_of_their_position():
    q = torch.randn(1, 20, 1, K, dtype=torch.float64)
    order = torch.arange(20)[None]
    built = model(reader={"kind": "rerope", "window": 24, "trained": 5})
    tokens = torch.randint(19, (1, 20), generator=torch.Generator().manual_seed(0))
    maps, plain = (m(Inputs(tokens), needs=("attention",)).attention[0] for m in (built, model()))
    growth = ((order[0] + 1).log() / math.log(5)).clamp(min=1)
    wanted = (plain.log() * growth[:, None]).softmax(-1)  # scores up to a constant of each query
    torch.testing.assert_close(maps, wanted, rtol=0, atol=1e-5)
    assert float(growth[4]) == pytest.approx(1.0) and float(growth[-1]) > 1.8
    assert q.shape[1] == len(growth)


def test_what_sets_distances_in_another_way_is_refused():
    tokens = Inputs(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(UnsupportedError, match="the reader rerope sets distances itself"):
        model("alibi", reader={"kind": "rerope"})(tokens)
    both_ways = model(reader={"kind": "leaky_rerope"})
    both_ways.config = both_ways.config.model_copy(update={"causal": False})
    with pytest.raises(UnsupportedError, match="leaky_rerope reads from left to right"):
        both_ways(tokens)
