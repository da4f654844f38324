"""Chance in word2vec: every word of the text has a stream of random numbers of its own.

A stream begins at (seed, epoch, place of the word in the text). What is drawn for a word therefore depends neither on
threads nor on where a block of text begins, a stopped training goes on with the same numbers, and the kernel in C++ and
its plain twin draw alike. In this order a stream says: whether the word is kept, how far its window reaches, the wrong
words of its predictions.
"""

from __future__ import annotations

import numpy as np

MASK = (1 << 64) - 1


def mix(z: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014): 64 bits to 64 bits that look like chance."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def epoch_key(seed: int, epoch: int) -> int:
    """Where the streams of one pass over the text begin."""
    return mix(mix(seed) + epoch & MASK)


class Draws:
    """The stream of one word."""

    def __init__(self, key: int, place: int):
        self._state = mix(key + place & MASK)

    def next(self) -> int:
        """64 random bits."""
        self._state = self._state + 0x9E3779B97F4A7C15 & MASK
        return mix(self._state)

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return (self.next() >> 32) * n >> 32

    def word(self, share: np.ndarray, other: np.ndarray) -> int:
        """One word out of the tables of ``alias``."""
        bits = self.next()
        slot = (bits >> 32) * len(share) >> 32
        return slot if bits & 0xFFFFFFFF < share[slot] else int(other[slot])


def keep(counts: np.ndarray, sample: float) -> np.ndarray:
    """(V,) uint64: of 2^32, the chance that an occurrence of each word is kept."""
    if sample == 0:
        return np.full(len(counts), 1 << 32, np.uint64)
    share = counts / counts.sum()
    chance = np.minimum((np.sqrt(share / sample) + 1) * sample / share, 1.0)
    return np.round(chance * 2**32).astype(np.uint64)


def alias(counts: np.ndarray, exponent: float) -> tuple[np.ndarray, np.ndarray]:
    """Tables to draw a word in proportion to count^exponent in constant time (Walker 1977, Vose 1991).

    Returns:
        share (V,) uint32 and other (V,) int32: slot i stands for word i in share[i] of 2^32 cases, else for other[i].
    """
    n = len(counts)
    weight = counts.astype(np.float64) ** exponent
    chance = (weight * (n / weight.sum())).tolist()
    share, other = [1.0] * n, list(range(n))
    small = [i for i, c in enumerate(chance) if c < 1]
    large = [i for i, c in enumerate(chance) if c >= 1]
    while small and large:
        little, big = small.pop(), large[-1]
        share[little], other[little] = chance[little], big
        chance[big] -= 1 - chance[little]
        if chance[big] < 1:
            small.append(large.pop())
    scaled = np.minimum(np.round(np.array(share) * 2**32), 2**32 - 1)
    return scaled.astype(np.uint32), np.array(other, np.int32)
