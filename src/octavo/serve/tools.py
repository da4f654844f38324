"""Tools in a chat: conversations with calls in them, what an answer has to follow, and calls read out of an answer.

A call is written as ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: by our own chat template, and by
those of the Qwen and Hermes families (with line ends inside, which are read too).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from octavo.errors import ConfigError
from octavo.serve.body import parse_object
from octavo.serve.refusal import ApiError, param_name

if TYPE_CHECKING:
    from octavo.infer.constraints import Grammar
    from octavo.serve.protocol import ChatRequest, Message, ToolCall
    from octavo.tokenizer import Tokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_ENDS = 16


@dataclass(frozen=True)
class Call:
    """A function the model wants called; ``arguments`` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def shown(self) -> dict[str, Any]:
        """As an answer has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as a chat template reads them: arguments are objects, and results say which function they are of.

    Raises:
        ApiError: arguments that are not a JSON object, or a result of no call.
    """
    turns, called = list[dict[str, Any]](), dict[str, str]()
    for i, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": message.content or ""}
        if message.tool_calls:
            where = f"messages.{i}.tool_calls"
            turn["tool_calls"] = [_called(call, f"{where}.{k}") for k, call in enumerate(message.tool_calls)]
            called |= {call.id: call.function.name for call in message.tool_calls}
        if message.role == "tool":
            name = called.get(message.tool_call_id or "")
            if name is None:
                raise ApiError(
                    400,
                    "No earlier message of the assistant has a call with this id.",
                    param=f"messages.{i}.tool_call_id",
                    code="invalid_value",
                )
            turn |= {"tool_call_id": message.tool_call_id, "name": name}
        turns.append(turn)
    return turns


