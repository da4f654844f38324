"""Texts that follow a JSON Schema, a regular expression or a grammar, whatever the model would rather write.

After every token, llguidance says which tokens may come next; all others are excluded before the next one is drawn. So
a text has the model's own probabilities, token by token, among those that keep it possible. A text ends by itself where
nothing can follow; where more may follow, the model chooses between going on and a token that ends texts.

The vocabulary is told to llguidance as bytes. A token that stands for other bytes at the beginning of a text (where
SentencePiece's leading space is dropped) is told twice; one more id stands for the end, whatever ends a text here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.infer.text import PROMPT_TAIL

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

# A model may put white space between the parts of JSON, but not write it for ever.
WHITE_SPACE = r"[ \n\r\t]{1,64}"
# Any way of cutting a text into tokens that the model likes, not only the tokenizer's own.
_FREE = '%llguidance {"no_forcing": true}\n'


class GrammarError(ConfigError):
    """What a text was to follow cannot be understood or cannot be enforced.

    Args:
        keywords: of a JSON Schema, those that cannot be enforced.
    """

    def __init__(self, what: str, *, fix: str, keywords: Sequence[str] = ()):
        super().__init__(what, fix=fix)
        self.keywords = tuple(keywords)


class Vocabulary:
    """A tokenizer as llguidance sees it."""

    def __init__(self, tokenizer: Tokenizer):
        LLTokenizer = _llguidance().LLTokenizer
        n, self.special_ids = tokenizer.vocab_size, frozenset(tokenizer.special_ids)
        first, rest = [tokenizer.decode_bytes([i]) for i in range(n)], [tokenizer.token_bytes(i) for i in range(n)]
        apart = [i for i in range(n) if first[i] != rest[i] and i not in self.special_ids]
        self.n = n
        self.opening = np.arange(n)
        """The id that stands for a token at the beginning of a text."""
        self.opening[apart] = np.arange(n, n + len(apart))
        specials = [b"<special>" if i in self.special_ids else raw for i, raw in enumerate(rest)]
        self.end = n + len(apart)
        wrapped = _Wrapped([*specials, *(first[i] for i in apart), b"<end>"], [*sorted(self.special_ids), self.end])
        self.told = LLTokenizer(wrapped, n_vocab=self.end + 1)

    def is_opening(self, prompt: Sequence[int]) -> bool:
        """Whether what follows ``prompt`` is decoded as the beginning of a text."""
        return all(token in self.special_ids for token in prompt[-PROMPT_TAIL:])


class _Wrapped:
    """The attributes that LLTokenizer reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_ids: list[int]):
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special_ids, special_ids[-1]

    def __call__(self, text: Any) -> list[int]:
        return []  # asked for only where a text is forced, which _FREE turns off


class Grammar:
    """What texts have to follow; ``Request.constraint`` takes it.

    Args:
        lark: a grammar in llguidance's form of Lark.
        name: what to call it where it is refused.

    Raises:
        GrammarError: it is not a grammar, or too large.
    """

    def __init__(self, tokenizer: Tokenizer, lark: str, name: str = "grammar"):
        self.vocabulary = _vocabulary(tokenizer)
        self.matcher = _llguidance().LLMatcher(self.vocabulary.told, _FREE + lark, log_level=0)
        if self.matcher.is_error():
            raise _refusal(name, self.matcher.get_error())

    def __call__(self, prompt: Sequence[int], stop_ids: Collection[int]) -> Follow:
        """For a text that follows ``prompt`` and may be ended by ``stop_ids``."""
        return Follow(self.vocabulary, self.matcher.deep_copy(), self.vocabulary.is_opening(prompt), stop_ids)


