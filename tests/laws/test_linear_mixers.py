"""Every law on linear attention, retention and Mamba-2 as they can be set: short chunks, each form, groups, norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo import laws
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs

VARIANTS: dict[str, dict[str, Any]] = {
    "linear attention, no divisor": {"kind": "linear_attention", "n_heads": 2, "normalise": False, "bias": True},
    "linear attention, identity": {"kind": "linear_attention", "feature_map": "identity", "normalise": False},
    "linear attention, relu": {"kind": "linear_attention", "n_heads": 2, "feature_map": "relu", "head_dim": 5},
    "retention, narrow values": {"kind": "retention", "n_heads": 4, "value_dim": 12, "gate": "gelu"},
    "retention, not rotated": {"kind": "retention", "n_heads": 2, "rotate": False, "norm": {"kind": "layernorm"}},
    "mamba2, groups": {"kind": "mamba2", "n_heads": 4, "n_groups": 2, "d_state": 6, "bias": True},
    "mamba2, norm first": {"kind": "mamba2", "n_heads": 4, "norm_before_gate": True, "conv_bias": False, "d_state": 6},
    "mamba2, no norm": {"kind": "mamba2", "n_heads": 2, "norm": False, "head_dim": 3, "conv_width": 2, "d_state": 6},
    "mamba2, limits": {"kind": "mamba2", "dt_limit": (0.1, 0.9), "norm_groups": 4, "conv_width": 1, "d_state": 6},
}
ROWS = {"linear": "B9", "retent": "S4", "mamba2": "S2"}


def small(mixer: dict[str, Any], **more: Any) -> dict[str, Any]:
    block = {"mixer": mixer, "channel": None}
    return {"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 16, "blocks": {"block": block}} | more


@pytest.mark.parametrize(
    "mixer", [pytest.param(m, marks=pytest.mark.rows(ROWS[name[:6]])) for name, m in VARIANTS.items()], ids=VARIANTS
)
def test_every_law(mixer):
    results = laws.check(small(mixer | {"chunk": 5}), seed=5)
    assert [str(result) for result in results if not result.ok] == []
    assert sum(result.status == "holds" for result in results) == 15


@pytest.mark.parametrize("kind", ["linear_attention", "retention", "mamba2"])
def test_every_form_decodes(kind):
    for backend in ("plain", "parallel", "chunked"):
        results = laws.check(
            small({"kind": kind, "backend": backend, "chunk": 5}), ["incremental", "packed", "padding"]
        )
        assert [result.status for result in results] == ["holds"] * 3


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("linear_attention", marks=pytest.mark.slow),
        pytest.param("retention", marks=pytest.mark.slow),
        "mamba2",
    ],
)
def test_compiles_without_a_graph_break(kind):
    results = laws.check(small({"kind": kind, "chunk": 5}), ["compilable"])
    assert [str(result) for result in results] == ["compilable: holds"]


@pytest.mark.rows("S1", "S2")
@pytest.mark.parametrize("kind", ["linear_attention", "retention", "mamba2"])
def test_a_state_is_as_large_after_a_thousand_tokens_and_keeps_float32(kind):
    model = build(Decoder.Config.model_validate(small({"kind": kind}))).bfloat16()
    few, many = (model.new_state(2, n) for n in (8, 1024))
    assert few.payload_bytes == many.payload_bytes > 0
    assert model.state_specs()["0.mixer"]["h"].dtype == torch.float32
    with torch.no_grad():
        logits = model(Inputs(torch.zeros(2, 8, dtype=torch.long)), few).logits
    assert logits is not None and logits.dtype == torch.bfloat16
