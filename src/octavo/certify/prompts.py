"""What a model is asked when it is certified: texts and conversations as its users would give them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import CheckpointError, ConfigError, DataError
from octavo.tokenizer.special import Special

if TYPE_CHECKING:
    from octavo.language_model import LanguageModel
    from octavo.tokenizer import Tokenizer

ASKED = (
    "Once upon a time there was a little",
    "春天来了，",
    "What is the capital of France?",
    "请用一句话介绍你自己。",
    "The cat sat on the mat, and the dog",
    "从前有一座山，山里有一座庙，",
    "List three things that are blue.",
    "水在多少度结冰？",
    "def add(a, b):\n    return",
    "今天天气很好，我们去",
    "Why is the sky blue? Answer in one sentence.",
    "把下面这句话翻译成英文：我喜欢读书。",
    "In 1969, 3 people flew to the moon; 2 of them",
    "中国的首都是",
    "It's 7:45 — don't be late! (naïve café, ça va?)",
    "1, 2, 3, 5, 8, 13, ",
)
DOCUMENT_TOKENS = 48


@dataclass(frozen=True)
class Prompt:
    """Tokens that a text follows, and what they were made of: a text, a conversation, or neither."""

    ids: list[int]
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    rendered: str | None = None


class Numbers:
    """In place of the tokenizer of a model that comes without one: a token is its number."""

    chat_template = None
    special = Special()

    def __init__(self, vocab_size: int, stop_ids: Sequence[int] = ()):
        self.vocab_size, self.stop_ids = vocab_size, frozenset(stop_ids)

    def stream(self) -> Numbers:
        return self

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def asked(lm: LanguageModel, source: Path, n: int, longest: int) -> list[Prompt]:
    """``n`` prompts of at most ``longest`` tokens: of a run, beginnings of its documents first, then texts of our own.

    Every other text is put as a conversation to a model that has a chat template.
    """
    tokenizer: Any = lm.tokenizer
    if isinstance(tokenizer, Numbers):
        drawn = random.Random(0)
        lengths = [1 + drawn.randrange(min(longest, 64)) for _ in range(n)]
        return [Prompt([drawn.randrange(tokenizer.vocab_size) for _ in range(length)]) for length in lengths]
    own = _beginnings(source, tokenizer, n // 2)
    more = _endless()
    texts = [*own, *(next(more) for _ in range(n - len(own)))]
    return [of_text(lm, text, longest, chat=i % 2 == 1) for i, text in enumerate(texts)]


def _endless() -> Iterator[str]:
    yield from ASKED
    for step in range(1, 10**6):
        yield from (f"{one} {ASKED[(i + step) % len(ASKED)]}" for i, one in enumerate(ASKED))


def _beginnings(source: Path, tokenizer: Tokenizer, n: int) -> list[str]:
    """How documents of a run's own data begin, those held out if there are any."""
    from octavo.data.shards import Shards

    for split in ("valid", "train"):
        folder = source / "data" / split
        if n and (folder / "manifest.json").is_file():
            shards = Shards.open(folder, verify=False)
            if shards.vocab_hash != tokenizer.hash or not shards.n_documents:
                return []
            chosen = range(0, shards.n_documents, max(1, shards.n_documents // n))[:n]
            begun = [tokenizer.decode(shards.document(i)[:DOCUMENT_TOKENS]) for i in chosen]
            return [text.rstrip("�") for text in begun if text.strip("� \n")]
    return []


def of_text(lm: LanguageModel, text: str, longest: int, *, chat: bool = False) -> Prompt:
    """A text as a prompt, or as what a user says; cut where it is too long."""
    if chat and lm.tokenizer.chat_template is not None:
        try:
            made = of_messages(lm, [{"role": "user", "content": text}])
        except DataError:  # a template that takes no such conversation
            made = None
        if made is not None and len(made.ids) <= longest:
            return made
    ids = lm.prompt_ids(text)
    while len(ids) > longest and text:
        text = text[: len(text) * longest // (len(ids) + 1)]
        ids = lm.prompt_ids(text)
    return Prompt(ids, text=text) if ids else Prompt([0])


def of_messages(lm: LanguageModel, messages: list[dict[str, Any]]) -> Prompt:
    rendered = lm.tokenizer.render(messages, add_generation_prompt=True)
    return Prompt(rendered.ids, messages=messages, rendered=rendered.text)


def read(lm: LanguageModel, path: Path, n: int | None, longest: int) -> list[Prompt]:
    """The prompts of a file: one a line, or JSON lines with ``prompt`` or ``messages``.

    Raises:
        ConfigError: no such file, or a prompt too long for the model. DataError: a line that says no prompt.
    """
    if isinstance(lm.tokenizer, Numbers):
        raise ConfigError("the model has no tokenizer to read prompts with", fix="leave --prompts out")
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", fix="give a text file") from None
    found: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (n is not None and len(found) == n):
            continue
        where = f"{path}:{number}"
        try:
            prompt = _line(lm, line, path.suffix == ".jsonl")
        except DataError as error:
            raise DataError(error.what, fix=error.fix, where=where) from None
        if not 0 < len(prompt.ids) <= longest:
            what = f"a prompt of {len(prompt.ids):,} tokens, where 1 to {longest:,} fit"
            raise ConfigError(what, fix="shorten it, or lower --tokens", where=where)
        found.append(prompt)
    if not found:
        raise DataError(f"{path} has no prompt", fix="write one a line")
    return found


def _line(lm: LanguageModel, line: str, is_json: bool) -> Prompt:
    if not is_json:
        return Prompt(lm.prompt_ids(line), text=line)
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON: {error}", fix="write one object a line") from None
    if isinstance(row, Mapping) and isinstance(row.get("prompt"), str):
        return Prompt(lm.prompt_ids(row["prompt"]), text=row["prompt"])
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        return of_messages(lm, row["messages"])
    raise DataError("neither `prompt` nor `messages`", fix='write {"prompt": "..."} or {"messages": [...]}')


def numbers_for(folder: Path) -> Numbers | None:
    """The stand-in for a model folder without a tokenizer; None where there is one."""
    from octavo.hub.folder import model_config, read_config
    from octavo.hub.limits import read_json

    if not folder.is_dir() or any((folder / name).is_file() for name in ("tokenizer.json", "encoder.json")):
        return None
    if (folder / "tokenizer.model").is_file():
        raise CheckpointError(
            f"{folder} has a tokenizer.model alone, which is not read here", fix="save its tokenizer as tokenizer.json"
        )
    hf, said = read_config(folder), folder / "generation_config.json"
    told = read_json(said) if said.is_file() else hf
    ends = told.get("eos_token_id") if isinstance(told, dict) else None
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    vocab_size = model_config(hf).vocab_size
    assert vocab_size is not None
    return Numbers(vocab_size, ends)
