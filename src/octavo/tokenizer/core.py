"""`Tokenizer`: text to ids and back, over the `tokenizers` library (imported here and in train.py, lazily).

Text that spells a special token stays text. The library would turn it into the special id, so the tokenizer it
runs here is a twin whose special tokens bear names nobody can write (random, new in every process). Where a
special token is meant (``parse_special``, chat templates) its spelling is first replaced by that name. All other
ids are those of the original, which is what is saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import CheckpointError, DataError
from octavo.tokenizer.pieces import ByteTable, StreamDecoder
from octavo.tokenizer.spec import add_roles, parse, special_pattern, tokens_of, twin_of
from octavo.tokenizer.special import FIM, MASK, SENTINEL, Special, as_dict

if TYPE_CHECKING:
    from octavo.tokenizer import fast
    from octavo.tokenizer.chat import Rendered

WORTH_FASTER = 1 << 17  # characters: fewer are encoded before a faster encoder is made


class Tokenizer:
    """Text to ids and back; made by :func:`octavo.tokenizer.train` or :meth:`load`.

    Args:
        text: the tokenizer.json, as text.
        special: token string of each role (``pad`` ``bos`` ``eos`` ``unk`` ``cls`` ``sep`` ``mask`` ``turn_start``
            ``turn_end``), where there is one. Turn marks that are not given are read off the chat template.
        chat_template: Jinja source, or None.
        max_seq_len: what the files say the model accepts, in tokens; only kept for saving.
        stop_ids: ids that end an answer beside end of text and end of turn.

    Raises:
        CheckpointError: the text is not a tokenizer.json this library can run.
    """

    def __init__(
        self,
        text: str,
        *,
        special: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        max_seq_len: int | None = None,
        stop_ids: Collection[int] = (),
    ):
        spec = parse(text)
        self._spec, self._special_text = spec, dict(special or {})
        self.chat_template, self.max_seq_len = chat_template, max_seq_len
        add_roles(spec, self._special_text)
        self._names: dict[str, str] = {}  # spelling of a special token -> its unguessable name in the twin
        stem = secrets.token_hex(16)
        for i, token in enumerate(t for t in spec["added_tokens"] if t["special"]):
            self._names[token["content"]] = f"{stem}{i:06x}"
        self._twin_text = twin_of(spec, self._names)
        self._twin = _rust(self._twin_text)
        self._check_twin()
        self.special_ids = frozenset(t["id"] for t in spec["added_tokens"] if t["special"])
        self._find_special = special_pattern(spec["added_tokens"])
        tokens = tokens_of(spec)
        self.vocab_size = len(tokens)
        self.tokens: tuple[str | None, ...] = tuple(tokens)
        plain_added = {t["content"] for t in spec["added_tokens"] if not t["special"]}
        try:
            self._table = ByteTable(tokens, spec.get("decoder"), set(self.special_ids), plain_added)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"the decoder in tokenizer.json is malformed: {error!r}", fix="save it again"
            ) from None
        self._more_stops = tuple(sorted({i for i in stop_ids if 0 <= i < self.vocab_size}))
        if twice := next((text for text in self._special_text.values() if text not in self._ids), None):
            raise CheckpointError(f"another token has the id of {twice!r}", fix="repair the ids in tokenizer.json")
        self.special = Special(**{name: self._ids[text] for name, text in self._special_text.items()})
        if self.special.turn_end is None:
            from octavo.tokenizer.chat import find_turn_marks

            start, end = find_turn_marks(self)
            self.special = Special(**{**as_dict(self.special), "turn_start": start, "turn_end": end})

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: end of text, end of turn, and what generation_config.json adds."""
        ends = (self.special.eos, self.special.turn_end, *self._more_stops)
        return frozenset(i for i in ends if i is not None)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens) if token is not None}

    def _check_twin(self) -> None:
        for token in self._spec["added_tokens"]:
            name = self._names.get(token["content"], token["content"])
            if self._twin.token_to_id(name) != token["id"]:
                raise CheckpointError(
                    f"added token {token['content']!r} has id {token['id']} in tokenizer.json but "
                    f"{self._twin.token_to_id(name)} by its place in the vocabulary",
                    fix="repair the ids under added_tokens",
                )

    # -- text to ids

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of ``text``, without bos or eos.

        Special tokens spelt in the text stay plain text unless ``parse_special``.

        Raises:
            DataError: the text contains a lone surrogate, which is not Unicode text.
        """
        if parse_special:
            text = self._name_specials(text)
        return self._encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as int32 arrays: the same as ``encode``, on all cores and many times faster.

        See :attr:`encoder` for what it runs on.
        """
        texts = list(texts)
        with contextlib.suppress(Exception):  # what it refuses, the usual encoder takes or refuses in words
            if "_faster" in self.__dict__ or sum(map(len, texts)) >= WORTH_FASTER:
                if (encode := self._faster[0]) is not None:
                    return encode(texts)
        return self._encode_all(texts)

    def _encode_all(self, texts: list[str]) -> list[np.ndarray]:
        try:
            encodings = self._twin.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            raise _refusal(error, texts) from None
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    @property
    def encoder(self) -> str:
        """What ``encode_batch`` runs on; where that is `tokenizers`, why it is nothing faster."""
        return self._faster[1]

    @cached_property
    def _faster(self) -> tuple[fast.Encode | None, str]:
        from octavo.tokenizer import fast

        try:
            return fast.find(self._twin_text, self.tokens, self._encode_all, self._normalize)
        except fast.NotFast as why:
            return None, f"tokenizers: {why}"

    def _normalize(self, text: str) -> str:
        return self._twin.normalizer.normalize_str(text)

    def _encode(self, text: str) -> Any:
        try:
            return self._twin.encode(text, add_special_tokens=False)
        except Exception as error:
            raise _refusal(error, [text]) from None

    # -- for chat.py: special tokens by place

    @property
    def special_names(self) -> Mapping[str, str]:
        """The unguessable name in the twin of each special token."""
        return self._names

    def find_specials(self, text: str) -> list[tuple[int, int]]:
        """(start, stop) of each special token spelt in ``text``, as the library would find them."""
        return [match.span() for match in self._find_special.finditer(text) if match[0] in self._names]

    def encode_named(self, text: str) -> Any:
        """Ids and character offsets of a text in which special tokens are written by their names."""
        return self._encode(text)

    def special_id_of(self, text: str) -> int:
        """The id of a special token by its spelling."""
        return self._ids[text]

    def _name_specials(self, text: str) -> str:
        return self._find_special.sub(lambda match: self._names.get(match[0], match[0]), text)

    # -- ids to text

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self._table.join(self._checked(ids), skip_special=skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ``ids``, specials skipped."""
        return self._table.join(self._checked(ids))

    def token_bytes(self, id: int) -> bytes:
        """The bytes one token stands for inside a text, ``b""`` for specials.

        For lossless kinds their lengths over a document add up to its length in UTF-8 bytes.
        """
        return self._table.rest[self._checked([id])[0]]

    def token_text(self, id: int) -> str:
        """The name of one token for people: its text, or the spelling of a special."""
        return self.decode([id], skip_special=False)

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder fed one id at a time; it returns only whole characters."""
        return StreamDecoder(self._table, skip_special=skip_special)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise DataError(f"token id {bad} is outside the vocabulary 0..{self.vocab_size - 1}", fix="check the model")
        return ids

    # -- conversations

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """A conversation as ids with a loss mask, by the chat template: see :func:`octavo.tokenizer.chat.render`."""
        from octavo.tokenizer.chat import render

        return render(
            self, messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables or {}
        )

    @property
    def post_processor(self) -> Mapping[str, Any]:
        """What tokenizer.json says of the tokens around a text, for other programs; empty if nothing."""
        said = self._spec.get("post_processor")
        return said if isinstance(said, Mapping) else {}

    # -- identity and storage

    @property
    def special_text(self) -> dict[str, str]:
        """Token string by role (``pad``, ``bos`` ...), for the roles that exist."""
        roles = as_dict(self.special)
        return {name: self.tokens[i] or "" for name, i in roles.items() if i is not None}

    @cached_property
    def hash(self) -> str:
        """SHA-256 over vocabulary, merges and specials, in a canonical form: equal for equal tokenizers."""
        model = self._spec["model"]
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or []]
        scores = [score for _, score in model["vocab"]] if isinstance(model["vocab"], list) else []
        later = ("cls", "sep", "mask")  # no part of the hash where there are none: older than these
        roles = {name: i for name, i in as_dict(self.special).items() if i is not None or name not in later}
        content = [list(self.tokens), merges, scores, sorted(self.special_ids), roles]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode("utf-8")).hexdigest()

    def with_mask(self) -> Tokenizer:
        """This tokenizer, with a token more for what is masked where it has none."""
        if self.special.mask is not None:
            return self
        return self._with((MASK,), {"mask": MASK})

    @cached_property
    def fim(self) -> tuple[int, int, int] | None:
        """The tokens before prefix, suffix and middle of a text whose middle is told last; None if it has none."""
        added = {token["content"]: token["id"] for token in self._spec["added_tokens"]}
        found = next((names for names in FIM if all(name in added for name in names)), None)
        return None if found is None else (added[found[0]], added[found[1]], added[found[2]])

    def with_fim(self) -> Tokenizer:
        """This tokenizer, with the three tokens of ``fim`` where it has none."""
        return self if self.fim is not None else self._with(FIM[0], {})

    def with_sentinels(self, n: int = 100) -> Tokenizer:
        """This tokenizer, with T5's <extra_id_0> and on where it has none: each stands for a span of a text."""
        if SENTINEL.format(0) in self.tokens:
            return self
        return self._with([SENTINEL.format(i) for i in range(n)], {})

    def _with(self, names: Sequence[str], roles: Mapping[str, str]) -> Tokenizer:
        """This tokenizer with more special tokens behind all others."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        new = [{"id": self.vocab_size + i, "content": name, **flags} for i, name in enumerate(names)]
        text = json.dumps({**self._spec, "added_tokens": [*self._spec["added_tokens"], *new]})
        return _rebuild(text, {**self.special_text, **roles}, self.chat_template, self.max_seq_len, self._more_stops)

    def to_json(self) -> str:
        """The tokenizer.json."""
        return json.dumps(self._spec, ensure_ascii=False, indent=2) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write the Hugging Face layout into ``folder``; transformers loads it without trusting remote code."""
        from octavo.tokenizer.layout import save

        save(self, Path(folder))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a Hugging Face folder, a tokenizer.json, or a folder with GPT-2's encoder.json and vocab.bpe.

        Raises:
            CheckpointError: a file is missing, damaged or of a kind this library cannot run.
        """
        from octavo.tokenizer.layout import load

        return load(Path(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.to_json(), self.special_text, self.chat_template, self.max_seq_len, self._more_stops)

    def __repr__(self) -> str:
        return f"Tokenizer({self._spec['model']['type']}, vocab_size={self.vocab_size}, hash={self.hash[:12]})"


def _rebuild(
    text: str, special: dict[str, str], template: str | None, max_seq_len: int | None, stop_ids: tuple[int, ...]
) -> Tokenizer:
    return Tokenizer(text, special=special, chat_template=template, max_seq_len=max_seq_len, stop_ids=stop_ids)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise DataError(f"a text must be a string, not {type(text).__name__}", fix="pass str")
    for i, char in enumerate(text):
        if "\ud800" <= char <= "\udfff":
            raise DataError(
                f"character {i} is the lone surrogate U+{ord(char):04X}, which no UTF-8 text contains",
                fix="read the text with errors='replace'",
            )


def _refusal(error: Exception, texts: Sequence[Any]) -> CheckpointError:
    """Why the library could not encode: the text (raised at once), or else a vocabulary without an unknown token."""
    for text in texts:
        _check_text(text)
    return CheckpointError(f"this tokenizer cannot encode the text: {error}", fix="repair its vocabulary")


def _rust(text: str) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # nothing narrower: a panic of the library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise CheckpointError(f"tokenizer.json cannot be read: {error}", fix="save it again") from None
