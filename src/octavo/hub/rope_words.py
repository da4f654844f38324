"""How Hugging Face's ``rope_parameters`` (before version 5, ``rope_scaling``) say the scalings of nn/rope_scaling.py.

What transformers has a class for, but ``longrope``: that is Phi-3's, see hub/phi3.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.hub.family import Family
    from octavo.models.decoder import Decoder

# Our kinds and which of our settings go by which of their names.
WORDS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "magnitude": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
}
REQUIRED = {"llama3": ("factor", "low_freq_factor", "high_freq_factor"), "linear": ("factor",), "dynamic": ("factor",)}


def read_scaling(kind: str, rope: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """Our scaling of a ``kind`` in WORDS; KeyError where a key is missing without which it means nothing."""
    for key in REQUIRED.get(kind, ()):
        rope[key]
    own = {ours: rope[theirs] for ours, theirs in WORDS[kind].items() if rope.get(theirs) is not None}
    tokens = hf["max_position_embeddings"]
    if kind == "dynamic":
        own["original"] = tokens  # there it is no setting of its own
    elif kind in ("llama3", "yarn"):
        # As in transformers: what stands beside the settings of rotation goes before what stands among them.
        own["original"] = hf.get("original_max_position_embeddings") or own.get("original") or tokens
    if kind == "yarn":
        own.setdefault("factor", tokens / own["original"])
        if not (own.get("mscale") and own.get("mscale_all_dim")):  # one alone, or zero, is ignored there
            own = {key: value for key, value in own.items() if key not in ("mscale", "mscale_all_dim")}
    return {"kind": kind, **own}


def write_scaling(scaling: Any, max_seq_len: int) -> dict[str, Any]:
    """Their settings for one of ours, as far as they have words for it; nothing for none."""
    if scaling is None or scaling.kind not in WORDS:
        return {}
    own = scaling.model_dump()
    if "original" in own and own["original"] is None:
        own["original"] = max_seq_len
    said = {theirs: own[ours] for ours, theirs in WORDS[scaling.kind].items() if own[ours] is not None}
    return {"rope_type": scaling.kind, **said}


def read_partial(
    family: Family, hf: Mapping[str, Any], head_dim: int, fraction: float, theta: float, tokens: int
) -> dict[str, Any]:
    """Rotary positions of a part of each head; ``fraction`` and ``theta`` where rope_parameters do not say any.

    Raises:
        CheckpointError: an odd part, or a scaling that is not known here.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    fraction, theta = rope.get("partial_rotary_factor", fraction), rope.get("rope_theta") or theta
    if int(head_dim * fraction) % 2 or not 0 < fraction <= 1:
        raise family.refuse("partial_rotary_factor", fraction, f"turns no even part of {head_dim} channels")
    kind = rope.get("rope_type", rope.get("type")) or "default"
    positions = {"kind": "rope", "theta": theta, "fraction": fraction}
    if kind == "default":
        return positions
    if kind not in WORDS:
        raise family.refuse("rope_scaling", rope if len(str(rope)) < 100 else kind)
    return {**positions, "scaling": read_scaling(kind, rope, {**hf, "max_position_embeddings": tokens})}


def write_partial(config: Decoder.Config) -> dict[str, Any]:
    """Their settings of rotary positions, in the spellings before and after transformers 5."""
    positions: Any = config.positions
    scaling = write_scaling(positions.scaling, config.max_seq_len)
    own = {"rope_theta": positions.theta, "partial_rotary_factor": positions.fraction}
    found = {**own, "rope_parameters": {**own, "rope_type": "default", **scaling}}
    return {**found, "rope_scaling": {**own, **scaling}} if scaling else found
