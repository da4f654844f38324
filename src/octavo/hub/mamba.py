"""Mamba (Gu and Dao 2023) in transformers' form: a state space in every layer, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.family import Entry, Family
from octavo.models.decoder import Decoder

NO_LIMIT = 1 << 20  # tokens; config.json names none, and the state is of constant size


class Mamba(Family):
    """RMSNorm before each mixer, tied embeddings, no position scheme.

    residual_in_fp32 decides about rounding in 16 bits alone; what is said of initial values is not read.
    """

    model_type, architecture = "mamba", "MambaForCausalLM"
    optional_prefix = "backbone."
    renamed: ClassVar[Mapping[str, str]] = {
        r"^backbone\.embedding\.": "backbone.embeddings."
    }  # an early spelling of the authors'
    default_tied = True

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        if hf.get("hidden_act", "silu") not in ("silu", "swish"):
            raise self.refuse("hidden_act", hf["hidden_act"])
        return Decoder.Config.model_validate(
            {
                "vocab_size": hf["vocab_size"],
                "d_model": hf["hidden_size"],
                "n_layers": hf["num_hidden_layers"],
                "max_seq_len": hf.get("max_position_embeddings") or NO_LIMIT,
                "blocks": {"block": {"mixer": self.read_mixer(hf), "channel": None}},
                "norm": {"kind": "rmsnorm", "eps": hf.get("layer_norm_epsilon", 1e-5)},
                "positions": {"kind": "none"},
                "tie_embeddings": hf.get("tie_word_embeddings", self.default_tied),
            }
        )

    def write(self, config: Decoder.Config) -> dict[str, Any]:
        mixer: Any = config.blocks[config.layer_names()[0]].mixer
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "max_position_embeddings": config.max_seq_len,
            "layer_norm_epsilon": config.norm.eps,
            "hidden_act": "silu",
            "tie_word_embeddings": config.tie_embeddings,
            **self.write_mixer(mixer, config.d_model),
        }

    def read_mixer(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        inner = hf.get("expand", 2) * hf["hidden_size"]
        if inner != int(inner):
            raise self.refuse("expand", hf["expand"], "gives no whole number of channels")
        rank = hf.get("time_step_rank", "auto")
        return {
            "kind": "mamba",
            "expand": hf.get("expand", 2),
            "state_size": hf.get("state_size", 16),
            "conv_width": hf.get("conv_kernel", 4),
            "dt_rank": None if rank == "auto" else rank,
            "conv_bias": hf.get("use_conv_bias", True),
            "bias": hf.get("use_bias", False),
        }

    def write_mixer(self, mixer: Any, d_model: int) -> dict[str, Any]:
        return {
            "expand": int(mixer.expand) if mixer.expand == int(mixer.expand) else mixer.expand,
            "intermediate_size": round(mixer.expand * d_model),
            "state_size": mixer.state_size,
            "conv_kernel": mixer.conv_width,
            "time_step_rank": mixer.dt_rank or -(-d_model // 16),
            "use_conv_bias": mixer.conv_bias,
            "use_bias": mixer.bias,
        }

    def mixer_entries(self, mixer: Any, theirs: str, ours: str) -> list[Entry]:
        """The tensors of one mixer."""
        found = [
            Entry(f"{theirs}.in_proj.weight", (f"{ours}.up.weight", f"{ours}.gate.weight")),
            Entry(f"{theirs}.conv1d.weight", (f"{ours}.conv_weight",), ones=(1,)),
            Entry(f"{theirs}.x_proj.weight", (f"{ours}.select.weight",)),
            Entry(f"{theirs}.dt_proj.weight", (f"{ours}.dt.weight",)),
            Entry(f"{theirs}.dt_proj.bias", (f"{ours}.dt_bias",)),
            Entry(f"{theirs}.A_log", (f"{ours}.a_log",)),
            Entry(f"{theirs}.D", (f"{ours}.skip",)),
            Entry(f"{theirs}.out_proj.weight", (f"{ours}.o.weight",)),
        ]
        if mixer.conv_bias:
            found.append(Entry(f"{theirs}.conv1d.bias", (f"{ours}.conv_bias",)))
        if mixer.bias:
            found.append(Entry(f"{theirs}.in_proj.bias", (f"{ours}.up.bias", f"{ours}.gate.bias")))
            found.append(Entry(f"{theirs}.out_proj.bias", (f"{ours}.o.bias",)))
        return found

    def entries(self, config: Decoder.Config) -> list[Entry]:
        root = self.optional_prefix
        found = [
            Entry(f"{root}embeddings.weight", ("embed.weight",)),
            Entry(f"{root}norm_f.weight", ("norm.weight",)),
        ]
        if not config.tie_embeddings:
            found.append(Entry(self.head, ("head.weight",)))
        for i, name in enumerate(config.layer_names()):
            theirs, ours = f"{root}layers.{i}", f"blocks.{i}.layers.mixer"
            found.append(Entry(f"{theirs}.norm.weight", (f"{ours}.norm_in.weight",)))
            found += self.mixer_entries(config.blocks[name].mixer, f"{theirs}.mixer", f"{ours}.mixer")
        return found
