"""Exact match of a chat model's answers to questions that have one right answer.

An answer counts when it equals the expected one after ``normalise``, applied to both. Next to the accuracy stand
its 95 % Wilson interval, the accuracy of always giving one answer (the commonest right one: the best a model could
do that ignores the question), and the share of answers the model ended by itself.
"""

from __future__ import annotations

import math
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import DataError

Message = Mapping[str, Any]
GenerateFn = Callable[[list[Sequence[Message]]], Sequence[tuple[str, bool]]]
"""Conversations -> for each, the assistant's next message and whether the model stopped by itself."""

QUOTES = {"`": "`", '"': '"', "'": "'", "“": "”", "‘": "’", "「": "」", "『": "』", "«": "»"}
FULL_STOPS = (".", "。", "．")
Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that ends with the user's turn, the right answer, and the kind of question."""

    messages: Sequence[Message]
    answer: str
    kind: str = "all"

    @classmethod
    def read(cls, row: Mapping[str, Any], where: str = "") -> Question:
        """From ``{"messages": [...], "answer": str, "kind": str}``; ``kind`` may be missing."""
        messages, answer = row.get("messages"), row.get("answer")
        if not isinstance(messages, Sequence) or not messages or messages[-1].get("role") == "assistant":
            raise DataError(
                "a question needs `messages` that end with a user's turn",
                fix="give the answer as `answer`",
                where=where,
            )
        if not isinstance(answer, str) or not normalise(answer):
            raise DataError("a question needs its right answer as text in `answer`", fix="add it", where=where)
        return cls(messages, answer, str(row.get("kind", "all")))


@dataclass(slots=True)
class Tally:
    """Counts over answered questions."""

    n: int = 0
    n_right: int = 0
    n_stopped: int = 0
    expected: Counter[str] = field(default_factory=Counter)

    def add(self, expected: str, given: str, stopped: bool) -> bool:
        """Count one answer; returns whether it was right."""
        right = normalise(given) == normalise(expected)
        self.n += 1
        self.n_right += right
        self.n_stopped += stopped
        self.expected[normalise(expected)] += 1
        return right

    def figures(self) -> dict[str, Any]:
        """The figures of this tally, ready for JSON."""
        low, high = wilson(self.n_right, self.n)
        answer, commonest = self.expected.most_common(1)[0]
        return {
            "questions": self.n,
            "right": self.n_right,
            "exact_match": self.n_right / self.n,
            "interval_95": [low, high],
            "majority_answer": answer,
            "majority_exact_match": commonest / self.n,
            "stopped_by_itself": self.n_stopped / self.n,
        }


def normalise(text: str) -> str:
    """The form in which answers are compared.

    Unicode is composed (NFC), runs of white space become one space, and from the outside in, as long as there are
    any: white space, one final full stop (never an ellipsis), and a pair of quotes or backticks around the whole.
    Case and everything inside count.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    while True:
        before = text
        if text.endswith(FULL_STOPS) and not text[:-1].endswith(FULL_STOPS):
            text = text[:-1].rstrip()
        if len(text) >= 2 and QUOTES.get(text[0]) == text[-1]:
            pair = text[0] + text[-1]
            if not set(pair) & set(text[1:-1].strip(pair)):  # `a` or `b` is not one quoted text
                text = text[1:-1].strip()
        if text == before:
            return text


def wilson(n_right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion, by default at 95 %.

    Source: E. B. Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not n:
        return 0.0, 1.0
    share = n_right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def choose(questions: Sequence[Question], n: int, seed: int = 0) -> list[Question]:
    """At most ``n`` questions, every kind's share kept as well as whole numbers allow; the same for the same seed."""
    if n >= len(questions):
        return list(questions)
    shuffled = random.Random(seed).sample(range(len(questions)), len(questions))
    seen: Counter[str] = Counter()
    size = Counter(question.kind for question in questions)
    rank: dict[int, float] = {}
    for index in shuffled:
        kind = questions[index].kind
        rank[index] = (seen[kind] + 0.5) / size[kind]
        seen[kind] += 1
    return [questions[index] for index in sorted(sorted(shuffled, key=rank.__getitem__)[:n])]


def score_answers(
    questions: Sequence[Question],
    generate_fn: GenerateFn,
    *,
    on_answer: Callable[[int], None] | None = None,
    batch_rows: int = 32,
    n_examples: int = 20,
) -> dict[str, Any]:
    """Ask every question once and compare.

    Args:
        questions: what to ask.
        generate_fn: conversations -> (text, stopped) each; greedy decoding makes the score repeatable.
        on_answer: called with the number of questions answered since the last call, for a progress line.
        batch_rows: how many conversations are given at once.
        n_examples: how many question, answer, given triples are kept in the result.

    Returns:
        Figures over all questions, ``kinds`` with the same figures per kind, ``majority_by_kind_exact_match`` (the
        commonest right answer of each kind, a stronger baseline) and ``examples``.

    Raises:
        DataError: no question.
    """
    if not questions:
        raise DataError("there are no questions to ask", fix="hold out some question-answer pairs")
    total, kinds, examples = Tally(), {}, []
    for start in range(0, len(questions), batch_rows):
        asked = questions[start : start + batch_rows]
        for question, (text, stopped) in zip(asked, generate_fn([q.messages for q in asked]), strict=True):
            right = total.add(question.answer, text, stopped)
            kinds.setdefault(question.kind, Tally()).add(question.answer, text, stopped)
            prompt = str(question.messages[-1].get("content", ""))
            examples.append({"question": prompt, "answer": question.answer, "given": text, "right": right})
        if on_answer:
            on_answer(len(asked))
    by_kind = sum(tally.expected.most_common(1)[0][1] for tally in kinds.values()) / total.n
    return {
        **total.figures(),
        "majority_by_kind_exact_match": by_kind,
        "kinds": {kind: tally.figures() for kind, tally in sorted(kinds.items())},
        "examples": examples[:n_examples],
    }


def greedy(model: Any, tokenizer: Any, max_new_tokens: int = 96) -> GenerateFn:
    """Answers by always taking the most probable token, through the one renderer.

    Args:
        model: a predictor that ``infer.generate`` accepts.
        tokenizer: its tokenizer, with a chat template.
        max_new_tokens: an answer that is longer counts as not stopped.
    """

    def answer(conversations: list[Sequence[Message]]) -> list[tuple[str, bool]]:
        from octavo.infer.generate import generate
        from octavo.infer.sampling import SamplingConfig

        prompts = [tokenizer.render(messages, add_generation_prompt=True).ids for messages in conversations]
        config = SamplingConfig(temperature=0, max_new_tokens=max_new_tokens)
        completions = generate(model, tokenizer, prompts, config)
        return [(completion.text, completion.finish_reason == "stop") for completion in completions]

    return answer
