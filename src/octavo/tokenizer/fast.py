"""The same ids, faster: when something other than `tokenizers` may encode.

The `fastokens` library encodes tens of times faster. It cuts text with scanners written by hand for a few well-known
patterns, and with a regular-expression engine of its own for all others. The scanners were compared with `tokenizers`
on every code point and on random text and gave the same ids; the engine did not (U+180E is white space to it, and
where it cuts can depend on the text before), so only the scanners' patterns are allowed here. Whatever is used must
first give the same ids on a probe that has pieces of this very vocabulary in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from octavo.tokenizer.pieces import byte_alphabet, unmap_bytes

Array = np.ndarray[Any, Any]
Encode = Callable[[list[str]], list[Array]]

# Compared: 0.3.5. Some earlier versions have no scanner for Qwen 2's pattern.
FIRST, END = (0, 3, 5), (0, 4)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2, LLAMA3 = _MODERN.replace("DIGITS", r"\p{N}"), _MODERN.replace("DIGITS", r"\p{N}{1,3}")

_RUN = "a line of text, " * 400
# Scripts, spaces, digits, contractions, emoji, specials, ends of lines; then what was found to differ between regular
# expressions: a Mongolian vowel separator, runs longer than a kilobyte, texts that part where another text had an x.
PROBE = (
    "The quick brown fox, it's 1234567 days old!\r\n\n\tdef f(x):  return x ** 2   # done\n"
    "你好，世界。 \u00e9t\u00e9 e\u0301 \U0001f469\u200d\U0001f680 \u0434\u0430 \u0645\u0631\u062d\u0628\u0627 "
    "aaaaaaaaaaaaaaaa ---- \u00a0 <|im_end|> </s> [INST] <0x0A> ##x \u2581y",
    "I'M we'LL they'Ve 'tis 'S'\u017f'\u017ft x'd's ''s 'll\u00e9 '\u2019s "
    "\u180e'\u180e \u180es\u180e\u180e \u180e's '\u180e're \u180e'LL b",
    "０１２ ٣٤٥ ½ Ⅷ 12,345.678e-9 0x1F 1 22 333 4444 55555\u3000全角 １a2b３ க்ஷ กำ 한국어 ひらがな ʼn\u0345 \U0001d7d9",
    " \u2003\u2028x\u2029 \x85\x0b\x0c\x1c\x1f\ufeff\u200b \t \n \t\n\n  \r\r\n x\n \n  y \u1680 ",
    f"{_RUN}{' ' * 3000}{'-' * 3000}{'x' * 3000}\n{'中' * 1500}{_RUN}",
    *(f"{_RUN}{' ' * 700}{end}" for end in ("x", " ", "\n", "\tx")),
)
VOCABULARY_PROBE = 4096  # tokens


class NotFast(Exception):
    """Why this tokenizer, or this machine, has nothing faster."""


def find(
    twin: str, tokens: Sequence[str | None], reference: Encode, normalize: Callable[[str], str]
) -> tuple[Encode, str]:
    """An encoder that gives the ids of ``reference``, only faster, and its name.

    Args:
        twin: the tokenizer.json to run.
        tokens: token string of each id.
        reference: the usual encoder.
        normalize: the tokenizer's own normaliser; asked only if it has one.

    Raises:
        NotFast: there is none, and why.
    """
    spec = json.loads(twin)
    normalizer = spec.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise NotFast(f"its normaliser is {normalizer.get('type')}")
    _check_model(spec["model"])
    _check_added(spec["added_tokens"], normalize if normalizer else str)
    encode, name = _whole_bytes(spec), "a table of bytes"
    if encode is None:
        encode, name = _fastokens(spec), f"fastokens {fastokens_version()}"
    if normalizer is not None:
        encode = _where_normal(encode, reference, normalize)
    texts = [*PROBE, *_vocabulary(tokens)]
    if any(not np.array_equal(a, b) for a, b in zip(encode(texts), reference(texts), strict=True)):
        raise NotFast("its ids differ on the probe")
    return encode, name


def _check_model(model: Mapping[str, Any]) -> None:
    if model["type"] != "BPE":
        raise NotFast(f"it is {model['type']}, not BPE over bytes")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise NotFast(f"its model has {option}")
    if not model["vocab"].keys() >= set(byte_alphabet().values()):
        raise NotFast("its vocabulary does not have every byte")


def _check_added(added: Sequence[Mapping[str, Any]], normalize: Callable[[str], str]) -> None:
    for token in added:
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]]
        if not token["special"] and (flags or normalize(token["content"]) != token["content"]):
            raise NotFast(f"its added token {token['content']!r} is matched in a way of its own")


def _is_level(step: Mapping[str, Any] | None) -> bool:
    return step is not None and step["type"] == "ByteLevel" and not step.get("add_prefix_space", True)


def _whole_bytes(spec: Mapping[str, Any]) -> Encode | None:
    """Bytes as ids, where nothing is merged and nothing is looked for in the text."""
    model, added = spec["model"], spec["added_tokens"]
    if model.get("merges") or spec.get("normalizer") or not _is_level(spec["pre_tokenizer"]):
        return None
    if model.get("ignore_merges") or not all(token["special"] for token in added):
        return None
    table = np.array([model["vocab"][char] for char in byte_alphabet().values()], np.int32)
    return lambda texts: [table[np.frombuffer(text.encode(), np.uint8)] for text in texts]


def _fastokens(spec: Mapping[str, Any]) -> Encode:
    splitter = _splitter(spec["pre_tokenizer"])
    try:
        import fastokens
    except ImportError as error:
        raise NotFast(f"fastokens is not there ({error})") from None
    version = fastokens_version()
    if not FIRST <= tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < END:
        raise NotFast(f"fastokens {version} was not compared")
    text = json.dumps({**spec, "normalizer": None, "pre_tokenizer": splitter})
    fast = _guarded(fastokens.Tokenizer.from_json_str, text)

    def encode(texts: list[str]) -> list[Array]:
        ids, offsets = _guarded(fast.encode_batch_flat, texts)
        flat, cuts = np.frombuffer(ids, np.uint32).astype(np.int32), np.frombuffer(offsets, np.uint64).tolist()
        return [flat[a:b] for a, b in zip(cuts, cuts[1:])]

    return encode


def fastokens_version() -> str:
    """The version of `fastokens` that is installed."""
    from importlib.metadata import version

    return version("fastokens")


def _guarded(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # nothing narrower: a panic of the library is no Exception
        raise NotFast(f"fastokens cannot run it: {error}") from None


def _splitter(step: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The pre-tokenizer in the form in which `fastokens` has a scanner for it."""
    if step is not None and _is_level(step) and step.get("use_regex", True):
        return step
    match step:
        case {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": pattern}, **how}, level]}:
            plain = how.get("behavior") == "Isolated" and not how.get("invert") and not level.get("use_regex", True)
            if plain and _is_level(level) and pattern in (GPT2, QWEN2, LLAMA3):
                return {**level, "use_regex": True} if pattern == GPT2 else step
    raise NotFast("how it cuts text is not GPT-2's, Qwen 2's or Llama 3's way")


def _where_normal(encode: Encode, reference: Encode, normalize: Callable[[str], str]) -> Encode:
    """``encode`` for the texts that are normalised already (parts of NFC text are NFC), ``reference`` for others."""

    def either(texts: list[str]) -> list[Array]:
        stable = [text.isascii() or normalize(text) == text for text in texts]
        fast = iter(encode([text for text, same in zip(texts, stable) if same]))
        slow = iter(reference([text for text, same in zip(texts, stable) if not same]))
        return [next(fast if same else slow) for same in stable]

    return either


def _vocabulary(tokens: Sequence[str | None]) -> list[str]:
    """Texts out of the vocabulary's own tokens, spread evenly: side by side, and with spaces between."""
    step = -(-len(tokens) // VOCABULARY_PROBE)
    pieces = [unmap_bytes(token) for token in tokens[::step] if token]
    return [joint.join(pieces).decode("utf-8", errors="replace") for joint in (b"", b" ", b"\n")]
