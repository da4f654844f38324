"""Retention against torchscale 0.3: its parallel, recurrent and chunkwise outputs (golden/make_retention.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from proof import agree
from safetensors.torch import load_file

from octavo.nn.contracts import Dims, Inputs
from octavo.nn.position import PositionDims
from octavo.nn.retention import Retention
from octavo.nn.rope import RotaryPositions
from octavo.nn.state import ContiguousState, place

pytestmark = pytest.mark.rows("S4")
GOLDEN = load_file(Path(__file__).parent / "golden" / "retention.safetensors")
D, HEADS, VALUES = 16, 2, 24
WIDTH = D // HEADS
THETA = 10000 ** (WIDTH / (WIDTH - 2))  # their angles run from 1 to 1 / 10000, the last included


def retention(backend, dtype=torch.float32):
    config = Retention.Config(
        n_heads=HEADS, value_dim=VALUES, norm={"kind": "rmsnorm", "weight": False, "eps": 1e-9}, backend=backend,
        chunk=5,
    )  # fmt: skip
    ours = Retention(config, Dims(D, 1, 64))
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "g_proj", "o": "out_proj"}
    ours.load_state_dict({f"{name}.weight": GOLDEN[f"weight.{theirs}.weight"] for name, theirs in names.items()})
    return ours.to(dtype)


POSITIONS = RotaryPositions(
    RotaryPositions.Config(layout="interleaved", theta=THETA), PositionDims(D, WIDTH, 64, HEADS)
)  # fmt: skip


def inputs(n):
    return Inputs(torch.zeros(2, n, dtype=torch.long))


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunkwise"])
@pytest.mark.parametrize("backend", ["plain", "parallel", "chunked"])
def test_three_forms_equal_torchscale(backend, form):
    x = GOLDEN["x"]
    ctx = place(inputs(x.shape[1]))[0]
    ctx.rotations = {WIDTH: POSITIONS.rotation(ctx.positions)}
    with torch.no_grad():
        ours, _ = retention(backend)(x, ctx)
    agree("retention", "torchscale MultiScaleRetention", ours, GOLDEN[form], case=f"{backend} against {form}")


def test_decoding_equals_torchscale():
    x, ours = GOLDEN["x"], retention("auto")
    state, parts = ContiguousState({"0": ours.state_spec()}, 2, 24, torch.float32), []
    with torch.no_grad():
        for part in x.split([11, *[1] * 13], 1):
            ctx = state.begin(inputs(part.shape[1]))
            ctx.rotations = {WIDTH: POSITIONS.rotation(ctx.positions)}
            parts.append(ours(part, ctx, state.layer("0"))[0])
    agree("retention", "torchscale MultiScaleRetention", torch.cat(parts, 1), GOLDEN["recurrent"], case="decoding")


def test_bf16_stays_near_torchscale():
    x = GOLDEN["x"].bfloat16()
    ctx = place(inputs(x.shape[1]))[0]
    ctx.rotations = {WIDTH: POSITIONS.rotation(ctx.positions)}
    with torch.no_grad():
        ours, _ = retention("auto", torch.bfloat16)(x, ctx)
    agree("retention", "torchscale MultiScaleRetention", ours, GOLDEN["parallel"], case="bf16")
