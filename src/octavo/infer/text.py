"""What decoding gives: tokens with their scores, and text that is certain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

PROMPT_TAIL = 8
"""Tokens of the prompt the text decoder hears: more than one character can have."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenScore:
    """ln p of a chosen token under the model itself (T = 1, nothing excluded), and the best alternatives."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """One decoding step of one row: the token, the text that became certain with it, and why the row ended."""

    row: int
    id: int
    text: str
    finish_reason: FinishReason | None = None
    score: TokenScore | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What a row produced. ``ids`` has every token, a stop token too; ``text`` has neither that nor a stop string."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    scores: tuple[TokenScore, ...] = ()


class CertainText:
    """Token ids to text that is certain: whole characters, and nothing that may yet become a stop string.

    The decoder hears the end of the prompt first: prompt and completion together read as one text, although a
    decoder drops the space before the first word of a text, and a prompt may end inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self.decoder, self.stops = tokenizer.stream(), stops
        self.pending = ""
        for token in prompt[-PROMPT_TAIL:]:
            self.decoder.push(token)

    def push(self, token: int, is_end: bool) -> tuple[str, FinishReason | None]:
        """The text that is certain now, and whether it ended with this token."""
        if is_end:
            return self.flush("stop")
        self.pending += self.decoder.push(token)
        return self._release(self._held())

    def flush(self, reason: FinishReason) -> tuple[str, FinishReason]:
        """What was held back, up to a stop string that the last bytes completed."""
        self.pending += self.decoder.flush()
        text, stopped = self._release(0)
        return text, stopped or reason

    def _release(self, n_held: int) -> tuple[str, FinishReason | None]:
        found = [at for stop in self.stops if (at := self.pending.find(stop)) >= 0]
        cut = min(found, default=len(self.pending) - n_held)
        text, self.pending = self.pending[:cut], self.pending[cut:]
        return text, "stop" if found else None

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(max(map(len, self.stops), default=1) - 1, len(self.pending))
        ends = (n for n in range(longest, 0, -1) if any(stop.startswith(self.pending[-n:]) for stop in self.stops))
        return next(ends, 0)
