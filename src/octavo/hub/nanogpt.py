"""nanoGPT checkpoints (ckpt.pt): GPT-2's shape with exact GELU and, by choice, no biases at all.

Source: nanoGPT, model.py and train.py. Checkpoints from before June 2023 were trained with GELU's tanh form, which
they do not say; the two differ by less than 0.0005 anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import CheckpointError
from octavo.hub import vocabulary
from octavo.hub.formats import Foreign
from octavo.hub.limits import MAX_LAYERS, MAX_SIZE

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.tokenizer import Tokenizer

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
KNOWN = (*SIZES, "bias", "dropout")
COMPILED = "_orig_mod."  # what torch.compile puts before every name
WRITE_LETTERS = (
    "python -c \"import json, pickle; print(json.dumps(pickle.load(open('meta.pkl', 'rb'))['stoi']))\" > meta.json"
)


def recognises(tree: Mapping[str, Any]) -> bool:
    """Whether the plain values of a file of ``torch.save`` are those of a nanoGPT checkpoint."""
    return isinstance(tree.get("model_args"), Mapping) and "model" in tree


def read(path: Path, tree: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None) -> Foreign:
    """The model of a checkpoint; its vocabulary is ``tokenizer``, or meta.json beside it.

    Raises:
        CheckpointError: settings or tensors that are not nanoGPT's, or no vocabulary.
    """
    sizes = tree["model_args"]
    if unknown := sorted(set(sizes) - set(KNOWN)):
        raise CheckpointError(f"{path} has the settings {', '.join(unknown)}, which nanoGPT has not", fix="retrain")
    for name in SIZES:
        if type(sizes.get(name)) is not int or not 1 <= sizes[name] < MAX_SIZE:
            raise CheckpointError(f"{path}: {name} = {sizes.get(name)!r} is no size", fix="fetch it again")
    if sizes["n_layer"] > MAX_LAYERS:
        raise CheckpointError(f"{path}: n_layer = {sizes['n_layer']} is not a number of layers", fix="fetch it again")
    weights = {name[6:].removeprefix(COMPILED): t for name, t in tensors.items() if name.startswith("model/")}
    weights = {name: t for name, t in weights.items() if not re.fullmatch(r"transformer\.h\.\d+\.attn\.bias", name)}
    bias = "transformer.ln_f.bias" in weights
    embedding, head = weights.get("transformer.wte.weight"), weights.pop("lm_head.weight", None)
    tied = head is None or (embedding is not None and head.shape == embedding.shape and bool((head == embedding).all()))
    if head is not None and not tied:
        weights["lm_head.weight"] = head
    config = {"model_type": "octavo", "model": _model(sizes, bias, tied), "dtype": "float32"}
    return Foreign(config, _renamed(weights, sizes["n_embd"]), tokenizer or _find_vocabulary(path, sizes["vocab_size"]))


def _model(sizes: Mapping[str, Any], bias: bool, tied: bool) -> dict[str, Any]:
    dropout = sizes.get("dropout") or 0.0
    attention = {"kind": "attention", "n_heads": sizes["n_head"], "qkv_bias": bias, "o_bias": bias, "dropout": dropout}
    mlp = {"kind": "mlp", "d_ff": 4 * sizes["n_embd"], "activation": "gelu", "bias": bias}
    return {
        "kind": "decoder",
        "d_model": sizes["n_embd"],
        "n_layers": sizes["n_layer"],
        "max_seq_len": sizes["block_size"],
        "vocab_size": sizes["vocab_size"],
        "blocks": {"block": {"mixer": attention, "channel": mlp, "dropout": dropout}},
        "norm": {"kind": "layernorm", "eps": 1e-5, "bias": bias},
        "positions": {"kind": "learned"},
        "tie_embeddings": tied,
        "embed_dropout": dropout,
    }


def _renamed(weights: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Our names; one that is not nanoGPT's stays, to be refused by it."""
    ends = {"wte.weight": "embed.weight", "wpe.weight": "positions.table.weight", "ln_f.weight": "norm.weight"}
    ends = {f"transformer.{theirs}": ours for theirs, ours in ends.items()}
    ends |= {"transformer.ln_f.bias": "norm.bias", "lm_head.weight": "head.weight"}
    parts = {
        "ln_1": "mixer.norm_in",
        "attn.c_proj": "mixer.mixer.o",
        "ln_2": "channel.norm_in",
        "mlp.c_fc": "channel.mixer.up",
        "mlp.c_proj": "channel.mixer.down",
    }
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"transformer\.h\.(\d+)\.([\w.]+)\.(weight|bias)", name)
        if match and match[2] == "attn.c_attn" and tensor.shape[0] == 3 * width:
            for letter, third in zip("qkv", tensor.split(width), strict=True):
                found[f"blocks.{match[1]}.layers.mixer.mixer.{letter}.{match[3]}"] = third
        elif match and match[2] in parts:
            found[f"blocks.{match[1]}.layers.{parts[match[2]]}.{match[3]}"] = tensor
        else:
            found[ends.get(name, name)] = tensor
    return found


def _find_vocabulary(path: Path, vocab_size: int) -> Tokenizer:
    letters = path.with_name("meta.json")
    if letters.is_file():
        return vocabulary.load(letters)
    if vocab_size >= 50257:
        fix = "give GPT-2's encoder.json and vocab.bpe with --tokenizer FOLDER"
    else:
        fix = f"beside its meta.pkl, which is a pickle too, run `{WRITE_LETTERS}`, then add --tokenizer meta.json"
    raise CheckpointError(f"{path} does not hold its vocabulary of {vocab_size} entries", fix=fix)
