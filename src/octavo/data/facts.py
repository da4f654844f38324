"""Questions and answers about the standard library, built from the library itself.

The first instruction-tuning data of a model that was pretrained on the built-in corpus: in which module a name
lives, what its parameters are, what it does. Every fact is asked in many wordings; some wordings of each kind are
held out of the training data for every fact, so that the score asks known facts in words never seen.

Answers are short and exact. A name that lives in more than one public module is not used, nor one that repeats the
name of its module.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from pydantic import Field

from octavo.data.chat import Conversation
from octavo.data.stdlib import Entry, entries
from octavo.errors import DataError
from octavo.files import write_atomic
from octavo.schema import Config

Kind = Literal["module", "signature", "purpose"]

SOURCE = "python-stdlib-facts"

# {} is the name. Names stand in backticks in most wordings; people leave them out too, so some wordings do.
TRAINED: dict[Kind, tuple[str, ...]] = {
    "module": (
        "Which module is `{}` in?",
        "Where does `{}` live?",
        "What module has `{}`?",
        "In which module can I find `{}`?",
        "Name the module of `{}`.",
        "Which module defines `{}`?",
        "`{}` belongs to which module?",
        "Tell me the module that contains `{}`.",
        "Where do I import `{}` from?",
        "What should I import to get `{}`?",
        "Which Python module provides `{}`?",
        "I need `{}`. Which module is it in?",
        "module of `{}`?",
        "which module is {} in?",
        "Where is {} defined?",
        "What module does {} come from?",
    ),
    "signature": (
        "What is the signature of `{}`?",
        "Which parameters does `{}` take?",
        "What arguments does `{}` accept?",
        "Show the signature of `{}`.",
        "How do I call `{}`?",
        "List the parameters of `{}`.",
        "Give me the arguments of `{}`.",
        "What can I pass to `{}`?",
        "What are the parameters of `{}`?",
        "Write the signature of `{}`.",
        "Tell me how to call `{}`.",
        "signature of `{}`?",
        "How is {} called?",
        "What parameters does {} have?",
    ),
    "purpose": (
        "What does `{}` do?",
        "What is `{}` for?",
        "Explain `{}` in one sentence.",
        "Describe what `{}` does.",
        "What is the purpose of `{}`?",
        "Why would I use `{}`?",
        "Tell me what `{}` does.",
        "What is `{}`?",
        "What happens when I use `{}`?",
        "Explain what `{}` is for.",
        "What is the use of `{}`?",
        "purpose of `{}`?",
        "what does {} do?",
        "What is {} good for?",
    ),
}

HELD_OUT: dict[Kind, tuple[str, ...]] = {
    "module": (
        "From which module do I get `{}`?",
        "Which module contains `{}`?",
        "In what module is `{}` defined?",
        "Can you tell me which module {} is in?",
    ),
    "signature": (
        "Which arguments does `{}` take?",
        "Show me how to call `{}`.",
        "Tell me the parameters of `{}`.",
        "What arguments does {} have?",
    ),
    "purpose": (
        "Can you explain what `{}` does?",
        "Tell me the purpose of `{}`.",
        "In one sentence, what does `{}` do?",
        "What would I use {} for?",
    ),
}

# How a second question is put once the name has been said.
FOLLOW_UPS: dict[Kind, tuple[str, ...]] = {
    "module": ("And which module is it in?", "Which module is that in?"),
    "signature": ("And what are its parameters?", "How do I call it?"),
    "purpose": ("And what does it do?", "What is it for?"),
}

SMALL_TALK: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Hello! Ask me about the Python standard library.",
        ("Hello", "Hello!", "Hi", "Hi!", "hi there", "Hey", "Good morning", "Good evening!", "Hi, how are you?"),
    ),
    (
        "I am a small language model, trained on this machine with Octavo.",
        ("Who are you?", "What are you?", "who are you", "Introduce yourself.", "What is your name?", "Are you a bot?"),
    ),
    (
        "I know a few facts about the Python standard library.",
        ("What can you do?", "What do you know?", "Can you help me?", "What can I ask you?", "help"),
    ),
    (
        "I read the documentation and source of the Python on this machine.",
        ("How were you trained?", "What were you trained on?", "Where is your knowledge from?", "What did you read?"),
    ),
    (
        "I do not know. I only know the Python standard library.",
        (
            "What is the capital of France?",
            "Who won the football game?",
            "What is the weather today?",
            "Tell me a joke.",
            "Who is the president?",
            "How old are you?",
            "Write a poem.",
            "What is 12 times 7?",
        ),
    ),
    ("You are welcome!", ("Thanks", "Thank you!", "thanks a lot", "Great, thank you.")),
    ("Goodbye!", ("Bye", "Goodbye", "bye!", "See you later.")),
)

# Modules a Python user meets, so that the answers are of use: facts are taken from each in turn.
MODULES = tuple(
    "argparse ast base64 binascii bisect calendar cmath code codecs collections colorsys configparser "
    "contextlib copy csv dataclasses datetime difflib dis doctest email.utils enum fileinput fnmatch fractions "
    "functools getpass gettext glob gzip hashlib heapq hmac html http.client imaplib inspect io ipaddress itertools "
    "json keyword linecache locale logging mailbox math mimetypes modulefinder numbers operator optparse os pathlib "
    "pdb pickle pickletools pkgutil platform plistlib pprint profile pstats py_compile queue quopri random reprlib "
    "sched secrets select selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl stat statistics "
    "string struct subprocess symtable sys sysconfig tarfile telnetlib tempfile textwrap threading time timeit "
    "tokenize trace traceback types typing unicodedata unittest.mock urllib.parse urllib.request uuid venv warnings "
    "wave weakref webbrowser wsgiref.util zipapp zipfile zipimport zlib zoneinfo".split()
)

MIN_HELD_OUT = 200
NAME_CHARS = 5, 20


class FactsConfig(Config):
    """How many facts, in which shares, and how often they are asked.

    Args:
        n_facts: distinct facts (a name and a kind of question).
        signature_share: the share that asks for parameters; the rest after ``purpose_share`` asks for the module.
        purpose_share: the share that asks what a name does.
        n_held_out: questions in wordings that are not trained, spread evenly over the facts.
        two_turn_share: conversations of two questions, as a share of the single ones.
        small_talk_repeats: how often each greeting and question about the model itself occurs.
        max_answer_chars: longer signatures and sentences are not used.
        max_per_module: facts about names of one module, so that no single answer is right too often.
    """

    n_facts: int = Field(default=240, ge=10)
    signature_share: float = Field(default=0.2, ge=0, le=0.5)
    purpose_share: float = Field(default=0.2, ge=0, le=0.5)
    n_held_out: int = Field(default=240, ge=MIN_HELD_OUT)
    two_turn_share: float = Field(default=0.1, ge=0, le=1)
    small_talk_repeats: int = Field(default=3, ge=0)
    max_answer_chars: int = Field(default=60, ge=20)
    max_per_module: int = Field(default=5, ge=1)


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to know: what ``kind`` of question about ``name`` has which ``answer``."""

    name: str
    module: str
    kind: Kind
    answer: str


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out wording of a fact with the exact answer expected."""

    question: str
    answer: str
    kind: Kind
    name: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as messages."""
        return [{"role": "user", "content": self.question}]


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts, the conversations to train on and the held-out wordings of the same facts."""

    facts: list[Fact]
    train: list[Conversation]
    held_out: list[Question]

    @property
    def majority(self) -> dict[Kind, str]:
        """The most frequent answer of each kind of question: the best one can say without knowing the name."""
        answers: dict[Kind, Counter[str]] = defaultdict(Counter)
        for fact in self.facts:
            answers[fact.kind][fact.answer] += 1
        return {kind: min(counts, key=lambda a, c=counts: (-c[a], a)) for kind, counts in answers.items()}

    @property
    def majority_accuracy(self) -> float:
        """The share of held-out questions that the majority answer of their kind gets right."""
        majority = self.majority
        return sum(majority[q.kind] == q.answer for q in self.held_out) / len(self.held_out)

    def write(self, folder: str | Path) -> Path:
        """Write ``train.jsonl`` (rows of ``messages``: an ordinary chat source) and ``held_out.jsonl``.

        Returns:
            The path of ``train.jsonl``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_rows(folder / "train.jsonl", ({"messages": c.messages} for c in self.train))
        _write_rows(
            folder / "held_out.jsonl",
            ({"messages": q.messages, "answer": q.answer, "kind": q.kind, "name": q.name} for q in self.held_out),
        )
        return folder / "train.jsonl"


