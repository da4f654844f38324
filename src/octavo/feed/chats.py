"""Tuning on conversations: read from files, or built as questions about Python's standard library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.config import ChatData, FactsData, Recipe, TuneConfig
from octavo.data import chat, check_chat, facts, show
from octavo.data.chat import ChatReport, Conversation
from octavo.data.check import Finding
from octavo.data.loader import Loader
from octavo.data.pack import WholeRows
from octavo.errors import DataError
from octavo.feed.kinds import Kind, spread
from octavo.feed.rows import Feed, rows_of_step
from octavo.tokenizer import Tokenizer


class Facts(Kind):
    """Questions about the standard library, through the one renderer, packed whole; loss on the answers."""

    noun, many = "conversation", "conversations"
    asks = True

    def read(self, recipe: Recipe, tune: TuneConfig, tokenizer: Tokenizer, seq_len: int, keep: Path | None) -> Feed:
        report, notices = ChatReport(), list[str]()
        given, kept_back = conversations(tune, recipe.seed, keep=keep, report=report)
        samples = chat.tokenise(given, tokenizer, seq_len + 1, report)
        pad = tokenizer.special.pad if tokenizer.special.pad is not None else 0
        source = WholeRows([(s.ids, s.loss_mask) for s in samples], seq_len, pad=pad)
        valid, held = None, list[chat.Sample]()
        if kept_back:
            try:
                held = chat.tokenise(kept_back, tokenizer, seq_len + 1)
                valid = WholeRows([(s.ids, s.loss_mask) for s in held], seq_len, pad=pad)
            except DataError as error:
                notices.append(f"no validation: {error.what}")
        return Feed(
            Loader(source, rows_of_step(tune, seq_len), seed=recipe.seed),
            valid,
            report.trained_tokens,
            [given[sample.number] for sample in samples],
            [kept_back[sample.number] for sample in held],
            report,
            notices,
        )

    def told(self, one: Conversation, tokenizer: Tokenizer) -> show.Told:
        where = f"{one.source}:{one.line}" if one.source else ""
        return show.Told(where, tokenizer.render(one.messages, tools=one.tools).ids)

    def findings(
        self, tune: TuneConfig, seed: int, tokenizer: Tokenizer, seq_len: int, limit: int
    ) -> Iterator[Finding]:
        report = ChatReport()
        trained, held_out = conversations(tune, seed, report=report)
        yield from check_chat.rows(trained, report)
        if held_out:
            yield from check_chat.overlap(trained, held_out)
        yield from check_chat.rendering(trained, tokenizer, seq_len, limit)


class Chats(Facts):
    """Conversations on disk, treated the same."""

    def fingerprint(self, data: Any) -> str | None:
        return chat.fingerprint(data)


def conversations(
    tune: TuneConfig, seed: int, *, keep: Path | None = None, report: ChatReport | None = None
) -> tuple[list[Conversation], list[Conversation]]:
    """What is trained on, and what is kept for validation."""
    if isinstance(tune.data, ChatData):
        return spread(chat.read(tune.data, report), tune.held_out)
    assert isinstance(tune.data, FactsData)  # other kinds have no conversations
    built = facts.build(seed, tune.data.facts)
    if keep is not None:
        built.write(keep)
    answered = [Conversation([*q.messages, {"role": "assistant", "content": q.answer}]) for q in built.held_out]
    return built.train, answered
