"""What every checkpoint family is asked beside transformers' own class, on random weights: the folder that one of the
two writes is the same model in the other. The files of families name the cases and say what is particular."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.hub.folder import FAMILIES, load_model, model_config, read_config, save_model
from octavo.infer.generate import generate
from octavo.infer.sampling import SamplingConfig
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs

V, T = 61, 12
ENDS: dict[str, Any] = {"vocab_size": V, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
Same = Callable[[Tensor, Tensor], None]


class Bare:
    """As much of a tokenizer as decoding needs."""

    class special:
        pad = bos = eos = unk = turn_start = turn_end = None

    vocab_size = V

    def stream(self):
        return self

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def some_tokens(rows: int = 3, n: int = T) -> Tensor:
    return torch.randint(V, (rows, n), generator=torch.Generator().manual_seed(3))


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


# ------------------------------------------------------------------------------------------------- models


@torch.no_grad()
def filled(model: Any, seed: int = 7, spread: float = 0.2) -> Any:
    """Weights that are neither zero nor one nor shared by accident, and scores of experts that are far apart."""
    generator = torch.Generator().manual_seed(seed)
    biases = [(key, tensor) for key, tensor in model.named_buffers() if key.endswith("_bias")]  # of experts' choice
    for key, tensor in [*model.named_parameters(), *biases]:
        drawn = torch.randn(tensor.shape, generator=generator)
        is_norm = ("norm" in key or "ln" in key) and key.endswith("weight")
        tensor.copy_(drawn * (0.6 if "gate.weight" in key or "correction_bias" in key else spread) + float(is_norm))
    return model.float().eval()


@dataclass(frozen=True)
class Pair:
    """Their model, and ours loaded from its folder."""

    name: str
    theirs: Any
    ours: Decoder
    folder: Path

    @property
    def family(self) -> str:
        return self.name.split()[0]


class Cases:
    """Configurations of transformers' classes by name: the family, then what sets the case apart.

    Args:
        spread: of the random weights.
        how: how a class computes, beside its eager attention.
    """

    def __init__(self, configs: Mapping[str, Any], *, spread: float = 0.2, **how: Any):
        self.configs, self.spread, self.how = configs, spread, {"attn_implementation": "eager", **how}

    def reference(self, name: str, attention: str = "", **changes: Any) -> Any:
        """Their model, some settings changed."""
        config = type(self.configs[name])(**self.configs[name].to_dict() | changes)
        # Falcon's ALiBi counts twice in transformers' eager form: once in the scores, once more in the mask.
        attention = attention or ("sdpa" if name.startswith("falcon RW") else self.how["attn_implementation"])
        how = {**self.how, "attn_implementation": attention}
        return filled(transformers.AutoModelForCausalLM.from_config(config, **how), spread=self.spread)

    def saved(self, name: str, folder: Path, **changes: Any) -> Path:
        """Their folder, some keys of its config.json changed; None removes one."""
        self.reference(name).save_pretrained(folder)
        config = read_config(folder) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return folder

    def said(self, name: str, **changes: Any) -> dict[str, Any]:
        """Their config.json, some keys changed."""
        return json.loads(self.configs[name].to_json_string()) | changes

    def pairs(self) -> Any:
        """A fixture that gives a Pair of every case."""

        @pytest.fixture(scope="module", params=self.configs)
        def pair(request, tmp_path_factory):
            theirs, folder = self.reference(request.param), tmp_path_factory.mktemp("family")
            theirs.save_pretrained(folder)
            return Pair(request.param, theirs, load_model(folder), folder)

        return pair


# ------------------------------------------------------------------------------------------- what is computed


def valid_of(side: str) -> Tensor:
    """Which of three rows' tokens are text: T, T - 5 and 2 of them, padded on a side; "none": all."""
    n, order = torch.tensor([T, T - 5, 2])[:, None], torch.arange(T)
    return {"none": order >= 0 * n, "right": order < n, "left": order >= T - n}[side]


