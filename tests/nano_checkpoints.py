"""nanoGPT checkpoints as that project writes them, and reading pickles without the child."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from octavo.hub import pickled

LETTERS = "\n !,.abcdefghijklmnopqrst"
V, D, L, H, T = len(LETTERS), 32, 3, 4, 24


def read_here(path: Path, folder: Path) -> None:
    """What the child does, in this process and without its limits: for tests about what was read."""
    try:
        pickled._convert(str(path), str(folder), 2 * path.stat().st_size)
    except Exception as error:
        raise pickled.refused(path, pickled._explain(error)) from None


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 + 0.1 for name, shape in shapes.items()}


def gpt_weights(bias: bool) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (T, D)}
    sizes = {"ln_1": (D,), "attn.c_attn": (3 * D, D), "attn.c_proj": (D, D), "ln_2": (D,),
             "mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}  # fmt: skip
    named = {f"transformer.h.{i}.{name}": shape for i in range(L) for name, shape in sizes.items()}
    for name, shape in {**named, "transformer.ln_f": (D,)}.items():
        shapes |= {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})
    return draw(shapes)


def save_gpt(path: Path, w: dict[str, torch.Tensor], *, prefix: str = "", **changes) -> None:
    args = {"n_layer": L, "n_head": H, "n_embd": D, "block_size": T, "bias": "transformer.ln_f.bias" in w,
            "vocab_size": V, "dropout": 0.1} | changes  # fmt: skip
    model = {prefix + name: tensor for name, tensor in w.items()}
    model[f"{prefix}lm_head.weight"] = model[f"{prefix}transformer.wte.weight"]  # one memory, two names
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    config = {"dataset": "shakespeare_char", "out_dir": "out", "lr_decay_iters": 5000}
    torch.save({"model": model, "optimizer": moments, "model_args": args, "iter_num": 7,
                "best_val_loss": torch.tensor(1.5), "config": config}, path)  # fmt: skip


def save_letters(folder: Path) -> Path:
    path = folder / "meta.json"
    path.write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    return path
