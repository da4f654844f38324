"""minimind (jingyaogong/minimind) in its own Hugging Face form: three generations, one model_type.

transformers has no class for it, so nothing is written as minimind unless it is asked for: the second generation is
a Llama, the third a Qwen3, with experts a Qwen3-MoE, and that is how they are saved. Folders in those forms need
nothing of this file. The second generation with experts has no such sibling and is saved in our own layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.experts import WithExperts
from octavo.hub.family import Entry, Family
from octavo.hub.llama import Llama
from octavo.models.decoder import Decoder

# inference_rope_scaling is YaRN over the trained table, switched on to read longer texts than were trained.
ONLY = {**Llama.only, "attention_bias": False, "mlp_bias": False, "use_moe": False, "inference_rope_scaling": False}


class MiniMind(Llama):
    """The second and the third generation. The third has head_dim among its keys, and norms each head's q and k."""

    model_type, architecture = "minimind", "MiniMindForCausalLM"
    automatic = False
    scalable = False  # its code has a YaRN of its own, whose ramp ends at another pair
    only: ClassVar[Mapping[str, Any]] = ONLY
    whole_heads = False
    default_theta = 1e6
    default_tied = True

    def of(self, hf: Mapping[str, Any]) -> Family:
        if "dim" in hf:
            return FIRST
        return (THIRD_MOE if "head_dim" in hf else SECOND_MOE) if hf.get("use_moe") else self

    def read_attention(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"dropout": hf.get("dropout") or 0.0, **({"qk_norm": self.read_norm(hf)} if "head_dim" in hf else {})}

    def write_attention(self, mixer: Any) -> dict[str, Any]:
        return {"dropout": mixer.dropout, "use_moe": False}

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        # Before the third generation the two matrices were one, whatever the key said.
        tied = super().read_ends(hf) if "head_dim" in hf else {"tie_embeddings": True}
        return {**tied, "embed_dropout": hf.get("dropout") or 0.0}

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        if hf.get("intermediate_size") is None and "head_dim" not in hf:
            hf = {**hf, "intermediate_size": _width(hf["hidden_size"], 64)}
        return super().read({**hf, "resid_pdrop": hf.get("dropout")})

    def write(self, config: Decoder.Config) -> dict[str, Any]:
        found = super().write(config)
        mixer: Any = config.blocks[config.layer_names()[0]].mixer
        return found if mixer.qk_norm else {key: value for key, value in found.items() if key != "head_dim"}


class FirstMiniMind(Llama):
    """The first generation: other names, and a rotation of neighbouring channels. Read, never written."""

    model_type, architecture = "minimind", "MiniMindLM"
    scalable = False
    only: ClassVar[Mapping[str, Any]] = ONLY
    optional_prefix = ""
    embedding, head = "tok_embeddings", "output.weight"
    ignored = (r"layers\.\d+\.attention\.mask",)
    products: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **{f"attention.w{name}": (f"mixer.mixer.{name}",) for name in "qkvo"},
        **{f"feed_forward.w{i}": (f"channel.mixer.{name}",) for i, name in ((1, "gate"), (2, "down"), (3, "up"))},
    }
    norms: ClassVar[Mapping[str, str]] = {"attention_norm": "mixer.norm_in", "ffn_norm": "channel.norm_in"}

    def read_attention(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"dropout": hf.get("dropout") or 0.0}

    def read_positions(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().read_positions(hf)
        return {"positions": {**found["positions"], "layout": "interleaved"}}

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"tie_embeddings": True, "embed_dropout": hf.get("dropout") or 0.0}

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
                 "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size", "norm_eps": "rms_norm_eps",
                 "max_seq_len": "max_position_embeddings"}  # fmt: skip
        said = {names.get(key, key): value for key, value in hf.items()}
        if said.get("intermediate_size") is None:
            said["intermediate_size"] = _width(hf["dim"], hf.get("multiple_of", 64))
        return super().read({**said, "resid_pdrop": hf.get("dropout")})


def _width(d_model: int, multiple: int) -> int:
    """8/3 of the width, up to a multiple: the inner width where none is given."""
    return -(-int(8 * d_model / 3) // multiple) * multiple


class ThirdMoe(WithExperts, MiniMind):
    """The third generation with experts, one for each token where nothing else is said."""

    only: ClassVar[Mapping[str, Any]] = {key: value for key, value in ONLY.items() if key != "use_moe"}

    def sparse(self, hf: Mapping[str, Any]) -> list[bool]:
        return [True] * hf["num_hidden_layers"]

    def write_sparse(self, sparse: list[bool]) -> dict[str, Any]:
        raise ValueError("a mixture is not written in this form")

    def write_experts(self, experts: Any, d_model: int) -> dict[str, Any]:
        raise ValueError("a mixture is not written in this form")

    def read_experts(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        weight = hf.get("router_aux_loss_coef", 5e-4)
        return {
            "n_experts": hf.get("num_experts", 4),
            "experts_per_token": hf.get("num_experts_per_tok", 1),
            "d_ff": hf.get("moe_intermediate_size") or hf["intermediate_size"],
            "normalise": hf.get("norm_topk_prob", True),
            "balance": "switch" if weight else "none",
            "balance_weight": weight,
            "dropout": 0.0,
        }


class SecondMoe(ThirdMoe):
    """The second generation with experts, all as wide as a dense layer; shared ones stand in a list of their own."""

    only: ClassVar[Mapping[str, Any]] = {**ThirdMoe.only, "scoring_func": "softmax"}

    def read_experts(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        k, weight = hf.get("num_experts_per_tok", 2), hf.get("aux_loss_alpha", 0.1)
        return {
            "n_experts": hf.get("n_routed_experts", 4),
            "experts_per_token": k,
            "n_shared_experts": hf.get("n_shared_experts", 1) or 0,
            "d_ff": hf["intermediate_size"],
            "normalise": k > 1 and hf.get("norm_topk_prob", True),
            "balance": ("sequence" if hf.get("seq_aux", True) else "switch") if weight else "none",
            "balance_weight": weight,
            "dropout": hf.get("dropout") or 0.0,
        }

    def shared_entries(self, channel: Any, theirs: str, ours: str) -> list[Entry]:
        n, axes = channel.n_shared_experts, {"gate": 0, "up": 0, "down": 1}
        return [
            Entry(f"{theirs}.mlp.shared_experts.{i}.{p}_proj.weight", (f"{ours}.shared.{p}.weight",), cut=(axis, i, n))
            for i in range(n)
            for p, axis in axes.items()
        ]


FIRST, SECOND_MOE, THIRD_MOE = FirstMiniMind(), SecondMoe(), ThirdMoe()
