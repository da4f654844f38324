"""The native step against the model's own forward pass: rows of different lengths, shapes, both number formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.errors import ResourceError
from octavo.infer.native import NativeStep, library, unsuitable
from octavo.infer.window import Window
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs

ATTENTION = {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}
NORMED = {"qk_norm": {"kind": "rmsnorm", "offset": True}}
GEMMA = {"norm": {"kind": "rmsnorm", "offset": True}, "embed_scale": 8.0}


def around(mixer: dict[str, Any]) -> dict[str, Any]:
    """A block with norms around each branch."""
    glu = {"kind": "glu", "activation": "gelu_tanh"}
    return {"mixer": ATTENTION | {"scale": 0.2} | mixer, "channel": glu, "norm_placement": "sandwich"}


SHAPES = {
    "llama": {},
    "odd widths": {
        "d_model": 52,
        "blocks": {"block": {"mixer": ATTENTION | {"head_dim": 14}, "channel": {"kind": "glu", "d_ff": 37}}},
    },
    "qwen2": {"blocks": {"block": {"mixer": ATTENTION | {"qkv_bias": True, "o_bias": True}}}},
    "qwen3": {"blocks": {"block": {"mixer": ATTENTION | {"qk_norm": {"kind": "rmsnorm", "eps": 1e-5}}}}},
    "untied": {"tie_embeddings": False, "head_bias": True},
    "tied with bias": {"head_bias": True},
    "mlp": {"blocks": {"block": {"mixer": ATTENTION, "channel": {"kind": "mlp", "activation": "gelu", "bias": True}}}},
    "interleaved": {"positions": {"kind": "rope", "layout": "interleaved", "fraction": 0.5, "reverse": True}},
    "no positions": {"positions": "none"},
    "three heads of 64 to a key": {
        "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 6, "n_kv_heads": 2, "head_dim": 64}}}
    },
    "seven heads of 96 to a key": {
        "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 7, "n_kv_heads": 1, "head_dim": 96}}}
    },
    "a window": {"blocks": {"block": {"mixer": ATTENTION | {"window": 7}}}},
    "gemma2": GEMMA
    | {
        "logit_softcap": 3.0,
        "pattern": ["local", "full"],
        "blocks": {name: around({"window": w, "softcap": 2.0}) for name, w in (("local", 5), ("full", None))},
    },
    "gemma3": GEMMA
    | {
        "n_layers": 4,
        "pattern": ["local", "local", "full"],
        "blocks": {
            "local": around({"window": 9, **NORMED}) | {"positions": {"kind": "rope", "theta": 100.0}},
            "full": around(NORMED),
        },
    },
    "windows alone, turned another way than the model": {
        "blocks": {
            "local": {"mixer": {"kind": "attention", "n_heads": 4, "head_dim": 8, "window": 6}, "positions": "rope"}
        },
        "positions": {"kind": "rope", "theta": 50.0},
    },
    "norms behind": {"blocks": {"block": {"mixer": ATTENTION, "norm_placement": "branch"}}},
    "turned in every other layer": {
        "pattern": ["turned", "not"],
        "blocks": {name: {"mixer": ATTENTION | {"rotate": name == "turned"}} for name in ("turned", "not")},
    },
    "positions of one kind of block": {
        "positions": "none",
        "pattern": ["turned", "not"],
        "blocks": {"turned": {"mixer": ATTENTION, "positions": "rope"}, "not": {"mixer": ATTENTION}},
    },
    "many heads": {"blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 8, "scale": 0.3}}}},
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    assert library()[0] is not None or "compiler" in library()[1], library()[1]
    if library()[0] is None:
        pytest.skip(library()[1])


def model(**changes) -> Decoder:
    base = {
        "d_model": 64,
        "n_layers": 3,
        "vocab_size": 53,
        "max_seq_len": 64,
        "blocks": {"block": {"mixer": ATTENTION}},
    }
    made = build(Decoder.Config.model_validate(base | changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases and norms that matter
    return made


@torch.inference_mode()
def read(one: Decoder, prompts: list[list[int]]):
    state = one.new_state(len(prompts), 40)
    longest = max(map(len, prompts))
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts])
    valid = torch.tensor([[i < len(p) for i in range(longest)] for p in prompts])
    one(Inputs(tokens, valid=valid), state=state)
    return state


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_is_the_models_own(shape, dtype, threads):
    one = model(**SHAPES[shape]).to(dtype)
    prompts = [[1, 2, 3, 4, 5], [7], [9, 8], [3] * 30, [11, 12]]
    plain, native = read(one, prompts), read(one, prompts)
    assert unsuitable(one) == ""
    step = NativeStep(one, native)
    # In bf16 the model rounds every activation, the native step none: the model in fp32 is the judge of both.
    exact = model(**SHAPES[shape])
    exact.load_state_dict({k: v.float() for k, v in one.state_dict().items()})
    judge = read(exact, prompts)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in range(6):
            rows = torch.arange(5) if n != 3 else torch.tensor([3, 1])
            tokens = torch.randint(53, (len(rows),))
            found = step(tokens, rows)
            padded, valid = torch.zeros(5, 1, dtype=torch.long), torch.zeros(5, 1, dtype=torch.bool)
            padded[rows, 0], valid[rows, 0] = tokens, True
            with torch.inference_mode():
                own = one(Inputs(padded, valid=valid), state=plain).logits[rows, -1]
                true = exact(Inputs(padded, valid=valid), state=judge).logits[rows, -1]
            scale = float(true.abs().max())
            if dtype == torch.float32:
                assert float((found - own).abs().max()) < 2e-6 * max(scale, 1) * 3
            else:
                # The cache is rounded in both: the native step must not be further off than the model itself.
                assert float((found - true).norm()) <= 1.2 * float((own - true).norm()) + 1e-3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(native.lengths, plain.lengths) and torch.equal(native.doc_ids[:, :40], plain.doc_ids[:, :40])
    for name, layer in native.layers.items():  # what rings say of themselves; the last entry is a spare one
        for marks in {"_slots", "_docs"} & layer.buffers.keys():
            assert torch.equal(layer.buffers[marks][:, :-1], plain.layers[name].buffers[marks][:, :-1])


@torch.inference_mode()
def test_the_state_can_go_on_without_it():
    one = model()
    plain, native = read(one, [[1, 2, 3], [4, 5]]), read(one, [[1, 2, 3], [4, 5]])
    NativeStep(one, native)(torch.tensor([6, 7]), torch.tensor([0, 1]))
    one(Inputs(torch.tensor([[6], [7]])), state=plain)
    more = Inputs(torch.tensor([[8, 9], [10, 11]]))
    torch.testing.assert_close(one(more, state=native).logits, one(more, state=plain).logits)


@torch.inference_mode()
def test_greedy_text_is_the_plain_loops_through_chosen_and_copied_rows():
    one = model()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    texts = []
    for served in (True, False):
        window = Window(one, prompts, 20)
        assert window.native
        window.native = served
        logits, text = window.read(prompts), []
        for n in range(20):
            text.append(logits.argmax(-1).tolist())
            if n == 5:
                window.select([1, 0, 1])
                text[-1] = [text[-1][i] for i in (1, 0, 1)]
            logits = window.read([[token] for token in text[-1]])
        texts.append(text)
        assert (window.step is not None) == served
    assert texts[0] == texts[1]


@torch.inference_mode()
def test_only_the_last_document_is_read():
    one = model()
    states = []
    for _ in range(2):
        state = one.new_state(1, 40)
        one(Inputs(torch.tensor([[1, 2, 3, 4, 5]]), doc_ids=torch.tensor([[0, 0, 0, 1, 1]])), state=state)
        states.append(state)
    found = NativeStep(one, states[0])(torch.tensor([6]), torch.tensor([0]))
    own = one(Inputs(torch.tensor([[6]]), doc_ids=torch.tensor([[1]])), state=states[1]).logits[:, -1]
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_full_state_is_refused():
    one = model()
    state = read(one, [[1, 2, 3]])
    step = NativeStep(one, state)
    for _ in range(37):
        step(torch.tensor([1]), torch.tensor([0]))
    with pytest.raises(ResourceError, match="40 tokens a row, 41 are needed"):
        step(torch.tensor([1]), torch.tensor([0]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"positions": "learned"}, "positions learned"),
        ({"norm": "layernorm"}, "not RMSNorm"),
        ({"embed_norm": True}, "a normed embedding"),
        ({"blocks": {"block": {"mixer": ATTENTION, "norm_placement": "post"}}}, "norms after the sum"),
        ({"blocks": {"block": {"mixer": ATTENTION, "topology": "parallel"}}}, "parallel mixers"),
        (
            {
                "pattern": ["a", "b"],
                "blocks": {
                    "a": {"mixer": ATTENTION, "positions": {"kind": "rope", "fraction": 0.5}},
                    "b": {"mixer": ATTENTION},
                },
            },
            "rotations of several widths",
        ),
        ({"blocks": {"block": {"mixer": ATTENTION, "channel": {"kind": "glu", "activation": "sigmoid"}}}}, "usual"),
        ({"blocks": {"block": {"mixer": {"kind": "mla", "n_heads": 4}}}}, "not attention to all tokens"),
        ({"blocks": {"block": {"mixer": ATTENTION | {"reader": {"kind": "strided", "stride": 4}}}}}, "or a window"),
        ({"blocks": {"block": {"mixer": ATTENTION | {"sinks": True}}}}, "attention with sinks = True"),
        ({"blocks": {"block": {"mixer": ATTENTION | {"gate": "head"}}}}, "attention with gate = head"),
        ({"blocks": {"block": {"mixer": ATTENTION | {"keys": "value"}}}}, "attention with keys = value"),
        ({"blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 4, "values": "input"}}}}, "values = input"),
        ({"blocks": {"block": {"mixer": ATTENTION | {"v_rank": 8}}}}, "attention with v_rank = 8"),
        ({"causal": False}, "the model with causal = False"),
    ],
)
def test_what_it_does_not_serve_is_named(changes, why):
    one = model(**changes)
    state = one.new_state(1, 8)
    assert why in unsuitable(one)
    with pytest.raises(ValueError, match=why):
        NativeStep(one, state)
