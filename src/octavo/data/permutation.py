"""A permutation of 0 .. n-1 that is a function of a key, so that an order of any length needs no storage."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ROUNDS = 6
BLOCK = 1 << 15  # values at a time: what lies between two steps stays in the cache
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


def mix(values: Array) -> Array:
    """The finaliser of splitmix64 on uint64 values: every bit of the result depends on every bit of the argument."""
    values = values + _GOLDEN
    values = (values ^ (values >> _S30)) * _MIX1
    values = (values ^ (values >> _S27)) * _MIX2
    return values ^ (values >> _S31)


def _round_keys(key: tuple[int, ...]) -> Array:
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = mix(state ^ np.uint64(part & (2**64 - 1)))
    return mix(state + np.arange(1, ROUNDS + 1, dtype=np.uint64) * _GOLDEN)


def permute(index: Array, n: int, *key: int) -> Array:
    """Where each of ``index`` goes in the permutation of 0 .. n-1 that belongs to ``key``.

    A Feistel network over the next even power of two, walked along its cycle until it is inside: a bijection for
    every key, computed at once for all of ``index`` in constant memory.

    Args:
        index: integers in 0 .. n-1, any shape.
        n: size of the set.
        key: integers (seed, epoch, ...).

    Source: Black and Rogaway 2002 (Ciphers with Arbitrary Finite Domains), cycle walking.
    """
    flat = np.asarray(index, dtype=np.uint64).ravel()
    if flat.size and int(flat.max()) >= n:
        raise IndexError(f"index {flat.max()} of a permutation of {n}")
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = _round_keys(key)
    out = flat.copy()
    for start in range(0, flat.size, BLOCK):
        _walk(out[start : start + BLOCK], n, half, mask, keys)
    return out.astype(np.int64).reshape(np.shape(index))


def _walk(out: Array, n: int, half: np.uint64, mask: np.uint64, keys: Array) -> None:
    outside = np.arange(out.size)
    while outside.size:
        left, right = out[outside] >> half, out[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        walked = (left << half) | right
        out[outside] = walked
        outside = outside[walked >= n]
