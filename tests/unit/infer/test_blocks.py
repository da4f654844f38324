"""Blocks of memory: nothing is lost, doubled or taken for another text, whatever is asked in whatever order."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from octavo.infer.blocks import SCRAP, Blocks

SIZE = 2
TOKENS = st.lists(st.integers(0, 1), max_size=9)  # few tokens, so that texts often begin alike


class Machine(RuleBasedStateMachine):
    """A model of the allocator: every holder's blocks with the texts they were filled with."""

    texts = Bundle("texts")

    @initialize(n_blocks=st.integers(1, 12))
    def begin(self, n_blocks):
        self.blocks = Blocks(n_blocks, SIZE)
        self.held: dict[int, tuple[list[int], list[int], str]] = {}  # holder: tokens, blocks, within
        self.written: dict[int, tuple] = {}  # block: the whole text up to its end, as it was filled
        self.next = 0

    @rule(target=texts, tokens=TOKENS, within=st.sampled_from(["a", "b"]))
    def enter(self, tokens, within):
        """A text comes: what is known of it is found, the rest is taken and filled."""
        found = self.blocks.find(tokens, within, len(tokens) // SIZE)
        for i, block in enumerate(found):
            assert self.written[block] == (within, *tokens[: (i + 1) * SIZE])
        wanted = -(-len(tokens) // SIZE) - len(found)
        before = self.blocks.n_available
        more = self.blocks.take(wanted)
        if more is None:
            assert wanted > before == self.blocks.n_available
            self.blocks.release(found)
            return -1
        blocks = found + more
        for i in range(len(found), len(blocks)):
            self.written[blocks[i]] = (within, *tokens[: (i + 1) * SIZE])
            if (i + 1) * SIZE <= len(tokens):
                text = tokens[i * SIZE : (i + 1) * SIZE]
                blocks[i] = self.blocks.know(blocks[i], blocks[i - 1] if i else None, text, within)
                assert self.written[blocks[i]] == (within, *tokens[: (i + 1) * SIZE])
        self.next += 1
        self.held[self.next] = (tokens, blocks, within)
        return self.next

    @rule(target=texts, holder=texts)
    def fork(self, holder):
        if holder not in self.held:
            return -1
        tokens, blocks, within = self.held[holder]
        self.blocks.hold(blocks)
        self.next += 1
        self.held[self.next] = (tokens, list(blocks), within)
        return self.next

    @rule(holder=consumes(texts))
    def leave(self, holder):
        if holder in self.held:
            self.blocks.release(self.held.pop(holder)[1])

    @rule()
    def forget(self):
        self.blocks.forget_idle()
        assert self.blocks.n_idle == 0

    @invariant()
    def every_block_is_somewhere_once(self):
        blocks = self.blocks
        counts: dict[int, int] = {}
        for _, own, _ in self.held.values():
            assert SCRAP not in own and len(set(own)) == len(own)
            for block in own:
                counts[block] = counts.get(block, 0) + 1
        assert blocks.n_held == len(counts)
        assert blocks.n_held + blocks.n_available == blocks.n_blocks
        assert {b: n for b, n in enumerate(blocks._holders) if n} == counts
        assert not set(blocks._free) & set(blocks._idle) and len(set(blocks._free)) == len(blocks._free)
        assert not (set(blocks._free) | set(blocks._idle)) & set(counts)

    @invariant()
    def what_is_known_can_be_found(self):
        """Of an idle text no block is missing before another."""
        nodes = set(self.blocks._node_of.values())
        for before, _ in self.blocks._after:
            assert isinstance(before, str) or before in nodes

    @invariant()
    def a_shared_block_says_so(self):
        for _, own, _ in self.held.values():
            for block in own:
                if sum(block in other for _, other, _ in self.held.values()) > 1:
                    assert self.blocks.shared(block)


TestBlocks = Machine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.rows("B7")
def test_the_oldest_idle_text_is_given_up_from_its_end():
    blocks = Blocks(4, SIZE)
    first = blocks.take(2)
    assert first is not None
    blocks.know(first[0], None, [1, 2], "m")
    blocks.know(first[1], first[0], [3, 4], "m")
    blocks.release(first)
    assert blocks.n_idle == 2 and blocks.n_available == 4
    assert blocks.take(3) is not None  # two free ones and one of the idle
    assert blocks.find([1, 2, 3, 4], "m", 2) == first[:1]
    assert blocks.take(1) is None


@pytest.mark.rows("B7")
def test_the_same_text_filled_twice_is_kept_once():
    blocks = Blocks(4, SIZE)
    (a,), (b,) = blocks.take(1), blocks.take(1)
    assert blocks.know(a, None, [1, 2], "m") == a
    assert blocks.know(b, None, [1, 2], "m") == a
    assert blocks.n_held == 1 and blocks.shared(a)
    assert blocks.find([1, 2], "other", 1) == []
