"""What is read next: texts that go on, parts of prompts, and who waits when memory is short. No tensor is here."""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from octavo.infer.blocks import Blocks


@dataclass(eq=False)
class Sequence:
    """One text: its tokens, how many of them the state holds, and where.

    tokens: the prompt's and those produced. length: tokens held. rank: who goes first, the smallest. whole: read anew
    for every token, without a state. alone: it was part of a pass that failed, and gets the next to itself. within:
    texts share blocks only with texts of the same. leader: the text that reads the same prompt, and that this one goes
    on from when its own first token is known. draft: what may come next, to be read and judged in the same pass. owner:
    whoever asked for it.
    """

    tokens: list[int]
    n_prompt: int
    rank: tuple[int, int]
    within: Hashable = ""
    length: int = 0
    table: list[int] = field(default_factory=list)
    slot: int | None = None
    whole: bool = False
    alone: bool = False
    leader: Sequence | None = None
    draft: list[int] = field(default_factory=list)
    owner: Any = None

    @property
    def pending(self) -> int:
        """Tokens not yet read."""
        return len(self.tokens) - self.length

    def held(self, block_size: int) -> list[int]:
        """The blocks that hold its ``length`` tokens."""
        return self.table[: -(-self.length // block_size)]


@dataclass(frozen=True, slots=True)
class Work:
    """``n`` tokens of a sequence to be read in this step, from its ``length`` on, and then its draft."""

    sequence: Sequence
    n: int
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        start = self.sequence.length
        return [*self.sequence.tokens[start : start + self.n], *self.draft]

    @property
    def n_wanted(self) -> int:
        """Of how many of its last tokens the logits are needed."""
        return 1 + len(self.draft) if self.completes else 0

    @property
    def completes(self) -> bool:
        """Whether the next token of the text is known after it."""
        return self.sequence.length + self.n == len(self.sequence.tokens)


@dataclass
class Plan:
    """A step: ``works``, and what comes before them in this order: blocks to copy (from, to), and slots that begin as a
    copy of another or, from None, with nothing."""

    works: list[Work] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    slots: list[tuple[int | None, int]] = field(default_factory=list)


class Scheduler:
    """Continuous batching (Yu et al. 2022, Orca) with prompts read in parts (Agrawal et al. 2023, Sarathi).

    In every step each running text reads its next token; what ``step_tokens`` leaves is for prompts, in parts of at
    most ``chunk`` tokens. A text is admitted when there is memory for its prompt; when memory runs out, the one of the
    lowest rank gives its own up, and is read anew later.

    Args:
        blocks: None where the state has no field that grows: then slots alone are counted.
        n_slots: texts that have a state at once.
        share: whether texts may begin with the blocks of others.
        deterministic: parts of prompts always begin at multiples of ``chunk``, and what was produced is read again one
            token a step: so every pass is one that the text alone would have had.
    """

    def __init__(
        self,
        blocks: Blocks | None,
        n_slots: int,
        *,
        step_tokens: int,
        chunk: int,
        share: bool,
        deterministic: bool = False,
    ):
        self.blocks, self.share, self.deterministic = blocks, share and blocks is not None, deterministic
        self.step_tokens, self.chunk = step_tokens, chunk
        self.slots = list(range(n_slots - 1, -1, -1))
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.n_preempted = 0
        self.n_shared = 0

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or nobody waits for it: what it held is free. Its followers are read for themselves."""
        if sequence.slot is None:
            self.waiting = [other for other in self.waiting if other is not sequence]
        else:
            self.running.remove(sequence)
            self._give_up(sequence)
        for other in self.waiting:
            if other.leader is sequence:
                other.leader = None

    def plan(self) -> Plan:
        """The next step; without works when nothing is left to do."""
        plan, budget = Plan(), self.step_tokens
        works: dict[int, Work] = {}
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
            if sequence.slot is None:  # it gave way to another of this step
                continue
            n = min(self._part(sequence), budget)
            if n < 1 or (self.deterministic and n < self._part(sequence)):
                continue
            draft = tuple(sequence.draft[: budget - n] if n == sequence.pending == 1 else ())
            if self._make_room(sequence, n + len(draft), plan):
                works[id(sequence)] = Work(sequence, n, draft)
                budget -= n + len(draft)
        for sequence in list(self.waiting):
            if budget < 1 or not self.slots:
                break
            if sequence.leader is not None and sequence.leader.length < sequence.n_prompt:
                continue
            if not self._admit(sequence, plan):
                break
            n = min(self._part(sequence), budget)
            if sequence.pending and not (self.deterministic and n < self._part(sequence)):
                if self._make_room(sequence, n, plan):
                    works[id(sequence)] = Work(sequence, n)
                    budget -= n
        plan.works = [work for work in works.values() if work.sequence.slot is not None and work.n > 0]
        return plan

    def advance(self, sequence: Sequence, n: int) -> None:
        """``n`` more tokens of it are held; full blocks are known by their text from now on."""
        before, sequence.length = sequence.length, sequence.length + n
        if self.blocks is None or not self.share or sequence.whole:
            return
        size, table = self.blocks.block_size, sequence.table
        for i in range(before // size, sequence.length // size):
            text = sequence.tokens[i * size : (i + 1) * size]
            table[i] = self.blocks.know(table[i], table[i - 1] if i else None, text, sequence.within)

    def put_back(self, sequence: Sequence) -> None:
        """It gives its memory up and is read anew when its turn comes."""
        self.running.remove(sequence)
        self._give_up(sequence)
        self.n_preempted += 1
        self.add(sequence)

    def read_whole(self, sequence: Sequence) -> None:
        """From now on it is read without a state."""
        if self.blocks is not None and sequence.table:
            self.blocks.release(sequence.table)
        sequence.table, sequence.length, sequence.whole = [], len(sequence.tokens) - 1, True

    def _part(self, sequence: Sequence) -> int:
        if self.deterministic and sequence.length >= sequence.n_prompt:
            return min(sequence.pending, 1)
        if self.deterministic:
            return min(sequence.n_prompt - sequence.length, self.chunk - sequence.length % self.chunk)
        return min(sequence.pending, self.chunk)

    def _needs(self, sequence: Sequence, length: int) -> int:
        """Blocks that it has not yet, for ``length`` tokens."""
        assert self.blocks is not None
        return -(-length // self.blocks.block_size) - len(sequence.table)

    def _make_room(self, sequence: Sequence, n: int, plan: Plan) -> bool:
        if self.blocks is None or sequence.whole:
            return True
        blocks, table, size = self.blocks, sequence.table, self.blocks.block_size
        last = sequence.length // size
        copy = last < len(table) and blocks.shared(table[last])
        wanted = self._needs(sequence, sequence.length + n) + copy
        if wanted < 1:
            return True
        while (new := blocks.take(wanted)) is None:
            victim = max(self.running, key=_rank)
            self.put_back(victim)
            if victim is sequence:
                return False
        if copy:
            own = new.pop()
            plan.block_copies.append((table[last], own))
            blocks.release([table[last]])
            table[last] = own
        table += new
        return True

    def _admit(self, sequence: Sequence, plan: Plan) -> bool:
        leader, source = sequence.leader, None
        if leader is not None and leader.slot is not None and leader.length == sequence.n_prompt < len(sequence.tokens):
            source = leader.slot
            if self.blocks is not None:
                self.blocks.hold(leader.held(self.blocks.block_size))
                sequence.table = leader.held(self.blocks.block_size)
            sequence.length = leader.length
        elif self.blocks is not None and not sequence.whole:
            found = self._found(sequence)
            needed = -(-(len(sequence.tokens) + 1) // self.blocks.block_size) - len(found)
            if needed > self.blocks.n_available:
                self.blocks.release(found)
                return False
            sequence.table, sequence.length = found, len(found) * self.blocks.block_size
            self.n_shared += sequence.length
        sequence.slot = self.slots.pop()
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_rank)
        plan.slots.append((source, sequence.slot))
        sequence.leader = None
        return True

    def _found(self, sequence: Sequence) -> list[int]:
        if not self.share or self.blocks is None:
            return []
        size = self.blocks.block_size
        at_most = (len(sequence.tokens) - 1) // size  # the last token is always read: what follows it is asked
        if self.deterministic:
            at_most = min(at_most, (sequence.n_prompt - 1) // size)
        found = self.blocks.find(sequence.tokens, sequence.within, at_most)
        keep = len(found)
        if self.deterministic:  # parts begin where they would without what was found
            whole = math.lcm(size, self.chunk) // size
            keep = len(found) // whole * whole
        self.blocks.release(found[keep:])
        return found[:keep]

    def _give_up(self, sequence: Sequence) -> None:
        if self.blocks is not None:
            self.blocks.release(sequence.table)
        assert sequence.slot is not None
        self.slots.append(sequence.slot)
        sequence.table, sequence.slot, sequence.draft = [], None, []
        sequence.length = len(sequence.tokens) - 1 if sequence.whole else 0


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
