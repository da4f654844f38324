"""The laws on models of the encoders' shape: types, a normed input, heads beside the language model, two rotations."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from octavo.laws.model import check
from octavo.laws.subject import Subject
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs

SMALL = {"d_model": 16, "n_layers": 3, "vocab_size": 19, "max_seq_len": 16}
ATTENTION = {"kind": "attention", "n_heads": 4, "qkv_bias": True, "o_bias": True}
BERT = {
    **SMALL, "causal": False, "norm": "layernorm", "positions": {"kind": "learned", "offset": 2}, "n_token_types": 2,
    "embed_norm": True, "final_norm": False, "head_bias": True, "head_transform": {"activation": "gelu"},
    "blocks": {"block": {"mixer": ATTENTION, "channel": {"kind": "mlp", "bias": True}, "norm_placement": "post"}},
    "classes": {"n_classes": 3, "transform": {"activation": "tanh", "norm": False}, "dropout": 0.1},
}  # fmt: skip
LOCAL = {"mixer": {**ATTENTION, "window": 5}, "positions": {"kind": "rope", "theta": 100.0}}
TWO = {
    **SMALL, "blocks": {"local": LOCAL, "global": {"mixer": ATTENTION},
                        "still": {"mixer": ATTENTION, "positions": "none"}},
    "pattern": ("local", "global", "still"), "multi_token": {"block": "local"},
    "classes": {"labels": ("a", "b"), "over": "token", "bias": False},
}  # fmt: skip
MODELS = {
    "bert": BERT,
    "mean": {**BERT, "classes": {"n_classes": 2, "pooling": "mean"}, "head_transform": None, "tie_embeddings": False},
    "two rotations": TWO,
    "beside learned positions": {**TWO, "positions": "learned"},
    "beside alibi": {**TWO, "positions": "alibi"},
    "last token": {**TWO, "classes": {"n_classes": 2, "pooling": "last"}},
}


@pytest.mark.rows("A1", "A2")
@pytest.mark.parametrize("name", MODELS)
def test_every_law_holds(name):
    results = check(MODELS[name])
    assert not [str(result) for result in results if not result.ok]
    assert sum(result.status == "holds" for result in results) >= 9


def classes(model: Decoder, tokens: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(Inputs(tokens, **named), needs=("classes",)).classes
    assert found is not None
    return found


@pytest.mark.rows("A2", "A5")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("over", ["sequence", "token"])
def test_padding_on_any_side_is_invisible_to_classes(name, over):
    own = {**MODELS[name]["classes"], "over": over}
    own |= {"pooling": "last"} if MODELS[name].get("causal", True) else {}
    subject = Subject(Decoder.Config.model_validate({**MODELS[name], "classes": own}), 3)
    tokens = subject.tokens(2)
    types = {"token_types": tokens % 2} if "n_token_types" in MODELS[name] else {}
    for valid in (torch.arange(12) < 8, torch.arange(12) >= 4, (torch.arange(12) < 2) | (torch.arange(12) >= 6)):
        alone = classes(subject.model, tokens[:, valid], **{k: v[:, valid] for k, v in types.items()})
        padded = classes(subject.model, tokens, valid=valid.expand(2, 12), **types)
        padded = padded[:, valid] if over == "token" else padded
        assert torch.allclose(padded, alone, atol=1e-10), name


@pytest.mark.rows("A1", "A5")
def test_an_encoder_reads_both_ways_within_its_document_alone():
    """The gradient of an output with respect to a token's embedding is zero exactly where the mask forbids reading."""
    model = Subject(Decoder.Config.model_validate(BERT), 1).model
    tokens, docs = torch.arange(12)[None] % 19, torch.tensor([[0] * 5 + [1] * 7])
    valid = torch.arange(12)[None] < 11
    leaves = []
    hook = model.embed.register_forward_hook(lambda *a: leaves.append(a[2].detach().requires_grad_()) or leaves[-1])
    out = model(Inputs(tokens, doc_ids=docs, valid=valid)).logits
    hook.remove()
    for t in range(11):
        (gradient,) = torch.autograd.grad(out[0, t].square().sum(), leaves[0], retain_graph=True)
        felt = (gradient[0] != 0).any(-1)
        assert torch.equal(felt, (docs[0] == docs[0, t]) & valid[0]), t