def build(seed: int = 0, config: FactsConfig | None = None, root: Path | None = None) -> Facts:
    """Choose facts and word them; the same seed on the same Python gives the same conversations.

    Args:
        seed: of the choice of wordings and the order.
        config: the sizes.
        root: the library's folder; where this Python keeps it by default.

    Raises:
        DataError: the library does not hold as many facts, or there are too few wordings for ``n_held_out``.
    """
    config = config or FactsConfig()
    facts = _choose(list(entries(root)), config)
    rng = random.Random(seed)
    per_fact = -(-config.n_held_out // len(facts))
    if per_fact > min(map(len, HELD_OUT.values())):
        raise DataError(
            f"n_held_out = {config.n_held_out} asks each of {len(facts)} facts in {per_fact} held-out wordings; "
            f"there are {min(map(len, HELD_OUT.values()))}",
            fix="raise n_facts or lower n_held_out",
        )
    held_out = [
        Question(
            HELD_OUT[fact.kind][(i + turn) % len(HELD_OUT[fact.kind])].format(fact.name),
            fact.answer,
            fact.kind,
            fact.name,
        )
        for turn in range(per_fact)
        for i, fact in enumerate(facts)
    ][: config.n_held_out]
    singles = [[(wording.format(fact.name), fact.answer)] for fact in facts for wording in TRAINED[fact.kind]]
    pairs = [_two_turns(facts, rng) for _ in range(round(config.two_turn_share * len(singles)))]
    talk = [[(q, answer)] for answer, questions in SMALL_TALK for q in questions] * config.small_talk_repeats
    turns = singles + pairs + talk
    rng.shuffle(turns)
    train = [Conversation(_messages(turn), SOURCE, line) for line, turn in enumerate(turns, 1)]
    return Facts(facts, train, held_out)


def _two_turns(facts: list[Fact], rng: random.Random) -> list[tuple[str, str]]:
    """A question and another one: about the same name ("it") where a second fact about it is known."""
    first, other = rng.sample(facts, 2)
    opening = (rng.choice(TRAINED[first.kind]).format(first.name), first.answer)
    same = [fact for fact in facts if fact.name == first.name and fact.kind != first.kind]
    if same:
        second = rng.choice(same)
        return [opening, (rng.choice(FOLLOW_UPS[second.kind]), second.answer)]
    return [opening, (rng.choice(TRAINED[other.kind]).format(other.name), other.answer)]


def _choose(found: list[Entry], config: FactsConfig) -> list[Fact]:
    named = [entry for entry in found if entry.kind in ("class", "function") and entry.public]
    homes: dict[str, set[str]] = defaultdict(set)
    for entry in named:
        homes[entry.name.lower()].add(entry.module)
    candidates: dict[str, dict[str, Entry]] = {module: {} for module in MODULES}
    # Functions first and exceptions last: what people look up.
    for entry in sorted(named, key=lambda e: (e.name.endswith(("Error", "Warning")), e.kind == "class")):
        unique = len(homes[entry.name.lower()]) == 1 and entry.name.lower() not in entry.module.split(".")
        if entry.module in candidates and unique and NAME_CHARS[0] <= len(entry.name) <= NAME_CHARS[1]:
            candidates[entry.module].setdefault(entry.name, entry)
    n_signature, n_purpose = (round(config.n_facts * s) for s in (config.signature_share, config.purpose_share))
    facts: list[Fact] = []
    wanted: dict[Kind, int] = {
        "module": config.n_facts - n_signature - n_purpose,
        "signature": n_signature,
        "purpose": n_purpose,
    }
    for kind, n in wanted.items():
        known = [
            [fact for entry in names.values() if (fact := _fact(kind, entry, config.max_answer_chars))][
                : config.max_per_module
            ]
            for names in candidates.values()
        ]
        # One of each module in turn.
        rounds = [fact for turn in zip_longest(*known) for fact in turn if fact]
        if len(rounds) < n:
            raise DataError(
                f"the library has {len(rounds)} facts of kind {kind}, {n} are asked for",
                fix="lower n_facts, or raise max_per_module or max_answer_chars",
            )
        facts += rounds[:n]
    return facts


def _fact(kind: Kind, entry: Entry, max_chars: int) -> Fact | None:
    """The fact of a kind about an entry, or None where the library does not say it shortly."""
    answer = entry.module
    if kind == "signature":
        answer = f"{entry.name}{entry.signature}"
        if entry.kind != "function" or entry.signature in ("", "()") or re.search(r"[ (]_", entry.signature):
            return None
    elif kind == "purpose":
        paragraph = " ".join(re.split(r"\n\s*\n", entry.doc)[0].split())
        answer = re.split(r"(?<=[a-z)])\.(?: |$)", paragraph)[0].rstrip(".:") + "."
        # A first line such as "name(x) -> y" is not a sentence.
        if not re.match(r"[A-Z][a-z]+ ", answer) or re.search(r"->|[:`*\\<]", answer) or answer.count(" ") < 3:
            return None
    return Fact(entry.name, entry.module, kind, answer) if len(answer) <= max_chars and answer.isascii() else None


def _messages(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]


def _write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
