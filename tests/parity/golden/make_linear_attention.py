"""Linear attention by the naive functions of fla-core 0.6, written to linear_attention.safetensors.

Give the unpacked package: ``make_linear_attention.py FOLDER``, where FOLDER/fla/ops/linear_attn/naive.py is; that file
alone is loaded, because the package wants a GPU.
"""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

spec = importlib.util.spec_from_file_location("naive", Path(sys.argv[1]) / "fla/ops/linear_attn/naive.py")
assert spec is not None and spec.loader is not None
naive = importlib.util.module_from_spec(spec)
spec.loader.exec_module(naive)

B, T, H, K = 2, 128, 2, 4  # the chunks there are 64 tokens and must divide T
torch.manual_seed(0)
q, k, v = torch.randn(3, B, T, H, K)
found = {"q": q, "k": k, "v": v}
for name, f in {"elu": lambda x: F.elu(x) + 1, "identity": lambda x: x}.items():
    for divided in (True, False) if name == "elu" else (False,):
        kept = {"scale": 1.0, "normalize": divided}
        suffix = f"{name}{'.divided' if divided else ''}"
        found[f"recurrent.{suffix}"] = naive.naive_recurrent_linear_attn(f(q), f(k), v, **kept)[0]
        found[f"chunked.{suffix}"] = naive.naive_chunk_linear_attn(f(q), f(k), v, **kept)
save_file({k: v.contiguous() for k, v in found.items()}, Path(__file__).parent / "linear_attention.safetensors")
