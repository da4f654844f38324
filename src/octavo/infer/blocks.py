"""Which block of memory belongs to whom: counted references, texts that begin alike, and what is given up first.

No tensor is here: a block is a number, ``block_size`` tokens of every layer's state. Kwon et al. 2023, section 4; that
full blocks are found again by their text, as a tree: Zheng et al. 2023 (SGLang), section 3.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

SCRAP = 0
"""The block that padding is written to; nobody owns it."""


class Blocks:
    """``n_blocks`` blocks beside the scrap one. Every one is free, held (by one or more), or idle.

    An idle block is held by nobody, but its text is known: whoever begins with the same text takes it over. The text of
    a block is known by the tokens in it and by the block before it, compared as they are, not by a digest of them: two
    texts are never taken for one another. Idle blocks are given up in the order in which they fell idle; the last block
    of a text falls idle first, so that no block outlives the one before it.
    """

    def __init__(self, n_blocks: int, block_size: int):
        self.n_blocks, self.block_size = n_blocks, block_size
        self._free = list(range(n_blocks, SCRAP, -1))
        self._holders = [0] * (n_blocks + 1)
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._after: dict[tuple[Hashable, tuple[int, ...]], int] = {}  # (the node before, tokens) -> block
        self._key_of: dict[int, tuple[Hashable, tuple[int, ...]]] = {}
        self._node_of: dict[int, int] = {}
        self._n_nodes = 0

    @property
    def n_available(self) -> int:
        """Blocks that ``take`` can give."""
        return len(self._free) + len(self._idle)

    @property
    def n_held(self) -> int:
        return self.n_blocks - self.n_available

    @property
    def n_idle(self) -> int:
        return len(self._idle)

    def take(self, n: int) -> list[int] | None:
        """``n`` blocks held once each; None, and no change, where there are not as many."""
        if n > self.n_available:
            return None
        taken = []
        for _ in range(n):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def hold(self, blocks: Sequence[int]) -> None:
        """One holder more of each."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less of each, the blocks of a text in its order."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def shared(self, block: int) -> bool:
        """Whether somebody else holds it too, or its text is known: who writes to it must copy it first."""
        return self._holders[block] > 1 or block in self._key_of

    def find(self, tokens: Sequence[int], within: Hashable, at_most: int) -> list[int]:
        """The blocks that hold the beginning of ``tokens``, not more than ``at_most``, held once more each.

        Args:
            within: texts are compared only with texts of the same ``within`` (a model with its adapters).
        """
        found, node, size = list[int](), within, self.block_size
        for i in range(min(at_most, len(tokens) // size)):
            block = self._after.get((node, tuple(tokens[i * size : (i + 1) * size])))
            if block is None:
                break
            found.append(block)
            node = self._node_of[block]
        self.hold(found)
        return found

    def know(self, block: int, before: int | None, tokens: Sequence[int], within: Hashable) -> int:
        """Say the text of a full block: its tokens and the block before it, whose own text is known (None: the first).

        Returns:
            The block to go on with: another that holds the same text, if there is one; ``block`` is then released and
            the other held.
        """
        if block in self._key_of:
            return block
        key = (within if before is None else self._node_of[before], tuple(tokens))
        known = self._after.get(key)
        if known is not None:
            self.hold([known])
            self.release([block])
            return known
        self._n_nodes += 1
        self._after[key], self._key_of[block], self._node_of[block] = block, key, self._n_nodes
        return block

    def forget_idle(self) -> None:
        """Give up everything idle, as when the weights change."""
        while self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
            self._free.append(block)

    def _forget(self, block: int) -> None:
        del self._after[self._key_of.pop(block)]
        del self._node_of[block]
