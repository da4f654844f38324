"""Phi-3 (Abdin et al. 2024): Llama's shape with q, k, v and gate, up stored as one matrix each; part of a head may
turn, and long contexts have factors of their own (LongRoPE, Ding et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.llama import Llama
from octavo.hub.mistral import Mistral
from octavo.models.decoder import Decoder

LONG = ("longrope", "su", "yarn")  # its older names; all three are the same


class Phi3(Mistral):
    """A checkpoint with long factors is read with the short ones and ends at original_max_position_embeddings.

    Its class in transformers changes the factors of all positions where a text gets longer than that; a table
    that depends on the text's length has neither a causal pass nor a true cache (see ``LongRope``).
    """

    model_type, architecture = "phi3", "Phi3ForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {
        key: plain for key, plain in Mistral.only.items() if key != "partial_rotary_factor"
    }
    default_eps = 1e-5
    default_window = None
    default_original = 4096
    products: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "self_attn.qkv_proj": ("mixer.mixer.q", "mixer.mixer.k", "mixer.mixer.v"),
        "self_attn.o_proj": Llama.products["self_attn.o_proj"],
        "mlp.gate_up_proj": ("channel.mixer.gate", "channel.mixer.up"),
        "mlp.down_proj": Llama.products["mlp.down_proj"],
    }

    def read_positions(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        rope = self.rope(hf)
        kind = rope.get("rope_type", rope.get("type")) or "default"
        head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        fraction = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
        if int(head_dim * fraction) % 2:
            raise self.refuse("partial_rotary_factor", fraction, f"turns an odd part of {head_dim} channels")
        positions: dict[str, Any] = {
            "kind": "rope",
            "theta": rope.get("rope_theta") or hf.get("rope_theta") or self.default_theta,
            "fraction": fraction,
        }
        if kind == "default":
            return {"positions": positions}
        if kind not in LONG:
            raise self.refuse("rope_scaling", kind)
        if head_dim * hf["num_attention_heads"] != hf["hidden_size"]:
            raise self.refuse("head_dim", head_dim, "is refused by its class together with longrope")
        original = hf.get("original_max_position_embeddings", self.default_original)
        if rope.get("original_max_position_embeddings", original) != original:
            raise self.refuse("original_max_position_embeddings", original, "is given twice, and differs")
        extended, magnitude = hf["max_position_embeddings"], rope.get("attention_factor")
        if magnitude is None and (factor := rope.get("factor")) is not None:
            magnitude = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
        positions["scaling"] = {
            "kind": "longrope",
            "short": rope["short_factor"],
            "long": rope["long_factor"],
            "original": original,
            "extended": extended,
            "magnitude": magnitude,
        }
        return {"positions": positions, "max_seq_len": min(original, extended)}

    def write_positions(self, config: Decoder.Config) -> dict[str, Any]:
        positions: Any = config.positions
        scaling = positions.scaling
        rope = {"rope_theta": positions.theta, "rope_type": "default", "partial_rotary_factor": positions.fraction}
        found = {
            **super().write_positions(config),
            "partial_rotary_factor": positions.fraction,
            "original_max_position_embeddings": config.max_seq_len,
            "rope_parameters": rope,
        }
        if scaling is None:
            return found
        factors = {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": scaling.original, **factors}
        if scaling.magnitude is not None:
            rope["attention_factor"] = scaling.magnitude
        else:  # all that the spelling before version 5 can say
            found["rope_scaling"] = {"type": "longrope", **factors}
        return found | {
            "max_position_embeddings": scaling.extended,
            "original_max_position_embeddings": scaling.original,
        }

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read_ends(hf), "embed_dropout": hf.get("embd_pdrop") or 0.0}

    def write_ends(self, config: Decoder.Config) -> dict[str, Any]:
        dropout = config.blocks[config.layer_names()[0]].dropout
        return {**super().write_ends(config), "embd_pdrop": config.embed_dropout, "resid_pdrop": dropout}
