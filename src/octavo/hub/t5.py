"""T5 (Raffel et al. 2020): an encoder-decoder with relative positions shared by all layers of a half, and no biases."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from octavo.hub.family import Entry, Family, activation
from octavo.models.decoder import Decoder
from octavo.models.encoder_decoder import EncoderDecoder


class T5(Family):
    """Version 1.0 has one matrix in three places and scales what the head reads; 1.1 has a head of its own and gates.

    Its class in transformers 5 keeps that scaling as scale_decoder_outputs, and shares the head's matrix wherever the
    checkpoint has none: what a folder is follows from its tensors too.
    """

    model_type, architecture = "t5", "T5ForConditionalGeneration"
    configures = EncoderDecoder.Config
    # A table that early checkpoints hold and no version of the code reads.
    ignored = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
    copies: ClassVar[Mapping[str, str]] = {
        f"{half}.embed_tokens.weight": "shared.weight" for half in ("encoder", "decoder")
    }

    def borne_out(self, hf: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
        tied, scaled = _ends(hf)
        if tied and not scaled and self.head in tensors:
            return {**hf, "tie_word_embeddings": False, "scale_decoder_outputs": False}
        if not tied and self.head not in tensors:
            return {**hf, "tie_word_embeddings": True, "scale_decoder_outputs": False}
        return hf

    def read(self, hf: Mapping[str, Any]) -> EncoderDecoder.Config:
        tied, scaled = _ends(hf)
        if scaled and not tied:
            raise self.refuse("scale_decoder_outputs", True, "goes with a tied head here")
        dropout = hf.get("dropout_rate", 0.1)
        gated, _, name = hf.get("feed_forward_proj", "relu").rpartition("-")
        if gated not in ("", "gated"):
            raise self.refuse("feed_forward_proj", hf["feed_forward_proj"])
        channel = {
            "kind": "glu" if gated else "mlp",
            "d_ff": hf["d_ff"],
            "activation": "gelu_tanh" if gated and name == "gelu" else activation(name),
            "dropout": dropout,
        }
        heads = {"n_heads": hf["num_heads"], "head_dim": hf["d_kv"], "scale": 1.0, "dropout": dropout}
        block = {"mixer": {"kind": "attention", **heads}, "channel": channel, "dropout": dropout}
        half = {
            "d_model": hf["d_model"],
            "n_layers": hf["num_layers"],
            "max_seq_len": hf.get("n_positions") or 512,
            "norm": {"kind": "rmsnorm", "eps": hf.get("layer_norm_epsilon", 1e-6)},
            "positions": {
                "kind": "t5",
                "n_buckets": hf.get("relative_attention_num_buckets", 32),
                "max_distance": hf.get("relative_attention_max_distance", 128),
            },
            "embed_dropout": dropout,
        }
        crossed = {**block, "cross": {"kind": "cross_attention", **heads}}
        decoder = {
            **half,
            "n_layers": hf.get("num_decoder_layers") or hf["num_layers"],
            "blocks": {"block": crossed},
            "tie_embeddings": tied,
            "logit_scale": hf["d_model"] ** -0.5 if scaled else 1.0,
        }
        return EncoderDecoder.Config.model_validate(
            {
                "vocab_size": hf["vocab_size"],
                "encoder": {**half, "causal": False, "blocks": {"block": block}},
                "decoder": decoder,
                "start_id": hf.get("decoder_start_token_id") or hf.get("pad_token_id") or 0,
            }
        )

    def write(self, config: EncoderDecoder.Config) -> dict[str, Any]:  # type: ignore[override]
        one, two = config.encoder, config.decoder
        block = two.blocks[two.layer_names()[0]]
        mixer, channel, positions = (getattr(block, "mixer"), getattr(block, "channel"), two.positions)  # noqa: B009
        name = {"gelu_tanh": "gelu_new" if channel.kind == "mlp" else "gelu"}.get(
            channel.activation, channel.activation
        )
        return {
            "is_encoder_decoder": True,
            "vocab_size": config.vocab_size,
            "d_model": two.d_model,
            "d_kv": mixer.head_dim or two.d_model // mixer.n_heads,
            "d_ff": channel.d_ff or (-(-8 * two.d_model // 96) * 32 if channel.kind == "glu" else 4 * two.d_model),
            "num_layers": one.n_layers,
            "num_decoder_layers": two.n_layers,
            "num_heads": mixer.n_heads,
            "n_positions": two.max_seq_len,
            "relative_attention_num_buckets": positions.n_buckets,
            "relative_attention_max_distance": positions.max_distance,
            "layer_norm_epsilon": two.norm.eps,
            "feed_forward_proj": f"gated-{name}" if channel.kind == "glu" else name,
            "dropout_rate": block.dropout,
            "tie_word_embeddings": two.tie_embeddings,
            "scale_decoder_outputs": two.logit_scale != 1,
            "decoder_start_token_id": config.start_id or 0,
        }

    def entries(self, config: EncoderDecoder.Config) -> list[Entry]:  # type: ignore[override]
        found = [Entry("shared.weight", ("decoder.embed.weight",))]
        if not config.decoder.tie_embeddings:
            found.append(Entry(self.head, ("decoder.head.weight",)))
        for half, own in (("encoder", config.encoder), ("decoder", config.decoder)):
            bias = f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            found.append(Entry(bias, (f"{half}.positions.table.weight",)))
            found.append(Entry(f"{half}.final_layer_norm.weight", (f"{half}.norm.weight",)))
            for i, name in enumerate(own.layer_names()):
                found += self._layer(own, name, f"{half}.block.{i}.layer", f"{half}.blocks.{i}.layers")
        return found

    def _layer(self, own: Decoder.Config, name: str, theirs: str, ours: str) -> list[Entry]:
        attention = {p: p for p in "qkvo"}
        gated: Any = own.blocks[name].channel
        wide = {"wi_0": "gate", "wi_1": "up"} if gated.kind == "glu" else {"wi": "up"}
        parts = [("mixer", "SelfAttention", attention)]
        parts += [("cross", "EncDecAttention", attention)] if own.blocks[name].cross else []
        parts += [("channel", "DenseReluDense", {**wide, "wo": "down"})]
        found = []
        for at, (part, called, products) in enumerate(parts):
            found.append(Entry(f"{theirs}.{at}.layer_norm.weight", (f"{ours}.{part}.norm_in.weight",)))
            for product, role in products.items():
                found.append(Entry(f"{theirs}.{at}.{called}.{product}.weight", (f"{ours}.{part}.mixer.{role}.weight",)))
        return found


def _ends(hf: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the head is the embedding, and whether what it reads is scaled; without a word the one says the other."""
    tied = hf.get("tie_word_embeddings") is not False
    scaled = hf.get("scale_decoder_outputs")
    return tied, tied if scaled is None else bool(scaled)
