"""BERT, RoBERTa, ModernBERT and Gemma 3 against transformers: folders both ways, hidden states, heads of classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from proof import agree
from safetensors.torch import load_file, save_file

from octavo.errors import CheckpointError
from octavo.hub.folder import load_model, model_config, read_config, save_model
from octavo.models.cost import predicted_parameters
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.nn.state import place

V, PAD = 61, 1
SHAPE: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
                         "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
CONFIGS = {
    "bert": transformers.BertConfig(**SHAPE, pad_token_id=PAD),
    "roberta": transformers.RobertaConfig(**SHAPE, pad_token_id=PAD, type_vocab_size=1, layer_norm_eps=1e-5),
    "modernbert": transformers.ModernBertConfig(
        **SHAPE, **IDS, pad_token_id=PAD, local_attention=4, rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}),
    "modernbert biased": transformers.ModernBertConfig(
        **SHAPE, **IDS, pad_token_id=PAD, local_attention=6, global_attn_every_n_layers=2, norm_bias=True,
        attention_bias=True, mlp_bias=True, classifier_bias=True, classifier_pooling="mean", decoder_bias=False),
}  # fmt: skip
PURPOSES = {
    "masked": transformers.AutoModelForMaskedLM,
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "base": transformers.AutoModel,
}


def randomised(model: Any, offset: bool = False) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            start = float("norm" in key.lower() and key.endswith("weight") and not offset)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + start)
    return model.float().eval()


def reference(name: str, purpose: str, **settings: Any) -> Any:
    config = CONFIGS[name].__class__.from_dict(CONFIGS[name].to_dict() | settings)
    if purpose in ("sequence", "token"):
        config.num_labels = 3
    return randomised(PURPOSES[purpose].from_config(config, attn_implementation="eager"))


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, the second padded at its end with the id that is padding."""
    tokens = torch.randint(2, V, (2, 14), generator=torch.Generator().manual_seed(3))
    valid = torch.arange(14) < torch.tensor([[14], [9]])
    return torch.where(valid, tokens, PAD), valid


def typed(name: str, tokens: torch.Tensor) -> torch.Tensor | None:
    return (torch.arange(14) > 5).long().expand_as(tokens) if name == "bert" else None


def ours_of(model: Decoder, purpose: str, **named: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    asked = "classes" if purpose in ("sequence", "token") else "logits"
    out = model(Inputs(**named), needs=(asked, "hidden_states"))
    return getattr(out, asked), out.hidden_states


@pytest.mark.rows("A1", "A2")
@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_folder_says_the_same_here_and_there(name, purpose, tmp_path):
    theirs = reference(name, purpose)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert sum(p.numel() for p in model.parameters()) == predicted_parameters(model)
    (tokens, valid), types = texts(), typed(name, texts()[0])
    extra = {} if types is None else {"token_type_ids": types}

    def compare(there: Any, case: str) -> None:
        wanted = there(tokens, attention_mask=valid.long(), output_hidden_states=True, **extra)
        got, states = ours_of(model, purpose, tokens=tokens, valid=valid, token_types=types)
        for i, (a, b) in enumerate(zip(states, wanted.hidden_states, strict=True)):
            agree("attention", f"transformers {type(there).__name__}", a[valid], b[valid], case=f"{case}, layer {i}")
        if purpose != "base":
            reach = (slice(None),) if purpose == "sequence" else valid
            agree("attention", f"transformers {type(there).__name__}", got[reach], wanted.logits[reach], case=case)

    compare(theirs, name)
    assert save_model(model, tmp_path / "ours") == name.split()[0]
    back = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    compare(back.eval(), f"{name}, written here")
    if purpose != "base":
        names = {key: value.shape for key, value in theirs.state_dict().items()}
        assert {key: value.shape for key, value in back.state_dict().items()} == names
    again = load_model(tmp_path / "ours")
    assert torch.equal(ours_of(again, purpose, tokens=tokens)[0], ours_of(model, purpose, tokens=tokens)[0])


@pytest.mark.rows("A2")
@torch.no_grad()
def test_what_the_classes_are_read_of_is_berts_pooled_output(tmp_path):
    theirs = reference("bert", "sequence")
    theirs.save_pretrained(tmp_path)
    model, (tokens, valid) = load_model(tmp_path), texts()
    hidden = model(Inputs(tokens, valid=valid), needs=("hidden",)).hidden
    got = model.classes.read(hidden, place(Inputs(tokens, valid=valid))[0])
    agree("attention", "transformers BertPooler", got, theirs.bert(tokens, attention_mask=valid.long()).pooler_output)


@pytest.mark.rows("A1")
def test_gradients_are_theirs(tmp_path):
    theirs = reference("modernbert", "masked")
    theirs.save_pretrained(tmp_path)
    model, (tokens, _) = load_model(tmp_path), texts()
    theirs(tokens).logits.square().mean().backward()
    model(Inputs(tokens)).logits.square().mean().backward()
    layer = theirs.model.layers[1]
    local = model.stack()[1].layers["mixer"].mixer
    want = layer.attn.Wqkv.weight.grad.split(32)
    for ours, gradient in zip((local.q, local.k, local.v), want, strict=True):
        agree("attention", "transformers ModernBertForMaskedLM", ours.weight.grad, gradient, case="gradients")


@pytest.mark.rows("A2")
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_a_decoder_reads_its_classes_from_the_last_token(side):
    config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, pad_token_id=PAD, num_labels=3,
                                      bos_token_id=None, eos_token_id=None)  # fmt: skip
    theirs = randomised(transformers.LlamaForSequenceClassification(config))
    base = model_config({**config.to_dict(), "architectures": None})
    own = base.model_copy(update={"tie_embeddings": True}).model_dump()
    own["classes"] = {"n_classes": 3, "pooling": "last", "bias": False}
    model = build(Decoder.Config.model_validate(own)).eval()
    from octavo.hub.folder import FAMILIES

    state = theirs.state_dict()
    for entry in FAMILIES["llama"].entries(model.config):
        model.get_parameter(entry.ours[0]).copy_(state[entry.theirs])
    model.classes.out.weight.copy_(state["score.weight"])
    tokens, valid = texts()
    tokens, valid = (tokens, valid) if side == "right" else (tokens.flip(1), valid.flip(1))
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    wanted = theirs(tokens, attention_mask=valid.long(), position_ids=positions).logits
    got = model(Inputs(tokens, valid=valid), needs=("classes",)).classes
    agree("attention", "transformers LlamaForSequenceClassification", got, wanted, case=f"padded {side}")


SIBLINGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
}  # fmt: skip


@pytest.mark.rows("A2")
@pytest.mark.parametrize("purpose", ["sequence", "token"])
@pytest.mark.parametrize("name", SIBLINGS)
@torch.no_grad()
def test_folders_of_decoders_with_classes_both_ways(name, purpose, tmp_path):
    own = {"sliding_window": 4} if name == "mistral" else {"head_dim": 8} if name == "qwen3" else {}
    named = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    config = SIBLINGS[name](**SHAPE, **own, **named, num_key_value_heads=2, pad_token_id=PAD, bos_token_id=None,
                            eos_token_id=None)  # fmt: skip
    theirs = randomised(PURPOSES[purpose].from_config(config, attn_implementation="eager"))
    theirs.save_pretrained(tmp_path / "theirs")
    model, (tokens, valid) = load_model(tmp_path / "theirs"), texts()
    assert model.config.classes.labels == ("a", "b", "c") and model.config.tie_embeddings
    reach = (slice(None),) if purpose == "sequence" else valid

    def compare(there: Any, case: str) -> None:
        wanted = there(tokens, attention_mask=valid.long()).logits
        got = model(Inputs(tokens, valid=valid), needs=("classes",)).classes
        agree("attention", f"transformers {type(there).__name__}", got[reach], wanted[reach], case=case)

    compare(theirs, name)
    assert save_model(model, tmp_path / "ours", extra={"pad_token_id": PAD}) == name
    back = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager", trust_remote_code=False).eval()
    assert back.config.id2label == {0: "a", 1: "b", 2: "c"}
    compare(back, f"{name}, written here")
    path = tmp_path / "ours" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "score.weight"} | {"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"missing: score\.weight.*not used: x"):
        load_model(tmp_path / "ours")


# ------------------------------------------------------------------------------------------- Gemma 3

GEMMA = {
    "plain": {"sliding_window": 4},
    "scaled": {"sliding_window": 3, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    "capped": {"sliding_window": 4, "final_logit_softcapping": 2.0},
}  # fmt: skip


def gemma(case: str) -> Any:
    config = transformers.Gemma3TextConfig(
        **SHAPE, num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=5, sliding_window_pattern=3,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, **GEMMA[case],
    )  # fmt: skip
    return randomised(transformers.Gemma3ForCausalLM._from_config(config, attn_implementation="eager"), offset=True)


@pytest.mark.parametrize("case", GEMMA)
@torch.no_grad()
def test_gemma_3_both_ways_and_cached_as_theirs(case, tmp_path):
    theirs = gemma(case)
    theirs.save_pretrained(tmp_path / "theirs")
    model, tokens = load_model(tmp_path / "theirs"), texts()[0]
    assert [b.config.positions is None for b in model.stack()] == [False, False, True, False]
    agree("attention", "transformers Gemma3ForCausalLM", model(Inputs(tokens)).logits, theirs(tokens).logits, case=case)
    assert save_model(model, tmp_path / "ours") == "gemma3_text"
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    agree("attention", "transformers Gemma3ForCausalLM", model(Inputs(tokens)).logits, back(tokens).logits, case="back")
    state, parts = model.new_state(2, 14), tokens.split([5, 1, 1, 4, 3], 1)
    cached = torch.cat([model(Inputs(part), state).logits for part in parts], 1)
    agree("attention", "transformers Gemma3ForCausalLM", cached, theirs(tokens).logits, case=f"{case}, cached")


@torch.no_grad()
def test_gemma_3_continues_with_the_same_text(tmp_path):
    theirs = gemma("scaled")
    theirs.save_pretrained(tmp_path)
    model, prompt = load_model(tmp_path), texts()[0][:1, :5]
    wanted = theirs.generate(prompt, max_new_tokens=20, do_sample=False)[0, 5:].tolist()
    state, got, new = model.new_state(1, 30), [], prompt
    for _ in range(20):
        new = model(Inputs(new), state).logits[:, -1:].argmax(-1)
        got.append(int(new))
    assert got == wanted


def test_gemma_3_in_the_older_spelling(tmp_path):
    theirs = gemma("scaled")
    theirs.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    new = model_config(config)
    for key in ("rope_parameters", "layer_types"):
        config.pop(key)
    config |= {"rope_theta": 5000.0, "rope_local_base_freq": 50.0, "sliding_window_pattern": 3,
               "rope_scaling": {"rope_type": "linear", "factor": 4.0}}  # fmt: skip
    assert model_config(config) == new


# --------------------------------------------------------------------------------- published configurations

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {  # config.json as published, and parameters
    "bert-base-uncased": ({"architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 30522,
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "type_vocab_size": 2,
        "pad_token_id": 0, "position_embedding_type": "absolute"}, 109_514_298),
    "roberta-base": ({"architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "vocab_size": 50265,
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 514, "type_vocab_size": 1,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, 124_697_433),
    "ModernBERT-base": ({"architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", "vocab_size": 50368,
        "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12,
        "max_position_embeddings": 8192, "global_attn_every_n_layers": 3, "local_attention": 128,
        "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "norm_bias": False, "decoder_bias": True,
        "classifier_pooling": "mean"}, 149_655_232),
    "gemma-3-1b": ({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262144,
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256, "max_position_embeddings": 32768,
        "rope_theta": 1000000, "rope_local_base_freq": 10000, "sliding_window": 512, "sliding_window_pattern": 6},
        999_885_952),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_their_published_size(name):
    hf, n = PUBLISHED[name]
    config = model_config(hf)
    assert predicted_parameters(build(config, device="meta")) == n
    if name == "ModernBERT-base":
        windows = [config.blocks[block].mixer.window for block in config.layer_names()]
        assert windows == [None if i % 3 == 0 else 65 for i in range(22)]
    if name == "gemma-3-1b":
        local = [config.blocks[block].positions for block in config.layer_names()]
        assert [i for i, own in enumerate(local) if own is None] == [5, 11, 17, 23]
        assert {own.theta for own in local if own} == {10000.0}


REFUSED = [
    ("bert", {"is_decoder": True}, "is_decoder"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ("bert", {"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
    ("bert", {"hidden_act": "mish"}, "mish"),
    ("gemma3", {"attn_logit_softcapping": 1.0}, "attn_logit_softcapping"),
    ("roberta", {"add_cross_attention": True}, "add_cross_attention"),
    ("modernbert", {"layer_types": ["full_attention"]}, "layer_types"),
    ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, "rope_parameters"),
]


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED, ids=str)
def test_what_would_change_the_mathematics_is_refused_by_its_key(name, changes, said):
    config = gemma("plain").config if name == "gemma3" else CONFIGS[name]
    hf = config.to_dict() | {"architectures": None} | changes
    with pytest.raises(CheckpointError, match=said):
        model_config(hf)


def test_older_spellings_and_unread_weights_of_real_folders(tmp_path):
    """bert-base-uncased: gamma and beta, the pooler and the second task beside the masked language model."""
    config = transformers.BertConfig(**SHAPE)
    model = randomised(transformers.BertForPreTraining(config))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    older = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in tensors.items()
    }
    assert older.keys() != tensors.keys()
    save_file(older, path)
    hf = read_config(tmp_path) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    tokens = texts()[0]
    with torch.no_grad():
        wanted = model(tokens).prediction_logits
        agree("attention", "transformers BertForPreTraining", load_model(tmp_path)(Inputs(tokens)).logits, wanted)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_every_tensor_is_accounted_for(name, tmp_path):
    reference(name, "sequence").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    left = {key: tensor for key, tensor in tensors.items() if key != "classifier.bias"} | {"x": torch.zeros(1)}
    save_file(left, path)
    with pytest.raises(CheckpointError, match=r"missing: classifier\.bias.*not used: x"):
        load_model(tmp_path)


def test_labels_and_problems_are_kept(tmp_path: Path):
    config = transformers.BertConfig(**SHAPE, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    randomised(transformers.BertForSequenceClassification(config)).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.config.classes.labels == ("bad", "good")
    save_model(model, tmp_path / "ours")
    assert read_config(tmp_path / "ours")["id2label"] == {"0": "bad", "1": "good"}
    hf = read_config(tmp_path / "ours")
    assert model_config(hf | {"id2label": {"0": "x"}, "problem_type": None}).classes.problem == "regression"
    assert model_config(hf | {"problem_type": "multi_label_classification"}).classes.problem == "multi_label"
