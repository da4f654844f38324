"""The row formats of chat files and how each becomes messages.

Four shapes of row are recognised, one per file, from the columns of its first row:

- ``alpaca``: ``instruction``, ``input``, ``output`` (and ``system``, ``history``: pairs of earlier turns);
- ``sharegpt``: ``conversations``, a list of ``{from: human|gpt|system|function_call|observation, value}``;
- ``messages``: ``messages``, a list of ``{role: user|assistant|system|tool, content}``, as OpenAI has it;
- ``pairs``: ``prompt`` and ``completion`` (or ``response``, ``question`` and ``answer``), texts or lists of messages.

A row that is not what it claims to be is an error with file and line; a row that is well formed but holds nothing
to learn is dropped and counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

from octavo.data import readers

MAX_DEPTH = 48  # of a message or a tool; rendering takes a few more

Format = Literal["alpaca", "sharegpt", "messages", "pairs"]
Message = dict[str, Any]

# Our name for each column -> what a file may call it, most usual first.
COLUMNS: dict[Format, dict[str, tuple[str, ...]]] = {
    "alpaca": {
        "instruction": ("instruction",),
        "input": ("input",),
        "output": ("output",),
        "system": ("system",),
        "history": ("history",),
    },
    "sharegpt": {
        "messages": ("conversations", "conversation", "messages"),
        "role": ("from",),
        "content": ("value",),
        "system": ("system",),
        "tools": ("tools",),
    },
    "messages": {
        "messages": ("messages", "conversations", "conversation"),
        "role": ("role",),
        "content": ("content",),
        "system": ("system",),
        "tools": ("tools",),
    },
    "pairs": {
        "prompt": ("prompt", "question"),
        "completion": ("completion", "response", "answer"),
        "system": ("system",),
    },
}

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
    "function_call": "function_call",
}


class BadRow(Exception):
    """A row that is not what it claims to be; the text says why."""


class Useless(Exception):
    """A well-formed row with nothing to learn in it; the text is the reason it is counted under."""


def detect(
    row: Mapping[str, Any], given: Literal["auto"] | Format = "auto", columns: Mapping[str, str] | None = None
) -> tuple[Format, dict[str, str]]:
    """The format of a file and the column names it uses, from one of its rows.

    Args:
        row: the row.
        given: the format where it is known.
        columns: our column name -> the file's, where it is not a usual one.

    Raises:
        BadRow: no known format has these columns.
    """
    columns = columns or {}
    if given != "auto":
        return given, _names(given, row, columns)
    # Rows with a list of messages are told apart by the keys of the messages.
    shapes: tuple[Format, ...] = ("messages", "sharegpt")
    for name in shapes:
        names = _names(name, row, columns)
        turns = row.get(names["messages"])
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and names["role"] in turns[0]:
            return name, names
    flat: dict[Format, tuple[str, ...]] = {"alpaca": ("instruction", "output"), "pairs": ("prompt", "completion")}
    for name, needed in flat.items():
        names = _names(name, row, columns)
        if all(names[column] in row for column in needed):
            return name, names
    raise BadRow(
        f"columns {_columns(row) or '(none)'} are not those of Alpaca (instruction, output), ShareGPT "
        "(conversations), messages (messages) or pairs (prompt, completion)"
    )


def _columns(row: Mapping[str, Any]) -> str:
    names = [readers.excerpt(name) for name in islice(row, readers.SHOWN_FIELDS)]
    return ", ".join(names) + (" ..." if len(row) > len(names) else "")


def _names(name: Format, row: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """Our column names -> the file's: the one given, else the first usual one the row has."""
    return {
        column: given.get(column) or next((usual for usual in names if usual in row), names[0])
        for column, names in COLUMNS[name].items()
    }


def convert(row: dict[str, Any], name: Format, names: Mapping[str, str]) -> tuple[list[Message], list[Any] | None]:
    """The messages of a row, ending with an assistant's, and the tools it offers.

    Raises:
        BadRow: it is not what it claims to be.
        Useless: there is nothing to learn in it.
    """
    if name == "alpaca":
        messages = _alpaca(row, names)
    elif name == "pairs":
        messages = _side(row, names["prompt"], "user") + _side(row, names["completion"], "assistant")
    else:
        turns = row.get(names["messages"])
        if not isinstance(turns, list):
            raise BadRow(f"expected a list in `{names['messages']}`, got {kind_of(turns)}")
        messages = [_message(turn, names["role"], names["content"], i) for i, turn in enumerate(turns)]
    if row.get(names["system"]) and not any(m["role"] == "system" for m in messages):
        messages.insert(0, {"role": "system", "content": _text(row, names["system"])})
    for i, message in enumerate(messages):
        _check_text(message, f"message {i}")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise Useless("no assistant message")
    answers = [m for m in messages if m["role"] == "assistant"]
    if not all(m["content"].strip() or m.get("tool_calls") for m in answers):
        raise Useless("empty answer")
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        raise Useless("empty prompt")
    tools = _json(row.get(names["tools"]) or None, names["tools"]) if "tools" in names else None
    if tools is not None and not isinstance(tools, list):
        raise BadRow(f"expected a list in `{names['tools']}`, got {kind_of(tools)}")
    _check_text(tools, "tools")
    return messages, tools or None


