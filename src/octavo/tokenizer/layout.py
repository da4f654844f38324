"""Tokenizers on disk: the Hugging Face layout in and out, GPT-2's two files in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError
from octavo.files import write_atomic
from octavo.tokenizer.core import Tokenizer

ROLE_KEYS = {role: f"{role}_token" for role in ("pad", "bos", "eos", "unk", "cls", "sep", "mask")}
MAX_FILE_BYTES = 256 << 20
# transformers writes this number for "no limit known".
NO_LIMIT = 10**12


def load(path: Path) -> Tokenizer:
    """See :meth:`octavo.tokenizer.Tokenizer.load`."""
    if path.is_file():
        return _load(path.parent, _read(path)) if path.name == "tokenizer.json" else Tokenizer(_read(path))
    if not path.is_dir():
        raise CheckpointError(f"no tokenizer at {path}: there is no such file or folder", fix="check the path")
    if (path / "tokenizer.json").is_file():
        return _load(path, _read(path / "tokenizer.json"))
    for vocab, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (path / vocab).is_file() and (path / merges).is_file():
            return _load(path, _gpt2(_read(path / vocab), _read(path / merges), path))
    fix = "give a folder with tokenizer.json"
    if (path / "tokenizer.model").is_file():
        fix = "save it once as tokenizer.json: transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    raise CheckpointError(f"no tokenizer.json, and no encoder.json with vocab.bpe, in {path}", fix=fix)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """See :meth:`octavo.tokenizer.Tokenizer.save`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer.special_text
    roles = {key: text[role] for role, key in ROLE_KEYS.items() if role in text}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.max_seq_len or 10**30,
        # Two roles that transformers has no name for, kept for our own reading.
        "octavo": {role: text[role] for role in ("turn_start", "turn_end") if role in text},
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
        write_atomic(folder / "chat_template.jinja", tokenizer.chat_template)
    else:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    _write(folder / "special_tokens_map.json", roles)
    _write(folder / "tokenizer_config.json", config)
    write_atomic(folder / "tokenizer.json", tokenizer.to_json())


def _write(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", fix="check the file")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: byte {error.start}", fix="fetch it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", fix="check the file") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", fix="fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object", fix="fetch it again")
    return value


def _load(folder: Path, text: str) -> Tokenizer:
    config = _read_json(folder / "tokenizer_config.json")
    given = _read_json(folder / "special_tokens_map.json")
    try:
        spec = json.loads(text)
        extra = _missing_added(spec, config.get("added_tokens_decoder") or {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}/tokenizer.json is damaged: {error}", fix="fetch it again") from None
    if extra:
        spec["added_tokens"] = [*(spec.get("added_tokens") or []), *extra]
        text = json.dumps(spec, ensure_ascii=False)
    roles: dict[str, str] = {}
    for role, key in ROLE_KEYS.items():
        token = config.get(key, given.get(key))
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str) and token:
            roles[role] = token
    if not roles:
        roles = _usual_roles(spec)
    ours = config.get("octavo")
    roles |= {k: v for k, v in (ours if isinstance(ours, dict) else {}).items() if k in ("turn_start", "turn_end")}
    limit = config.get("model_max_length")
    ends = _read_json(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return Tokenizer(
        text,
        special=roles,
        chat_template=_template(folder, config),
        max_seq_len=limit if isinstance(limit, int) and 0 < limit < NO_LIMIT else None,
        stop_ids=[i for i in ends if isinstance(i, int)],
    )


def _missing_added(spec: Mapping[str, Any], decoder: Mapping[str, Any]) -> list[dict[str, Any]]:
    there = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    extra = []
    for key, token in decoder.items():
        content, i = token["content"], int(key)
        if there.get(content, i) != i:
            raise CheckpointError(
                f"added token {content!r} has id {there[content]} in tokenizer.json and {i} in tokenizer_config.json",
                fix="fetch both files again",
            )
        if content not in there:
            flags = {k: token.get(k, False) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            extra.append({"id": i, "content": content, **flags})
    return extra


def _usual_roles(spec: Mapping[str, Any]) -> dict[str, str]:
    """A bare tokenizer.json says nothing about roles: recognise the names everyone uses, if they are special."""
    special = {token["content"] for token in spec.get("added_tokens") or [] if token.get("special")}
    usual = {
        "pad": ("<|pad|>", "<pad>", "[PAD]"),
        "bos": ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"),
        "eos": ("<|eos|>", "</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>"),
        "unk": ("<|unk|>", "<unk>", "[UNK]"),
        "cls": ("[CLS]",),
        "sep": ("[SEP]",),
        "mask": ("<|mask|>", "[MASK]", "<mask>"),
    }
    found = {role: next((name for name in names if name in special), None) for role, names in usual.items()}
    return {role: name for role, name in found.items() if name}


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read(file)
    template = config.get("chat_template")
    if isinstance(template, str):
        return template
    if isinstance(template, list):  # several, by name
        named = {str(t.get("name")): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default", next(iter(named.values()), None))
        return template if isinstance(template, str) else None
    return None


def _gpt2(vocab_text: str, merges_text: str, folder: Path) -> str:
    try:
        vocab = json.loads(vocab_text)
        lines = [line for line in merges_text.split("\n") if line and not line.startswith("#version")]
        merges = [line.split(" ") for line in lines]
        if not all(len(pair) == 2 for pair in merges) or not isinstance(vocab, dict):
            raise ValueError("a line of the merges is not a pair")
    except ValueError as error:
        raise CheckpointError(f"{folder} holds no GPT-2 vocabulary: {error}", fix="fetch it again") from None
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    end = "<|endoftext|>"
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[end], "content": end, **flags}] if end in vocab else [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab, "merges": merges},
    }
    return json.dumps(spec, ensure_ascii=False)
