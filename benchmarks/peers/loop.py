"""The loop that every peer of benchmarks/train.py runs: the same batches, AdamW, clipping; one JSON line a step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

LR, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=Path, required=True, help="tokens.npy and targets.npy, (steps, rows, T)")
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--metrics", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--variant", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def optimizer(model: torch.nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=fused)


def train(args: argparse.Namespace, step: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
    """Call ``step(tokens, targets)`` on each batch, (rows, T) int64 each; batches repeat when they run out."""
    tokens = np.load(args.batches / "tokens.npy", mmap_mode="r")
    targets = np.load(args.batches / "targets.npy", mmap_mode="r")
    with open(args.metrics, "w", buffering=1) as file:
        for n in range(args.steps):
            batch = [torch.from_numpy(x[n % len(x)].astype(np.int64)) for x in (tokens, targets)]
            loss = float(step(*batch))
            file.write(json.dumps({"kind": "train", "step": n + 1, "loss": loss}) + "\n")
