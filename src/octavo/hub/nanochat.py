"""nanochat (Karpathy 2025): norms without weights, ReLU squared, normed queries and keys, bounded logits.

The family reads and writes the folders of transformers' NanoChatForCausalLM; checkpoints of nanochat itself
(model_*.pt with meta_*.json) are read in their first published form. Source: nanochat, nanochat/gpt.py and
nanochat/tokenizer.py as of October 2025. Rotary pairs turn clockwise there. Its own code keeps the rotary tables in
bf16; here, as in transformers, they are exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import CheckpointError
from octavo.hub import vocabulary
from octavo.hub.family import Entry, Family, activation, hf_activation
from octavo.hub.formats import Foreign
from octavo.hub.limits import MAX_LAYERS, MAX_SIZES, read_json
from octavo.hub.nanogpt import COMPILED
from octavo.models.decoder import Decoder

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.tokenizer import Tokenizer

SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
EPS = 2.0**-23  # what torch's rms_norm takes for float32 when it is told nothing
# Weights of later versions, each of which changes the mathematics.
LATER = ("resid_lambdas", "x0_lambdas", "value_embeds", "ve_gate", "smear_gate", "smear_lambda", "backout_lambda")
SPECIALS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
CHAT = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set ns.system = message['content'] + '\\n\\n' %}
    {%- elif message['role'] == 'user' %}
        {{- '<|user_start|>' + ns.system + message['content'] + '<|user_end|>' }}
        {%- set ns.system = '' %}
    {%- else %}
        {{- '<|assistant_start|>' }}
        {%- generation %}
            {{- message['content'] + '<|assistant_end|>' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant_start|>' }}
{%- endif %}
"""


class NanoChat(Family):
    """Nothing in it has a bias, and no norm a weight."""

    model_type, architecture = "nanochat", "NanoChatForCausalLM"
    ignored = (r".*\.rotary_emb\.inv_freq",)
    optional_prefix = "model."

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise self.refuse("rope_parameters", rope)
        heads, D = hf["num_attention_heads"], hf["hidden_size"]
        norm = {"kind": "rmsnorm", "eps": hf.get("rms_norm_eps", 1e-6), "weight": False}
        mixer = {
            "kind": "attention",
            "n_heads": heads,
            "n_kv_heads": hf.get("num_key_value_heads") or heads,
            "head_dim": hf.get("head_dim") or D // heads,
            "qkv_bias": hf.get("attention_bias") or False,
            "o_bias": hf.get("attention_bias") or False,
            "qk_norm": norm,
            "dropout": hf.get("attention_dropout") or 0.0,
        }
        channel = {
            "kind": "mlp",
            "d_ff": hf["intermediate_size"],
            "activation": activation(hf.get("hidden_act") or "relu2"),
        }
        theta = rope.get("rope_theta") or hf.get("rope_theta") or 10000.0
        return Decoder.Config.model_validate(
            {
                "vocab_size": hf["vocab_size"],
                "d_model": D,
                "n_layers": hf["num_hidden_layers"],
                "max_seq_len": hf["max_position_embeddings"],
                "blocks": {"block": {"mixer": mixer, "channel": channel}},
                "norm": norm,
                "positions": {"kind": "rope", "theta": theta, "reverse": True},
                "tie_embeddings": hf.get("tie_word_embeddings", False),
                "embed_norm": True,
                "logit_softcap": hf.get("final_logit_softcapping", 15.0),
            }
        )

    def write(self, config: Decoder.Config) -> dict[str, Any]:
        block = config.blocks[config.layer_names()[0]]
        mixer, channel = block.mixer, block.channel
        theta = config.positions.theta
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": mixer.n_heads,
            "num_key_value_heads": mixer.n_kv_heads or mixer.n_heads,
            "head_dim": mixer.head_dim or config.d_model // mixer.n_heads,
            "intermediate_size": channel.d_ff or 4 * config.d_model,  # type: ignore[union-attr]
            "hidden_act": hf_activation(channel.activation),  # type: ignore[union-attr]
            "max_position_embeddings": config.max_seq_len,
            "rms_norm_eps": config.norm.eps,
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
            "tie_word_embeddings": config.tie_embeddings,
            "attention_bias": mixer.qkv_bias,
            "attention_dropout": mixer.dropout,
            "final_logit_softcapping": config.logit_softcap,
        }

    def entries(self, config: Decoder.Config) -> list[Entry]:
        root = self.optional_prefix
        found = [Entry(f"{root}embed_tokens.weight", ("embed.weight",))]
        if not config.tie_embeddings:
            found.append(Entry(self.head, ("head.weight",)))
        for i, name in enumerate(config.layer_names()):
            theirs, ours = f"{root}layers.{i}", f"blocks.{i}.layers"
            mixer = config.blocks[name].mixer
            for p in "qkvo":
                biased = mixer.o_bias if p == "o" else mixer.qkv_bias
                for part in ("weight", "bias") if biased else ("weight",):
                    found.append(Entry(f"{theirs}.self_attn.{p}_proj.{part}", (f"{ours}.mixer.mixer.{p}.{part}",)))
            found.append(Entry(f"{theirs}.mlp.fc1.weight", (f"{ours}.channel.mixer.up.weight",)))
            found.append(Entry(f"{theirs}.mlp.fc2.weight", (f"{ours}.channel.mixer.down.weight",)))
        return found


