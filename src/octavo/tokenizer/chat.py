"""Conversations to ids and a loss mask: the only place where a chat template is applied.

Two promises. Text of a message never becomes a special token, whatever it spells: only what the template itself
writes does. And the loss mask covers what the assistant wrote and the token that ends its turn, nothing else.

How the first is kept: a special token can only be spelt with its first and last character and its punctuation. In
a second rendering those are replaced, inside the messages, by stand-ins that occur nowhere else. Where both
renderings agree, a special spelt in the second one was written by the template. Where the template looks into the
text (so that they differ), the specials inside messages are broken by an invisible mark instead, and the sequence
of specials must still be the one of the stand-in rendering, or the conversation is refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from octavo.errors import DataError
from octavo.tokenizer.budget import BudgetError
from octavo.tokenizer.sandbox import Template, compile_template

if TYPE_CHECKING:
    from octavo.tokenizer.core import Tokenizer

CHATML = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages and messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\\n\\n' }}
    {%- endif %}
    {{- 'Tools, one JSON object a line. To call one, answer with <tool_call>{"name": ..., "arguments": {...}}' }}
    {{- '</tool_call>.' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message['content'] or '' }}
            {%- for call in message['tool_calls'] or [] %}
                {%- set function = call['function'] or call %}
                {{- '<tool_call>' + (function | tojson) + '</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif not (tools and loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_STAND_INS = 0xF0000  # start of a private-use plane
# A conversation is rendered several times; together they may take this long.
_SECONDS, _SECONDS_PER_MESSAGE = 2.0, 0.05
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}\Z")


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it.

    ``loss_mask[i]`` is 1 where ``ids[i]`` is a target: the assistant's text and the token that ends its turn.
    """

    ids: list[int]
    loss_mask: list[int]
    text: str


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Rendered:
    """Apply the tokenizer's chat template.

    Args:
        messages: mappings with ``role`` and ``content`` (text, a list of ``{"type": "text", "text": ...}`` parts,
            or None beside ``tool_calls``); further keys reach the template.
        add_generation_prompt: end with the opening of an assistant turn.
        tools: JSON schemas of functions, for templates that know tools.
        variables: further names for the template (``enable_thinking`` ...).

    Raises:
        DataError: a message is malformed (its index is named), the template refuses the conversation, or a
            promise above cannot be kept.
    """
    if tokenizer.chat_template is None:
        raise DataError("this tokenizer has no chat template", fix="add a chat_template.jinja to its folder")
    job = _Job(tokenizer, compile_template(tokenizer.chat_template), tools, variables or {})
    messages = [_checked(i, message) for i, message in enumerate(messages)]
    text, specials, spans = job.safe(messages, add_generation_prompt)
    if not job.template.marks_generation:
        spans = job.derived_spans(messages, text, specials)
    ids, offsets = _encode(tokenizer, text, specials)
    mask, at = [0] * len(ids), 0
    for start, stop in spans:
        while at < len(ids) and offsets[at][0] < start:
            at += 1
        while at < len(ids) and offsets[at][1] <= stop and offsets[at][0] < stop:
            mask[at] = 1
            at += 1
    return Rendered(ids, mask, text)


