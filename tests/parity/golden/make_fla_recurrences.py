"""What fla-core's naive functions give on random tensors: gla, rwkv6, deltanet and gated_deltanet .safetensors here.

    pip download --no-deps fla-core==0.6.0 einops && unzip the wheels into FOLDER
    PYTHONPATH=FOLDER python make_fla_recurrences.py FOLDER

Importing the package needs triton and with it a GPU; each function is loaded from its own file instead.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER, HERE = Path(sys.argv[1]), Path(__file__).parent
Naive = Callable[..., tuple[Tensor, Tensor]]
B, T, H, K, V = 2, 37, 3, 6, 5


def load(path: str, name: str) -> Naive:
    spec = importlib.util.spec_from_file_location(Path(path).stem, FOLDER / "fla" / "ops" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def run(kind: str, function: Naive, inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """One case: the inputs, the weights of the outputs in a sum, the outputs, and that sum's gradients."""
    case = "bf16." if dtype == torch.bfloat16 else "fp32."
    given = {name: x.to(dtype) if name != "initial_state" else x for name, x in inputs.items()}
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    o, h = function(**leaves, output_final_state=True)
    weights = torch.randn(o.shape, generator=GENERATOR), torch.randn(h.shape, generator=GENERATOR)
    ((o * weights[0]).sum() + (h * weights[1]).sum()).backward()
    stored = FILES.setdefault(kind, {})
    stored |= {case + name: x for name, x in given.items()}
    stored |= {
        case + "o": o.detach(),
        case + "h": h.detach(),
        case + "o_weight": weights[0],
        case + "h_weight": weights[1],
    }
    if dtype == torch.float32:
        stored |= {case + "grad." + name: x.grad for name, x in leaves.items()}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)
FILES: dict[str, dict[str, Tensor]] = {}
# Decays from none to e^-40 a token: where a factored form without care overflows.
strong = -40 * torch.rand(B, T, H, K, generator=GENERATOR) * (torch.rand(B, T, H, K, generator=GENERATOR) > 0.5)
h0 = 0.5 * normal(B, H, K, V)
q, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V)
unit = torch.nn.functional.normalize(k, dim=-1)
beta, slow = torch.rand(B, T, H, generator=GENERATOR), -5 * torch.rand(B, T, H, generator=GENERATOR)
heads_first = {"q": q, "k": k, "v": v, "w": strong}
heads_first = {name: x.transpose(1, 2).contiguous() for name, x in heads_first.items()}
delta = {"q": q, "k": unit, "v": v, "beta": beta}
gla = load("gla/naive.py", "naive_recurrent_gla")
for dtype in (torch.float32, torch.bfloat16):
    run("gla", gla, {"q": q, "k": k, "v": v, "gk": strong, "initial_state": h0}, dtype)
rwkv6 = load("rwkv6/recurrent_naive.py", "naive_recurrent_rwkv6")
run("rwkv6", rwkv6, heads_first | {"u": normal(H, K), "initial_state": h0}, torch.float32)
recurrence = load("delta_rule/naive.py", "delta_rule_recurrence")
transposed = {name: x.transpose(1, 2).contiguous() for name, x in delta.items()}
run("deltanet", recurrence, transposed | {"initial_state": h0}, torch.float32)
gated = load("gated_delta_rule/naive.py", "naive_recurrent_gated_delta_rule")
run("gated_deltanet", gated, delta | {"g": slow, "initial_state": h0}, torch.float32)
for kind, tensors in FILES.items():
    save_file({name: x.clone().contiguous() for name, x in tensors.items()}, HERE / f"{kind}.safetensors")
