"""Drafts: cheap guesses of what a model will say next, which it then judges in one pass (Leviathan et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from octavo.infer.executors import PlainExecutor
from octavo.infer.memory import Pool
from octavo.infer.scheduler import Sequence as Text
from octavo.infer.scheduler import Work


class Drafter(Protocol):
    """Proposes how texts go on."""

    def propose(self, texts: Sequence[tuple[Text, int]]) -> list[list[int]]:
        """For each text, and the most tokens it has room for, as many guesses as are worth judging; none is fine."""
        ...


class PromptLookup:
    """What followed the last time the text said its last ``longest`` to ``shortest`` tokens. Source: Saxena 2023.

    Costs nothing but the search, and pays where an answer repeats its prompt: code, summaries, quotations.
    """

    def __init__(self, n: int = 8, longest: int = 3, shortest: int = 1):
        self.n, self.longest, self.shortest = n, longest, shortest

    def propose(self, texts: Sequence[tuple[Text, int]]) -> list[list[int]]:
        return [self._continued(text.tokens)[:room] for text, room in texts]

    def _continued(self, tokens: list[int]) -> list[int]:
        for length in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            end = tokens[-length:]
            for start in range(len(tokens) - length - 1, -1, -1):
                if tokens[start : start + length] == end:
                    return tokens[start + length : start + length + self.n]
        return []


class ModelDraft:
    """The most probable tokens of a smaller model of the same vocabulary: trained, or counted (an n-gram model).

    Args:
        n_slots: texts that have a state at once, as many as the engine's.
    """

    def __init__(self, model: Any, n: int = 4, *, n_slots: int = 64):
        self.model, self.n = model, n
        limit = model.max_seq_len
        weight = getattr(getattr(model, "embed", None), "weight", torch.empty(0))
        self.pool = Pool(
            model.state_specs(), n_blocks=n_slots, block_size=limit, n_slots=n_slots, max_tokens=limit,
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        self.executor = PlainExecutor(model, self.pool)
        self.known: dict[int, _Known] = {}

    def propose(self, texts: Sequence[tuple[Text, int]]) -> list[list[int]]:
        limit = self.model.max_seq_len
        rooms = [min(self.n, room, limit - len(text.tokens)) for text, room in texts]
        able = [(text, room) for (text, _), room in zip(texts, rooms, strict=True) if room > 0]
        own = [self._followed(text) for text, _ in able]
        self._read([Work(mine, mine.pending) for mine in own])
        for mine in own:
            self.known[mine.slot or 0].save(self.pool)
        for i in range(1, max((room for _, room in able), default=0)):
            self._read([Work(mine, 1) for mine, (_, room) in zip(own, able, strict=True) if room > i])
        found = iter([mine.tokens[len(text.tokens) :] for mine, (text, _) in zip(own, able, strict=True)])
        return [next(found) if room > 0 else [] for room in rooms]

    def _followed(self, text: Text) -> Text:
        """This model's own copy of a text, gone back to where the two part, with at least one token to read."""
        assert text.slot is not None
        known = self.known.get(text.slot)
        if known is None or known.owner is not text:
            self.pool.clear(text.slot)
            own = Text([], 0, (0, 0), slot=text.slot, table=[text.slot + 1] if self.pool.block_bytes else [])
            known = self.known[text.slot] = _Known(text, own)
        known.go_back(self.pool, text.tokens)
        return known.own

    def _read(self, works: Sequence[Work]) -> None:
        for work, logits in self.executor(works):
            assert logits is not None
            work.sequence.length += work.n
            work.sequence.tokens.append(int(logits[-1].argmax()))


class _Known:
    """What the draft model holds of a text: all that is true, and beyond it its own guesses."""

    def __init__(self, owner: Text, own: Text):
        self.owner, self.own = owner, own
        self.saved: tuple[int, Any] = (0, None)

    def save(self, pool: Pool) -> None:
        """Where a recurrence can go back to: behind it there are guesses only."""
        if not pool.goes_back:
            self.saved = (self.own.length, pool.save(self.own.slot or 0))

    def go_back(self, pool: Pool, tokens: list[int]) -> None:
        own = self.own
        held = own.tokens[: own.length]
        start = min(self.saved[0], len(tokens) - 1) if not pool.goes_back else 0
        same = start
        for a, b in zip(held[start:], tokens[start : len(tokens) - 1]):
            if a != b:
                break
            same += 1
        if same < own.length and not pool.goes_back:
            same, saved = self.saved
            if saved is None:
                pool.clear(own.slot or 0)
            else:
                pool.load(own.slot or 0, saved)
        own.length, own.tokens = same, list(tokens)
