"""Agreement with an independent implementation, asserted and, if asked for, recorded.

``agree("mamba2", "transformers Mamba2ForCausalLM", ours, theirs)`` is the one assertion of a component's parity
test. With OCTAVO_PARITY naming a file, each call adds a line there: component, reference, case, dtype, largest error.
"""

from __future__ import annotations

import json
import os

import torch
from torch import Tensor


def agree(
    kind: str, reference: str, got: Tensor, wanted: Tensor, *, case: str = "", tolerance: float = 1e-5, why: str = ""
) -> None:
    """Assert |got - wanted| <= tolerance x max(1, largest |wanted|) everywhere.

    Args:
        kind: the component's ``kind`` in its table.
        reference: the implementation, with its package.
        tolerance: a larger one than 1e-5 needs a reason, ``why``; ignored in bfloat16, where 2 % is the bound.
    """
    assert got.shape == wanted.shape, f"{tuple(got.shape)} is not {tuple(wanted.shape)}"
    assert tolerance <= 1e-5 or why, "a tolerance above 1e-5 needs a reason"
    low = torch.bfloat16 in (got.dtype, wanted.dtype)
    got, wanted = got.detach().double(), wanted.detach().double()
    error, size = float((got - wanted).abs().max()), max(1.0, float(wanted.abs().max()))
    if path := os.environ.get("OCTAVO_PARITY"):
        line = {"kind": kind, "reference": reference, "case": case, "dtype": "bf16" if low else "fp32", "error": error}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    bound = (0.02 if low else tolerance) * size
    assert error <= bound, f"{kind} against {reference} {case}: {error:.3g} is above {bound:.3g}"