# ------------------------------------------------------------------------------- nanochat's own checkpoints


def settings_of(path: Path) -> Path:
    """The meta_*.json that belongs to a model_*.pt."""
    return path.with_name(path.name.replace("model_", "meta_", 1)).with_suffix(".json")


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of a file of ``torch.save`` are those of a nanochat checkpoint."""
    return any(name.removeprefix(COMPILED).endswith(".attn.c_q.weight") for name in tensors)


def read(path: Path, tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None) -> Foreign:
    """The model of a checkpoint, in the words of the family.

    Raises:
        CheckpointError: of a later version, damaged, or without its settings or its tokenizer.
    """
    weights = {name.removeprefix(COMPILED): tensor for name, tensor in tensors.items()}
    later = [part for part in LATER if any(part in name.split(".") for name in weights)]
    if later:
        raise CheckpointError(
            f"{path} was written by a later nanochat than is read here: it has {', '.join(later)}",
            fix="use a checkpoint of the version of October 2025, such as nanochat-d32",
        )
    sizes = _sizes(path)
    found = {"model_type": "nanochat", "hidden_act": "relu2", "dtype": "float32", "rms_norm_eps": EPS}
    config = {
        **found,
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["n_embd"],
        "num_hidden_layers": sizes["n_layer"],
        "num_attention_heads": sizes["n_head"],
        "num_key_value_heads": sizes["n_kv_head"],
        "intermediate_size": 4 * sizes["n_embd"],
        "max_position_embeddings": sizes["sequence_len"],
        "rope_theta": 10000.0,
        "final_logit_softcapping": 15.0,
        "tie_word_embeddings": False,
    }
    return Foreign(config, {_renamed(name): t for name, t in weights.items()}, with_chat(tokenizer))


def _sizes(path: Path) -> dict[str, int]:
    meta = settings_of(path)
    try:
        sizes = read_json(meta)["model_config"]
        extra = sorted(set(sizes) - set(SIZES))
        wrong = [
            name
            for name in SIZES
            if type(sizes.get(name)) is not int or not 1 <= sizes[name] <= MAX_SIZES["max_seq_len"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{meta} holds no model_config: {error!r}", fix="fetch it again") from None
    if extra and (extra != ["window_pattern"] or set(str(sizes["window_pattern"])) != {"L"}):
        raise CheckpointError(
            f"{meta} has {', '.join(extra)}, of a later nanochat than is read here", fix="use an earlier checkpoint"
        )
    if wrong or sizes["n_layer"] > MAX_LAYERS:
        raise CheckpointError(f"{meta}: {', '.join(wrong) or 'n_layer'} is no size", fix="fetch it again")
    return sizes


def _renamed(name: str) -> str:
    """The family's name of a tensor; one that is not nanochat's stays, to be refused by it."""
    parts = {f"attn.c_{p}": f"self_attn.{p}_proj" for p in "qkv"}
    parts |= {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    match = re.fullmatch(r"transformer\.h\.(\d+)\.([\w.]+)\.weight", name)
    if match and match[2] in parts:
        return f"model.layers.{match[1]}.{parts[match[2]]}.weight"
    return "model.embed_tokens.weight" if name == "transformer.wte.weight" else name


def with_chat(tokenizer: Tokenizer | None) -> Tokenizer | None:
    """``tokenizer`` with nanochat's chat template, if it has its special tokens and no template of its own."""
    if tokenizer is None or tokenizer.chat_template is not None or not set(SPECIALS) <= set(tokenizer.special_names):
        return tokenizer
    bos = tokenizer.special_id_of(SPECIALS[0])
    return vocabulary.Tokenizer(
        tokenizer.to_json(), special={**tokenizer.special_text, "bos": SPECIALS[0]}, chat_template=CHAT, stop_ids=[bos]
    )
