"""Drafts: cheap guesses of what a model will say next, which it then judges in one pass (Leviathan et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.infer.executors import PlainExecutor, fastest
from octavo.infer.memory import Pool, kind_of
from octavo.infer.scheduler import Sequence as Text
from octavo.infer.scheduler import Work
from octavo.models.decoder import Decoder


class Drafter(Protocol):
    """Proposes how texts go on."""

    def propose(self, texts: Sequence[tuple[Text, int]]) -> list[list[int]]:
        """For each text, and the most tokens it has room for, as many guesses as are worth judging; none is fine."""
        ...


class PromptLookup:
    """What followed the last time the text said its last ``longest`` to ``shortest`` tokens. Source: Saxena 2023.

    Costs a few look-ups, however long the text is, and pays where an answer repeats its prompt: code, summaries,
    quotations.
    """

    def __init__(self, n: int = 8, longest: int = 3, shortest: int = 1):
        self.n, self.longest, self.shortest = n, longest, shortest
        self.places: WeakKeyDictionary[Text, _Places] = WeakKeyDictionary()

    def propose(self, texts: Sequence[tuple[Text, int]]) -> list[list[int]]:
        return [self._continued(text)[:room] for text, room in texts]

    def _continued(self, text: Text) -> list[int]:
        tokens, places = text.tokens, self.places.setdefault(text, _Places())
        lengths = range(self.longest, self.shortest - 1, -1)
        for end in range(places.known + 1, len(tokens)):  # what ends with the last token has not gone on
            for length in lengths:
                if length <= end:
                    places.last[tuple(tokens[end - length : end])] = end
        places.known = max(len(tokens) - 1, 0)
        found = (places.last.get(tuple(tokens[-length:])) for length in lengths)
        at = next((end for end in found if end is not None), None)
        return [] if at is None else tokens[at : at + self.n]


@dataclass
class _Places:
    """Where each few tokens of a text were said last, by their end; looked at up to the end ``known``."""

    last: dict[tuple[int, ...], int] = field(default_factory=dict)
    known: int = 0


class ModelDraft:
    """The most probable tokens of a smaller model of the same vocabulary: trained, or counted (an n-gram model).

    Args:
        n_slots: texts that have a state at once, as many as the engine's.
    """

    def __init__(self, model: Any, n: int = 4, *, n_slots: int = 64):
        self.model, self.n = model, n
        limit = model.max_seq_len
        dtype, device = kind_of(model)
        self.pool = Pool(
            model.state_specs(), n_blocks=n_slots, block_size=limit, n_slots=n_slots, max_tokens=limit,
            dtype=dtype, device=device,
        )  # fmt: skip
        self.executor = fastest(model, self.pool, PlainExecutor(model, self.pool))
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


class ModuleDraft:
    """What the model's own first module of multi-token prediction foretells: one token beyond the next.

    It reads the hidden states of the model as they are made, so the model runs through its own forward pass, and texts
    that begin alike are each read for themselves. Source: DeepSeek-AI 2024 (DeepSeek-V3), section 2.2, "MTP in
    inference".
    """

    def __init__(self, model: Decoder, *, n_slots: int = 64):
        if not len(getattr(model, "multi_token", ())):
            raise ConfigError("the model has no multi_token modules to draft with", fix="use another draft")
        self.model, limit = model, model.max_seq_len
        module: Any = model.multi_token[0]
        self.pool = Pool(
            module.state_specs(), n_blocks=n_slots, block_size=limit, n_slots=n_slots, max_tokens=limit,
            dtype=model.embed.weight.dtype, device=model.embed.weight.device,
        )  # fmt: skip
        if not self.pool.goes_back:
            raise ConfigError("the module keeps a state that cannot go back", fix="use another draft")
        self.texts: dict[int, _Observed] = {}

    def observe(self, work: Work, hidden: Tensor) -> None:
        """Take the hidden states of a work, the draft's too: what does not hold is overwritten later."""
        sequence = work.sequence
        assert sequence.slot is not None
        if (found := self.texts.get(sequence.slot)) is None or found.owner is not sequence:
            found = self.texts[sequence.slot] = _Observed(sequence)
        found.take(sequence.length, hidden)

    def propose(self, texts: Sequence[tuple[Text, int]]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in texts]
        groups: dict[int, list[int]] = {}
        for i, (text, room) in enumerate(texts):
            own = self.texts.get(text.slot if text.slot is not None else -1)
            if room > 0 and own is not None and own.owner is text and own.known(text.length):
                groups.setdefault(text.length - own.read, []).append(i)
        for rows in groups.values():
            for i, token in zip(rows, self._foretold([texts[i][0] for i in rows]), strict=True):
                drafts[i] = [token]
        return drafts

    @torch.inference_mode()
    def _foretold(self, texts: list[Text]) -> list[int]:
        """The token after the last one of each text, all with as many new tokens."""
        own = [self.texts[text.slot or 0] for text in texts]
        hidden = torch.stack([one.hidden[: text.length - one.read] for one, text in zip(own, texts, strict=True)])
        following = [text.tokens[one.read + 1 : text.length + 1] for one, text in zip(own, texts, strict=True)]
        slots = [text.slot or 0 for text in texts]
        state = self.pool.view([[slot + 1] for slot in slots], slots, [one.read for one in own])
        made = self.model.foretell(hidden, torch.tensor(following, device=hidden.device), state)
        for one, text in zip(own, texts, strict=True):
            one.drop(text.length)
        return self.model.logits(made[:, -1]).argmax(-1).tolist()


class _Observed:
    """Hidden states of a text that its module has not read yet: those of the tokens from ``read`` on."""

    def __init__(self, owner: Text):
        self.owner, self.read, self.complete = owner, 0, owner.length == 0
        self.hidden = torch.empty(0)

    def take(self, start: int, hidden: Tensor) -> None:
        if start < self.read:  # it was put back, and is read anew
            self.read, self.complete, self.hidden = 0, start == 0, hidden[:0]
        self.complete = self.complete and start <= self.read + len(self.hidden)
        before = self.hidden[: max(start - self.read, 0)]
        self.hidden = torch.cat([before, hidden]) if len(before) else hidden

    def known(self, length: int) -> bool:
        """Whether it has seen everything up to ``length``; not so of a text that went on from another's state."""
        return self.complete and self.read < length <= self.read + len(self.hidden)

    def drop(self, length: int) -> None:
        self.hidden, self.read = self.hidden[length - self.read :], length
