"""Small GGUF files, written with the names and the rearrangements of llama.cpp's convert_hf_to_gguf.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from octavo.tokenizer.pieces import byte_alphabet

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = [
    "t h",
    "th e",
    "Ġ the",
    "Ġ c",
    "Ġc a",
    "Ġca t",
    "i n",
    "Ġ Ġ",
    "ĠĠ ĠĠ",
    "1 2",
    "12 3",
    "Ġ 1",
    "' s",
    "Ċ Ċ",
    "Ã ©",
]
BPE_PIECES = [
    "<|end|>", "<|im_start|>", "<|im_end|>", "<think>",
    *byte_alphabet().values(),
    *(merge.replace(" ", "") for merge in MERGES),
]  # fmt: skip
V = 288  # a few rows more than entries, as checkpoints have; a multiple of 32
PADS = [f"[PAD{i}]" for i in range(V - len(BPE_PIECES))]  # llama.cpp wants a name for each

SHAPE = {
    "vocab_size": V, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
MODELS: dict[str, tuple[str, Any]] = {
    "llama": ("llama", transformers.LlamaConfig(**SHAPE, **THETA, rms_norm_eps=1e-5)),
    "llama tied": ("llama", transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True, head_dim=32)),
    "llama biased": ("llama", transformers.LlamaConfig(**SHAPE, attention_bias=True)),
    "qwen2": ("qwen2", transformers.Qwen2Config(**SHAPE, **THETA, tie_word_embeddings=True)),
    "qwen3": ("qwen3", transformers.Qwen3Config(**SHAPE, head_dim=32)),
    "gemma2": (
        "gemma2",
        transformers.Gemma2Config(
            **SHAPE, head_dim=32, query_pre_attn_scalar=32, sliding_window=4, attn_logit_softcapping=0.5,
            final_logit_softcapping=1.5, tie_word_embeddings=True,
        ),
    ),
}  # fmt: skip


def reference(name: str) -> Any:
    """A transformers model in which no weight is zero, one or shared by accident."""
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name][1], attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            shift = float("norm" in key and MODELS[name][0] != "gemma2")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + shift)
    return model


def write(
    path: Path, name: str, model: Any, *, matrices: str = "F32", tokenizer: dict[str, Any] | None = None, **more: Any
) -> dict[str, np.ndarray]:
    """Write ``model`` (of MODELS[name]) with ``matrices`` stored in that type; gives what was stored, as float32.

    ``tokenizer`` replaces keys of BPE, ``more`` adds metadata or, where None, leaves it out.
    """
    import gguf

    arch, config = MODELS[name]
    writer = gguf.GGUFWriter(path, arch)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    meta: dict[str, Any] = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        **({f"{arch}.rope.dimension_count": head_dim, f"{arch}.vocab_size": V} if arch == "llama" else {}),
    }
    if arch == "gemma2":
        meta |= {
            "gemma2.attn_logit_softcapping": float(config.attn_logit_softcapping),
            "gemma2.final_logit_softcapping": float(config.final_logit_softcapping),
            "gemma2.attention.sliding_window": config.sliding_window,
        }
    for key, value in {**meta, **BPE, **(tokenizer or {}), **more}.items():
        if value is not None:
            add(writer, key, value)
    kind = gguf.GGMLQuantizationType[matrices]
    stored = {}
    for their_name, array in tensors(name, model).items():
        here = kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(array, here)
        raw = None if here.name in ("F32", "F16") else here
        writer.add_tensor(their_name, data, raw_dtype=raw)
        stored[their_name] = gguf.quants.dequantize(data, here).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def add(writer: Any, key: str, value: Any) -> None:
    """One key of metadata in the type that llama.cpp gives it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def tensors(name: str, model: Any) -> dict[str, np.ndarray]:
    """The weights under llama.cpp's names, which its own package gives, and rearranged as its converter does."""
    import gguf

    arch, config = MODELS[name]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    found = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy().copy()
        if arch == "llama" and ".q_proj." in key:
            array = permuted(array, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in key:
            array = permuted(array, config.num_key_value_heads)
        if arch == "gemma2" and key.endswith("norm.weight"):
            array = array + 1
        found[names.get_name(key, try_suffixes=(".weight", ".bias")) or key] = array
    return found


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of halves to rows of neighbours, head by head."""
    per_head = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return per_head.swapaxes(1, 2).reshape(weights.shape)


BPE: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": BPE_PIECES + PADS,
    "tokenizer.ggml.token_type": [CONTROL] * 3
    + [USER_DEFINED]
    + [NORMAL] * (len(BPE_PIECES) - 4)
    + [UNUSED] * len(PADS),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": CHATML,
}
