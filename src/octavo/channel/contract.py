"""What a channel tells the decoder, and what the decoder gives back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Edge(NamedTuple):
    """A piece of the signal and a text that may stand behind it.

    ``to`` is where in the signal it ends; ``text`` may be empty (a slip of the finger), and ``to`` may be where it
    began (a letter left out), but not both. log_prob: ln p(this piece of the signal | text).
    """

    to: int
    text: str
    log_prob: float


class Channel(Protocol):
    """p(signal | text), as the edges of a lattice over the signal. ``max_gap`` bounds edges in a row that read none of
    it; ``end`` is ln p(nothing more comes) after the last."""

    @property
    def max_gap(self) -> int: ...

    @property
    def end(self) -> float: ...

    def edges(self, signal: str, at: int) -> Sequence[Edge]: ...


class Reading(NamedTuple):
    """A text behind a signal. log_prob: weight * language + channel, in nats."""

    text: str
    log_prob: float
    language: float
    channel: float
