"""Everything that goes into scores.json: the model, its n-gram baselines on the same tokens, chat answers."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from octavo.eval import answers, classes, metrics
from octavo.files import write_json
from octavo.ngrams.counting import NGramCounts
from octavo.schema import Config

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.tokenizer import Tokenizer

FORMAT = 1
TRIGRAM = 3
HIGH_ORDERS = range(3, 8)
WHAT = "text tokens given bos and the tokens before them; eos is scored apart (eos_nats) and has no bytes"


class EvalConfig(Config):
    """What is measured at the end of a run."""

    orders: tuple[Annotated[int, Field(ge=1, le=16)], ...] = Field(
        default=(1, 2, 3, 4, 5, 6, 7), description="Orders of the Kneser-Ney baseline; empty for no baseline."
    )
    modified: bool = Field(
        default=False, description="Modified Kneser-Ney (three discounts per order) as the baseline."
    )
    max_documents: int | None = Field(default=None, ge=1, description="Score at most this many held-out documents.")
    max_bytes: int | None = Field(
        default=1_000_000, ge=1, description="Score held-out documents until this many bytes."
    )
    max_baseline_tokens: int = Field(
        default=20_000_000, ge=1, description="Above this the baseline counts whole documents up to it, and says so."
    )
    stride: int | None = Field(
        default=None, ge=1, description="Tokens a window advances by; default: half of max_seq_len."
    )
    answers: int = Field(default=400, ge=0, description="Ask at most this many held-out questions; 0 for none.")


class Documents(Protocol):
    """What is scored or counted: ``Shards``, or ``Encoded`` for text that was never written to shards."""

    n_documents: int

    def document(self, index: int, /) -> np.ndarray: ...


class Encoded:
    """Texts as documents ``[bos] tokens [eos]`` in memory; without ``bos`` or ``eos`` where there is none."""

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer):
        special = tokenizer.special
        before, after = ([] if id is None else [id] for id in (special.bos, special.eos))
        texts = list(texts)
        self._documents = [np.array([*before, *ids, *after], np.int32) for ids in tokenizer.encode_batch(texts)]
        self.n_documents = len(texts)
        self.n_bytes = sum(len(text.encode()) for text in texts)

    def document(self, index: int) -> np.ndarray:
        return self._documents[index]


def evaluate(
    *,
    logits_fn: Callable[[Tensor], Tensor],
    max_seq_len: int,
    tokenizer: Tokenizer,
    held_out: Documents,
    scorer: metrics.Scorer | None = None,
    trained_on: Documents | None,
    config: EvalConfig,
    questions: Sequence[answers.Question] = (),
    generate_fn: answers.GenerateFn | None = None,
    vocab_size: int | None = None,
    n_bytes: int | None = None,
    about: dict[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Score a model and its baselines.

    Args:
        logits_fn: tokens (B, T) int64 -> logits (B, T, V).
        max_seq_len: the model's longest input in tokens.
        tokenizer: the one that made the documents.
        held_out: documents the model never saw.
        scorer: scores documents in place of ``logits_fn``, whole ones (``config.stride`` then means nothing).
        trained_on: exactly the documents the model was pretrained on, or None for no baseline.
        questions: held-out questions, asked through ``generate_fn`` (conversations -> (text, stopped) each).
        vocab_size: V of the logits where the embedding is padded beyond the tokenizer's vocabulary.
        n_bytes: UTF-8 length of all held-out text. Where the tokens do not add up to it (a tokenizer that loses
            text), ``scored.byte_exact`` is false and bits per byte are per byte of the tokens.
        about: copied into the result (which model, which run).
        out: where the result is written in one step, besides being returned.
        on_progress: told what is done next.

    Returns:
        The content of scores.json.
    """
    started = time.perf_counter()
    say = on_progress or (lambda _: None)
    lengths = metrics.token_byte_lengths(tokenizer)
    eos = -1 if tokenizer.special.eos is None else tokenizer.special.eos
    documents = list(take(held_out, lengths, config.max_documents, config.max_bytes))
    say("held-out text")
    scored: dict[str, Any] = {"what": WHAT, "documents": len(documents), "held_out_documents": held_out.n_documents}
    if n_bytes is not None:
        every = (held_out.document(index) for index in range(held_out.n_documents))
        scored["byte_exact"] = sum(int(lengths[document].sum()) for document in every) == n_bytes
    if scorer is None:
        scorer = metrics.neural_scorer(logits_fn, max_seq_len, config.stride, vocab_size=vocab_size or len(lengths))
    model, seconds = _timed(lambda: metrics.score_documents(scorer, documents, lengths, eos))
    result: dict[str, Any] = {
        "format": FORMAT,
        "about": about or {},
        "scored": scored,
        "model": {**model.figures(), "seconds": round(seconds, 3)},
        "baseline": None,
        "differences": {},
        "answers": None,
    }
    if trained_on is not None and config.orders:
        say("Kneser-Ney baseline")
        result["baseline"] = baseline(trained_on, documents, lengths, eos, config)
        result["differences"] = differences(model.bits_per_byte, result["baseline"])
    if questions and generate_fn and config.answers:
        asked = answers.choose(questions, config.answers)
        say(f"{len(asked)} questions")
        figures, seconds = _timed(lambda: answers.score_answers(asked, generate_fn))
        result["answers"] = {**figures, "seconds": round(seconds, 3)}
    result["config"] = config.model_dump(mode="json")
    result["seconds"] = round(time.perf_counter() - started, 3)
    if out is not None:
        write_json(out, result)
    return result


