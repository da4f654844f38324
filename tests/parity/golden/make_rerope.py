"""What the author's patches of Llama give (Su 2023, github.com/bojone/rerope at 2cbd019): rerope.safetensors here.

    pip install --no-deps transformers==4.31.0 tokenizers==0.13.3 huggingface_hub==0.16.4
    PYTHONPATH=FOLDER python make_rerope.py     # FOLDER: rerope_patch.py and leaky_rerope_patch.py of that commit

A small Llama reads 24 tokens at once, and token by token from its cache, with a window of 6 where 16 were trained.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "vocab_size": 19, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip

tokens = torch.randint(19, (2, 24), generator=torch.Generator().manual_seed(0))
found = {"tokens": tokens}
for name in ("rerope", "leaky_rerope"):
    patch = importlib.import_module(f"{name}_patch")
    patch.window, patch.training_length, patch.scaling_factor = 6, 16, 4
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        found[f"{name}.whole"] = model(tokens).logits
        past, steps = None, []
        for t in range(tokens.shape[1]):
            out = model(tokens[:, t : t + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
        found[f"{name}.steps"] = torch.cat(steps, 1)
    found |= {f"weights.{key}": p for key, p in model.state_dict().items() if "inv_freq" not in key}
save_file({name: t.contiguous() for name, t in found.items()}, Path(__file__).parent / "rerope.safetensors")
