"""Cached decoding of any predictor: prompts in, pieces of text out, through an engine of its own.

Texts of different lengths are decoded together; every one draws from its own random stream, so it gets the tokens it
would get alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from octavo.infer.engine import Engine
from octavo.infer.request import EngineConfig, Failure, OnFull, Request, check_prompts
from octavo.infer.sampling import SamplingConfig
from octavo.infer.text import Completion, Piece

if TYPE_CHECKING:
    from octavo.infer.constraints import Grammar
    from octavo.tokenizer import Tokenizer

PREFILL_TOKENS = 256
"""Tokens a row reads in one pass: bounds the memory of the logits, and how long a cancelled prompt runs on."""


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig | None = None,
    *,
    stop_ids: Collection[int] | None = None,
    on_full: OnFull = "crop",
    n_top: int | None = None,
    constraint: Grammar | None = None,
    engine: Engine | None = None,
) -> list[Completion]:
    """Complete every prompt; see ``pieces`` for the arguments.

    Returns:
        One completion per prompt, in their order.
    """
    steps: list[list[Piece]] = [[] for _ in prompts]
    how = {"stop_ids": stop_ids, "on_full": on_full, "n_top": n_top, "constraint": constraint, "engine": engine}
    for piece in pieces(model, tokenizer, prompts, config, **how):  # type: ignore[arg-type]
        steps[piece.row].append(piece)
    return [
        Completion(
            "".join(piece.text for piece in row),
            tuple(piece.id for piece in row),
            row[-1].finish_reason or "length",
            tuple(piece.score for piece in row if piece.score is not None),
        )
        for row in steps
    ]


def best(completions: Sequence[Completion], n: int = 1) -> list[Completion]:
    """The ``n`` most probable of the texts drawn for one prompt, by the mean of ln p of their tokens (see ``n_top``).

    The mean, so that a text does not win by being short. Of equals the earlier one comes first.
    """
    return sorted(completions, key=lambda one: -mean_log_prob([score.logprob for score in one.scores]))[:n]


def mean_log_prob(scores: Sequence[float]) -> float:
    """The mean of ln p over the tokens of a text."""
    return sum(scores) / len(scores)


def stream(
    model: Any,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    config: SamplingConfig | None = None,
    *,
    stop_ids: Collection[int] | None = None,
    on_full: OnFull = "crop",
    constraint: Grammar | None = None,
    engine: Engine | None = None,
) -> Iterator[str]:
    """The completion of one prompt, as soon as each whole character of it is certain."""
    how = {"stop_ids": stop_ids, "on_full": on_full, "constraint": constraint, "engine": engine}
    for piece in pieces(model, tokenizer, [prompt], config, **how):  # type: ignore[arg-type]
        if piece.text:
            yield piece.text


def pieces(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig | None = None,
    *,
    stop_ids: Collection[int] | None = None,
    on_full: OnFull = "crop",
    n_top: int | None = None,
    constraint: Grammar | None = None,
    engine: Engine | None = None,
) -> Iterator[Piece]:
    """Decode all prompts together, one token a row and step.

    For an encoder-decoder a prompt is the source, and what is decoded is the target from its first token on.

    Args:
        model: a predictor (``nn.contracts.Predictor`` with ``new_state``).
        prompts: (rows,) token ids, at least one each.
        config: how to choose and when to stop; row i draws from the stream ``seed + i``.
        stop_ids: tokens that end a row; by default the tokenizer's end of text and end of turn.
        on_full: what happens at ``max_seq_len`` tokens. ``crop`` keeps the last ``max_seq_len`` tokens and reads
            them anew for every token (the textbook loop of GPT-2; the cache cannot help, as every position moves).
            ``stop`` refuses a prompt that leaves no room and ends a row when the context is full.
        n_top: with a number, every piece carries its log-probability and those of the ``n_top`` best tokens.
        constraint: what every text has to follow (``constraints.Grammar``).
        engine: where to decode; by default one of its own, as large as these texts can become. One that is kept
            remembers how earlier texts began, and may have a drafter.

    Raises:
        ConfigError: an empty prompt, an id outside the vocabulary, or a prompt too long under ``stop``.
        NumericError: the model's output is not a number.
    """
    config = config or SamplingConfig()
    check_prompts(model, prompts, on_full)
    ends = frozenset(tokenizer.stop_ids if stop_ids is None else stop_ids)
    engine = engine or Engine(model, tokenizer, room_for(model, prompts, config))
    requests = {}
    try:
        for row, prompt in enumerate(prompts):
            request = Request(
                prompt, config, stop_ids=ends, on_full=on_full, n_top=n_top, first_stream=row, constraint=constraint
            )
            engine.add(request)
            requests[request] = row
        with evaluating(model):
            while engine.busy:
                for request, event in engine.step():
                    if isinstance(event, Failure):
                        raise event.error
                    yield replace(event, row=requests[request])
    except GeneratorExit:  # whoever asked has stopped listening
        for request in requests:
            engine.cancel(request)
        raise
    except BaseException:  # an interrupt too, in the middle of a step
        engine.reset()
        raise


def room_for(model: Any, prompts: Sequence[Sequence[int]], config: SamplingConfig) -> EngineConfig:
    """An engine that holds all of these texts at once, however long they become."""
    longest = [min(len(prompt) + config.max_new_tokens, model.max_seq_len) for prompt in prompts]
    size = min(EngineConfig().block_size, model.max_seq_len)
    blocks = sum(-(-n // size) for n in longest)
    return EngineConfig(max_sequences=len(prompts), max_tokens=blocks * size, step_tokens=len(prompts) + PREFILL_TOKENS)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """A plain text as the model saw texts in training: after the beginning-of-text token, where there is one."""
    bos = tokenizer.special.bos
    return [*([] if bos is None else [bos]), *tokenizer.encode(text)]


def encode_source(tokenizer: Tokenizer, text: str) -> list[int]:
    """A plain text as an encoder reads it: between the tokens that begin and end texts, where there are such."""
    eos = tokenizer.special.eos
    return [*encode_prompt(tokenizer, text), *([] if eos is None else [eos])]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off while decoding, as it was afterwards (a training loop samples from its own model)."""
    training = isinstance(model, torch.nn.Module) and model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