def baseline(
    trained_on: Documents, documents: Sequence[np.ndarray], lengths: np.ndarray, eos: int, config: EvalConfig
) -> dict[str, Any]:
    """Kneser-Ney models of every order in ``config.orders``, all from one count, on the documents scored."""
    started = time.perf_counter()
    counted = list(_up_to(trained_on, config.max_baseline_tokens))
    counts = NGramCounts.of(counted, len(lengths), max(config.orders))
    orders = {}
    for order in sorted(set(config.orders)):
        scorer = metrics.ngram_scorer(counts.model(order, "modified_kneser_ney" if config.modified else "kneser_ney"))
        orders[str(order)] = metrics.score_documents(scorer, documents, lengths, eos).figures()
    high = {order: figures["bits_per_byte"] for order, figures in orders.items() if int(order) in HIGH_ORDERS}
    return {
        "kind": "modified Kneser-Ney" if config.modified else "interpolated Kneser-Ney",
        "trained_on": {
            "documents": len(counted),
            "tokens": sum(len(document) for document in counted),
            "all_of_the_training_text": len(counted) == trained_on.n_documents,
        },
        "orders": orders,
        "trigram_bits_per_byte": high.get(str(TRIGRAM)),
        "best_order": int(min(high, key=high.__getitem__)) if high else None,
        "best_bits_per_byte": min(high.values(), default=None),
        "seconds": round(time.perf_counter() - started, 3),
    }


def differences(bits_per_byte: float, baseline: dict[str, Any]) -> dict[str, float]:
    """The model's bits per byte minus a baseline's: below zero, the model is better."""
    named = {name: baseline[f"{name}_bits_per_byte"] for name in ("trigram", "best")}
    return {f"model_minus_{name}": bits_per_byte - value for name, value in named.items() if value is not None}


def take(
    documents: Documents, lengths: np.ndarray, max_documents: int | None, max_bytes: int | None
) -> Iterator[np.ndarray]:
    """Whole documents in order until there are ``max_documents`` or at least ``max_bytes`` of text."""
    room = math.inf if max_bytes is None else max_bytes
    for index in range(min(documents.n_documents, max_documents or documents.n_documents)):
        if room <= 0:
            return
        document = documents.document(index)
        room -= int(lengths[document].sum())
        yield document


def summary(result: dict[str, Any]) -> dict[str, str]:
    """The lines a person reads first, by name."""
    if "model" not in result:
        return classes.lines(result)
    model, baseline, asked = result["model"], result["baseline"], result["answers"]
    lines = {
        "bits per byte": f"{model['bits_per_byte']:.4f}   ({model['bytes']:,} bytes of held-out text)",
        "perplexity": f"{model['perplexity_per_token']:.2f} per token   ({model['tokens']:,} tokens)",
        "token accuracy": f"{model['token_accuracy']:.1%}",
    }
    for order, figures in (baseline["orders"] if baseline else {}).items():
        gap = model["bits_per_byte"] - figures["bits_per_byte"]
        lines[f"Kneser-Ney order {order}"] = f"{figures['bits_per_byte']:.4f}   (model {gap:+.4f})"
    if asked:
        low, high = asked["interval_95"]
        lines["answers right"] = (
            f"{asked['exact_match']:.1%}   ({low:.1%} to {high:.1%}; {asked['right']} of {asked['questions']}; "
            f"majority answer {asked['majority_exact_match']:.1%})"
        )
        lines["stops by itself"] = f"{asked['stopped_by_itself']:.1%}"
    return lines | classes.lines(result)


def _up_to(documents: Documents, max_tokens: int) -> Iterator[np.ndarray]:
    """Whole documents until ``max_tokens``, at least one."""
    room = max_tokens
    for index in range(documents.n_documents):
        document = documents.document(index)
        if index and len(document) > room:
            return
        room -= len(document)
        yield document


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started
