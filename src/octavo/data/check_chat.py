"""Whether conversations are fit to be tuned on: roles and turns, and what the renderer makes of them.

The renderer is the training's own. What is asked of it: the prompt of every answer, as it is put to the finished
model, is how the trained text begins; the token that ends an answer is trained; nothing begins twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from octavo.data.chat import ChatReport, Conversation
from octavo.data.check import EXAMPLES, FIRST_ROWS, Finding, HeldOut, of_share
from octavo.data.clean import text_hash
from octavo.errors import DataError
from octavo.report import words

if TYPE_CHECKING:
    from octavo.tokenizer import Rendered, Tokenizer


def rows(conversations: Sequence[Conversation], report: ChatReport) -> Iterator[Finding]:
    """What stands in the files, before anything is rendered.

    Args:
        report: what became of the rows when they were read.
    """
    told = ", ".join(f"{name} {n:,}" for name, n in Counter(report.formats.values()).most_common())
    text = f"{len(conversations):,} to train on" + (f", of {report.rows:,} rows" if report.rows else "")
    yield Finding("conversations", "ok", text + (f"; files by format: {told}" if told else ""))
    if report.rows:
        bad = report.dropped["bad row"]
        yield of_share("bad rows", bad, report.rows, "correct them: they are left out only with on_bad_row: skip")
        reasons = {name: n for name, n in report.dropped.items() if name != "bad row"}
        fix = ", ".join(f"{n:,} {name}" for name, n in reasons.items())
        yield of_share("dropped rows", sum(reasons.values()), report.rows, f"look at them: {fix}")
    yield _roles(conversations)
    odd = [c for c in conversations if not _takes_turns([m["role"] for m in c.messages])]
    fix = "let a user speak before each answer, and answers end in one turn"
    yield of_share("out of turn", len(odd), len(conversations), fix, _places(odd))
    empty = [c for c in conversations if any(not (m["content"] or m.get("tool_calls")) for m in c.messages)]
    yield of_share("empty turns", len(empty), len(conversations), "remove these turns", _places(empty))
    yield _equal(conversations)


def _roles(conversations: Iterable[Conversation]) -> Finding:
    roles = Counter(message["role"] for c in conversations for message in c.messages)
    text = ", ".join(f"{role} {n:,}" for role, n in roles.most_common())
    return Finding("roles", "ok", f"turns by role: {text}", figures=dict(roles))


def _takes_turns(roles: Sequence[str]) -> bool:
    """An answer follows a question or a tool's answer, a question follows an answer or the beginning."""
    spoken = [role for role in roles if role != "system"]
    if not spoken or spoken[0] != "user":
        return False
    follows = {"assistant": ("user", "tool"), "user": ("assistant",), "tool": ("assistant", "tool")}
    return all(before in follows.get(role, ()) for before, role in zip(spoken, spoken[1:]))


def _places(conversations: Sequence[Conversation]) -> list[str]:
    return [words.printable(f"{c.source}:{c.line}") for c in conversations[:EXAMPLES]]


def text_of(conversation: Conversation) -> str:
    """All that is said in a conversation."""
    return "\n".join(str(message["content"]) for message in conversation.messages)


def _equal(conversations: Sequence[Conversation]) -> Finding:
    first: dict[bytes, Conversation] = {}
    twice = []
    for conversation in conversations:
        key = text_hash(
            "\0".join(f"{m['role']}\0{m['content']}{m.get('tool_calls', '')}" for m in conversation.messages)
        )
        if first.setdefault(key, conversation) is not conversation:
            twice.append(conversation)
    return of_share("equal conversations", len(twice), len(conversations), "remove them", _places(twice))


def overlap(trained: Sequence[Conversation], held_out: Sequence[Conversation]) -> Iterator[Finding]:
    """Held-out conversations that are trained on, whole or nearly so."""
    known = {text_hash(text_of(c)) for c in trained}
    same = [c for c in held_out if text_hash(text_of(c)) in known]
    fix = "remove equal conversations before they are split"
    yield of_share("held out and trained", len(same), len(held_out), fix, _places(same))
    judged = HeldOut(text_of(c) for c in held_out)
    for conversation in trained:
        judged.see(text_of(conversation))
    yield judged.finding()


