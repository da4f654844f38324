"""DeepSeek-V2 and V3 (DeepSeek-AI 2024): latent attention, and many experts from layer first_k_dense_replace on.

V3's published folder has one layer more than num_hidden_layers says: the module that predicts a further token
(DeepSeek-V3, section 2.2), with copies of the embedding and the head. transformers leaves it out when it loads a model
and when it saves one, num_nextn_predict_layers still saying 1; so what the tensors say decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from octavo.hub.experts import WithExperts, whole
from octavo.hub.family import Entry
from octavo.models.block import BlockConfig
from octavo.models.decoder import Decoder


class DeepSeekV2(WithExperts):
    """The best groups by their best expert; the chosen scores of a softmax weight, times routed_scaling_factor."""

    model_type, architecture = "deepseek_v2", "DeepseekV2ForCausalLM"
    # norm_topk_prob: its published code divides the chosen scores by their sum, its class in transformers does not.
    only: ClassVar[Mapping[str, Any]] = {
        **WithExperts.only, "mlp_bias": False, "norm_topk_prob": False, "moe_layer_freq": 1, "scoring_func": "softmax",
    }  # fmt: skip
    shared: ClassVar[Mapping[str, str]] = {p: f"mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")}
    default_method, default_dense, default_scale = "greedy", 0, 1.0

    # ------------------------------------------------------------------------------------------- attention

    def read_mixer(self, hf: Mapping[str, Any], window: int | None) -> dict[str, Any]:
        if hf.get("num_key_value_heads") not in (None, hf["num_attention_heads"]):
            raise self.refuse("num_key_value_heads", hf["num_key_value_heads"], "is not the number of heads")
        rope = self.rope(hf)
        mscale = rope.get("mscale_all_dim") if self._kind(rope) == "yarn" else None
        if mscale and not rope.get("factor"):
            raise self.refuse("rope_parameters", dict(rope), "has mscale_all_dim without a factor")
        return {
            "kind": "mla",
            "n_heads": hf["num_attention_heads"],
            "head_dim": whole(hf, "qk_nope_head_dim", self),
            "rope_dim": whole(hf, "qk_rope_head_dim", self),
            "v_head_dim": whole(hf, "v_head_dim", self),
            "kv_rank": whole(hf, "kv_lora_rank", self),
            "q_rank": hf.get("q_lora_rank"),
            "bias": hf.get("attention_bias") or False,
            "norm": {"kind": "rmsnorm", "eps": 1e-6},  # whatever rms_norm_eps says
            "yarn": {"factor": rope["factor"], "mscale": mscale} if mscale else None,
            "dropout": hf.get("attention_dropout") or 0.0,
        }

    def write_mixer(self, mixer: Any, d_model: int) -> dict[str, Any]:
        width, rope = mixer.head_dim or d_model // mixer.n_heads, self._rope_dim(mixer, d_model)
        return {
            "num_attention_heads": mixer.n_heads,
            "num_key_value_heads": mixer.n_heads,
            "qk_nope_head_dim": width,
            "qk_rope_head_dim": rope,
            "v_head_dim": mixer.v_head_dim or width,
            "kv_lora_rank": mixer.kv_rank or 4 * width,
            "q_lora_rank": mixer.q_rank,
            "attention_bias": mixer.bias,
            "attention_dropout": mixer.dropout,
        }

    def _rope_dim(self, mixer: Any, d_model: int) -> int:
        return mixer.rope_dim or max(2, (mixer.head_dim or d_model // mixer.n_heads) // 4 * 2)

    def _kind(self, rope: Mapping[str, Any]) -> str:
        return rope.get("rope_type", rope.get("type")) or "default"

    def read_positions(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        rope = self.rope(hf)
        if self._kind(rope) not in ("default", "yarn"):
            raise self.refuse("rope_scaling", self._kind(rope))
        found = super().read_positions(hf)
        layout = "interleaved" if hf.get("rope_interleave", True) else "half"
        return {"positions": {**found["positions"], "layout": layout}}

    def write_positions(self, config: Decoder.Config) -> dict[str, Any]:
        positions: Any = config.positions
        if positions.fraction != 1 or positions.reverse:
            raise ValueError("its rotation turns whole heads, anticlockwise")
        found = super().write_positions(config)
        mixer: Any = config.blocks[config.layer_names()[0]].mixer
        if positions.scaling is not None and mixer.yarn is not None:
            for key in ("rope_parameters", "rope_scaling"):
                found[key]["mscale_all_dim"] = mixer.yarn.mscale
        return found | self.write_layout(positions.layout)

    def write_layout(self, layout: str) -> dict[str, Any]:
        return {}  # always interleaved; another layout does not come back

    def windows(self, hf: Mapping[str, Any]) -> list[int | None]:
        return [None] * hf["num_hidden_layers"]

    def mixer_entries(self, block: BlockConfig, theirs: str, ours: str) -> list[Entry]:
        mixer: Any = block.mixer
        a, b, kinds = f"{theirs}.self_attn", f"{ours}.mixer.mixer", ("weight", "bias") if mixer.bias else ("weight",)
        found = []
        if mixer.q_rank:
            found += [Entry(f"{a}.q_a_proj.{kind}", (f"{b}.q_down.{kind}",)) for kind in kinds]
            found.append(Entry(f"{a}.q_a_layernorm.weight", (f"{b}.q_norm.weight",)))
        found.append(Entry(f"{a}.{'q_b' if mixer.q_rank else 'q'}_proj.weight", (f"{b}.q.weight",)))
        for kind in kinds:
            found.append(Entry(f"{a}.kv_a_proj_with_mqa.{kind}", (f"{b}.kv_down.{kind}", f"{b}.k_rope.{kind}")))
            found.append(Entry(f"{a}.o_proj.{kind}", (f"{b}.o.{kind}",)))
        found.append(Entry(f"{a}.kv_a_layernorm.weight", (f"{b}.kv_norm.weight",)))
        # Each head's keys and values stand together.
        found.append(Entry(f"{a}.kv_b_proj.weight", (f"{b}.k.weight", f"{b}.v.weight"), groups=mixer.n_heads))
        return found

    # --------------------------------------------------------------------------------------------- experts

    def sparse(self, hf: Mapping[str, Any]) -> list[bool]:
        dense = hf.get("first_k_dense_replace", self.default_dense) or 0
        return [i >= dense for i in range(hf["num_hidden_layers"])]

    def write_sparse(self, sparse: list[bool]) -> dict[str, Any]:
        return {"first_k_dense_replace": sparse.index(True), "moe_layer_freq": 1}

    def read_experts(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        weight = hf.get("aux_loss_alpha") or 0.0
        return {
            "n_experts": whole(hf, "n_routed_experts", self),
            "experts_per_token": whole(hf, "num_experts_per_tok", self),
            "d_ff": whole(hf, "moe_intermediate_size", self),
            "n_shared_experts": whole(hf, "n_shared_experts", self),
            "routed_scale": hf.get("routed_scaling_factor", self.default_scale),
            "balance": ("sequence" if hf.get("seq_aux", True) else "switch") if weight else "none",
            "balance_weight": weight,
            **self.read_choice(hf),
        }

    def write_experts(self, experts: Any, d_model: int) -> dict[str, Any]:
        width = experts.width(d_model)
        n_shared, rest = divmod(experts.shared_d_ff or experts.n_shared_experts * width, width)
        if rest or not n_shared:
            raise ValueError("its shared experts are as wide as the others, and there is one at least")
        known = experts.balance in ("sequence", "switch")
        return {
            "n_routed_experts": experts.n_experts,
            "num_experts_per_tok": experts.experts_per_token,
            "moe_intermediate_size": width,
            "n_shared_experts": n_shared,
            "routed_scaling_factor": experts.routed_scale,
            "aux_loss_alpha": experts.balance_weight if known else 0.0,
            "seq_aux": experts.balance != "switch",
            **self.write_choice(experts),
        }

    def read_choice(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """How the experts of a token are chosen, and what their scores weigh."""
        method = hf.get("topk_method") or self.default_method
        if method not in ("greedy", "group_limited_greedy"):
            raise self.refuse("topk_method", method)
        found = {"score": "softmax", "normalise": False}
        if method == "greedy":
            return found
        return {**found, "n_groups": whole(hf, "n_group", self), "groups_per_token": whole(hf, "topk_group", self)}

    def write_choice(self, experts: Any) -> dict[str, Any]:
        method = "greedy" if experts.n_groups == 1 else "group_limited_greedy"
        groups = {"n_group": experts.n_groups, "topk_group": experts.groups_per_token}
        return {"scoring_func": "softmax", "topk_method": method, "norm_topk_prob": False, **groups}


class DeepSeekV3(DeepSeekV2):
    """Sigmoid scores; the best groups by their two best experts; a bias for the choice alone; one further token."""

    model_type, architecture = "deepseek_v3", "DeepseekV3ForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {
        **WithExperts.only, "mlp_bias": False, "moe_layer_freq": 1, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }  # fmt: skip
    whole_heads = False
    default_dense, default_scale = 3, 2.5
    selection_bias = "mlp.gate.e_score_correction_bias"

    def read_choice(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "score": "sigmoid",
            "normalise": hf.get("norm_topk_prob", True),
            "n_groups": whole(hf, "n_group", self),
            "groups_per_token": whole(hf, "topk_group", self),
            "group_score": "two_largest",
            "selection_bias": True,
        }

    def write_choice(self, experts: Any) -> dict[str, Any]:
        if 2 * experts.n_groups > experts.n_experts:
            raise ValueError("its groups have two experts at least")
        return {
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": experts.normalise,
            "n_group": experts.n_groups,
            "topk_group": experts.groups_per_token,
        }

    def write_layout(self, layout: str) -> dict[str, Any]:
        return {"rope_interleave": layout == "interleaved"}

    # ---------------------------------------------------------------------------- the module of a further token

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        found, n = super().read_ends(hf), hf.get("num_nextn_predict_layers") or 0
        if n > 1:
            raise self.refuse("num_nextn_predict_layers", n, "is more than the one module that was ever published")
        return {**found, **({"multi_token": {"n_modules": 1}} if n else {})}

    def write_ends(self, config: Decoder.Config) -> dict[str, Any]:
        n = config.multi_token.n_modules if config.multi_token else 0
        return {**super().write_ends(config), "num_nextn_predict_layers": n}

    def borne_out(self, hf: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
        module = f"layers.{hf['num_hidden_layers']}."
        if not hf.get("num_nextn_predict_layers") or any(module in name for name in tensors):
            return hf
        return {**hf, "num_nextn_predict_layers": 0}

    def entries(self, config: Decoder.Config) -> list[Entry]:
        found, wanted = super().entries(config), config.multi_token
        if wanted is None:
            return found
        theirs, ours = f"{self.optional_prefix}layers.{config.n_layers}", "multi_token.0"
        block = config.blocks[wanted.block or config.layer_names()[-1]]
        head = "embed.weight" if config.tie_embeddings else "head.weight"
        return [
            *found,
            *self.layer_entries(block, theirs, f"{ours}.block.layers"),
            Entry(f"{theirs}.enorm.weight", (f"{ours}.embed_norm.weight",)),
            Entry(f"{theirs}.hnorm.weight", (f"{ours}.hidden_norm.weight",)),
            # Its columns are first those for the embedding; ours, as in the paper, those for the hidden state.
            Entry(f"{theirs}.eh_proj.weight", (f"{ours}.project.weight",), exchanged=True),
            Entry(f"{theirs}.shared_head.norm.weight", (f"{ours}.norm.weight",)),
            Entry(f"{theirs}.embed_tokens.weight", ("embed.weight",), repeats=True),
            Entry(f"{theirs}.shared_head.head.weight", (head,), repeats=True),
        ]