class _Job:
    """One conversation's renderings under one template."""

    def __init__(self, tokenizer: Tokenizer, template: Template, tools: Any, variables: Mapping[str, Any]):
        self.tokenizer, self.template, self.tools = tokenizer, template, _plain(list(tools)) if tools else None
        names = {f"{role}_token": text for role, text in tokenizer.special_text.items()}
        self.variables = {**_plain(dict(variables)), **names}
        self._began, self._allowed = time.thread_time(), 0.0

    def raw(self, messages: Sequence[Any], prompt: bool, tools: Any = None) -> tuple[str, list[tuple[int, int]]]:
        """One rendering; refusals name the first message that causes them."""
        tools = self.tools if tools is None else tools
        try:
            return self._render(messages, prompt, tools)
        except jinja2.TemplateError as error:
            where = ""
            # A template that takes all it can get would take it again for every message.
            for n in range(1, 0 if isinstance(error, BudgetError) else min(len(messages), 64)):
                try:
                    self._render(messages[:n], False, tools)
                except jinja2.TemplateError as early:
                    if str(early) == str(error):
                        where = f"message {n - 1}"
                        break
            what = str(error) or type(error).__name__
            raise DataError(
                f"the chat template refuses the conversation: {what}",
                where=where or (f"message {len(messages) - 1}" if messages else ""),
                fix="change that message or use a template that takes it",
            ) from None

    def _render(self, messages: Sequence[Any], prompt: bool, tools: Any) -> tuple[str, list[tuple[int, int]]]:
        names = {**self.variables, "messages": list(messages), "tools": tools, "documents": None}
        inputs = "".join(_leaves([messages, tools]))
        self._allowed = max(self._allowed, _SECONDS + _SECONDS_PER_MESSAGE * len(messages))
        if time.thread_time() - self._began > self._allowed:
            raise BudgetError(f"all its renderings take longer than {self._allowed:.1f} s")
        return self.template.render(len(messages), inputs, {**names, "add_generation_prompt": prompt})

    def safe(self, messages: Sequence[Any], prompt: bool) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
        """The text, the spans of the special tokens the template wrote, and the spans of generation blocks."""
        text, spans = self.raw(messages, prompt)
        find = self.tokenizer.find_specials
        signs = {
            char
            for name in self.tokenizer.special_names
            for k, char in enumerate(name)
            if k in (0, len(name) - 1) or not char.isalnum()
        }
        data = [messages, self.tools]
        if not any(char in leaf for leaf in _leaves(data) for char in signs):
            return text, find(text), spans
        used = set(text).union(*_leaves(data), self.template_source)
        free = (chr(code) for code in range(_STAND_INS, _STAND_INS + 0xFFFD) if chr(code) not in used)
        there = {ord(char): next(free) for char in sorted(signs)}
        back = {ord(stand_in): chr(code) for code, stand_in in there.items()}
        masked, _ = self.raw(*self._mapped(data, lambda leaf: leaf.translate(there), prompt))
        specials = find(masked)
        if masked.translate(back) == text:
            return text, specials, spans
        mark = next(free)
        broken, spans = self.raw(*self._mapped(data, lambda leaf: self._break(leaf, mark), prompt))
        found = find(broken)
        wrote = [broken[a:b] for a, b in found]
        if broken.replace(mark, "") != text or wrote != [masked[a:b] for a, b in specials]:
            raise DataError(
                "the chat template changes message text in a way that could turn it into special tokens",
                fix="remove text that spells special tokens from the messages",
            )
        # Positions without the marks.
        before = [0]
        for char in broken:
            before.append(before[-1] + (char == mark))
        shift = lambda pairs: [(a - before[a], b - before[b]) for a, b in pairs]  # noqa: E731
        return text, shift(found), shift(spans)

    @property
    def template_source(self) -> str:
        return self.tokenizer.chat_template or ""

    def _mapped(self, data: list[Any], change: Callable[[str], str], prompt: bool) -> tuple[Any, bool, Any]:
        messages, tools = (_map_leaves(part, change) for part in data)
        return messages, prompt, tools

    def _break(self, leaf: str, mark: str) -> str:
        for start, _ in reversed(self.tokenizer.find_specials(leaf)):
            leaf = f"{leaf[: start + 1]}{mark}{leaf[start + 1 :]}"
        return leaf

    def derived_spans(
        self, messages: Sequence[Any], text: str, specials: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """What the assistant wrote, for a template without generation blocks.

        The rendering up to a turn, opened for the assistant, must be how the whole text begins; the turn ends with
        the last special token that the template writes after it, before the next turn.
        """
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            opening, _ = self.raw(messages[:i], True)
            closed, _ = self.raw(messages[: i + 1], False)
            if not text.startswith(opening):
                raise _not_found("cannot be found: the template rewrites earlier turns", i)
            start = len(opening)
            content = _text_of(message).strip()
            if opening == self.raw(messages[:i], False)[0]:
                at = text.find(content, start)
                if at < 0:
                    raise _not_found("cannot be found in the rendered conversation", i)
                start = at - (text[at - 1 : at] == " " and at > start)
            if text.startswith(closed):
                ends = [stop for begin, stop in specials if start <= begin and stop <= len(closed)]
                stop = ends[-1] if ends else len(closed)
            else:
                at = text.find(content, start)
                later = [(begin, stop) for begin, stop in specials if begin >= max(at, start) + len(content)]
                begin, stop = later[0] if later else (len(text), len(text))
                # The same closing token before the text means that another turn was found.
                if at < 0 or any(start <= a < at and text[a:b] == text[begin:stop] for a, b in specials):
                    raise _not_found("cannot be found in the rendered conversation", i)
            spans.append((start, stop))
        return spans


def _not_found(what: str, i: int) -> DataError:
    fix = "put {% generation %} ... {% endgeneration %} around it in the chat template"
    return DataError(f"the assistant's text {what}", where=f"message {i}", fix=fix)


def _encode(
    tokenizer: Tokenizer, text: str, specials: Sequence[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character offsets of ``text``, with special tokens only at ``specials``."""
    names = tokenizer.special_names
    parts, at, moved, shift = [], 0, [], 0
    for start, stop in specials:
        name = names[text[start:stop]]
        parts += [text[at:start], name]
        shift += len(name) - (stop - start)
        moved.append((stop + shift, shift))  # from this place on, that many characters too many
        at = stop
    encoding = tokenizer.encode_named("".join([*parts, text[at:]]))
    offsets, here, k = [], 0, 0
    for start, stop in encoding.offsets:
        while k < len(moved) and start >= moved[k][0]:
            here = moved[k][1]
            k += 1
        end = here
        if k < len(moved) and stop >= moved[k][0]:
            end = moved[k][1]
        offsets.append((start - here, stop - end))
    return encoding.ids, offsets


def find_turn_marks(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """Ids of the special tokens that open and close an assistant turn, read off a probe conversation."""
    if tokenizer.chat_template is None:
        return None, None
    probes = ("octavo7user", "octavo7assistant")
    messages = [{"role": role, "content": probe} for role, probe in zip(("user", "assistant"), probes, strict=True)]
    try:
        text, _ = _Job(tokenizer, compile_template(tokenizer.chat_template), None, {}).raw(messages, False)
    except DataError:
        return None, None
    asked, answered = (text.find(probe) for probe in probes)
    if not 0 <= asked < answered:
        return None, None
    found = [(start, tokenizer.special_id_of(text[start:stop])) for start, stop in tokenizer.find_specials(text)]
    close = next((i for start, i in found if start > answered), None)
    between = (i for start, i in found if asked < start < answered and i != close)
    return next(between, None), close


# -- messages


def _checked(i: int, message: Any) -> dict[str, Any]:
    where = f"message {i}"
    if not isinstance(message, Mapping):
        raise DataError(
            f"a message must be a mapping, not {type(message).__name__}", where=where, fix="give role and content"
        )
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.match(role):
        raise DataError(f"role = {role!r} must be a short name", where=where, fix="use system, user, assistant or tool")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise DataError("the message has no content", where=where, fix="give it text")
    if not isinstance(content, (str, list, type(None))):
        raise DataError(f"content must be text, not {type(content).__name__}", where=where, fix="give it text")
    for part in content if isinstance(content, list) else ():
        if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            raise DataError("a part of the content is not text", where=where, fix='use {"type": "text", "text": ...}')
    plain = _plain(dict(message))
    for leaf in _leaves(plain):
        if not leaf.isascii() and re.search("[\ud800-\udfff]", leaf):
            raise DataError("the text contains a lone surrogate", where=where, fix="read it with errors='replace'")
    # Templates read reasoning under one of several names; transformers gives it under each.
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((plain[name] for name in names if plain.get(name) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _plain(value: Any, depth: int = 0) -> Any:
    """``value`` rebuilt from exact JSON types: an object of the caller's never meets the template."""
    if depth > 64:
        raise DataError("a message is nested more than 64 deep", fix="flatten it")
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise DataError(f"a message holds a {type(value).__name__}", fix="use text, numbers, lists and mappings")


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _map_leaves(value: Any, change: Callable[[str], str], key: str = "") -> Any:
    if isinstance(value, str):
        return value if key in ("role", "type") else change(value)
    if isinstance(value, Mapping):
        return {name: _map_leaves(item, change, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_map_leaves(item, change, key) for item in value]
    return value
