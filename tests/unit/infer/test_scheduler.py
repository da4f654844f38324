"""The scheduler without a model: whatever comes, leaves and runs short, every token is read once, nothing is lost."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo.infer.blocks import Blocks
from octavo.infer.scheduler import Scheduler, Sequence

SIZE, N_BLOCKS, SLOTS, LONGEST = 4, 12, 3, 40


class Machine(RuleBasedStateMachine):
    """Plays the executor: it keeps, for every entry of every block, which token of which text was written there."""

    @initialize(chunk=st.sampled_from([4, 7, 8]), share=st.booleans(), deterministic=st.booleans(), grows=st.booleans())
    def begin(self, chunk, share, deterministic, grows):
        self.blocks = Blocks(N_BLOCKS, SIZE) if grows else None
        self.scheduler = Scheduler(
            self.blocks, SLOTS, step_tokens=10, chunk=chunk, share=share, deterministic=deterministic
        )
        self.chunk, self.written, self.slots = chunk, {}, {}
        self.texts: list[Sequence] = []
        self.n = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), priority=st.integers(0, 1), forks=st.integers(0, 2)
    )
    def arrive(self, prompt, priority, forks):
        if len(self.texts) > 6:
            return
        leader = None
        for _ in range(1 + forks):
            self.n += 1
            text = Sequence(list(prompt), len(prompt), (priority, self.n))
            text.leader = leader
            leader = leader or text
            self.texts.append(text)
            self.scheduler.add(text)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def leave(self, data):
        text = data.draw(st.sampled_from(self.texts))
        self.texts.remove(text)
        self.scheduler.remove(text)

    @rule(data=st.data(), drafted=st.booleans())
    def step(self, data, drafted):
        for text in self.scheduler.running:
            text.draft = [7, 7] if drafted and text.pending == 1 and not self.scheduler.deterministic else []
        plan = self.scheduler.plan()
        for source, target in plan.block_copies:
            for i in range(SIZE):
                self.written[target, i] = self.written.get((source, i))
        for origin, slot in plan.slots:
            self.slots[slot] = [] if origin is None else list(self.slots[origin])
        assert sum(work.n + len(work.draft) for work in plan.works) <= 10
        assert len({id(work.sequence) for work in plan.works}) == len(plan.works)
        for work in plan.works:  # everybody writes, then everybody reads
            text = work.sequence
            if self.scheduler.deterministic:
                inside = text.length < text.n_prompt
                assert text.length % self.chunk == 0 if inside else work.n == 1
            if self.blocks is None:
                assert self.slots[text.slot] == text.tokens[: text.length]
                self.slots[text.slot] = text.tokens[: text.length + work.n]
                continue
            for i, token in enumerate(work.tokens, text.length):
                block = text.table[i // SIZE]
                assert not self.blocks.shared(block)
                self.written[block, i % SIZE] = (i, token, tuple(text.tokens[:i]))
        for work in plan.works:
            text = work.sequence
            for i in range(text.length + work.n) if self.blocks is not None else ():
                held = self.written[text.table[i // SIZE], i % SIZE]
                assert held == (i, text.tokens[i], tuple(text.tokens[:i]))
        for work in plan.works:
            text, completes = work.sequence, work.completes
            followers = [other for other in self.texts if other.leader is text]
            self.scheduler.advance(text, work.n)
            for row in (text, *followers) if completes and text.length >= text.n_prompt else ():
                if row is text or row.pending == len(row.tokens) == row.n_prompt:
                    row.tokens.append(data.draw(st.integers(0, 1)))
                    if len(row.tokens) >= LONGEST and row in self.texts:
                        self.texts.remove(row)
                        self.scheduler.remove(row)
        if self.texts and not plan.works:
            again = self.scheduler.plan()  # who gave way comes back at once: there is always somebody who can go on
            assert again.works or self.scheduler.running
            for text in list(self.texts):
                self.texts.remove(text)
                self.scheduler.remove(text)

    @invariant()
    def nothing_is_lost(self):
        running = [text for text in self.texts if text.slot is not None]
        assert sorted(map(id, self.scheduler.running)) == sorted(map(id, running))
        assert len(self.scheduler.waiting) + len(running) == len(self.texts)
        slots = [text.slot for text in running]
        assert len(set(slots)) == len(slots) and len(slots) + len(self.scheduler.slots) == SLOTS
        if self.blocks is not None:
            held = {block for text in running for block in text.table}
            assert self.blocks.n_held == len(held)


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_what_is_found_ends_where_a_part_does():
    """Parts of 7 and blocks of 4: of nine known tokens eight are in blocks, and no part ends there."""
    scheduler = Scheduler(Blocks(N_BLOCKS, SIZE), SLOTS, step_tokens=40, chunk=7, share=True, deterministic=True)
    starts = []
    for n, number in ((30, 1), (30, 2), (9, 3)):
        text = Sequence([0] * n, n, (0, number))
        scheduler.add(text)
        for first in (True, *[False] * 9):
            for work in scheduler.plan().works:
                if first:
                    starts.append(text.length)
                scheduler.advance(text, work.n)
        scheduler.remove(text)
    assert starts == [0, 28, 0]