def places(valid: Tensor) -> Tensor:
    return (valid.long().cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def check_states(
    pair: Pair,
    side: str = "none",
    *,
    same: Same = close,
    takes: Collection[str] = ("attention_mask", "position_ids"),
    order: Callable[[Sequence[Tensor]], Sequence[Tensor | None]] = list,
    **options: Any,
) -> None:
    """Logits and every hidden state.

    Args:
        takes: what their class is told of padding.
        order: their hidden states in our order, None where they have none.
    """
    tokens, valid = some_tokens(), valid_of(side)
    told = {"attention_mask": valid.long(), "position_ids": places(valid)}
    options |= {key: told[key] for key in takes}
    a = pair.theirs(tokens, output_hidden_states=True, **options)
    b = pair.ours(Inputs(tokens, valid=None if side == "none" else valid), needs=("logits", "hidden_states"))
    assert float(a.logits[valid].std()) > 0.3  # an agreement about something
    states = order(a.hidden_states)
    assert len(states) == pair.ours.config.n_layers + 1
    for got, wanted in zip((b.logits, *b.hidden_states), (a.logits, *states), strict=True):
        if wanted is not None:
            same(got[valid], wanted[valid])


@torch.no_grad()
def check_decoding(pair: Pair, prompts: tuple[int, int] = (5, 5)) -> None:
    """Token by token with the cache of each, after prompts of these lengths, padded on the left."""
    tokens, n, longest = some_tokens(2), torch.tensor(prompts)[:, None], max(prompts)
    valid, padded = torch.ones(2, T, dtype=torch.bool), min(prompts) < longest
    valid[:, :longest] = torch.arange(longest) >= longest - n
    cache, state = None, pair.ours.new_state(2, T)
    for start, stop in [(0, longest), *((t, t + 1) for t in range(longest, T))]:
        span = slice(start, stop)
        told = {"attention_mask": valid[:, :stop].long(), "position_ids": places(valid)[:, span]} if padded else {}
        a = pair.theirs(tokens[:, span], past_key_values=cache, use_cache=True, **told)
        cache = a.past_key_values
        b = pair.ours(Inputs(tokens[:, span], valid=valid[:, span] if padded else None), state=state)
        close(b.logits[valid[:, span]], a.logits[valid[:, span]])


def in_parts(ours: Decoder, tokens: Tensor, sizes: int | list[int]) -> Tensor:
    """The logits of ``tokens`` read part by part with a state."""
    state = ours.new_state(*tokens.shape)
    return torch.cat([ours(Inputs(part), state).logits for part in tokens.split(sizes, 1)], 1)


def check_greedy(ours: Decoder, theirs: Any, prompts: Sequence[Tensor], n: int = 15, **options: Any) -> set[int]:
    """The same text as transformers' generate, prompt by prompt there and in one batch here; its tokens."""
    config = SamplingConfig(temperature=0, max_new_tokens=n)
    said = list(generate(ours, Bare(), [prompt.tolist() for prompt in prompts], config, stop_ids=()))
    for prompt, mine in zip(prompts, said, strict=True):
        mask = torch.ones(1, len(prompt))
        wanted = theirs.generate(
            prompt[None], do_sample=False, max_new_tokens=n, attention_mask=mask, pad_token_id=0, **options
        )
        assert list(mine.ids) == wanted[0, len(prompt) :].tolist()
    return {token for mine in said for token in mine.ids}


# ----------------------------------------------------------------------------------------------- folders


def read_there(folder: Path) -> Any:
    """Our folder in their class, every tensor accounted for."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )
    assert not [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
    return model.eval()


@torch.no_grad()
def check_export(
    pair: Pair,
    folder: Path,
    families: Collection[str] = (),
    *,
    prompts: Sequence[int] = (5,),
    same: Same = close,
    shard_bytes: int = 10**9,
    **options: Any,
) -> set[int]:
    """Saved here it loads there and here, and says the same text; its tokens.

    Args:
        families: those whose words may say it; the pair's own where none is named.
        prompts: the lengths of the prompts that both go on from.
    """
    assert save_model(pair.ours, folder, shard_bytes=shard_bytes) in (families or (pair.family,))
    again, tokens = read_there(folder), some_tokens()
    same(again(tokens, **options).logits, pair.theirs(tokens, **options).logits)
    assert torch.equal(load_model(folder)(Inputs(tokens)).logits, pair.ours(Inputs(tokens)).logits)
    return check_greedy(pair.ours, again, [tokens[i, :n] for i, n in enumerate(prompts)])


def check_same_tensors(one: Path, other: Path) -> None:
    """Two folders have the same tensors, to the bit. Heads have two names in transformers, old and new."""

    def stored(folder: Path) -> dict[str, Tensor]:
        files = [load_file(path) for path in folder.glob("*.safetensors")]
        return {name.replace("embed_out.", "lm_head."): tensor for file in files for name, tensor in file.items()}

    a, b = stored(one), stored(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def tensors_of(config: Decoder.Config, model_type: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a folder of this family has, without weights."""
    own = {name: tuple(p.shape) for name, p in build(config, device="meta").named_parameters()}
    return {e.theirs: e.shape([own[part] for part in e.ours]) for e in FAMILIES[model_type].entries(config)}


# --------------------------------------------------------------------------------------------- strictness


def refused(load: Callable[[], object], *said: str) -> None:
    """``load`` is refused in one line that says this and what to do."""
    with pytest.raises(CheckpointError) as caught:
        load()
    for part in (*said, "Fix:"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def damaged(folder: Path, changes: Mapping[str, tuple[int, ...] | Tensor | None]) -> Path:
    """The folder with some tensors removed, or replaced, by zeros of a shape."""
    tensors = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        if change is None:
            tensors.pop(name)
        else:
            tensors[name] = torch.zeros(change) if isinstance(change, tuple) else change
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def check_left_out(hf: Mapping[str, Any], config_class: Any, but: Collection[str] = ()) -> None:
    """A config.json without a key is refused, or read as their class reads it; key by key.

    Args:
        but: keys whose absence the tensors must speak for, and what describes no function.
    """
    compared = 0
    for key in hf.keys() - {"model_type", *but}:
        less = {name: value for name, value in hf.items() if name != key}
        try:
            ours = model_config(less)
            theirs = model_config(config_class.from_dict(less).to_dict())
        except CheckpointError:  # another key does not fit what their class means without this one
            continue
        assert ours == theirs, key
        compared += 1
    assert compared >= 5
