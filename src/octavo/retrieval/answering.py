"""Retrieval-augmented answers: passages that fit a question are put before it (Lewis et al. 2020; in the form chat
models are used: as text of the conversation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.retrieval.store import Hit, Store


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """The last message of the user's that is text, empty if there is none."""
    said = (m["content"] for m in reversed(messages) if m.get("role") == "user" and isinstance(m.get("content"), str))
    return next(said, "")


def with_passages(messages: Sequence[Mapping[str, Any]], hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """The conversation with numbered passages before the user's last question; unchanged if nothing was found."""
    changed = [dict(message) for message in messages]
    if not hits:
        return changed
    for message in reversed(changed):
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            found = "\n".join(f"[{i}] {hit.passage.text}" for i, hit in enumerate(hits, 1))
            message["content"] = f"{found}\n\n{message['content']}"
            break
    return changed


def looked_up(store: Store, messages: Sequence[Mapping[str, Any]], k: int) -> tuple[list[dict[str, Any]], list[Hit]]:
    """Search ``store`` for the user's last question and put what is found before it."""
    question = question_of(messages)
    hits = store.search(question, k) if question else []
    return with_passages(messages, hits), hits