@torch.no_grad()
def test_each_block_turns_by_its_own_scheme():
    """Against models in which every block has the scheme of one."""
    subject = Subject(Decoder.Config.model_validate({**TWO, "multi_token": None}), 2)
    tokens = subject.tokens(2)
    states = subject.model(Inputs(tokens), needs=("hidden_states",)).hidden_states
    for depth, scheme in enumerate(({"kind": "rope", "theta": 100.0}, {"kind": "rope"}, {"kind": "none"})):
        blocks = {n: {**b, "positions": None} for n, b in TWO["blocks"].items()}
        one = subject.fresh(Decoder.Config.model_validate(
            {**TWO, "multi_token": None, "blocks": blocks, "positions": scheme}))  # fmt: skip
        name = ("local", "global", "still")[depth]
        ctx = one.new_state(2).begin(Inputs(tokens))
        x = states[depth]
        here = one._contexts(ctx)[name]
        y, _ = one.stack()[depth](x, dataclasses.replace(here), None, depth)
        wanted = states[depth + 1]
        y = one.norm(y) if depth == 2 else y
        assert torch.allclose(y, wanted, atol=1e-10), name
    plain = {n: {**b, "positions": None} for n, b in TWO["blocks"].items()}
    other = subject.fresh(Decoder.Config.model_validate({**TWO, "multi_token": None, "blocks": plain}))
    assert float((other(Inputs(tokens)).logits - subject.logits(tokens)).abs().max()) > 1e-3


@torch.no_grad()
def test_the_embedding_is_normed_after_positions_and_types():
    model = Subject(Decoder.Config.model_validate(BERT), 1).model
    tokens, types = torch.tensor([[3, 5, 7]]), torch.tensor([[0, 0, 1]])
    got = model(Inputs(tokens, token_types=types), needs=("hidden_states",)).hidden_states[0]
    by_hand = model.embed.weight[tokens] + model.positions.table.weight[2:5] + model.token_types.weight[types]
    assert torch.allclose(got, model.embed_norm(by_hand), atol=1e-12)
    assert torch.equal(model(Inputs(tokens)).logits, model(Inputs(tokens, token_types=torch.zeros_like(tokens))).logits)


REFUSED = [
    ({"blocks": {"b": {"positions": "learned"}}}, "a block's own are rope or none"),
    ({"blocks": {"b": {"positions": "alibi"}}}, "a block's own are rope or none"),
    ({"classes": {}}, "labels or n_classes"),
    ({"classes": {"labels": ["a", "a"]}}, "twice"),
    ({"classes": {"labels": ["a", "b"], "n_classes": 3}}, "there are 2 labels"),
    ({"classes": {"n_classes": 2}}, "use last or mean"),
    ({"blocks": {"b": {"mixer": {"head_dim": 3}, "positions": "rope"}}, "positions": "none"}, "head_dim = 3 is odd"),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED, ids=str)
def test_what_makes_no_sense_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Decoder.Config.model_validate({**SMALL, **settings})


def test_outputs_a_model_has_not_are_refused_by_name():
    from octavo.errors import UnsupportedError

    model = build(Decoder.Config.model_validate({**SMALL, "blocks": {"b": {"mixer": ATTENTION}}}))
    tokens = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(UnsupportedError, match="no classes"):
        model(Inputs(tokens), needs=("classes",))
    with pytest.raises(UnsupportedError, match="no token types"):
        model(Inputs(tokens, token_types=tokens))
    with pytest.raises(UnsupportedError, match="without a state"):
        both = build(Decoder.Config.model_validate(
            {**SMALL, "blocks": {"b": {"mixer": ATTENTION}}, "classes": {"n_classes": 2, "pooling": "last"}}
        ))  # fmt: skip
        both(Inputs(tokens), both.new_state(1), needs=("classes",))
    with pytest.raises(UnsupportedError, match="reads both ways"):
        encoder = build(Decoder.Config.model_validate(BERT))
        encoder(Inputs(tokens), encoder.new_state(1))
