"""Vocabularies that other programs keep as plain lists, written as a tokenizer.json. No torch here.

Entries have the kinds that GGUF gives them (llama.cpp, ``llama_token_type``). Two ways of merging exist: by the rank
of a pair (byte-level BPE) and by the score of what comes out (SentencePiece BPE); the second is written as the first.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError
from octavo.hub.limits import read_json
from octavo.tokenizer import Tokenizer
from octavo.tokenizer.pieces import byte_alphabet

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
MAX_PIECE_CHARS = 1024
MAX_FILE_BYTES = 256 << 20

ENGLISH_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _words(numbers: str) -> str:
    """The pattern that GPT-4's family shares; they differ in how many digits make a piece."""
    return (
        rf"{ENGLISH_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(gpt2_words: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": gpt2_words}


# How text is cut before merging, by the names that GGUF files use (llama.cpp, src/llama-vocab.cpp).
_GPT2 = [_bytes(True)]
_DIGITS = [_split(r"\p{N}"), _bytes(True)]
_QWEN2 = [_split(_words(r"\p{N}")), _bytes(False)]
_LLAMA3 = [_split(_words(r"\p{N}{1,3}")), _bytes(False)]
CUTS: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "jais", "phi-2", "trillion", "granite-docling"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan"), _QWEN2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), _LLAMA3),
}
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3")  # a word that is an entry is not taken apart


def byte_level(
    source: Path,
    pieces: Sequence[str],
    merges: Sequence[Sequence[str]],
    kinds: Sequence[int],
    roles: Mapping[str, int],
    cut: str,
    **more: Any,
) -> Tokenizer:
    """Byte-level BPE (GPT-2 and after).

    Args:
        source: the file, for errors.
        pieces: the entry of each id.
        merges: pairs, the earliest learnt first.
        kinds: of each entry.
        roles: id by role (``bos``, ``eos`` ...).
        cut: a key of ``CUTS``.
        more: what ``Tokenizer`` takes beside the text and the roles.

    Raises:
        CheckpointError: an unknown cut, or lists that do not fit together.
    """
    if cut not in CUTS:
        raise CheckpointError(
            f"{source} cuts text into words in the way {cut!r}, which is not known here",
            fix="give the model's own tokenizer with octavo convert --tokenizer FOLDER",
        )
    model = {
        "type": "BPE",
        "vocab": _ids(source, pieces),
        "merges": [list(pair) for pair in merges],
        "ignore_merges": cut in WHOLE_WORDS_FIRST,
    }
    steps = CUTS[cut]
    spec = {
        "model": model,
        "added_tokens": _added(pieces, kinds),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "decoder": _bytes(True),
    }
    return _tokenizer(source, spec, pieces, roles, more)


def sentencepiece(
    source: Path,
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    roles: Mapping[str, int],
    *,
    leading_space: bool = True,
    **more: Any,
) -> Tokenizer:
    """SentencePiece's BPE (Llama 2, Gemma): the two neighbours whose join scores best are joined, then again.

    ``pieces`` write a space as U+2581. Characters without an entry become their bytes. ``leading_space`` puts a space
    before a text. The other arguments are those of ``byte_level``.
    """
    ids = _ids(source, pieces)
    joinable = {piece: i for piece, i in ids.items() if kinds[i] in (NORMAL, USER_DEFINED)}
    if (longest := max(map(len, joinable), default=0)) > MAX_PIECE_CHARS:
        raise CheckpointError(f"{source} has a vocabulary entry of {longest} characters", fix="fetch it again")
    merges = []
    for piece, i in joinable.items():
        for at in range(1, len(piece)):
            left, right = joinable.get(piece[:at]), joinable.get(piece[at:])
            if left is not None and right is not None:
                merges.append((-scores[i], i, left, right))
    spaces: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if leading_space else []
    spaces.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
    ]
    back.append({"type": "Fuse"})
    if leading_space:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == UNKNOWN), None)
    model = {
        "type": "BPE",
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": BYTE in kinds,
        "vocab": ids,
        "merges": [[pieces[left], pieces[right]] for _, _, left, right in sorted(merges)],
    }
    spec = {
        "model": model,
        "added_tokens": _added(pieces, kinds),
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "decoder": {"type": "Sequence", "decoders": back},
    }
    return _tokenizer(source, spec, pieces, roles, more)


