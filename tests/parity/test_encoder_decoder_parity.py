"""T5 and BART against their classes in transformers, and the Transformer of 2017 against torch.nn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from proof import agree
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from octavo.errors import CheckpointError
from octavo.hub.folder import FAMILIES, load_model, read_config, save_model
from octavo.models.cost import predicted_parameters
from octavo.models.decoder import build
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.contracts import Inputs
from octavo.nn.position import sinusoid

V = 61
T5: dict[str, Any] = {
    "vocab_size": V, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": V, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
REFERENCES = {
    "t5": transformers.T5Config(**T5),
    "t5 gated": transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": transformers.BartConfig(**BART),
    "bart scaled": transformers.BartConfig(**BART, scale_embedding=True, activation_function="relu"),
}


def reference(name: str) -> Any:
    """A transformers model with weights that are neither zero nor one, its final bias included."""
    model = transformers.AutoModelForSeq2SeqLM.from_config(REFERENCES[name], attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            start = float("norm" in key and key.endswith("weight"))
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + start)
        if name == "t5 gated":  # 1.1 has a head of its own
            model.lm_head.weight = nn.Parameter(torch.randn(V, 32, generator=generator) * 0.25)
    return model


def stored(name: str, folder: Path) -> tuple[Any, EncoderDecoder]:
    """A model there, and what is read here of the folder it wrote."""
    theirs = reference(name)
    theirs.save_pretrained(folder)
    if name == "t5 gated":  # as the published ones are
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {**tensors, "lm_head.weight": theirs.lm_head.weight.data}, folder / "model.safetensors", {"format": "pt"}
        )
    return theirs, load_model(folder)


def texts(seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Sources (3, 9) padded at the end, where they are valid, and targets (3, 6)."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(3, V, (3, 9), generator=generator)
    valid = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]
    return source.masked_fill(~valid, 0), valid, torch.randint(3, V, (3, 6), generator=generator)


NEEDS = ("logits", "hidden_states", "encoder_hidden_states", "cross_attention", "attention", "encoder_attention")


@pytest.mark.rows("A4", "B3")
@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_an_encoder_decoder_is_its_class_in_transformers(name, tmp_path):
    theirs, ours = stored(name, tmp_path / "theirs")
    source, valid, tokens = texts()
    wanted = theirs(
        input_ids=source, attention_mask=valid.long(), decoder_input_ids=tokens, output_hidden_states=True,
        output_attentions=True,
    )  # fmt: skip
    inputs = Inputs(tokens, source=source, source_valid=valid)
    got = ours(inputs, needs=NEEDS)
    class_name = f"transformers {type(theirs).__name__}"
    agree("cross_attention", class_name, got.logits, wanted.logits, case=name)
    for ours_, theirs_ in (
        (got.hidden_states, wanted.decoder_hidden_states),
        (got.cross_attention, wanted.cross_attentions),
        (got.attention, wanted.decoder_attentions),
    ):
        assert len(ours_) == len(theirs_)
        for one, other in zip(ours_, theirs_, strict=True):
            agree("cross_attention", class_name, one, other, case=f"{name}, inside")
    for one, other in zip(got.encoder_hidden_states, wanted.encoder_hidden_states, strict=True):
        agree("cross_attention", class_name, one[valid], other[valid], case=f"{name}, encoder")
    state = ours.new_state(3, 6)
    parts = [ours(Inputs(tokens[:, :2], source=source, source_valid=valid), state).logits]
    parts += [ours(Inputs(tokens[:, t : t + 1]), state).logits for t in range(2, 6)]
    agree("cross_attention", class_name, torch.cat(parts, 1), wanted.logits, case=f"{name}, cached")

    family = name.split()[0]
    assert FAMILIES[family].fits(ours.config)
    assert sum(p.numel() for p in ours.parameters()) == predicted_parameters(ours)
    assert save_model(ours, tmp_path / "ours") == family
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, trust_remote_code=False
    )
    again = back.eval()(input_ids=source, attention_mask=valid.long(), decoder_input_ids=tokens).logits
    agree("cross_attention", class_name, again, wanted.logits, case=f"{name}, exported")
    assert torch.equal(load_model(tmp_path / "ours")(inputs).logits, got.logits)


@pytest.mark.parametrize("name", ["t5", "t5 gated", "bart"])
def test_gradients_are_those_of_its_class(name, tmp_path):
    theirs, ours = stored(name, tmp_path)
    source, valid, tokens = texts()
    theirs(input_ids=source, attention_mask=valid.long(), decoder_input_ids=tokens).logits.square().mean().backward()
    ours.train(False)(Inputs(tokens, source=source, source_valid=valid)).logits.square().mean().backward()
    agree(
        "cross_attention", f"transformers {type(theirs).__name__}", ours.embed.weight.grad,
        theirs.get_input_embeddings().weight.grad, case=f"{name}, gradient of the embedding",
    )  # fmt: skip


def changed(folder: Path, **keys: Any) -> None:
    import json

    config = read_config(folder) | keys
    (folder / "config.json").write_text(json.dumps(config))


def test_what_a_folder_must_not_have(tmp_path):
    """Every tensor is accounted for, copies are compared, and settings of another mathematics are refused by name."""
    stored("bart", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")

    def write(more: dict[str, Tensor], without: str = "") -> None:
        kept = {n: t for n, t in {**tensors, **more}.items() if n != without}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})

    shared = tensors["model.shared.weight"]
    write({"model.encoder.embed_tokens.weight": shared.clone(), "lm_head.weight": shared.clone()})
    load_model(tmp_path)
    write({"model.encoder.embed_tokens.weight": shared + 1})
    with pytest.raises(CheckpointError, match=r"model.encoder.embed_tokens.weight differs from model.shared.weight"):
        load_model(tmp_path)
    write({}, without="final_logits_bias")
    assert load_model(tmp_path).config.decoder.head_bias is False
    write({"model.encoder.layer_norm.weight": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"not used: model.encoder.layer_norm.weight"):
        load_model(tmp_path)
    write({}, without="model.decoder.layers.1.encoder_attn.k_proj.bias")
    with pytest.raises(CheckpointError, match=r"missing: model.decoder.layers.1.encoder_attn.k_proj.bias"):
        load_model(tmp_path)
    write({})
    for key, value in {"tie_word_embeddings": False, "normalize_before": True}.items():
        changed(tmp_path, **{key: value})
        with pytest.raises(CheckpointError, match=key):
            load_model(tmp_path)
        changed(tmp_path, **{key: not value})


def test_a_t5_head_is_shared_and_scaled_as_its_folder_says(tmp_path):
    """Without a head of its own a folder that says it is not tied means version 5's way of keeping 1.1: not scaled."""
    _, ours = stored("t5", tmp_path)
    assert ours.config.decoder.tie_embeddings and ours.config.decoder.logit_scale == 32**-0.5
    changed(tmp_path, tie_word_embeddings=False, scale_decoder_outputs=False)
    plain = load_model(tmp_path)
    assert plain.config.decoder.tie_embeddings and plain.config.decoder.logit_scale == 1
    changed(tmp_path, feed_forward_proj="dense-relu")
    with pytest.raises(CheckpointError, match="feed_forward_proj"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------ the model of 2017

NAMES = {"self_attn": "mixer", "multihead_attn": "cross"}


def of_2017(theirs: nn.Transformer, head: nn.Linear, embed: Tensor) -> EncoderDecoder:
    """Ours with the weights of torch's, its positions the paper's sinusoids."""
    block = {
        "mixer": {"n_heads": 4, "qkv_bias": True, "o_bias": True},
        "channel": {"kind": "mlp", "d_ff": 24, "activation": "relu", "bias": True},
        "norm_placement": "post",
    }
    half = {"d_model": 16, "n_layers": 2, "max_seq_len": 32, "norm": "layernorm", "positions": "sinusoidal",
            "embed_scale": 4.0}  # fmt: skip
    cross = {"kind": "cross_attention", "n_heads": 4, "qkv_bias": True, "o_bias": True}
    config = EncoderDecoder.Config.model_validate(
        {
            "vocab_size": V,
            "encoder": {**half, "causal": False, "blocks": {"block": block}},
            "decoder": {**half, "blocks": {"block": {**block, "cross": cross}}, "tie_embeddings": False},
        }
    )
    ours = build(config).eval()
    state = {"decoder.embed.weight": embed, "encoder.embed.weight": embed, "decoder.head.weight": head.weight}
    for half_name, part in (("encoder", theirs.encoder), ("decoder", theirs.decoder)):
        state |= {f"{half_name}.norm.{p}": getattr(part.norm, p) for p in ("weight", "bias")}
        for i, layer in enumerate(part.layers):
            root, norms = f"{half_name}.blocks.{i}.layers", ["mixer", "cross", "channel"]
            for name, own in NAMES.items() if half_name == "decoder" else [("self_attn", "mixer")]:
                attention = getattr(layer, name)
                for p in ("weight", "bias"):
                    for role, piece in zip("qkv", getattr(attention, f"in_proj_{p}").chunk(3), strict=True):
                        state[f"{root}.{own}.mixer.{role}.{p}"] = piece
                    state[f"{root}.{own}.mixer.o.{p}"] = getattr(attention.out_proj, p)
            for p in ("weight", "bias"):
                state[f"{root}.channel.mixer.up.{p}"] = getattr(layer.linear1, p)
                state[f"{root}.channel.mixer.down.{p}"] = getattr(layer.linear2, p)
                for k, own in enumerate(norms if half_name == "decoder" else ["mixer", "channel"], 1):
                    state[f"{root}.{own}.norm_sum.{p}"] = getattr(getattr(layer, f"norm{k}"), p)
    ours.load_state_dict({k: v.detach() for k, v in state.items()})
    return ours


@pytest.mark.rows("A4", "B3")
@torch.no_grad()
def test_the_transformer_of_2017_is_torch_nn(tmp_path):
    torch.manual_seed(0)
    theirs = nn.Transformer(16, 4, 2, 2, 24, dropout=0.0, batch_first=True).eval()
    head, embed = nn.Linear(16, V, bias=False), torch.randn(V, 16) * 0.3
    for parameter in theirs.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.2)
    ours = of_2017(theirs, head, embed)
    source, valid, tokens = texts()

    def entering(ids: Tensor) -> Tensor:
        return embed[ids] * 4.0 + sinusoid(torch.arange(ids.shape[1]), 16, "interleaved")

    hidden = theirs(
        entering(source), entering(tokens), tgt_mask=nn.Transformer.generate_square_subsequent_mask(6),
        tgt_is_causal=True, src_key_padding_mask=~valid, memory_key_padding_mask=~valid,
    )  # fmt: skip
    got = ours(Inputs(tokens, source=source, source_valid=valid), needs=("logits", "hidden"))
    agree("cross_attention", "torch nn.Transformer", got.hidden, hidden, case="2017, hidden")
    agree("cross_attention", "torch nn.Transformer", got.logits, head(hidden), case="2017")
    save_model(ours, tmp_path / "own")
    assert torch.equal(
        load_model(tmp_path / "own")(Inputs(tokens, source=source, source_valid=valid)).logits, got.logits
    )
