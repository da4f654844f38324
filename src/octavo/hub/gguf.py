"""GGUF (llama.cpp): Llama, Qwen2, Qwen3, Gemma 2 and Mamba with their tokenizers and chat templates, from one file.

Matrices of a quantised type that is ours keep their codes (hub/gguf_blocks.py), any other type becomes float32. Names,
units and the rearranged weights are those of llama.cpp: convert_hf_to_gguf.py (which permutes Llama's queries and keys
and adds one to Gemma's norms), src/llama-arch.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import CheckpointError
from octavo.hub import gguf_blocks, vocabulary
from octavo.hub.formats import Foreign
from octavo.hub.gguf_file import MAGIC, GGUFFile, open_file
from octavo.hub.limits import MAX_LAYERS, MAX_SIZE, MAX_SIZES
from octavo.hub.llama2c import half_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.hub.small_weights import Codes
    from octavo.tokenizer import Tokenizer

MAX_HEADS = MAX_SIZES["n_heads"]
GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = {
    **LAYER_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
MAMBA_ENDS = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}
MAMBA_NAMES = {
    "attn_norm": "norm",
    **{
        f"ssm_{short}": f"mixer.{name}_proj" for short, name in {"in": "in", "x": "x", "dt": "dt", "out": "out"}.items()
    },
    "ssm_conv1d": "mixer.conv1d",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
}
# Settings whose value changes nothing, or is read below; any other one might change the mathematics.
KNOWN = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "rope.dimension_count",
    "rope.freq_base", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "tensor_data_layout", "rope.scaling.type",
    "expert_count", "expert_used_count", "attention.causal",
}  # fmt: skip
PLAIN = {
    "rope.scaling.type": "none",
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "ssm.dt_b_c_rms": False,
}


@dataclass(frozen=True)
class Architecture:
    """How one ``general.architecture`` reads as a Hugging Face family."""

    settings: Callable[[Settings], dict[str, Any]]
    known: frozenset[str] = frozenset()
    names: Mapping[str, str] = field(default_factory=lambda: LAYER_NAMES)
    ends: Mapping[str, str] = field(default_factory=lambda: GLOBAL_NAMES)
    layers: str = "model.layers"
    every: str = "attn_q.weight"  # what each layer has
    interleaved: bool = False  # queries and keys are stored for rotary pairs (2i, 2i + 1)
    norm_offset: float = 0.0  # what is added to the weights of norms


@dataclass(frozen=True)
class Settings:
    """The metadata of one architecture, checked as it is read."""

    file: GGUFFile
    architecture: str

    def count(self, key: str, most: int, default: int | None = None) -> int:
        """A whole number from 1 to ``most``."""
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not int or not 1 <= value <= most:
            raise _wrong(self.file, f"{self.architecture}.{key} = {value!r} is not a number from 1 to {most}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number; the shortest decimal that the file's 32 bits can mean."""
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise _wrong(self.file, f"{self.architecture}.{key} = {value!r} is not a positive number")
        return float(str(np.float32(value)))

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.metadata


def _llama(settings: Settings) -> dict[str, Any]:
    return {"model_type": "llama", "attention_bias": "blk.0.attn_output.bias" in settings.file.tensors}


def _qwen2(settings: Settings) -> dict[str, Any]:
    return {"model_type": "qwen2", "use_sliding_window": False}


def _qwen3(settings: Settings) -> dict[str, Any]:
    return {"model_type": "qwen3", "use_sliding_window": False, "attention_bias": False}


def _gemma2(settings: Settings) -> dict[str, Any]:
    n_layers = settings.count("block_count", MAX_LAYERS)
    heads, width = settings.count("attention.head_count", MAX_HEADS), settings.count("embedding_length", MAX_SIZE)
    # The file does not say what scores are divided by; llama.cpp knows the 27B model by its number of layers.
    divisor = width // heads if n_layers == 46 else settings.count("attention.key_length", MAX_HEADS, width // heads)
    return {
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": divisor,
        "attn_logit_softcapping": settings.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": settings.real("final_logit_softcapping", 30.0),
        "sliding_window": settings.count("attention.sliding_window", MAX_SIZES["max_seq_len"], 4096),
    }


def _mamba(settings: Settings) -> dict[str, Any]:
    width, inner = settings.count("embedding_length", MAX_SIZE), settings.count("ssm.inner_size", MAX_SIZE)
    return {
        "model_type": "mamba",
        "expand": inner / width,
        "conv_kernel": settings.count("ssm.conv_kernel", MAX_SIZE),
        "state_size": settings.count("ssm.state_size", MAX_SIZE),
        "time_step_rank": settings.count("ssm.time_step_rank", MAX_SIZE),
        "layer_norm_epsilon": settings.real("attention.layer_norm_rms_epsilon"),
        "use_conv_bias": "blk.0.ssm_conv1d.bias" in settings.file.tensors,
        "use_bias": False,
    }


