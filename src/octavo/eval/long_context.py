"""How far a trained model can read: perplexity, retrieval, memory and time against length, for each way of reading.

Nothing is trained and no weight changes: a way of reading is another reader of attention (nn/readers.py) or another
scaling of the rotary table (nn/rope_scaling.py), set on the loaded model and taken off again. Every method gets the
same texts. At each length the same last tokens are scored; only how much text stands before them differs, so a
difference between two lengths is what the added text did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from octavo.errors import ConfigError, DataError, UnsupportedError
from octavo.models.cost import state_bytes
from octavo.models.decoder import Decoder
from octavo.models.override import set_rope_scaling
from octavo.nn.attention import Attention, use_reader
from octavo.nn.contracts import Inputs
from octavo.nn.readers import READERS
from octavo.nn.rope import RotaryPositions
from octavo.nn.rope_scaling import ROPE_SCALINGS
from octavo.schema import Config

if TYPE_CHECKING:
    from octavo.eval.runner import Documents

FORMAT = 1


@dataclass(frozen=True)
class Method:
    """A way of reading ``length`` tokens with a model of ``trained``: by a reader or a rope scaling, or as it is."""

    says: str
    reader: Callable[[int, int], dict[str, Any]] | None = None
    scaling: Callable[[int, int], dict[str, Any]] | None = None


def _factor(kind: str) -> Callable[[int, int], dict[str, Any]]:
    return lambda trained, length: {"kind": kind, "factor": max(1.0, length / trained)}


def _windows(trained: int, length: int) -> dict[str, Any]:
    half = max(1, trained // 2)
    return {"kind": "parallel_windows", "window": half, "n_windows": max(0, -(-(length - half) // half))}


METHODS: dict[str, Method] = {
    "plain": Method("as trained: the control"),
    "linear": Method("position interpolation by length / trained", scaling=_factor("linear")),
    "ntk": Method("NTK-aware base by length / trained", scaling=_factor("ntk")),
    "dynamic": Method(
        "NTK whose base grows with the text",
        scaling=lambda trained, length: {"kind": "dynamic", "factor": 1.0, "original": trained},
    ),
    "yarn": Method(
        "YaRN by length / trained",
        scaling=lambda trained, length: {**_factor("yarn")(trained, length), "original": trained},
    ),
    "rerope": Method(
        "ReRoPE, distances end at trained / 2",
        reader=lambda trained, length: {"kind": "rerope", "window": max(1, trained // 2)},
    ),
    "leaky_rerope": Method(
        "Leaky ReRoPE, distances beyond trained / 2 squeezed into the trained ones",
        reader=lambda trained, length: {
            "kind": "leaky_rerope", "window": max(1, trained // 2),
            "leak": max(1.0, (length - trained // 2) / (trained - trained // 2)),
        },
    ),
    "lambda": Method(
        "StreamingLLM: 4 first tokens and the last trained - 4",
        reader=lambda trained, length: {"kind": "lambda", "n_sinks": 4, "window": max(1, trained - 4)},
    ),
    "lm_infinite": Method(
        "LM-Infinite: the same, distances end at trained",
        reader=lambda trained, length: {
            "kind": "lambda", "n_sinks": 4, "window": max(1, trained - 4), "positions": "capped", "limit": trained,
        },
    ),
    "external_memory": Method(
        "Focused Transformer: the last trained / 2 and the best trained / 4 older tokens of each head",
        reader=lambda trained, length: {
            "kind": "external_memory", "window": max(1, trained // 2), "top_k": max(1, trained // 4),
        },
    ),
    "longheads": Method(
        "LongHeads: 8 chunks of trained / 8 chosen by each head",
        reader=lambda trained, length: {"kind": "longheads", "chunk": max(1, trained // 8), "n_chunks": 8},
    ),
    "infllm": Method(
        "InfLLM: 4 first tokens, the last trained / 2, 4 blocks of trained / 16",
        reader=lambda trained, length: {
            "kind": "infllm", "n_sinks": 4, "window": max(1, trained // 2), "block": max(1, trained // 16), "top_k": 4,
        },
    ),
    "pcw": Method("parallel context windows of trained / 2, the last of them the task", reader=_windows),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is measured: tokens, texts and trials at every length.

    trained: tokens of the model's training. scored: last tokens of each text whose perplexity counts; by default a
    little less than half the shortest length. cue, key: tokens of the passkey task; choices: keys of which one is
    right.
    """

    lengths: tuple[int, ...]
    trained: int
    methods: tuple[str, ...] = tuple(METHODS)
    texts: int = 8
    scored: int | None = None
    trials: int = 16
    choices: int = 8
    cue: int = 8
    key: int = 16
    seed: int = 0

    @property
    def n_scored(self) -> int:
        return self.scored or max(1, min(self.lengths) // 2 - 1)

    @property
    def n_tokens(self) -> int:
        """Tokens that are read in all, for the time that is left."""
        return len(self.methods) * sum(self.lengths) * (self.texts + self.trials)


@dataclass
class Cell:
    """One method at one length; None where it could not be measured, and ``why``.

    state_bytes: of one row that holds so many tokens; apart_bytes: those of them that are only read where they are
    chosen. seconds: for one text, the quickest of all.
    """

    method: str
    length: int
    perplexity: float | None = None
    passkey: float | None = None
    state_bytes: int | None = None
    apart_bytes: int | None = None
    seconds: float | None = None
    why: str = ""


@dataclass
class Texts:
    """What all methods read: texts and fillers (n, longest), cues (trials, cue), keys (trials, choices, key)."""

    texts: np.ndarray
    fillers: np.ndarray
    cues: np.ndarray
    keys: np.ndarray
    bos: int | None

    @classmethod
    def choose(cls, documents: Documents, plan: Plan, bos: int | None, eos: int | None) -> Texts:
        """Texts at equal distances along all documents that are long enough; cues and keys from anywhere in them.

        Raises:
            DataError: no document is long enough.
        """
        longest = max(plan.lengths)
        streams = [documents.document(i) for i in range(documents.n_documents)]
        long = [stream for stream in streams if len(stream) > longest]
        if not long:
            most = max((len(stream) for stream in streams), default=0)
            raise DataError(
                f"the longest text has {most:,} tokens, {longest + 1:,} are needed",
                fix=f"give longer texts, or --lengths up to {max(most - 1, 0)}",
            )
        room = np.cumsum([len(stream) - longest for stream in long])

        def cut(n: int, shift: float) -> np.ndarray:
            rows = np.zeros((n, longest), np.int64)
            for i in range(n):
                at = int((i + shift) / n * room[-1])
                which = int(np.searchsorted(room, at, side="right"))
                start = at - (int(room[which - 1]) if which else 0)
                rows[i] = long[which][start : start + longest]
            return rows

        random = np.random.default_rng(plan.seed)
        every = np.concatenate(long)
        every = every[~np.isin(every, [i for i in (bos, eos) if i is not None])].astype(np.int64)
        starts = random.integers(0, len(every) - plan.cue, plan.trials)
        cues = every[starts[:, None] + np.arange(plan.cue)]
        starts = random.integers(0, len(every) - plan.key, (plan.trials, plan.choices))
        keys = every[starts[..., None] + np.arange(plan.key)]
        return cls(cut(plan.texts, 0.5), cut(plan.trials, 0.25), cues, keys, bos)

    def text(self, i: int, length: int) -> Tensor:
        """The last ``length`` tokens of a text, (1, length): whatever the length, they end in the same tokens."""
        return self._begun(self.texts[i, -length:])

    def prompt(self, trial: int, length: int) -> Tensor:
        """Text with the cue and its key somewhere inside, and the cue again at its end: (1, length - key)."""
        cue, key = self.cues[trial], self.keys[trial, 0]
        needle = np.concatenate([cue, key])
        n_filler = length - len(needle) - len(cue) - len(key)
        depth = (trial + 0.5) / len(self.keys)
        filler, at = self.fillers[trial, :n_filler], 1 + int(depth * (n_filler - 1))
        return self._begun(np.concatenate([filler[:at], needle, filler[at:], cue]))

    def _begun(self, tokens: np.ndarray) -> Tensor:
        tokens = tokens.copy()
        if self.bos is not None:
            tokens[0] = self.bos
        return torch.from_numpy(tokens)[None]


@contextmanager
def reading(model: Decoder, method: str, trained: int, length: int) -> Iterator[None]:
    """Inside, the model reads by ``method``; outside as before.

    Raises:
        UnsupportedError: the method does not fit the model.
    """
    how, positions = METHODS[method], model.config.positions
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    if (how.reader or how.scaling) and not isinstance(positions, RotaryPositions.Config):
        raise UnsupportedError(f"the model has positions {positions.kind}, not rope", fix="measure plain alone")
    if how.reader and not attentions:
        raise UnsupportedError("the model has no attention whose reader could be another", fix="measure plain alone")
    before = [(module.reader, module.capabilities) for module in attentions]
    try:
        if how.reader:
            use_reader(model, _config(READERS, how.reader(trained, length)), length)
        if how.scaling:
            set_rope_scaling(model, _config(ROPE_SCALINGS, how.scaling(trained, length)))
        yield
    finally:
        for module, (reader, capabilities) in zip(attentions, before, strict=True):
            module.reader, module.capabilities = reader, capabilities  # type: ignore[misc]
        if how.scaling:
            set_rope_scaling(model, positions.scaling)  # type: ignore[attr-defined]


def _config(table: Mapping[str, Any], values: dict[str, Any]) -> Config:
    return table[values["kind"]].Config.model_validate(values)


@torch.no_grad()
def perplexity(
    model: Decoder, texts: Texts, length: int, plan: Plan, tick: Callable[[int], None]
) -> tuple[float, float]:
    """exp of the mean of -ln p over the last tokens of every text, and the seconds of the quickest one."""
    n, nats, quickest = plan.n_scored, 0.0, math.inf
    for i in range(plan.texts):
        ids = texts.text(i, length)
        began = time.perf_counter()
        hidden = model(Inputs(ids), needs=("hidden",)).hidden
        quickest = min(quickest, time.perf_counter() - began)
        assert hidden is not None
        logits = model.logits(hidden[:, -n - 1 : -1]).float()
        nats += float(cross_entropy(logits[0], ids[0, -n:], reduction="sum"))
        tick(length)
    return math.exp(min(nats / (n * plan.texts), 700.0)), quickest


@torch.no_grad()
def passkey(model: Decoder, texts: Texts, length: int, plan: Plan, tick: Callable[[int], None]) -> float:
    """How often, after the cue's second time, the text has raised the likelihood of the key that followed it most.

    Raised: ln p(key | text, cue) - ln p(key | cue). What a key is worth without the text differs much more between
    keys than what a small model makes of the text.
    """
    right = 0
    for trial in range(plan.trials):
        state = model.new_state(1, length)
        keys, cue = torch.from_numpy(texts.keys[trial]), torch.from_numpy(texts.cues[trial])
        hidden = model(Inputs(texts.prompt(trial, length)), state, needs=("hidden",)).hidden
        assert hidden is not None
        said = [model.logits(hidden[:, -1:]).expand(len(keys), -1, -1)]
        state.select(torch.zeros(len(keys), dtype=torch.long))
        if plan.key > 1:
            logits = model(Inputs(keys[:, :-1]), state).logits
            assert logits is not None
            said.append(logits)
        alone = model(Inputs(torch.cat([cue.expand(len(keys), -1), keys[:, :-1]], 1))).logits
        assert alone is not None
        raised = _likelihood(torch.cat(said, 1), keys) - _likelihood(alone[:, len(cue) - 1 :], keys)
        right += bool(raised[0] > raised[1:].max())
        tick(length)
    return right / plan.trials


def _likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """ln p of tokens (B, T) under logits (B, T, V): (B,)."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))


def measure_cell(
    model: Decoder, texts: Texts, method: str, length: int, plan: Plan, tick: Callable[[int], None]
) -> Cell:
    """Everything about one method at one length."""
    cell = Cell(method, length)
    try:
        with reading(model, method, plan.trained, length):
            cell.perplexity, cell.seconds = perplexity(model, texts, length, plan, tick)
            dtype = model.embed.weight.dtype
            cell.state_bytes = state_bytes(model.state_specs(), length, dtype)
            cell.apart_bytes = sum(
                module.reader.apart(length) * 2 * module.n_kv_heads * module.head_dim * dtype.itemsize
                for module in model.modules()
                if isinstance(module, Attention)
            )
            if plan.trials and model.capabilities.incremental:
                cell.passkey = passkey(model, texts, length, plan, tick)
    except UnsupportedError as error:
        cell.why = error.what
    return cell


def measure(
    model: Decoder,
    documents: Documents,
    plan: Plan,
    *,
    bos: int | None = None,
    eos: int | None = None,
    about: dict[str, Any] | None = None,
    tick: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """Every method of ``plan`` at every length, on the same texts.

    Args:
        documents: texts as tokens, of which those longer than the longest length are used.
        bos: put at the beginning of everything that is read.
        tick: told how many tokens have been read, and by which method.

    Returns:
        A dictionary for JSON: about, plan, chance, methods, cells.

    Raises:
        DataError: no text is long enough. ConfigError: lengths too short for the task. UnsupportedError: a plan of
            a single method that does not fit the model.
    """
    needed = max(plan.n_scored + 1, 2 * (plan.cue + plan.key) + 1 if plan.trials else 0)
    if min(plan.lengths) < needed:
        raise ConfigError(
            f"a length of {min(plan.lengths)} tokens is too short for what is measured", fix=f"use {needed} or more"
        )
    texts = Texts.choose(documents, plan, bos, eos)
    was_training = model.training
    model.eval()
    cells = []
    try:
        for method in plan.methods:
            for length in plan.lengths:
                told = (lambda n: None) if tick is None else partial(_tell, tick, method)
                cells.append(measure_cell(model, texts, method, length, plan, told))
                if len(plan.methods) == 1 and cells[-1].why:
                    raise UnsupportedError(f"{method}: {cells[-1].why}", fix="measure another method")
    finally:
        model.train(was_training)
    return {
        "format": FORMAT,
        "about": about or {},
        "plan": asdict(plan) | {"scored": plan.n_scored},
        "chance": 1 / plan.choices,
        "methods": {name: METHODS[name].says for name in plan.methods},
        "cells": [asdict(cell) for cell in cells],
    }


def _tell(tick: Callable[[int, str], None], method: str, n: int) -> None:
    tick(n, method)
