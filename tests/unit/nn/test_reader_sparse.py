"""Sparse patterns: the sets of the paper, layers that alternate, and what they save."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.nn.attention import Attention
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.kernels import build as kernels
from octavo.nn.reader_sparse import FixedReader, StridedReader
from octavo.nn.state import place

pytestmark = pytest.mark.rows("B8")


def read_by(reader, T: int) -> torch.Tensor:
    ctx = place(Inputs(torch.zeros(1, T, dtype=torch.long)))[0]
    return reader.mask(ctx, ctx.keys)[0, 0]


def strided(part: str = "both", stride: int = 6) -> StridedReader:
    return StridedReader(StridedReader.Config(stride=stride, part=part))


def fixed(part: str = "both", stride: int = 6, summary: int = 1) -> FixedReader:
    return FixedReader(FixedReader.Config(stride=stride, summary=summary, part=part))


# Figure 3 of the paper: 36 tokens as six lines of six, and what token 3 of line 3 reads.
PICTURES = {
    "strided": (strided, """
        ...x..
        ...x..
        ...xxx
        xxxx..
        ......
        ......"""),
    "fixed": (fixed, """
        .....x
        .....x
        .....x
        xxxx..
        ......
        ......"""),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_the_pattern_is_the_figures(name):
    make, picture = PICTURES[name]
    drawn = torch.tensor([[mark == "x" for mark in line] for line in picture.split()])
    assert torch.equal(read_by(make(), 36)[21].view(6, 6), drawn)


@pytest.mark.parametrize("part", ["local", "column", "both"])
def test_strided_sets_are_the_papers(part):
    stride, T = 4, 19
    for i, row in enumerate(read_by(strided(part, stride), T).tolist()):
        local, column = set(range(max(0, i - stride), i + 1)), {j for j in range(i + 1) if (i - j) % stride == 0}
        assert {j for j in range(T) if row[j]} == {"local": local, "column": column, "both": local | column}[part]


@pytest.mark.parametrize("part", ["block", "summary", "both"])
@pytest.mark.parametrize("summary", [1, 3])
def test_fixed_sets_are_the_papers(part, summary):
    stride, T = 5, 23
    for i, row in enumerate(read_by(fixed(part, stride, summary), T).tolist()):
        block = {j for j in range(i + 1) if j // stride == i // stride}
        ends = {j for j in range(i + 1) if j % stride in range(stride - summary, stride)}
        wanted = {"block": block, "summary": ends or {i}, "both": block | ends}[part]
        assert {j for j in range(T) if row[j]} == wanted


def test_two_steps_reach_every_earlier_token():
    """What the two sets were chosen for: through two layers everything is in reach."""
    for make, parts in ((strided, ("local", "column")), (fixed, ("block", "summary"))):
        first, second = (read_by(make(part), 36).double() + torch.eye(36) for part in parts)  # with the residual
        assert torch.equal(second @ first > 0, torch.ones(36, 36, dtype=torch.bool).tril())


def model(mixers: dict[str, dict], n_layers: int = 2, **more) -> Decoder:
    config = {"d_model": 32, "n_layers": n_layers, "vocab_size": 19, "max_seq_len": 256, **more,
              "blocks": {name: {"mixer": {"kind": "attention", "n_heads": 2, **m}, "channel": None}
                         for name, m in mixers.items()}}  # fmt: skip
    made = build(Decoder.Config.model_validate(config))
    randomise(made, 0)
    return made


SPARSE = {"kind": "strided", "stride": 16}


def test_trap_e16_alternating_layers_save_computation_and_not_one_parameter():
    """The note says a sparse transformer has fewer parameters. Only what is computed shrinks, and scores in memory."""
    mixers = {
        "dense": {"backend": "tiled"},
        "column": {"backend": "tiled", "reader": SPARSE | {"part": "column"}},
        "summary": {"backend": "tiled", "reader": {"kind": "fixed", "stride": 16, "part": "summary"}},
    }
    flops, parameters, held = {}, {}, {}
    for name in ("column", "summary", "dense"):
        made = model({name: mixers[name], "dense": mixers["dense"]})  # alternates with dense layers
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made(Inputs(torch.zeros(1, 256, dtype=torch.long)), needs=("hidden",))
        flops[name] = counter.get_total_flops()
        parameters[name] = sum(p.numel() for p in made.parameters())
        held[name] = made.new_state(1, 256).payload_bytes
    assert len(set(parameters.values())) == len(set(held.values())) == 1
    one_dense_layer = flops["dense"] / 2
    assert flops["column"] - one_dense_layer < 0.6 * one_dense_layer
    assert flops["summary"] - one_dense_layer < 0.6 * one_dense_layer
    pairs = {name: int(read_by(reader, 256).sum()) for name, reader in
             {"strided": strided(stride=16), "fixed": fixed(stride=16)}.items()}  # fmt: skip
    assert all(n < 0.3 * 256 * 513 / 2 for n in pairs.values())


@pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("part", ["local", "column", "block", "summary"])
def test_training_in_fp32_equals_the_plain_form(part, packed):
    """Windows, blocks and columns run through the kernel there, as ranges of keys."""
    kind = (
        {"kind": "strided", "stride": 7}
        if part in ("local", "column")
        else {"kind": "fixed", "stride": 7, "summary": 2}
    )
    doc_ids = (torch.arange(45) // 19).expand(2, 45) if packed else None
    x, outputs = torch.randn(2, 45, 32, generator=torch.Generator().manual_seed(0)), []
    for backend in ("auto", "plain"):
        config = Attention.Config.model_validate(
            {"n_heads": 4, "n_kv_heads": 2, "reader": kind | {"part": part}, "backend": backend}
        )
        mixer, given = Attention(config, Dims(32, 1, 64)), x.clone().requires_grad_()
        randomise(mixer, 0)
        ctx = place(Inputs(torch.zeros(2, 45, dtype=torch.long), doc_ids=doc_ids))[0]
        y = mixer.train()(given, ctx)[0]
        y.square().sum().backward()
        outputs.append([y, given.grad, mixer.k.weight.grad])
    for got, wanted in zip(*outputs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.detach().abs().max()))


def test_a_summary_must_fit_its_block():
    with pytest.raises(ValueError, match="summary = 5 must be at most stride = 4"):
        FixedReader.Config(stride=4, summary=5)
