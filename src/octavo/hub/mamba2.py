"""Mamba-2 (Dao and Gu 2024) in transformers' form: Mamba's frame around the mixer of one decay a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.hub.family import Entry
from octavo.hub.mamba import Mamba


class Mamba2(Mamba):
    """Untied unless config.json says so; the gated norm inside is over each group of heads.

    time_step_limit bounds the step in every pass here. Its class in transformers forgets it where it decodes a
    single token with a cache, so that there one pass and decoding differ if the limit is ever reached.
    """

    model_type, architecture = "mamba2", "Mamba2ForCausalLM"
    default_tied = False

    def read_mixer(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        inner, heads, width = hf.get("expand", 2) * hf["hidden_size"], hf["num_heads"], hf["head_dim"]
        if heads * width != inner:
            raise self.refuse("head_dim", width, f"is not {inner} channels with {heads} heads")
        return {
            "kind": "mamba2",
            "n_heads": heads,
            "head_dim": width,
            "d_state": hf.get("state_size", 128),
            "n_groups": hf.get("n_groups", 8),
            "conv_width": hf.get("conv_kernel", 4),
            "conv_bias": hf.get("use_conv_bias", True),
            "bias": hf.get("use_bias", False),
            "dt_limit": read_limit(hf.get("time_step_limit")),
            "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        }

    def write_mixer(self, mixer: Any, d_model: int) -> dict[str, Any]:
        width = mixer.head_dim or 2 * d_model // mixer.n_heads
        expand = mixer.n_heads * width / d_model
        return {
            "expand": int(expand) if expand == int(expand) else expand,
            "num_heads": mixer.n_heads,
            "head_dim": width,
            "state_size": mixer.d_state,
            "n_groups": mixer.n_groups,
            "conv_kernel": mixer.conv_width,
            "use_conv_bias": mixer.conv_bias,
            "use_bias": mixer.bias,
            **({} if mixer.dt_limit is None else {"time_step_limit": write_limit(mixer.dt_limit)}),
        }

    def mixer_entries(self, mixer: Any, theirs: str, ours: str) -> list[Entry]:
        return mamba2_entries(mixer, theirs, ours)


def mamba2_entries(mixer: Any, theirs: str, ours: str) -> list[Entry]:
    """The tensors of one mixer, in the names of all classes of transformers that have it."""
    names = {
        "in_proj.weight": "up.weight", "dt_bias": "dt_bias", "A_log": "log_a", "D": "skip", "norm.weight": "scale",
        "out_proj.weight": "o.weight",
        **({"conv1d.bias": "conv_bias"} if mixer.conv_bias else {}),
        **({"in_proj.bias": "up.bias", "out_proj.bias": "o.bias"} if mixer.bias else {}),
    }  # fmt: skip
    found = [Entry(f"{theirs}.{their}", (f"{ours}.{own}",)) for their, own in names.items()]
    return [*found, Entry(f"{theirs}.conv1d.weight", (f"{ours}.conv_weight",), ones=(1,))]


FAR = 1e30  # an upper bound that no step reaches: our configurations hold finite numbers alone


def read_limit(limit: Any) -> tuple[float, float] | None:
    """time_step_limit: two numbers, where transformers writes infinity as a mapping; None for no bound at all."""
    if limit is None:
        return None
    low, high = (min(float(x["__float__"] if isinstance(x, Mapping) else x), FAR) for x in limit)
    return None if low <= 0 and high == FAR else (low, high)


def write_limit(limit: tuple[float, float]) -> list[Any]:
    """``limit`` as transformers 5 writes it."""
    return [{"__float__": "Infinity"} if x == FAR else x for x in limit]