def characters(source: Path, letters: Sequence[str]) -> Tokenizer:
    """One entry a character, without special tokens (nanoGPT's data preparation by characters)."""
    if any(len(letter) != 1 for letter in letters):
        raise CheckpointError(f"{source} has an entry that is no single character", fix="give one character an id")
    spec = {
        # An unknown token that is no entry: a character without one is refused instead of left out.
        "model": {"type": "WordLevel", "vocab": _ids(source, letters), "unk_token": ""},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
    }
    return _tokenizer(source, spec, letters, {}, {})


def byte_ranks(
    source: Path, ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int], roles: Mapping[str, str]
) -> Tokenizer:
    """Byte-level BPE as `tiktoken` keeps it: byte strings by rank, which is their id, and a pattern that cuts.

    The pair that made an entry is what the entries before it make of its bytes.
    """
    letters = byte_alphabet()
    name = lambda raw: "".join(letters[byte] for byte in raw)  # noqa: E731
    merges = []
    for raw, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(raw) > MAX_PIECE_CHARS:
            raise CheckpointError(f"{source} has an entry of {len(raw)} bytes", fix="write the file again")
        if len(raw) > 1:
            parts = _merged(raw, ranks, rank)
            if len(parts) != 2:
                raise CheckpointError(f"{source}: no two entries make {raw!r}", fix="write the file again")
            merges.append([name(parts[0]), name(parts[1])])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "model": {"type": "BPE", "vocab": {name(raw): i for raw, i in ranks.items()}, "merges": merges,
                  "ignore_merges": True},
        "added_tokens": [{"id": i, "content": content, **flags} for content, i in special.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_split(pattern), _bytes(False)]},
        "decoder": _bytes(True),
    }  # fmt: skip
    ids = {role: special[content] for role, content in roles.items() if content in special}
    return _tokenizer(source, spec, {i: content for content, i in special.items()}, ids, {})


def _merged(raw: bytes, ranks: Mapping[bytes, int], before: int) -> list[bytes]:
    parts = [raw[i : i + 1] for i in range(len(raw))]
    while True:
        joined = [(ranks.get(a + b, before), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
        rank, i = min(joined, default=(before, 0))
        if rank >= before:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def load(path: Path, roles: Mapping[str, str] | None = None) -> Tokenizer:
    """A tokenizer given by hand: a folder, a tokenizer.json, or one of two things that others keep in pickles.

    Those are a JSON object of characters with their ids (nanoGPT: ``stoi``, alone or under that name), and one with
    ``pattern``, ``ranks`` (hexadecimal bytes to ids) and ``special`` (nanochat's, out of `tiktoken`).

    Raises:
        CheckpointError: none of these, or damaged.
    """
    if path.is_dir() or path.suffix != ".json" or path.name == "tokenizer.json":
        return Tokenizer.load(path)
    try:
        content = read_json(path, MAX_FILE_BYTES)
        if "ranks" in content:
            ranks = {bytes.fromhex(key): int(i) for key, i in content["ranks"].items()}
            return byte_ranks(path, ranks, str(content["pattern"]), dict(content["special"]), roles or {})
        if isinstance(content.get("model"), Mapping):
            return Tokenizer.load(path)
        ids = content.get("stoi", content)
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError("the ids are not 0, 1, 2 and so on")
        return characters(path, sorted(ids, key=lambda letter: ids[letter]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is no vocabulary: {error!r}", fix="give tokenizer.json or a folder") from None


def _ids(source: Path, pieces: Sequence[str]) -> dict[str, int]:
    ids = {piece: i for i, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        twice = next(piece for i, piece in enumerate(pieces) if ids[piece] != i)
        raise CheckpointError(f"{source} has the vocabulary entry {twice!r} twice", fix="fetch it again")
    return ids


def _added(pieces: Sequence[str], kinds: Collection[int]) -> list[dict[str, Any]]:
    """Entries that are found in text before anything is cut: special ones, and those a user has added."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": piece, **flags, "special": kind != USER_DEFINED}
        for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _tokenizer(
    source: Path, spec: dict[str, Any], pieces: Any, roles: Mapping[str, int], more: Mapping[str, Any]
) -> Tokenizer:
    empty = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    empty |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    special = {role: pieces[i] for role, i in roles.items()}
    try:
        return Tokenizer(json.dumps({**empty, **spec}, ensure_ascii=False), special=special, **more)
    except CheckpointError as error:
        raise CheckpointError(f"the vocabulary of {source}: {error.what}", fix=error.fix) from None