SSM = frozenset(f"ssm.{key}" for key in ("conv_kernel", "inner_size", "state_size", "time_step_rank", "dt_b_c_rms"))
CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"})
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, interleaved=True),
    "qwen2": Architecture(_qwen2),
    "qwen3": Architecture(_qwen3),
    "gemma2": Architecture(_gemma2, CAPS, GEMMA_NAMES, norm_offset=1.0),
    "mamba": Architecture(_mamba, SSM, MAMBA_NAMES, MAMBA_ENDS, "backbone.layers", "ssm_in.weight"),
}


def recognises(head: bytes, size: int, name: str) -> bool:
    """Whether a file that begins with ``head`` is a GGUF file."""
    return head[:4] == MAGIC


def read(path: Path, tokenizer: Tokenizer | None = None) -> Foreign:
    """Read a model with its tokenizer.

    Raises:
        CheckpointError: damaged, or of an architecture, tensor type or tokenizer that is not known here.
        ConfigError: the `gguf` package is not installed.
    """
    file = open_file(path)
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} holds the architecture {name!r}", fix=f"known in GGUF are {', '.join(ARCHITECTURES)}"
        )
    architecture, settings = ARCHITECTURES[name], Settings(file, name)
    config = _config(settings, architecture)
    tokenizer = tokenizer or read_tokenizer(file)
    kinds = {_renamed(name, architecture)[0]: file.type_name(name) for name in file.tensors}
    quantised = {name: kind for name, kind in kinds.items() if kind not in ("F64", "F32", "F16", "BF16")}
    return Foreign(config, _tensors(file, config, architecture), tokenizer, quantised)


def _wrong(file: GGUFFile, what: str) -> CheckpointError:
    return CheckpointError(f"{file.path}: {what}", fix="use another file of this model")


def _config(settings: Settings, architecture: Architecture) -> dict[str, Any]:
    file, prefix = settings.file, f"{settings.architecture}."
    for key, value in file.metadata.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and (
            name not in KNOWN | architecture.known or (name in PLAIN and value != PLAIN[name])
        ):
            raise _wrong(file, f"{key} = {str(value)[:60]} is not supported")
    if "rope_freqs.weight" in file.tensors:
        raise _wrong(file, "rope_freqs.weight stretches the rotary positions, which is not supported")
    n_layers = settings.count("block_count", MAX_LAYERS)
    if (last := f"blk.{n_layers - 1}.{architecture.every}") not in file.tensors:
        raise _wrong(file, f"{prefix}block_count = {n_layers}, but there is no tensor {last}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise _wrong(file, "there is no matrix token_embd.weight")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": settings.count("embedding_length", MAX_SIZE),
        "num_hidden_layers": n_layers,
        "max_position_embeddings": settings.count("context_length", MAX_SIZES["max_seq_len"]),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": _dtype(file),
        **({} if architecture.names is MAMBA_NAMES else _attention(settings)),
        **architecture.settings(settings),
    }


