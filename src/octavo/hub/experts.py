"""What families with mixtures of experts share: which layers have one, its settings, and a tensor for each expert.

In memory transformers holds all experts of a layer in one tensor, as we do; folders have one for each expert, and
that is what is read and written.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.errors import CheckpointError
from octavo.hub.family import Entry, activation, hf_activation
from octavo.hub.llama import Llama
from octavo.models.block import BlockConfig
from octavo.models.decoder import Decoder


class WithExperts(Llama):
    """Llama's shape with mixtures in some layers; a family says where they are and which keys they have."""

    # Below a layer's name: the router, and the products of expert {} and of those that read every token.
    router: ClassVar[str] = "mlp.gate.weight"
    expert: ClassVar[Mapping[str, str]] = {p: f"mlp.experts.{{}}.{p}_proj.weight" for p in ("gate", "up", "down")}
    shared: ClassVar[Mapping[str, str]] = {}
    shared_gate = selection_bias = ""

    @abstractmethod
    def sparse(self, hf: Mapping[str, Any]) -> list[bool]:
        """Which layers have experts."""

    @abstractmethod
    def write_sparse(self, sparse: list[bool]) -> dict[str, Any]:
        """The keys that say which."""

    @abstractmethod
    def read_experts(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a mixture, but its activation."""

    @abstractmethod
    def write_experts(self, experts: Any, d_model: int) -> dict[str, Any]:
        """Their words for a mixture."""

    def channels(self, hf: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        where = self.sparse(hf)
        acts = activation(hf.get(self.activation_key) or self.default_activation)
        experts = {"kind": "moe", **self.read_experts(hf), "activation": acts} if any(where) else {}
        dense = self.read_glu(hf) if not all(where) else {}
        return [("experts", experts) if sparse else ("full", dense) for sparse in where]

    def write_channels(self, config: Decoder.Config) -> dict[str, Any]:
        channels: list[Any] = [config.blocks[name].channel for name in config.layer_names()]
        experts = next((channel for channel in channels if channel.kind == "moe"), None)
        if experts is None:
            raise ValueError("no layer has experts")
        dense = next((channel for channel in channels if channel.kind == "glu"), None)
        width = (dense.d_ff or -(-8 * config.d_model // 96) * 32) if dense else experts.width(config.d_model)
        return {
            "intermediate_size": width,
            self.activation_key: hf_activation(experts.activation),
            **self.write_sparse([channel.kind == "moe" for channel in channels]),
            **self.write_experts(experts, config.d_model),
        }

    def channel_entries(self, block: BlockConfig, theirs: str, ours: str) -> list[Entry]:
        channel: Any = block.channel
        if channel.kind != "moe":
            return super().channel_entries(block, theirs, ours)
        ours, n = f"{ours}.channel.mixer", channel.n_experts
        found = [Entry(f"{theirs}.{self.router}", (f"{ours}.router.weight",))]
        if self.selection_bias:
            found.append(Entry(f"{theirs}.{self.selection_bias}", (f"{ours}.selection_bias",)))
        for product, name in self.expert.items():
            ours_of_all = (f"{ours}.experts.{product}.weight",)
            found += [Entry(f"{theirs}.{name.format(e)}", ours_of_all, cut=(0, e, n)) for e in range(n)]
        return found + self.shared_entries(channel, theirs, ours)

    def shared_entries(self, channel: Any, theirs: str, ours: str) -> list[Entry]:
        """The tensors of the experts that read every token."""
        found = [Entry(f"{theirs}.{name}", (f"{ours}.shared.{part}.weight",)) for part, name in self.shared.items()]
        if self.shared_gate:
            found.append(Entry(f"{theirs}.{self.shared_gate}", (f"{ours}.shared_gate.weight",)))
        return found


def balance(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The balance loss that a config.json asks for when training goes on: Mixtral's and Qwen's keys."""
    if not hf.get("output_router_logits"):
        return {}
    return {"balance": "switch", "balance_weight": hf.get("router_aux_loss_coef") or 0.0}


def write_balance(experts: Any) -> dict[str, Any]:
    """Those keys; another loss than theirs they have no word for, and a function it does not change."""
    asked = experts.balance == "switch" and experts.balance_weight > 0
    return {"output_router_logits": asked, "router_aux_loss_coef": experts.balance_weight if asked else 0.0}


def whole(hf: Mapping[str, Any], key: str, family: Llama) -> int:
    """A count that must be there and at least one.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(hf.get(key), int) or hf[key] < 1:
        raise CheckpointError(
            f"config.json has {key} = {hf.get(key)!r}, which is no count ({family.model_type})",
            fix="restore the file",
        )
    return hf[key]
