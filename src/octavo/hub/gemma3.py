"""Gemma 3's text model (Gemma Team 2025): Gemma 2 with normed heads instead of caps, and two rotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.gemma2 import Gemma2
from octavo.hub.rope_words import read_scaling, write_scaling
from octavo.models.decoder import Decoder

FULL, SLIDING = "full_attention", "sliding_attention"
SCALINGS = ("linear", "llama3", "yarn", "dynamic")


class Gemma3(Gemma2):
    """Of six layers five read a window and turn by their own base, without the scaling that the sixth may have."""

    model_type, architecture = "gemma3_text", "Gemma3ForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {**Gemma2.only, "attn_logit_softcapping": None}
    default_theta, default_local_theta = 1_000_000.0, 10_000.0

    def read_attention(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read_attention({**hf, "attn_logit_softcapping": None}), "qk_norm": self.read_norm(hf)}

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return super().read_ends({"final_logit_softcapping": None, **hf})

    def windows(self, hf: Mapping[str, Any]) -> list[int | None]:
        n, every = hf["num_hidden_layers"], hf.get("sliding_window_pattern") or 6
        kinds = [SLIDING if (i + 1) % every else FULL for i in range(n)]
        return self.by_kind(hf, kinds, hf.get("sliding_window", 4096))

    def rotation(self, hf: Mapping[str, Any], kind: str) -> dict[str, Any]:
        """The position scheme of one kind of layer; in the older spelling scalings are those of full layers."""
        rope = (hf.get("rope_parameters") or {}).get(kind) or {}
        older = (
            ("rope_theta", self.default_theta) if kind == FULL else ("rope_local_base_freq", self.default_local_theta)
        )
        if kind == FULL and hf.get("rope_scaling"):
            rope = {**rope, **hf["rope_scaling"]}
        found = {"kind": "rope", "theta": rope.get("rope_theta") or hf.get(older[0]) or older[1]}
        scaling = rope.get("rope_type", rope.get("type")) or "default"
        if scaling == "default":
            return found
        if scaling not in SCALINGS:
            raise self.refuse("rope_scaling", scaling)
        return {**found, "scaling": read_scaling(scaling, rope, hf)}

    def read_positions(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"positions": self.rotation(hf, FULL)}

    def write_positions(self, config: Decoder.Config) -> dict[str, Any]:
        near = next((b.positions for b in config.blocks.values() if b.positions is not None), None)
        found = {FULL: config.positions, SLIDING: near}
        said = {}
        for kind, positions in found.items():
            own: Any = positions
            theta = self.default_local_theta if own is None else own.theta
            scaling = {} if own is None else write_scaling(own.scaling, config.max_seq_len)
            said[kind] = {"rope_theta": theta, "rope_type": "default", **scaling}
        # The older spelling has no scaling of local layers, and none is written where it would say too little.
        older = (
            {k: v for k, v in said[FULL].items() if k != "rope_theta"} if said[FULL]["rope_type"] != "default" else None
        )
        return {
            "max_position_embeddings": config.max_seq_len,
            "rope_parameters": said,
            "rope_theta": said[FULL]["rope_theta"],
            "rope_local_base_freq": said[SLIDING]["rope_theta"],
            **({"rope_scaling": older} if older else {}),
        }

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        config, local = super().read(hf), self.rotation(hf, SLIDING)
        plain = config.model_dump()
        for block in plain["blocks"].values():
            block["positions"] = local if block["mixer"]["window"] is not None else None
        return Decoder.Config.model_validate(plain)