def _attention(settings: Settings) -> dict[str, Any]:
    """What all families with attention have."""
    heads, width = settings.count("attention.head_count", MAX_HEADS), settings.count("embedding_length", MAX_SIZE)
    head_dim = settings.count("attention.key_length", MAX_HEADS, max(width // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if settings.count(key, MAX_HEADS, head_dim) != head_dim:
            what = f"{settings.architecture}.{key} differs from the head width {head_dim}, which is not supported"
            raise _wrong(settings.file, what)
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": settings.count("attention.head_count_kv", MAX_HEADS, heads),
        "head_dim": head_dim,
        "intermediate_size": settings.count("feed_forward_length", MAX_SIZE),
        "rms_norm_eps": settings.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.real("rope.freq_base", 10000.0),
    }


WIDE = (".ssm_a", ".ssm_conv1d.weight")
COMPUTED = ("ssm_a", "ssm_conv1d")
"""What is not taken as it stands in the file."""


def _dtype(file: GGUFFile) -> str:
    """16 bits where every matrix has the same 16 bits, else float32."""
    # Of Mamba, the decays and the convolution are 32 bits wide in any file.
    matrices = (n for n, entry in file.tensors.items() if len(entry.shape) > 1 and not n.endswith(WIDE))
    kinds = {file.type_name(name) for name in matrices}
    return {"BF16": "bfloat16", "F16": "float16"}.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _tensors(file: GGUFFile, config: Mapping[str, Any], architecture: Architecture) -> dict[str, Tensor | Codes]:
    import torch

    from octavo.hub.folder import check_shapes
    from octavo.hub.small_weights import Codes

    shapes = {name: (entry.shape, *_renamed(name, architecture)) for name, entry in file.tensors.items()}
    heads = {"attn_q": config.get("num_attention_heads", 1), "attn_k": config.get("num_key_value_heads", 1)}
    for name, (shape, _, stem) in shapes.items():
        if architecture.interleaved and stem in heads and shape[0] % (2 * heads[stem]):
            raise _wrong(file, f"{name} of shape {list(shape)} cannot be {heads[stem]} heads")
    wide = {t: (shape[0], 1, *shape[1:]) for shape, t, stem in shapes.values() if stem == "ssm_conv1d" and shape[1:]}
    check_shapes(config, {theirs: shape for shape, theirs, _ in shapes.values()} | wide, file.path)
    dtype = getattr(torch, config["dtype"])
    found: dict[str, Tensor | Codes] = {}
    for name, entry in file.tensors.items():
        theirs, stem = _renamed(name, architecture)
        if len(entry.shape) == 2 and file.type_name(name) in gguf_blocks.KEPT and stem not in COMPUTED:
            codes = gguf_blocks.read(file, name)
            if architecture.interleaved and stem in heads:
                numbers, scales = (half_pairs(part, heads[stem]) for part in (codes.codes, codes.scales))
                codes = Codes(codes.bits, numbers, scales, codes.kind)
            found[theirs] = codes
            continue
        tensor = torch.from_numpy(file.array(name))
        if architecture.norm_offset and stem.endswith("norm"):
            tensor = tensor - architecture.norm_offset
        if architecture.interleaved and stem in heads:
            tensor = half_pairs(tensor, heads[stem])
        if stem == "ssm_a":
            if not bool((tensor < 0).all()):
                raise _wrong(file, f"{name} has decays that are not negative")
            tensor = (-tensor).log()
        if stem == "ssm_conv1d" and entry.shape[1:]:
            tensor = tensor[:, None]
        found[theirs] = tensor.to(dtype)
    return found


def _renamed(name: str, architecture: Architecture) -> tuple[str, str]:
    """A tensor's Hugging Face name, and its own without layer and ending; an unknown one keeps its name."""
    names, ends = architecture.names, architecture.ends
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)(\.weight|\.bias|)", name):
        layer, stem, part = match.groups()
        return (f"{architecture.layers}.{layer}.{names[stem]}{part}" if stem in names else name), stem
    stem, _, part = name.rpartition(".")
    return (f"{ends[stem]}.{part}" if stem in ends else name), stem


# --------------------------------------------------------------------------------------------- tokenizer


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer in a GGUF file, with its chat template.

    Raises:
        CheckpointError: a kind that is not known here, or lists that do not fit together.
    """
    meta = {key.removeprefix("tokenizer."): value for key, value in file.metadata.items()}
    kind, pieces = meta.get("ggml.model"), meta.get("ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(pieces, list):
        raise CheckpointError(
            f"{file.path} has a tokenizer of the kind {kind!r}, known are gpt2 and llama",
            fix="give the model's own with octavo convert --tokenizer FOLDER",
        )
    n_entries = len(pieces)
    kinds = _numbers(file, meta, "ggml.token_type", n_entries, default=vocabulary.NORMAL)
    while kinds and kinds[-1] == vocabulary.UNUSED:  # names for rows that only fill up the embedding
        kinds.pop()
    pieces = pieces[: len(kinds)]
    cut = meta.get("ggml.pre", "gpt-2" if kind == "gpt2" else "default")
    adds_bos = meta.get("ggml.add_bos_token", kind == "llama" or cut in vocabulary.WHOLE_WORDS_FIRST)
    template = meta.get("chat_template")
    template = template if isinstance(template, str) else None
    roles = {}
    for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        i = meta.get(f"ggml.{key}_token_id")
        # A beginning that no text gets would be put before every prompt.
        if type(i) is int and 0 <= i < len(pieces) and (role != "bos" or adds_bos or "bos_token" in (template or "")):
            roles[role] = i
    ends = [meta.get(f"ggml.{key}_token_id") for key in ("eot", "eom")]
    more = {"chat_template": template, "stop_ids": [i for i in ends if type(i) is int]}
    if kind == "gpt2":
        merges = [tuple(pair.split(" ")) for pair in _texts(meta.get("ggml.merges"))]
        if any(len(pair) != 2 for pair in merges):
            raise _wrong(file, "a merge of the tokenizer is not a pair")
        return vocabulary.byte_level(file.path, pieces, merges, kinds, roles, str(cut), **more)
    scores = _numbers(file, meta, "ggml.scores", n_entries)[: len(pieces)]
    space = meta.get("ggml.add_space_prefix", True) is not False
    return vocabulary.sentencepiece(file.path, pieces, scores, kinds, roles, leading_space=space, **more)


def _texts(value: Any) -> list[str]:
    return value if isinstance(value, list) else []


def _numbers(file: GGUFFile, meta: Mapping[str, Any], key: str, n: int, default: int | None = None) -> list[Any]:
    values = meta.get(key)
    if values is None and default is not None:
        return [default] * n
    if not isinstance(values, np.ndarray) or len(values) != n or not np.isfinite(values).all():
        raise _wrong(file, f"tokenizer.{key} has not one number for each of {n} entries")
    return values.tolist()
