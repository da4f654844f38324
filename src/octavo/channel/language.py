"""p(text) for the decoder: a counted model whose tokens are characters or bytes, asked a character at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import ConfigError
from octavo.predictors.predictor import NGramPredictor

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

KEPT = 1 << 23  # probabilities that are kept for when a context comes again

Context = tuple[int, ...]


class CharacterModel:
    """ln p(character | the characters before it), by a counted model.

    Raises:
        ConfigError: a token of the model's is longer than a character, so that a text is cut in more ways than one.
    """

    def __init__(self, model: NGramPredictor, tokenizer: Tokenizer):
        if not isinstance(model, NGramPredictor):
            raise ConfigError("this model was trained, not counted", fix="give the run of an n-gram; see --rescore")
        for token in range(tokenizer.vocab_size):
            piece = tokenizer.token_bytes(token)
            if len(piece) > 1 and len(piece.decode("utf-8", errors="replace")) > 1:
                raise ConfigError(
                    f"the model's tokens are longer than a character ({piece.decode('utf-8', errors='replace')!r})",
                    fix="count one with tokenizer.kind=character or byte",
                )
        self.model, self.tokenizer = model, tokenizer
        order = model.order
        self.width = None if order is None else order - 1
        self._ids: dict[str, Context] = {}
        self._kept: dict[Context, np.ndarray[Any, Any]] = {}

    def ids(self, text: str) -> Context:
        """The tokens of a text."""
        found = self._ids.get(text)
        if found is None:
            found = tuple(self.tokenizer.encode(text))
            if len(text) < 4:
                self._ids[text] = found
        return found

    def knows(self, text: str) -> bool:
        """Whether the vocabulary can spell ``text``."""
        return self.tokenizer.decode(self.ids(text)) == text

    def start(self, before: str = "") -> Context:
        """The context at the beginning of a document, or after ``before`` in one."""
        bos = self.tokenizer.special.bos
        return self.extend(() if bos is None else (bos,), self.ids(before))

    def extend(self, context: Context, ids: Context) -> Context:
        """The context after further tokens: no more of it than is read."""
        joined = context + ids
        return joined if self.width is None else joined[len(joined) - min(self.width, len(joined)) :]

    def tables(self, contexts: Sequence[Context]) -> np.ndarray[Any, Any]:
        """(n, V) log-probabilities of the next token after each context."""
        missing = [context for context in dict.fromkeys(contexts) if context not in self._kept]
        if missing:
            if (len(self._kept) + len(missing)) * self.model.vocab_size > KEPT:
                self._kept = {
                    context: self._kept[context] for context in dict.fromkeys(contexts) if context in self._kept
                }
            rows = self.model.next_log_probs_of([np.array(context, np.int64) for context in missing])
            self._kept.update(zip(missing, rows, strict=True))
        return np.stack([self._kept[context] for context in contexts])

    def log_prob(self, text: str, *, before: str = "", end: bool = False) -> float:
        """ln p(text), and of the document's end after it."""
        context, total = self.start(before), 0.0
        eos = self.tokenizer.special.eos
        for token in (*self.ids(text), *((eos,) if end and eos is not None else ())):
            total += float(self.tables([context])[0, token])
            context = self.extend(context, (token,))
        return total