def _check_text(value: Any, where: str, depth: int = 0) -> None:
    """Refuse a character that no text may hold, and nesting that no template could walk, wherever they stand."""
    if isinstance(value, str):
        if (wrong := readers.forbidden(value)) is not None:
            raise BadRow(f"{where}: {wrong[1]} at character {wrong[0]:,} of the text")
    elif isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            raise BadRow(f"{where}: nested more than {MAX_DEPTH} deep")
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_text(part, where, depth + 1)


def _alpaca(row: dict[str, Any], names: Mapping[str, str]) -> list[Message]:
    messages: list[Message] = []
    history = row.get(names["history"]) or []
    if not isinstance(history, list):
        raise BadRow(f"expected a list in `{names['history']}`, got {kind_of(history)}")
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow(f"expected pairs of texts in `{names['history']}`, got {kind_of(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = _text(row, names["instruction"])
    if row.get(names["input"]):
        question = f"{question}\n\n{_text(row, names['input'])}"
    return [
        *messages,
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(row, names["output"])},
    ]


def _side(row: dict[str, Any], column: str, role: str) -> list[Message]:
    """A prompt or completion: a text, or a list of messages as in the ``messages`` format."""
    if isinstance(row.get(column), list):
        return [_message(turn, "role", "content", i) for i, turn in enumerate(row[column])]
    return [{"role": role, "content": _text(row, column)}]


def _text(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise BadRow(f"`{column}` is missing; the row has {_columns(row) or 'no columns'}")
    if not isinstance(row[column], str):
        raise BadRow(f"expected text in `{column}`, got {kind_of(row[column])}")
    return row[column]


def _message(turn: Any, role_key: str, content_key: str, index: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"message {index}: expected an object, got {kind_of(turn)}")
    given = turn.get(role_key)
    if not isinstance(given, str) or given not in ROLES:
        raise BadRow(f"message {index}: `{role_key}` = {readers.shown(given)} is none of {', '.join(ROLES)}")
    role = ROLES[given]
    content = turn.get(content_key)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(_json(content, content_key))]}
    if role == "assistant" and 0 in (turn.get("weight"), turn.get("loss_weight")):
        raise Useless("an answer of weight 0 (every answer is trained)")
    message: Message = {"role": role, "content": "" if content is None else content}
    if isinstance(content, list):
        message |= _parts(content, index)
    elif not isinstance(message["content"], str):
        raise BadRow(f"message {index}: expected text in `{content_key}`, got {kind_of(content)}")
    if calls := turn.get("tool_calls"):
        if not isinstance(calls, list):
            raise BadRow(f"message {index}: expected a list in `tool_calls`, got {kind_of(calls)}")
        functions = [call.get("function", call) if isinstance(call, dict) else call for call in calls]
        message["tool_calls"] = [_call(function) for function in functions]
    for key in ("reasoning_content", "name", "tool_call_id"):
        if isinstance(turn.get(key), str):
            message[key] = turn[key]
    return message


def _parts(parts: list[Any], index: int) -> Message:
    """Content given as typed parts: texts are joined, reasoning and tool calls go to fields of their own."""
    found: dict[str, list[Any]] = {"text": [], "reasoning": [], "tool_call": []}
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        if not isinstance(part, dict) or not isinstance(kind, str) or kind not in found:
            raise BadRow(f"message {index}: content of type {readers.shown(kind)} is not text")
        value = part.get("value", part.get("text"))
        if not isinstance(value, str):
            raise BadRow(f"message {index}: expected text in a part of type {kind}, got {kind_of(value)}")
        found[kind].append(value)
    message: Message = {"content": "".join(found["text"])}
    if found["reasoning"]:
        message["reasoning_content"] = "".join(found["reasoning"])
    if found["tool_call"]:
        message["tool_calls"] = [_call(_json(value, "tool_call")) for value in found["tool_call"]]
    return message


def _call(function: Any) -> dict[str, Any]:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"a tool call needs a `name`, got {kind_of(function)}")
    return {"type": "function", "function": {"name": function["name"], "arguments": function.get("arguments", {})}}


def _json(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=readers.refuse_constant)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
        raise BadRow(f"`{column}` is not JSON ({why})") from None


def kind_of(value: Any) -> str:
    """What a JSON value is, in words for a message."""
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
