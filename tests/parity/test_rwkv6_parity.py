"""RWKV-6 against fla-core's naive recurrence and the rwkv package's layers (golden/make_*.py)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from proof import agree
from safetensors.torch import load_file

from octavo.nn import vector_decay
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.rwkv6 import Rwkv6
from octavo.nn.rwkv_channel import RwkvChannel
from octavo.nn.state import ContiguousState, place

pytestmark = pytest.mark.rows("S3")
GOLDEN = Path(__file__).parent / "golden"
NAIVE, PACKAGE = "fla-core naive_recurrent_rwkv6", "rwkv 0.8 att_seq_v6_0"
CHUNKED = {size: lambda *a, size=size: vector_decay.chunked(*a, chunk=size) for size in (1, 8, 64)}
FORMS = {"recurrent": vector_decay.recurrent} | {f"chunks of {size}": form for size, form in CHUNKED.items()}


@pytest.mark.parametrize("form", FORMS)
def test_the_recurrence_and_its_gradients_with_decays_from_none_to_e_40(form):
    given = {name.removeprefix("fp32."): x for name, x in load_file(GOLDEN / "rwkv6.safetensors").items()}
    leaves = {name: given[name].requires_grad_() for name in ("q", "k", "v", "w", "u", "initial_state")}
    q, k, v, w = (leaves[name].transpose(1, 2) for name in "qkvw")
    o, h = FORMS[form](q * q.shape[-1] ** -0.5, k, v, w, None, leaves["initial_state"], leaves["u"])
    agree("rwkv6", NAIVE, o.transpose(1, 2), given["o"], case=form)
    agree("rwkv6", NAIVE, h, given["h"], case=f"{form}, last state")
    loss = (o.transpose(1, 2) * given["o_weight"]).sum() + (h * given["h_weight"]).sum()
    for (name, _), gradient in zip(leaves.items(), torch.autograd.grad(loss, leaves.values()), strict=True):
        agree("rwkv6", NAIVE, gradient, given[f"grad.{name}"], case=f"{form}, gradient of {name}")


@pytest.fixture(scope="module")
def block():
    return load_file(GOLDEN / "rwkv6_block.safetensors")


def time_mixing(block, **settings):
    D, H = 16, 4
    layer = Rwkv6(Rwkv6.Config(n_heads=H, mix_rank=3, decay_rank=5, **settings), Dims(D, 2, 64))
    t = {name.removeprefix("time."): x for name, x in block.items() if name.startswith("time.")}
    found = {
        "mix_first": t["x_maa"], "mix": torch.stack([t[f"{name}_maa"] for name in "wkvrg"]),
        "mix_in.weight": t["tm_w1"].T, **{f"mix_out.{i}.weight": t["tm_w2"][i].T for i in range(5)},
        "decay": t["t_decay"].flatten(), "bonus": t["t_first"][..., 0],
        "decay_in.weight": t["td_w1"].T, "decay_out.weight": t["td_w2"].T, "norm_weight": t["lx_w"],
        "norm_bias": t["lx_b"], **{f"{ours}.weight": t[f"{theirs}w"].T for ours, theirs in zip(
            ("q", "k", "v", "gate", "o"), "rkvgo", strict=True)},
    }  # fmt: skip
    layer.load_state_dict(found)
    return layer.eval(), F.layer_norm(block["x"], (D,), t["ln_w"], t["ln_b"])[None]


@pytest.mark.parametrize("settings", [{"backend": "plain"}, {"backend": "chunked", "chunk": 8}, {}], ids=str)
@torch.no_grad()
def test_time_mixing_whole_and_in_pieces_with_its_state(block, settings):
    layer, x = time_mixing(block, **settings)
    T, wanted = x.shape[1], (block["time.y"] - block["x"])[None]
    tokens = torch.zeros(1, T, dtype=torch.long)
    agree("rwkv6", PACKAGE, layer(x, place(Inputs(tokens))[0])[0], wanted, case=f"whole {settings}")
    state = ContiguousState({"own": layer.state_spec()}, 1, T, torch.float32)
    parts = [
        layer(part, state.begin(Inputs(ids)), state.layer("own"))[0]
        for part, ids in zip(x.split([13, 1, 1, 14], 1), tokens.split([13, 1, 1, 14], 1), strict=True)
    ]
    agree("rwkv6", PACKAGE, torch.cat(parts, 1), wanted, case=f"in pieces {settings}")
    agree("rwkv6", PACKAGE, state.layer("own").read("h")[0], block["time.state"], case=f"last state {settings}")


@torch.no_grad()
def test_channel_mixing(block):
    c = {name.removeprefix("channel."): x for name, x in block.items() if name.startswith("channel.")}
    layer = RwkvChannel(RwkvChannel.Config(d_ff=24), Dims(16, 2, 64))
    layer.load_state_dict({
        "mix_k": 1 - c["k_maa"], "mix_r": 1 - c["r_maa"],
        "gate.weight": c["rw"].T, "up.weight": c["kw"].T, "down.weight": c["vw"].T,
    })  # fmt: skip
    x = F.layer_norm(block["x"], (16,), c["ln_w"], c["ln_b"])[None]
    y, _ = layer(x, place(Inputs(torch.zeros(1, x.shape[1], dtype=torch.long)))[0])
    agree("rwkv_channel", "rwkv 0.8 ffn_seq_v6", y, (block["channel.y"] - block["x"])[None])
