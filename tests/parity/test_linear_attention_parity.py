"""Linear attention against fla-core's naive recurrent and chunked functions (golden/make_linear_attention.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from proof import agree
from safetensors.torch import load_file

from octavo.nn.contracts import Dims, Inputs
from octavo.nn.linear_attention import LinearAttention
from octavo.nn.state import place

pytestmark = pytest.mark.rows("B9")
GOLDEN = load_file(Path(__file__).parent / "golden" / "linear_attention.safetensors")
B, T, H, K = GOLDEN["q"].shape
CASES = [("elu", True), ("elu", False), ("identity", False)]


def run(feature_map, normalise, backend, dtype=torch.float32):
    """The mixer on an input that holds q, k and v, which its products take apart."""
    config = LinearAttention.Config(
        n_heads=H, head_dim=K, feature_map=feature_map, normalise=normalise, backend=backend, chunk=24
    )
    ours = LinearAttention(config, Dims(3 * H * K, 1, T))
    eye = torch.eye(3 * H * K)
    with torch.no_grad():
        for product, rows in zip((ours.q, ours.k, ours.v), eye.split(H * K), strict=True):
            product.weight.copy_(rows)
        ours.o.weight.copy_(eye[:, : H * K])
        x = torch.cat([GOLDEN[name].flatten(2) for name in "qkv"], -1).to(dtype)
        y, _ = ours.to(dtype)(x, place(Inputs(torch.zeros(B, T, dtype=torch.long)))[0])
    return y[..., : H * K].view(B, T, H, K)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("backend", ["plain", "parallel", "chunked"])
@pytest.mark.parametrize("feature_map, normalise", CASES)
def test_three_forms_equal_fla(feature_map, normalise, backend, form):
    wanted = GOLDEN[f"{form}.{feature_map}{'.divided' if normalise else ''}"]
    ours = run(feature_map, normalise, backend)
    case = f"{feature_map}{', divided' if normalise else ''}, {backend} against {form}"
    agree("linear_attention", "fla-core naive_linear_attn", ours, wanted, case=case)


def test_bf16_stays_near_fla():
    wanted = GOLDEN["recurrent.elu.divided"]
    agree(
        "linear_attention", "fla-core naive_linear_attn", run("elu", True, "auto", torch.bfloat16), wanted, case="bf16"
    )