def rendering(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, seq_len: int, limit: int
) -> Iterator[Finding]:
    """What the renderer makes of the first ``limit`` conversations, in rows of ``seq_len`` tokens."""
    if tokenizer.chat_template is None:
        yield Finding("chat template", "fail", "the tokenizer has none", "add a chat_template.jinja to its folder")
        return
    looked = conversations[:limit]
    rendered: list[tuple[Conversation, Rendered]] = []
    refused: list[str] = []
    for conversation in looked:
        try:
            rendered.append((conversation, tokenizer.render(conversation.messages, tools=conversation.tools)))
        except DataError as error:
            refused.append(f"{conversation.source}:{conversation.line}: {error.what} ({error.where})")
    if refused:
        text = f"it refuses {len(refused):,} of {len(looked):,} conversations; training would stop"
        yield Finding("chat template", "fail", text, "change these rows", {"refused": len(refused)}, refused[:EXAMPLES])
    if rendered:
        yield from _trained(rendered, tokenizer, seq_len + 1)
        yield from _prompts(rendered[:FIRST_ROWS], tokenizer)


def _trained(
    rendered: Sequence[tuple[Conversation, Rendered]], tokenizer: Tokenizer, longest: int
) -> Iterator[Finding]:
    """Of samples of at most ``longest`` tokens: what is trained, what is cut off, and whether they learn to stop."""
    stops, of = tokenizer.stop_ids, len(rendered)
    nothing, cut, ends, ended, tokens, targets = [], [], 0, 0, 0, 0
    unended = []
    for conversation, made in rendered:
        kept = made.loss_mask[:longest]
        tokens, targets = tokens + len(kept), targets + sum(kept)
        if not any(kept[1:]):
            nothing.append(conversation)
        if any(made.loss_mask[longest:]):
            cut.append(conversation)
        # An answer is a run of trained tokens; its end is in the row or it is cut off.
        last = [i for i, (a, b) in enumerate(zip(made.loss_mask, [*made.loss_mask[1:], 0])) if a and not b]
        whole = [i for i in last if i < longest]
        ends += len(whole)
        good = sum(made.ids[i] in stops for i in whole)
        ended += good
        if good < len(whole):
            unended.append(conversation)
    share = words.percent(targets / max(tokens, 1), 1)
    figures = {"tokens": tokens, "trained": targets, "longest": max(len(made.ids) for _, made in rendered)}
    text = f"{tokens:,} in rows, {targets:,} of them trained ({share}), the longest conversation {figures['longest']:,}"
    yield Finding("tokens", "ok", text, figures=figures)
    fix = "raise tune.seq_len, or check the roles and the chat template"
    yield of_share("no trained token", len(nothing), of, fix, _places(nothing))
    yield of_share(
        "answers cut off", len(cut), of, "raise tune.seq_len", _places(cut), f" in rows of {longest - 1:,} tokens"
    )
    names = ", ".join(tokenizer.tokens[i] or "" for i in sorted(stops)) or "none"
    counted = {"answers": ends, "ended": ended}
    if ends and ended == ends:
        yield Finding("stop token", "ok", f"ends each of {ends:,} whole answers and is trained ({names})", "", counted)
        return
    text = (
        f"{ended:,} of {ends:,} whole answers end with one that is trained ({names}): the model would not learn to stop"
    )
    fix = "let the chat template end an assistant's turn with a special token, inside its generation block"
    bad = not ends or ended < ends / 2
    yield Finding(
        "stop token", "fail" if bad else "warn", text, fix if ends else "raise tune.seq_len", counted, _places(unended)
    )


def _prompts(rendered: Sequence[tuple[Conversation, Rendered]], tokenizer: Tokenizer) -> Iterator[Finding]:
    """On the first rows: each prompt, as the finished model is given it, is how the trained tokens begin."""
    bos = tokenizer.special.bos
    doubled = [c for c, made in rendered if bos is not None and made.ids.count(bos) > 1]
    of = len(rendered)
    fix = "let the chat template write bos_token once"
    yield of_share("bos twice", len(doubled), of, fix, _places(doubled), " of the first rows")
    wrong: list[str] = []
    for conversation, _ in rendered:
        why = _wrong_prompt(conversation, tokenizer)
        if why:
            wrong.append(words.printable(f"{conversation.source}:{conversation.line}: {why}"))
    fix = "let add_generation_prompt write exactly what stands before an answer in the chat template"
    yield of_share("prompts that differ", len(wrong), of, fix, wrong[:EXAMPLES], " of the first rows")


def _wrong_prompt(conversation: Conversation, tokenizer: Tokenizer) -> str:
    """Why an answer's prompt is not how the trained text begins; "" if all are."""
    messages: list[dict[str, Any]] = conversation.messages
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            prompt = tokenizer.render(messages[:i], add_generation_prompt=True, tools=conversation.tools)
            whole = tokenizer.render(messages[: i + 1], tools=conversation.tools)
        except DataError as error:
            return f"{error.what} (message {i})"
        if not whole.text.startswith(prompt.text):
            return f"the text before message {i} is another one in the prompt"
        if whole.ids[: len(prompt.ids)] != prompt.ids:
            return f"the tokens before message {i} are others in the prompt"
    return ""
