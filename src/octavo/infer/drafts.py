"""Drafts: cheap guesses of what a model will say next, which it then judges in one pass (Leviathan et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import ConfigError, NumericError
from octavo.infer import native
from octavo.infer.executors import PlainExecutor, fastest
from octavo.infer.memory import Pool, kind_of
from octavo.infer.said import Said, further
from octavo.infer.sampling import SamplingConfig, guess
from octavo.infer.scheduler import Sequence as Text
from octavo.infer.scheduler import Work
from octavo.infer.threads import one_thread
from octavo.models.decoder import Decoder


@dataclass(frozen=True)
class Asked:
    """A text that may be guessed ahead.

    Args:
        room: the most tokens it may still have.
        config, prompt, produced, stream: how its next token is chosen, as ``sampling.choose`` takes it.
        settings: of ``config``, equal for texts that can be chosen for together.
        n_tokens: ids from here on are no tokens.
    """

    text: Text
    room: int
    config: SamplingConfig
    prompt: Sequence[int]
    produced: Said
    stream: torch.Generator
    settings: Any
    n_tokens: int


@dataclass
class Draft:
    """Guesses of how a text goes on.

    Args:
        drawn_from: (len(tokens), V) float64, the distribution that each was drawn from; None where none was drawn.
    """

    tokens: list[int] = field(default_factory=list)
    drawn_from: Tensor | None = None


class Drafter(Protocol):
    """Proposes how texts go on."""

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """For each text as many guesses as are worth judging, within its room; none is fine.

        What is drawn must not depend on anything that is drawn later, or the answers are distributed otherwise.
        """
        ...


Guess = tuple[int, Tensor | None]  # a token, -1 for none, and the distribution (V,) that it was drawn from


def _guessed(logits: Tensor, asked: Sequence[Asked], before: Sequence[Sequence[int]]) -> list[Guess]:
    """A draft model's next token for each text, chosen as the model's own will be, and what it was drawn from.

    Where the draft model is as sure of each token as the model, every token is accepted; the settings that shape the
    model's distribution (temperature, top-k, penalties) shape the draft's alike.

    Args:
        logits: (B, V) of the draft model.
        before: of each text, what was guessed before this token.
    """
    found: list[Guess] = [(-1, None)] * len(asked)
    groups: dict[Any, list[int]] = {}
    for i, one in enumerate(asked):
        groups.setdefault((one.settings, one.n_tokens), []).append(i)
    for rows in groups.values():
        some = [asked[i] for i in rows]
        said = [further(one.produced, before[i]) for i, one in zip(rows, some, strict=True)]
        prompts, streams = [one.prompt for one in some], [one.stream for one in some]
        own, n = logits[rows].float(), some[0].n_tokens
        own = F.pad(own, (0, n - own.shape[1]), value=-math.inf)  # also cuts off what is no token of the model
        try:
            with one_thread(own.numel()):
                tokens, probs = guess(own, some[0].config, prompts, said, streams)
        except NumericError:  # a draft model that knows nothing makes no draft
            continue
        for k, i in enumerate(rows):
            found[i] = tokens[k], None if probs is None else probs[k]
    return found


class PromptLookup:
    """What followed the last time the text said its last ``longest`` to ``shortest`` tokens. Source: Saxena 2023.

    Costs a few look-ups, however long the text is, and pays where an answer repeats its prompt: code, summaries,
    quotations.
    """

    def __init__(self, n: int = 8, longest: int = 3, shortest: int = 1):
        self.n, self.longest, self.shortest = n, longest, shortest
        self.places: WeakKeyDictionary[Text, _Places] = WeakKeyDictionary()

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        return [Draft(self._continued(one.text)[: one.room]) for one in asked]

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
    """What a smaller model of the same vocabulary would say: trained, or counted (an n-gram model).

    At temperature 0 its most probable tokens; above it tokens drawn from its own distribution, shaped as the model's.

    Args:
        n_slots: texts that have a state at once, as many as the engine's.
    """

    def __init__(self, model: Any, n: int = 4, *, n_slots: int = 64):
        self.model, self.n = model, n
        limit = model.max_seq_len
        dtype, device = kind_of(model)
        self.pool = Pool(
            model.state_specs(), n_blocks=n_slots, block_size=limit, n_slots=n_slots, max_tokens=limit,
            dtype=dtype, device=device, aside=0 if native.unsuitable(model) else limit,
        )  # fmt: skip
        self.executor = fastest(model, self.pool, PlainExecutor(model, self.pool))
        self.known: dict[int, _Known] = {}

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        limit = self.model.max_seq_len
        rooms = [min(self.n, one.room, limit - len(one.text.tokens)) for one in asked]
        found = [Draft() for _ in asked]
        going = [_Going(one, self._followed(one.text), draft, room)
                 for one, draft, room in zip(asked, found, rooms, strict=True) if room > 0]  # fmt: skip
        begun = going
        while going:
            self._read(going, first=going is begun)
            going = [one for one in going if one.alive and len(one.draft.tokens) < one.room]
        for one in begun:
            one.draft.drawn_from = torch.stack(one.drawn_from) if one.drawn_from else None
        return found

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

    def _read(self, going: Sequence[_Going], *, first: bool) -> None:
        """One token more of each: what is known of a text first, then its last guess."""
        of = {id(one.own): one for one in going}
        read, rows = list[_Going](), list[Tensor]()
        for work, logits in self.executor([Work(one.own, one.own.pending if first else 1) for one in going]):
            assert logits is not None
            work.sequence.length += work.n
            read.append(of[id(work.sequence)])
            rows.append(logits[-1])
        if first:
            for one in going:
                self.known[one.own.slot or 0].save(self.pool)
        guesses = _guessed(torch.stack(rows), [one.asked for one in read], [one.draft.tokens for one in read])
        for one, (token, probs) in zip(read, guesses, strict=True):
            one.alive = token >= 0
            if one.alive:
                one.own.tokens.append(token)
                one.draft.tokens.append(token)
                one.drawn_from += [] if probs is None else [probs]


@dataclass
class _Going:
    """A text while a model drafts for it."""

    asked: Asked
    own: Text
    draft: Draft
    room: int
    drawn_from: list[Tensor] = field(default_factory=list)
    alive: bool = True


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

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        drafts = [Draft() for _ in asked]
        groups: dict[int, list[int]] = {}
        for i, one in enumerate(asked):
            text = one.text
            own = self.texts.get(text.slot if text.slot is not None else -1)
            if one.room > 0 and own is not None and own.owner is text and own.known(text.length):
                groups.setdefault(text.length - own.read, []).append(i)
        for rows in groups.values():
            some = [asked[i] for i in rows]
            foretold = _guessed(self._foretold([one.text for one in some]), some, [()] * len(some))
            for i, (token, probs) in zip(rows, foretold, strict=True):
                if token >= 0:
                    drafts[i] = Draft([token], None if probs is None else probs[None])
        return drafts

    @torch.inference_mode()
    def _foretold(self, texts: list[Text]) -> Tensor:
        """Logits of the token after the last one of each text, all with as many new tokens: (B, V)."""
        own = [self.texts[text.slot or 0] for text in texts]
        hidden = torch.stack([one.hidden[: text.length - one.read] for one, text in zip(own, texts, strict=True)])
        following = [text.tokens[one.read + 1 : text.length + 1] for one, text in zip(own, texts, strict=True)]
        slots = [text.slot or 0 for text in texts]
        state = self.pool.view([[slot + 1] for slot in slots], slots, [one.read for one in own])
        made = self.model.foretell(hidden, torch.tensor(following, device=hidden.device), state)
        for one, text in zip(own, texts, strict=True):
            one.drop(text.length)
        return self.model.logits(made[:, -1])


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
