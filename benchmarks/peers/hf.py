"""transformers' Llama in the loop its documentation shows; variants: fp32, bf16 (autocast, fused AdamW)."""

from __future__ import annotations

import loop
import torch
from transformers import LlamaConfig, LlamaForCausalLM

args = loop.arguments()
shape = args.shape
config = LlamaConfig(
    vocab_size=shape["vocab_size"], hidden_size=shape["d_model"], num_hidden_layers=shape["n_layers"],
    num_attention_heads=shape["n_heads"], num_key_value_heads=shape["n_kv_heads"],
    intermediate_size=shape["d_ff"], max_position_embeddings=shape["seq_len"], tie_word_embeddings=True,
)  # fmt: skip
model = LlamaForCausalLM(config).train()
bf16 = args.variant == "bf16"
optimizer = loop.optimizer(model, fused=bf16)


def step(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        # shift_labels: the targets come shifted already.
        loss = model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), loop.CLIP)
    optimizer.step()
    return loss.detach()


loop.train(args, step)
