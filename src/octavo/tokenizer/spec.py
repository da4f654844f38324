"""tokenizer.json as data: read and checked, its special tokens, and the twin that the library runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.errors import CheckpointError

MAX_IDS = 1 << 24  # ten times the largest vocabulary in use: more is a damaged or hostile file
MAX_HOLES = 1 << 16  # ids without a token that a vocabulary may have beside one for each token


def parse(text: str) -> dict[str, Any]:
    """A tokenizer.json with every field that is used here, its added tokens in the order of their ids.

    Raises:
        CheckpointError: it is none, or of a kind that is not supported.
    """
    try:
        spec = json.loads(text)
        kind = spec["model"].get("type")
        if kind is None:  # files older than the field
            kind = "BPE" if "merges" in spec["model"] else "WordLevel"
            spec["model"]["type"] = kind
        if kind not in ("BPE", "Unigram", "WordPiece", "WordLevel"):
            raise CheckpointError(f"tokenizer model {kind!r} is not supported", fix="use BPE, Unigram or WordPiece")
        spec["added_tokens"] = [
            {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False, **token}
            for token in spec.get("added_tokens") or []
        ]
        spec["added_tokens"].sort(key=lambda token: token["id"])
        _check_vocabulary(spec)
        spec["truncation"] = spec["padding"] = None  # whoever asks for ids gets all of them
        return spec
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"not a tokenizer.json: {error}", fix="save it again with its own library") from None


def _check_vocabulary(spec: Mapping[str, Any]) -> None:
    vocab = spec["model"]["vocab"]
    if not isinstance(spec["model"].get("unk_token"), (str, type(None))):
        raise ValueError("unk_token is not a token")
    if isinstance(vocab, list):
        if not all(isinstance(piece, str) and isinstance(score, (int, float)) for piece, score in vocab):
            raise ValueError("the vocabulary is not a list of pieces with scores")
    elif not all(type(i) is int and 0 <= i < MAX_IDS for i in vocab.values()):
        raise ValueError(f"an id of the vocabulary is not a number below {MAX_IDS}")
    for token in spec["added_tokens"]:
        if not (isinstance(token["content"], str) and type(token["id"]) is int and 0 <= token["id"] < MAX_IDS):
            raise ValueError(f"the added token {str(token)[:80]} is malformed")
    n = len(vocab) + len(spec["added_tokens"])
    numbers = [] if isinstance(vocab, list) else list(vocab.values())
    last = max([*numbers, *(token["id"] for token in spec["added_tokens"])], default=0)
    if last > 2 * n + MAX_HOLES:
        raise ValueError(f"id {last} in a vocabulary of {n} tokens")
    for merge in spec["model"].get("merges") or []:
        a, b = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not (isinstance(a, str) and isinstance(b, str)):
            raise ValueError("a merge is not a pair of tokens")


def add_roles(spec: dict[str, Any], roles: Mapping[str, str]) -> None:
    """Every token with a role is special, whatever its own flag says; one in the vocabulary is added."""
    added = {token["content"]: token for token in spec["added_tokens"]}
    vocab = vocab_of(spec)
    for role, content in roles.items():
        if not isinstance(content, str):
            raise CheckpointError(f"{role} token {content!r} is not text", fix="repair the special tokens")
        if content in added:
            added[content]["special"] = True
        elif content in vocab:
            token = {"id": vocab[content], "content": content, "single_word": False, "lstrip": False}
            token |= {"rstrip": False, "normalized": False, "special": True}
            spec["added_tokens"].append(token)
            added[content] = token
        else:
            raise CheckpointError(f"{role} token {content!r} is not in the vocabulary", fix="repair the special tokens")
    spec["added_tokens"].sort(key=lambda token: token["id"])


def vocab_of(spec: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the model's own tokens, without those that were added."""
    vocab = spec["model"]["vocab"]
    return dict(vocab) if isinstance(vocab, Mapping) else {entry[0]: i for i, entry in enumerate(vocab)}


def tokens_of(spec: Mapping[str, Any]) -> list[str | None]:
    """The token of every id; None where there is none."""
    ids = vocab_of(spec) | {token["content"]: token["id"] for token in spec["added_tokens"]}
    tokens: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
    for token, i in ids.items():
        tokens[i] = token
    return tokens


def twin_of(spec: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The tokenizer.json with every special token renamed and without post-processing."""
    model = dict(spec["model"])
    if isinstance(model["vocab"], Mapping):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"] or [])
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
    added = []
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token = {**token, "content": names[token["content"]], "normalized": False}
        added.append(token)
    try:
        return json.dumps({**spec, "model": model, "added_tokens": added, "post_processor": None})
    except RecursionError:
        raise CheckpointError("tokenizer.json is nested too deeply", fix="save it again") from None


def special_pattern(added: Sequence[Mapping[str, Any]]) -> re.Pattern[str]:
    """Finds added tokens in raw text as the library does: leftmost, then longest."""
    parts = []
    for token in sorted(added, key=lambda token: -len(token["content"])):
        if token["content"] and (token["special"] or not token["normalized"]):
            body = re.escape(token["content"])
            parts.append(rf"(?<!\w){body}(?!\w)" if token["single_word"] else body)
    return re.compile("|".join(parts) or r"(?!)")
