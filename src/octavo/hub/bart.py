"""BART (Lewis et al. 2020): the encoder-decoder of 2017 with learned positions, GELU and a norm of the embedding."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from octavo.hub.family import Entry, Family, activation, hf_activation
from octavo.models.encoder_decoder import EncoderDecoder

HALVES = ("encoder", "decoder")


class Bart(Family):
    """Norms after each sum, one matrix of tokens in three places, and a bias of the logits that is mostly zero.

    Positions begin at row 2 of their table. ``final_logits_bias`` may be missing in a checkpoint.
    """

    model_type, architecture = "bart", "BartForConditionalGeneration"
    optional_prefix = "model."
    configures = EncoderDecoder.Config
    bias = "final_logits_bias"
    copies: ClassVar[Mapping[str, str]] = {
        f"model.{half}.embed_tokens.weight": "model.shared.weight" for half in HALVES
    }
    only: ClassVar[Mapping[str, Any]] = {
        "tie_word_embeddings": True, "normalize_before": False, "add_final_layer_norm": False,
        "normalize_embedding": True, "static_position_embeddings": False, "add_bias_logits": False,
        "extra_pos_embeddings": 2,
    }  # fmt: skip

    def borne_out(self, hf: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
        return hf if self.bias in tensors else {**hf, self.bias: False}

    def read(self, hf: Mapping[str, Any]) -> EncoderDecoder.Config:
        for key, plain in self.only.items():
            if hf.get(key) not in (None, plain):
                raise self.refuse(key, hf[key])
        halves = {half: self._half(hf, half) for half in HALVES}
        halves["encoder"]["causal"] = False
        halves["decoder"]["head_bias"] = hf.get(self.bias, True)
        start = hf.get("decoder_start_token_id", 2)
        return EncoderDecoder.Config.model_validate({"vocab_size": hf["vocab_size"], "start_id": start, **halves})

    def _half(self, hf: Mapping[str, Any], half: str) -> dict[str, Any]:
        heads = {
            "n_heads": hf[f"{half}_attention_heads"],
            "qkv_bias": True,
            "o_bias": True,
            "dropout": hf.get("attention_dropout") or 0.0,
        }
        channel = {
            "kind": "mlp",
            "d_ff": hf[f"{half}_ffn_dim"],
            "activation": activation(hf.get("activation_function") or "gelu"),
            "bias": True,
            "dropout": hf.get("activation_dropout") or 0.0,
        }
        block = {
            "mixer": {"kind": "attention", **heads},
            "cross": {"kind": "cross_attention", **heads} if half == "decoder" else None,
            "channel": channel,
            "norm_placement": "post",
            "dropout": hf.get("dropout", 0.1),
        }
        return {
            "d_model": hf["d_model"],
            "n_layers": hf[f"{half}_layers"],
            "max_seq_len": hf.get("max_position_embeddings", 1024),
            "blocks": {"block": block},
            "norm": {"kind": "layernorm"},
            "positions": {"kind": "learned", "offset": 2},
            "final_norm": False,
            "embed_norm": True,
            "embed_scale": hf["d_model"] ** 0.5 if hf.get("scale_embedding") else 1.0,
            "embed_dropout": hf.get("dropout", 0.1),
            "padding_id": hf.get("pad_token_id"),
        }

    def write(self, config: EncoderDecoder.Config) -> dict[str, Any]:  # type: ignore[override]
        found: dict[str, Any] = {"is_encoder_decoder": True, "vocab_size": config.vocab_size}
        for half, own in zip(HALVES, (config.encoder, config.decoder), strict=True):
            block: Any = own.blocks[own.layer_names()[0]]
            found |= {
                f"{half}_layers": own.n_layers,
                f"{half}_attention_heads": block.mixer.n_heads,
                f"{half}_ffn_dim": block.channel.d_ff or 4 * own.d_model,
                "d_model": own.d_model,
                "max_position_embeddings": own.max_seq_len,
                "scale_embedding": own.embed_scale != 1,
                "activation_function": hf_activation(block.channel.activation),
                "dropout": block.dropout,
                "attention_dropout": block.mixer.dropout,
                "activation_dropout": block.channel.dropout,
            }
        # Its class ends texts at their longest with eos of itself, and knows no other way to begin one.
        found |= {"tie_word_embeddings": True, "decoder_start_token_id": config.start_id, "forced_eos_token_id": None}
        return found | ({} if config.decoder.head_bias else {self.bias: False})

    def entries(self, config: EncoderDecoder.Config) -> list[Entry]:  # type: ignore[override]
        found = [Entry("model.shared.weight", ("decoder.embed.weight",))]
        if config.decoder.head_bias:
            found.append(Entry(self.bias, ("decoder.head_bias",), ones=(0,)))
        for half, own in zip(HALVES, (config.encoder, config.decoder), strict=True):
            root = f"model.{half}"
            found.append(Entry(f"{root}.embed_positions.weight", (f"{half}.positions.table.weight",)))
            pairs = {f"{root}.layernorm_embedding": f"{half}.embed_norm"}
            for i, name in enumerate(own.layer_names()):
                theirs, ours = f"{root}.layers.{i}", f"{half}.blocks.{i}.layers"
                attentions = {"self_attn": "mixer"} | ({"encoder_attn": "cross"} if own.blocks[name].cross else {})
                for called, part in attentions.items():
                    pairs |= {f"{theirs}.{called}.{p}_proj": f"{ours}.{part}.mixer.{p}" for p in "qkv"}
                    pairs[f"{theirs}.{called}.out_proj"] = f"{ours}.{part}.mixer.o"
                    pairs[f"{theirs}.{called}_layer_norm"] = f"{ours}.{part}.norm_sum"
                pairs |= {f"{theirs}.fc1": f"{ours}.channel.mixer.up", f"{theirs}.fc2": f"{ours}.channel.mixer.down"}
                pairs[f"{theirs}.final_layer_norm"] = f"{ours}.channel.norm_sum"
            found += [Entry(f"{a}.{part}", (f"{b}.{part}",)) for a, b in pairs.items() for part in ("weight", "bias")]
        return found
