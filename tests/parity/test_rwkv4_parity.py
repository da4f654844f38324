"""RWKV-4 as one decoder against transformers' RwkvForCausalLM: hidden states, gradients, decoding with its state."""

import pytest
import torch
from proof import agree
from transformers import RwkvConfig, RwkvForCausalLM
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from octavo.models.decoder import Decoder, build
from octavo.nn import rwkv4
from octavo.nn.contracts import Inputs

pytestmark = pytest.mark.rows("S3")
REFERENCE = "transformers RwkvForCausalLM"
V, D, W, FF, N = 61, 16, 24, 40, 3
NAMES = {"key": "k", "value": "v", "receptance": "gate", "output": "o"}
CHANNEL_NAMES = {"key": "up", "value": "down", "receptance": "gate"}


def ours_of(width, backend, chunk):
    block = {
        "mixer": {"kind": "rwkv4", "width": width, "backend": backend, "chunk": chunk},
        "channel": {"kind": "rwkv_channel", "d_ff": FF},
    }
    return Decoder.Config.model_validate({
        "d_model": D, "n_layers": N, "vocab_size": V, "max_seq_len": 64, "tie_embeddings": False, "embed_norm": True,
        "norm": {"kind": "layernorm", "eps": 1e-5}, "positions": "none", "blocks": {"rwkv": block},
    })  # fmt: skip


def names(theirs):
    """Their parameters by our names."""
    found = {"embed.weight": theirs.rwkv.embeddings.weight, "head.weight": theirs.head.weight}
    norms = {"embed_norm": theirs.rwkv.blocks[0].pre_ln, "norm": theirs.rwkv.ln_out}
    for i, block in enumerate(theirs.rwkv.blocks):
        at = f"blocks.{i}.layers"
        norms |= {f"{at}.mixer.norm_in": block.ln1, f"{at}.channel.norm_in": block.ln2}
        time, channel = block.attention, block.feed_forward
        found |= {f"{at}.mixer.mixer.decay": time.time_decay, f"{at}.mixer.mixer.bonus": time.time_first}
        mixes = {"k": time.time_mix_key, "v": time.time_mix_value, "r": time.time_mix_receptance}
        found |= {f"{at}.mixer.mixer.mix_{name}": x for name, x in mixes.items()}
        mixes = {"k": channel.time_mix_key, "r": channel.time_mix_receptance}
        found |= {f"{at}.channel.mixer.mix_{name}": x for name, x in mixes.items()}
        found |= {f"{at}.mixer.mixer.{own}.weight": getattr(time, name).weight for name, own in NAMES.items()}
        found |= {f"{at}.channel.mixer.{own}.weight": getattr(channel, n).weight for n, own in CHANNEL_NAMES.items()}
    return found | {f"{own}.{part}": getattr(n, part) for own, n in norms.items() for part in ("weight", "bias")}


def pair(width=W, backend="auto", chunk=None):
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=V, hidden_size=D, attention_hidden_size=width, intermediate_size=FF, num_hidden_layers=N,
        context_length=64, rescale_every=0, tie_word_embeddings=False,
    )  # fmt: skip
    theirs, ours = RwkvForCausalLM(config).eval(), build(ours_of(width, backend, chunk)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ours.load_state_dict({name: p.detach().flatten() if p.dim() == 3 else p for name, p in names(theirs).items()})
    return theirs, ours, torch.randint(V, (2, 29))


@pytest.mark.parametrize("backend, chunk", [("plain", None), ("chunked", None), ("chunked", 8)])
def test_logits_every_hidden_state_and_gradients(backend, chunk):
    theirs, ours, tokens = pair(backend=backend, chunk=chunk)
    case = f"{backend} {chunk or ''}".strip()
    wanted = theirs(tokens, use_cache=False, output_hidden_states=True)
    got = ours(Inputs(tokens), needs=("logits", "hidden_states"))
    agree("rwkv4", REFERENCE, got.logits, wanted.logits, case=f"{case}, logits")
    # theirs lists the outputs of the layers and the normed last; ours begins with the embedding
    layers = [*wanted.hidden_states[: N - 1], wanted.hidden_states[-1]]
    for layer, (h, w) in enumerate(zip(got.hidden_states[1:], layers, strict=True)):
        agree("rwkv_channel", REFERENCE, h, w, case=f"{case}, after layer {layer}")
    weights = torch.randn(wanted.logits.shape)
    (wanted.logits * weights).mean().backward()
    (got.logits * weights).mean().backward()
    own = dict(ours.named_parameters())
    for name, parameter in names(theirs).items():
        gradient = parameter.grad.flatten() if parameter.dim() == 3 else parameter.grad
        agree("rwkv4", REFERENCE, own[name].grad, gradient, case=f"{case}, gradient of {name}")


@torch.no_grad()
def test_decoding_with_the_state():
    """One row, and the average as wide as the model: with several rows or another width their decoding fails."""
    theirs, ours, tokens = pair(width=D)
    state, held = None, ours.new_state(1, 32)
    for part in tokens[:1].split([17, *[1] * 12], 1):
        out = theirs(part, state=state, use_cache=True)
        state = out.state
        agree("rwkv4", REFERENCE, ours(Inputs(part), held).logits, out.logits, case="decoding")
    for i in range(N):
        own = held.layer(f"{i}.mixer")
        for name, wanted in zip(("x", "num", "den", "top"), state[1:], strict=True):
            agree("rwkv4", REFERENCE, own.read(name), wanted[:, :, i], case=f"state {name}")
        agree("rwkv_channel", REFERENCE, held.layer(f"{i}.channel").read("x"), state[0][:, :, i], case="state x")


@torch.no_grad()
def test_in_bf16():
    theirs, ours, tokens = pair()
    wanted = theirs.bfloat16()(tokens, use_cache=False).logits
    agree("rwkv4", REFERENCE, ours.bfloat16()(Inputs(tokens)).logits, wanted, case="logits")


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 7, 64])
def test_exponents_far_beyond_what_a_float_can_raise(size):
    """Keys of hundreds: e^300 is no float32, the average is."""
    torch.manual_seed(1)
    k, v, decay, u = 300 * torch.randn(2, 50, 8), torch.randn(2, 50, 8), torch.linspace(-5, 3, 8), torch.randn(8)
    wanted, state = rwkv_linear_attention_cpu(decay, u, k, v, return_state=True)
    valid = torch.ones(2, 50, dtype=torch.bool)
    y, after = rwkv4.chunked(k, v, decay.exp(), u, None, valid, rwkv4.empty(k), size)
    agree("rwkv4", "transformers rwkv_linear_attention_cpu", y, wanted, case=f"keys of 300, chunks of {size}")
    for got, last in zip(after, state, strict=True):
        agree("rwkv4", "transformers rwkv_linear_attention_cpu", got, last, case=f"state, chunks of {size}")
