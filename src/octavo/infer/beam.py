"""Beam search: several texts a prompt are followed at once, and the best that end are kept.

The definitions are those of transformers' ``generate``: a text's score is the sum of its log-probabilities divided by
its length to the power of ``length_penalty``, and only a candidate among the best ``n`` of a step may end. Prompts
do not feel each other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from octavo.errors import ConfigError
from octavo.infer.generate import evaluating
from octavo.infer.request import check_prompts
from octavo.infer.text import FinishReason
from octavo.infer.window import Window
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.schema import Config

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer


class BeamConfig(Config):
    """How many texts are followed, how long they are, and when the search for better ones ends.

    length_penalty p divides a text's log-probability by its tokens to the power of p: above 0 long ones gain.
    early_stopping: true ends as soon as ``n_beams`` texts have ended; false also when the best that still runs, as
    long as it is now, is no better than the worst of them; ``never`` only when it could not become so at its longest.
    """

    n_beams: int = Field(default=4, ge=1, le=1024)
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    max_new_tokens: int = Field(default=256, ge=1)


@dataclass(frozen=True, slots=True)
class Beam:
    """A text that was found: its tokens (the one that ended it too), its score, and how it ended."""

    text: str
    ids: tuple[int, ...]
    score: float
    finish_reason: FinishReason


@dataclass
class _Search:
    """One prompt's: texts that run and their scores (falling), texts that have ended with theirs (falling)."""

    config: BeamConfig
    longest: int
    ends: Collection[int]
    running: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    scores: Tensor = field(default_factory=lambda: torch.zeros(1))
    ended: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    done: bool = False

    def step(self, log_probs: Tensor) -> list[int]:
        """Take each running text's next log-probabilities (n, V); returns which of them the new ones continue."""
        n, (rows, V) = self.config.n_beams, log_probs.shape
        total = (log_probs + self.scores[:, None]).flatten()
        # Each text has len(ends) ways to end: with this many candidates, n always run on.
        best = total.topk(min(max(2, 1 + len(self.ends)) * n, rows * V))
        length = len(self.running[0]) + 1
        parents, running, scores = list[int](), list[tuple[int, ...]](), list[float]()
        for rank, (score, at) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(at, V)
            ids = (*self.running[parent], token)
            if token in self.ends or length == self.longest:
                if rank < n:
                    self.ended.append((score / length**self.config.length_penalty, ids))
            elif len(running) < n:
                parents.append(parent)
                running.append(ids)
                scores.append(score)
        self.ended = sorted(self.ended, key=lambda pair: -pair[0])[:n]
        self.running, self.scores = running, torch.tensor(scores)
        self.done = not running or self._enough(length)
        return parents

    def _enough(self, length: int) -> bool:
        if len(self.ended) < self.config.n_beams:
            return False
        if self.config.early_stopping is True:
            return True
        penalty = self.config.length_penalty
        at_best = self.longest if self.config.early_stopping == "never" and penalty > 0 else length
        return float(self.scores[0]) / at_best**penalty <= self.ended[-1][0]


def beam_search(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: BeamConfig | None = None,
    *,
    stop_ids: Collection[int] | None = None,
) -> list[list[Beam]]:
    """The best continuations of every prompt, or of an encoder-decoder the best targets of every source.

    Args:
        model: a predictor with ``new_state``.
        stop_ids: tokens that end a text; by default the tokenizer's end of text and end of turn.

    Returns:
        For each prompt at most ``n_beams`` texts, the best first.

    Raises:
        ConfigError: an empty prompt, an id outside the vocabulary, or a prompt that leaves no room in the context.
    """
    config = config or BeamConfig()
    check_prompts(model, prompts, "stop")
    ends = frozenset(tokenizer.stop_ids if stop_ids is None else stop_ids)
    n_tokens = min(model.vocab_size, tokenizer.vocab_size)
    sources = prompts if isinstance(model, EncoderDecoder) else None
    texts = [[model.config.first_token(tokenizer.special)] for _ in prompts] if sources is not None else prompts
    if n_tokens <= len(ends):
        raise ConfigError("every token ends a text", fix="name fewer stop_ids")
    searches = [_Search(config, min(config.max_new_tokens, model.max_seq_len - len(t)), ends) for t in texts]
    with evaluating(model):
        window = Window(model, texts, config.max_new_tokens, sources)
        active, new = list(searches), list(texts)
        while active:
            log_probs = window.read(new)[:, :n_tokens].float().log_softmax(-1).cpu()
            parts = log_probs.split([len(search.running) for search in active])
            rows, first, going = list[int](), 0, list[_Search]()
            for search, part in zip(active, parts, strict=True):
                parents = search.step(part)
                if not search.done:
                    rows += [first + parent for parent in parents]
                    going.append(search)
                first += len(part)
            active = going
            new = [ids[-1:] for search in active for ids in search.running]
            if active:
                window.select(rows)
    return [[_found(tokenizer, ids, score, ends) for score, ids in search.ended] for search in searches]


def _found(tokenizer: Tokenizer, ids: tuple[int, ...], score: float, ends: Collection[int]) -> Beam:
    stopped = ids[-1] in ends
    text = tokenizer.decode(list(ids[:-1] if stopped else ids))
    return Beam(text, ids, score, "stop" if stopped else "length")
