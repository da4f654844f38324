"""A plain fp32 loop over a plain model in eager torch, as small training projects ship it.

Variant llama: RMSNorm, rotary positions, grouped heads repeated in memory, gated MLP. Variant gpt: LayerNorm,
learned positions, GELU, dropout on embeddings, branches and attention.
"""

from __future__ import annotations

import loop
import torch
import torch.nn.functional as F
from torch import Tensor, nn

args = loop.arguments()
shape, llama = args.shape, args.variant == "llama"
D, H, T = shape["d_model"], shape["n_heads"], shape["seq_len"]
G, K, P = shape["n_kv_heads"], D // H, shape["dropout"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        bias = not llama
        self.norms = nn.ModuleList((nn.RMSNorm(D, 1e-6) if llama else nn.LayerNorm(D)) for _ in range(2))
        self.q, self.o = nn.Linear(D, H * K, bias=bias), nn.Linear(H * K, D, bias=bias)
        self.kv = nn.Linear(D, 2 * G * K, bias=bias)
        wide = shape["d_ff"]
        self.gate = nn.Linear(D, wide, bias=False) if llama else None
        self.up, self.down = nn.Linear(D, wide, bias=bias), nn.Linear(wide, D, bias=bias)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        B = x.shape[0]
        y = self.norms[0](x)
        q = self.q(y).view(B, -1, H, K).transpose(1, 2)
        k, v = self.kv(y).view(B, -1, 2 * G, K).transpose(1, 2).chunk(2, 1)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=P if self.training else 0.0)
        x = x + F.dropout(self.o(y.transpose(1, 2).reshape(B, -1, H * K)), P)
        y = self.norms[1](x)
        y = F.silu(self.gate(y)) * self.up(y) if self.gate is not None else F.gelu(self.up(y))
        return x + F.dropout(self.down(y), P)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape["vocab_size"], D)
        self.places = None if llama else nn.Embedding(T, D)
        self.layers = nn.ModuleList(Layer() for _ in range(shape["n_layers"]))
        self.norm = nn.RMSNorm(D, 1e-6) if llama else nn.LayerNorm(D)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        turn = None
        if self.places is not None:
            x = x + self.places.weight[: tokens.shape[1]]
        else:
            rates = 1e4 ** (-torch.arange(0, K, 2) / K)
            angles = torch.outer(torch.arange(tokens.shape[1]), torch.cat([rates, rates]))
            turn = angles.cos(), angles.sin()
        x = F.dropout(x, P)
        for layer in self.layers:
            x = layer(x, turn)
        return F.linear(self.norm(x), self.embed.weight)


model = Plain().train()
optimizer = loop.optimizer(model, fused=False)


def step(tokens: Tensor, targets: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), loop.CLIP)
    optimizer.step()
    return loss.detach()


loop.train(args, step)
