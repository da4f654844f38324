"""What a text said, for choices that look at all of it: counted as the text grows, not anew at each token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Said(Sequence[int]):
    """The tokens of a growing list from ``start`` on, to ``stop`` if there is one."""

    def __init__(self, tokens: Sequence[int], start: int = 0, stop: int | None = None):
        self.tokens, self.start, self.stop = tokens, start, stop
        self._counts, self._to = Counter[int](), start
        self._distinct: Tensor | None = None

    @property
    def counts(self) -> Mapping[int, int]:
        """How often each token was said."""
        if self._to < (end := self.start + len(self)):
            self._counts.update(self.tokens[self._to : end])
            self._to = end
        return self._counts

    @property
    def distinct(self) -> Tensor:
        """The tokens that were said, each once, int64."""
        if self._distinct is None or len(self.counts) != len(self._distinct):
            self._distinct = _tensor(self.counts)
        return self._distinct

    def __len__(self) -> int:
        return (len(self.tokens) if self.stop is None else self.stop) - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(self.tokens[self.start : self.start + len(self)])

    def __getitem__(self, index: Any) -> Any:
        return self.tokens[self.start : self.start + len(self)][index]


class Further(Sequence[int]):
    """What a text said, and what it would have said with some more tokens."""

    def __init__(self, said: Said, more: Sequence[int]):
        self.said, self.more = said, more

    @property
    def counts(self) -> Mapping[int, int]:
        return Counter(self.said.counts) + Counter(self.more)

    @property
    def distinct(self) -> Tensor:
        """The tokens that were said, each at least once, int64."""
        import torch

        return torch.cat([self.said.distinct, _tensor(self.more)])

    def __len__(self) -> int:
        return len(self.said) + len(self.more)

    def __getitem__(self, index: Any) -> Any:
        return [*self.said, *self.more][index]


def further(tokens: Sequence[int], more: Sequence[int]) -> Sequence[int]:
    """``tokens`` and then ``more``."""
    return Further(tokens, more) if isinstance(tokens, Said) else [*tokens, *more]


def counts(tokens: Sequence[int]) -> Mapping[int, int]:
    """How often each token was said."""
    return tokens.counts if isinstance(tokens, Said | Further) else Counter(tokens)


def distinct(tokens: Sequence[int]) -> Tensor:
    """The tokens that were said, each at least once, int64."""
    return tokens.distinct if isinstance(tokens, Said | Further) else _tensor(dict.fromkeys(tokens))


def _tensor(tokens: Any) -> Tensor:
    import torch

    return torch.tensor(list(tokens), dtype=torch.long)
