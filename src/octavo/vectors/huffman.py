"""The Huffman tree of a vocabulary: frequent words are few questions away from the root."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from octavo.errors import ConfigError
from octavo.vectors.config import MAX_OUTPUTS


@dataclass(frozen=True)
class Tree:
    """The way from the root to every word.

    Attributes:
        starts: (V + 1,) int64; word w's way is ``starts[w]`` to ``starts[w + 1]``.
        nodes: the inner node (0 to V - 2) where each question is asked.
        signs: float32, the answer: +1 for the lighter branch, -1 for the other.
    """

    starts: np.ndarray
    nodes: np.ndarray
    signs: np.ndarray


def tree(counts: np.ndarray) -> Tree:
    """The tree of least mean length (Huffman 1952) in linear time, for counts in descending order.

    Raises:
        ConfigError: a word is further from the root than the kernel can go.
    """
    n = len(counts)
    weight = [int(c) for c in counts[::-1]]  # leaves, lightest first; new nodes come out in order of weight too
    parent, light = [0] * (2 * n - 1), [False] * (2 * n - 1)
    leaf, inner = 0, n
    for node in range(n, 2 * n - 1):
        for first in (True, False):
            if leaf < n and (inner == node or weight[leaf] <= weight[inner]):
                child, leaf = leaf, leaf + 1
            else:
                child, inner = inner, inner + 1
            parent[child], light[child] = node, first
            if first:
                weight.append(weight[child])
            else:
                weight[node] += weight[child]
    ways: list[tuple[list[int], list[bool]]] = []
    for word in range(n):
        at, nodes, signs = n - 1 - word, [], []
        while at != 2 * n - 2:
            signs.append(light[at])
            at = parent[at]
            nodes.append(2 * n - 2 - at)  # the root is node 0
        ways.append((nodes[::-1], signs[::-1]))
    if max(len(nodes) for nodes, _ in ways) > MAX_OUTPUTS:
        raise ConfigError("the Huffman tree is too deep for these counts", fix="use --loss negative")
    starts = np.concatenate([[0], np.cumsum([len(nodes) for nodes, _ in ways])]).astype(np.int64)
    flat_nodes = np.array([node for nodes, _ in ways for node in nodes], np.int32)
    flat_signs = np.array([1.0 if sign else -1.0 for _, signs in ways for sign in signs], np.float32)
    return Tree(starts, flat_nodes, flat_signs)