class Follow:
    """One text on its way through a grammar (``request.Constraint``)."""

    def __init__(self, vocabulary: Vocabulary, matcher: Any, opening: bool, stop_ids: Collection[int]):
        self.vocabulary, self.matcher, self.opening = vocabulary, matcher, opening
        self.stop_ids = sorted(i for i in stop_ids if i < vocabulary.n)
        self.bits: np.ndarray | None = None  # where they are known already

    def mask(self, logits: Tensor) -> None:
        """Give every token that cannot come next -inf, in logits (V,).

        Raises:
            ConfigError: no token of the vocabulary can come next.
        """
        bits = self._bits() if self.bits is None else self.bits
        allowed = (bits[self.vocabulary.opening] if self.opening else bits[: self.vocabulary.n])[: len(logits)]
        allowed[[i for i in self.stop_ids if i < len(logits)]] = bits[self.vocabulary.end]
        if not allowed.any():
            raise _dead_end()
        logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), -torch.inf)

    def accept(self, token: int) -> bool:
        """Take the token that was chosen; True if the text is complete with it, and nothing can follow."""
        if token in self.stop_ids:
            return True
        self.matcher.consume_token(int(self.vocabulary.opening[token]) if self.opening else token)
        self.opening, self.bits = False, None
        if self.matcher.is_error() or not self.matcher.is_accepting():  # of an error, the next mask speaks
            return False
        self.bits = self._bits()
        return not self.bits[: self.vocabulary.n].any()

    def _bits(self) -> np.ndarray:
        """Which ids of the vocabulary, as it was told, may come next."""
        mask = self.matcher.compute_bitmask()
        if self.matcher.is_error():
            raise _refusal("grammar", self.matcher.get_error())
        return np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").astype(bool)


def json_schema(tokenizer: Tokenizer, schema: Mapping[str, Any] | bool) -> Grammar:
    """Texts that are JSON and valid under ``schema`` (draft 2020-12; a keyword that cannot be enforced is refused).

    Raises:
        GrammarError: not a schema, or one that cannot be enforced.
    """
    return Grammar(tokenizer, f"start: {json_rule(schema)}", "JSON schema")


def json_rule(schema: Mapping[str, Any] | bool) -> str:
    """What stands for JSON under ``schema`` in a grammar."""
    if not isinstance(schema, (Mapping, bool)):
        raise GrammarError("a JSON schema is an object, true or false", fix="see json-schema.org")
    own = {} if schema is True else schema
    if isinstance(own, Mapping):
        own = {**own, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}
    try:
        return f"%json {json.dumps(own, allow_nan=False)}"
    except (TypeError, ValueError) as error:
        raise GrammarError(f"the JSON schema is not JSON: {error}", fix="see json-schema.org") from None


def regex(tokenizer: Tokenizer, pattern: str) -> Grammar:
    r"""Texts that match ``pattern`` as a whole. The syntax is that of Rust's regex crate (no look-around, no ``\1``).

    Raises:
        GrammarError: not a regular expression.
    """
    spelt = json.loads(_llguidance().LLMatcher.grammar_from_regex(pattern))
    return Grammar(tokenizer, spelt["grammars"][0]["lark_grammar"], "regular expression")


def lark(tokenizer: Tokenizer, grammar: str) -> Grammar:
    """Texts that the rule ``start`` of a Lark grammar derives, in llguidance's dialect of it.

    Raises:
        GrammarError: not a grammar.
    """
    return Grammar(tokenizer, grammar)


def follow(
    tokenizer: Tokenizer,
    *,
    json_schema: Mapping[str, Any] | bool | None = None,
    regex: str | None = None,
    grammar: str | None = None,
) -> Grammar | None:
    """What was asked for, if anything.

    Raises:
        ConfigError: more than one, or one that is wrong.
    """
    given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ConfigError(f"a text cannot follow both {names[0]} and {names[1]}", fix="give one of them")
    if not names:
        return None
    make: Any = {"json_schema": _json_schema, "regex": _regex, "grammar": lark}[names[0]]
    return make(tokenizer, given[names[0]])


_json_schema, _regex = json_schema, regex  # the arguments of follow have these names


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


def _refusal(name: str, error: str) -> GrammarError:
    if "NoExtension" in error:
        return _dead_end()
    found = re.search(r"Unimplemented keys: \[(.*)\]", error)
    keywords = re.findall(r'"([^"]*)"', found[1]) if found else []
    if keywords:
        what = f"the {name} uses {', '.join(keywords)}, which cannot be enforced"
        return GrammarError(what, fix="leave it out", keywords=keywords)
    lines = [line.strip() for line in error.splitlines() if line.strip(" ^")]
    reason = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "unknown")
    return GrammarError(f"the {name} cannot be followed: {reason.removeprefix('error: ')[:200]}", fix="correct it")


def _dead_end() -> GrammarError:
    return GrammarError(
        "the text has come to a place where the grammar allows no token of this vocabulary",
        fix="use a tokenizer that can spell every byte, or another grammar",
    )


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError("structured output needs llguidance", fix="pip install 'octavo[structured]'") from None
    return llguidance
