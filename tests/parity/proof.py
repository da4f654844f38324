"""Agreement with an independent implementation, asserted and, if asked for, recorded.

``agree("mamba2", "transformers Mamba2ForCausalLM", ours, theirs)`` is the one assertion of a component's parity
test. With OCTAVO_PARITY naming a file, each call that holds adds a line there: component, reference, case, dtype,
largest error, test. ``python scripts/parity.py`` makes the record of the package out of these lines.
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
    dtypes = {got.dtype, wanted.dtype}
    dtype = "bf16" if torch.bfloat16 in dtypes else "fp64" if dtypes == {torch.float64} else "fp32"
    got, wanted = got.detach().double(), wanted.detach().double()
    size = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    error = float((got - wanted).abs().max()) / size if wanted.numel() else 0.0
    bound = 0.02 if dtype == "bf16" else tolerance
    assert error <= bound, f"{kind} against {reference} {case}: {error:.3g} of the largest value is above {bound:.3g}"
    if path := os.environ.get("OCTAVO_PARITY"):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
        line = {"kind": kind, "reference": reference, "case": case, "dtype": dtype, "error": error, "test": test}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