def _called(call: ToolCall, where: str) -> dict[str, Any]:
    try:
        arguments = parse_object(call.function.arguments.encode("utf-8", errors="surrogatepass"))
    except ApiError:
        message = "The arguments of a call are a JSON object, as text."
        raise ApiError(400, message, param=f"{where}.function.arguments", code="invalid_value") from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def offered(request: ChatRequest, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The tools that the model may call, as a chat template reads them.

    Raises:
        ApiError: the choice names a tool that is not there, or the template knows no tools.
    """
    choice = request.tool_choice
    names = [tool.function.name for tool in request.tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "Two tools have the same name.", param="tools", code="invalid_value")
    if choice.type in ("required", "function") and not names:
        raise ApiError(400, "tool_choice needs tools.", param="tool_choice", code="invalid_value")
    if choice.function is not None and choice.function.name not in names:
        message = "tool_choice names a function that is not among the tools."
        raise ApiError(400, message, param="tool_choice.function.name", code="invalid_value")
    if not names or choice.type == "none":
        return []
    if "tools" not in (tokenizer.chat_template or ""):
        message = "The chat template of this model knows no tools."
        raise ApiError(400, message, param="tools", code="unsupported_parameter")
    return [tool.model_dump(exclude_none=True) for tool in request.tools]


def grammar_of(request: ChatRequest, tools: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> Grammar | None:
    """What the answer has to follow: the schema of ``response_format``, and calls where there must be one.

    Raises:
        ApiError: a schema that cannot be followed.
    """
    choice, wanted = request.tool_choice, request.response_format
    must_call = choice.type in ("required", "function")
    if must_call:
        if choice.function is not None:
            tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
        one = choice.function is not None or request.parallel_tool_calls is False
        return _made(tokenizer, _calls(tools, one=one), "tools")
    if wanted is None or wanted.type == "text":
        return None
    schema = wanted.json_schema.schema_ if wanted.json_schema is not None else {"type": "object"}
    param = "response_format.json_schema.schema" if wanted.json_schema is not None else "response_format"
    if not tools:
        return _made(tokenizer, f"start: answer\n{_rule('answer', schema, param)}", param)
    either = _calls(tools, one=request.parallel_tool_calls is False, start="calls")
    return _made(tokenizer, f"start: answer | calls\n{_rule('answer', schema, param)}\n{either}", param)


def _calls(tools: Sequence[dict[str, Any]], *, one: bool, start: str = "start") -> str:
    """A grammar of one call, or of one after the other."""
    lines = [
        f"{start}: call" if one else f'{start}: call ("\\n"? call)*',
        f'call: "{OPEN}" "\\n"? ({" | ".join(f"call{i}" for i in range(len(tools)))}) "\\n"? "{CLOSE}"',
        r"_W: /[ \n\t]{1,16}/",
    ]
    for i, tool in enumerate(tools):
        function = tool["function"]
        head = rf'"{{" _W? "\"name\"" _W? ":" _W? "\"{function["name"]}\"" _W? "," _W?'
        lines.append(rf'call{i}: {head} "\"arguments\"" _W? ":" _W? arguments{i} _W? "}}"')
        lines.append(_rule(f"arguments{i}", function.get("parameters") or {"type": "object"}, "tools"))
    return "\n".join(lines)


def _rule(name: str, schema: dict[str, Any], param: str) -> str:
    from octavo.infer.constraints import json_rule

    try:
        return f"{name}: {json_rule(schema)}"
    except ConfigError as error:
        raise _refused(error, param) from None


def _made(tokenizer: Tokenizer, lark: str, param: str) -> Grammar:
    from octavo.infer.constraints import Grammar

    try:
        return Grammar(tokenizer, lark, "JSON schema")
    except ConfigError as error:
        raise _refused(error, param) from None


def _refused(error: ConfigError, param: str) -> ApiError:
    """Without the words of the client, but for names of keywords."""
    from octavo.infer.constraints import GrammarError

    if not isinstance(error, GrammarError):
        return ApiError(400, f"This server cannot do it: {error.what}.", param=param, code="unsupported_parameter")
    keywords = ", ".join(word for word in error.keywords if param_name([word]))
    message = f"The schema uses what cannot be enforced: {keywords}." if keywords else "The schema cannot be followed."
    return ApiError(400, message, param=param, code="invalid_schema")


class Reading:
    """An answer read as it comes: what is said, and what is called.

    What may yet become a call is held back, and so is white space, which says nothing beside a call. What begins like a
    call and is none, or calls no tool that there is, is said.
    """

    def __init__(self, names: Collection[str]):
        self.names = names
        self.calls = list[Call]()
        self._pending = ""
        self._tried = 0  # up to where no end of a call was found
        self._after_call = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """What is certain with ``text``: words, and calls that are complete."""
        self._pending += text
        known, said = len(self.calls), ""
        while (start := self._pending.find(OPEN)) >= 0:
            said += self._cut(start)
            if not self._take():
                return said, self.calls[known:]
        longest = min(len(OPEN) - 1, len(self._pending))
        ahead = next((n for n in range(longest, 0, -1) if OPEN.startswith(self._pending[-n:])), 0)
        said += self._cut(len(self._pending) - ahead)
        return said, self.calls[known:]

    def flush(self) -> tuple[str, list[Call]]:
        """The answer has ended: what is left is said, or is a call that was not closed."""
        known, said = len(self.calls), ""
        while (start := self._pending.find(OPEN)) >= 0:
            after = start + len(OPEN)
            if (call := self._parse(self._pending[after:])) is not None:
                self.calls.append(call)
                self._pending = ""
                break
            said += self._say(self._pending[:after])
            rest, self._pending, self._tried = self._pending[after:], "", 0
            said += self.push(rest)[0]
        rest = self._pending.rstrip() if self.calls else self._pending
        self._pending = ""
        return said + self._say(rest), self.calls[known:]

    def numbered(self, text: str, *, ended: bool) -> tuple[str, list[tuple[int, Call]]]:
        """As ``push``, and ``flush`` at the end; calls with their numbers in the answer."""
        known = len(self.calls)
        said = self.push(text)[0] + (self.flush()[0] if ended else "")
        return said, list(enumerate(self.calls[known:], start=known))

    def reason(self, reason: str) -> str:
        """Why the answer ended: an answer that calls ends for the call."""
        return "tool_calls" if self.calls and reason == "stop" else reason

    def _cut(self, stop: int) -> str:
        """Say what stands before ``stop``, but for the white space at its end."""
        words = self._pending[:stop].rstrip()
        if words:
            self._pending, self._tried = self._pending[len(words) :], 0
        return self._say(words)

    def _take(self) -> bool:
        """Take the call that the text begins with, if its end is there."""
        begin = self._pending.find(OPEN) + len(OPEN)
        end = self._pending.find(CLOSE, max(begin, self._tried))
        for _ in range(MAX_ENDS):  # the arguments may spell an end too
            if end < 0:
                break
            if (call := self._parse(self._pending[begin:end])) is not None:
                self.calls.append(call)
                self._pending, self._tried, self._after_call = self._pending[end + len(CLOSE) :], 0, True
                return True
            end = self._pending.find(CLOSE, end + 1)
        self._tried = max(begin, len(self._pending) - len(CLOSE) + 1)
        return False

    def _parse(self, text: str) -> Call | None:
        if not text.rstrip().endswith("}"):
            return None
        try:
            value = parse_object(text.strip().encode("utf-8", errors="surrogatepass"))
        except ApiError:
            return None
        name, arguments = value.get("name"), value.get("arguments", {})
        if not isinstance(name, str) or name not in self.names or not isinstance(arguments, dict):
            return None
        return Call(name, json.dumps(arguments, ensure_ascii=False))

    def _say(self, words: str) -> str:
        if self._after_call:
            words = words.lstrip()
        self._after_call = self._after_call and not words
        return words
