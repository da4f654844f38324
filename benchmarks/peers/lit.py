"""litgpt's GPT as its pretraining script sets it up: Fabric, torch.compile, its chunked loss.

Variants: bf16 (bf16-mixed, its fastest on a processor with matrix tiles), fp32 (its fastest on one without).
"""

from __future__ import annotations

import lightning as L
import loop
import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy

args = loop.arguments()
shape = args.shape
config = Config(
    block_size=shape["seq_len"], n_layer=shape["n_layers"], n_embd=shape["d_model"], vocab_size=shape["vocab_size"],
    padded_vocab_size=shape["vocab_size"], n_head=shape["n_heads"], n_query_groups=shape["n_kv_heads"],
    norm_class_name="RMSNorm", norm_eps=1e-6, parallel_residual=False, rotary_percentage=1.0, bias=False,
    mlp_class_name="LLaMAMLP", intermediate_size=shape["d_ff"],
)  # fmt: skip
fabric = L.Fabric(accelerator="cpu", devices=1, precision="32-true" if args.variant == "fp32" else "bf16-mixed")
fabric.launch()
with fabric.init_module():
    model = GPT(config)
for module in model.modules():  # as its pretraining initialises linear and embedding layers, without its depth rule
    if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
        torch.nn.init.normal_(module.weight, std=0.02)
model.lm_head.weight = model.transformer.wte.weight
model = fabric.setup(torch.compile(model))
optimizer = fabric.setup_optimizers(loop.optimizer(model, fused=False))


def step(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = chunked_cross_entropy(model(tokens), targets)
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=loop.CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


loop.train(args, step)
