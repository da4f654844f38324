"""What clients may send and what they get back: the OpenAI completion and chat formats, without the web parts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from octavo.errors import did_you_mean
from octavo.serve.refusal import ApiError, param_name

if TYPE_CHECKING:
    from octavo.infer.text import TokenScore
    from octavo.serve.tools import Call
    from octavo.tokenizer import Tokenizer

MAX_ROWS = 8
MAX_MESSAGES = 2048
MAX_STOP = 4
MAX_TOOLS = 128

# Fields that clients send and that change nothing about the text of an answer.
WITHOUT_EFFECT = frozenset("user metadata store service_tier safety_identifier prompt_cache_key".split())
TEMPLATES = frozenset(("chat_template", "chat_template_kwargs"))


class Strict(BaseModel):
    """What a client sends: every field known, of its own type, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def listed(value: Any) -> Any:
    """One text is a list of one."""
    return [value] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    """The text of a message: a string, or a list of text parts joined."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("only parts of type `text` are read")
        texts.append(part["text"])
    return "".join(texts)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
    """One turn of a conversation; a result of a call is one too."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[ToolCall] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(default=None, validate_default=True)
    content: Annotated[str | None, BeforeValidator(_as_text, json_schema_input_type=str | list[TextPart] | None)] = (
        Field(default=None, validate_default=True)
    )
    name: str | None = None

    @field_validator("tool_calls", "tool_call_id", "content")
    @classmethod
    def _of_its_role(cls, value: Any, info: ValidationInfo) -> Any:
        """Only answers call tools, only results answer a call, and all but calls have a text."""
        role, field = info.data.get("role"), info.field_name
        owner = {"tool_calls": "assistant", "tool_call_id": "tool"}.get(field or "")
        if owner not in (None, role) and value:
            raise ValueError(f"only messages of the role `{owner}` have this")
        needed = role == "tool" if field == "tool_call_id" else field == "content" and not info.data.get("tool_calls")
        if value is None and needed and role is not None:
            raise PydanticCustomError("missing", "Field required")
        return value


class Function(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that the model may want called."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class ToolChoice(Strict):
    """Whether a tool is called, and which; a word or an object in a request."""

    type: Literal["none", "auto", "required", "function"]
    function: NamedFunction | None = Field(default=None, validate_default=True)

    @field_validator("function")
    @classmethod
    def _named(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("type") == "function":
            raise PydanticCustomError("missing", "Field required")
        return value


def _as_choice(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What an answer is: any text, a JSON object, or JSON under a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(default=None, validate_default=True)

    @field_validator("json_schema")
    @classmethod
    def _beside_its_type(cls, value: Any, info: ValidationInfo) -> Any:
        kind = info.data.get("type")
        if value is None and kind == "json_schema":
            raise PydanticCustomError("missing", "Field required")
        if value is not None and kind in ("text", "json_object"):
            raise ValueError("only the type `json_schema` has this")
        return value


Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOP)]
Tokens = list[str] | list[int] | list[list[int]]


class _Request(Strict):
    model: str
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, lt=2**31)
    min_p: float = Field(default=0.0, ge=0, le=1)
    typical_p: float = Field(default=1.0, gt=0, le=1)
    temperature_end: float | None = Field(default=None, ge=0, le=2, description="the temperature moves to this one")
    temperature_tokens: int = Field(default=64, ge=1, lt=2**31, description="over so many tokens")
    temperature_path: Literal["linear", "geometric"] = "linear"
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=1024)
    n: int = Field(default=1, ge=1, le=MAX_ROWS)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[Stops, BeforeValidator(listed, json_schema_input_type=Stop | Stops)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    priority: int = Field(default=0, ge=-100, le=100, description="smaller goes first")


class ChatRequest(_Request):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Annotated[
        ToolChoice, BeforeValidator(_as_choice, json_schema_input_type=Literal["none", "auto", "required"] | ToolChoice)
    ] = ToolChoice(type="auto")
    parallel_tool_calls: bool = True


class CompletionRequest(_Request):
    """POST /v1/completions"""

    prompt: Annotated[Tokens, BeforeValidator(listed, json_schema_input_type=str | Tokens)]
    echo: bool = False
    best_of: int | None = Field(
        default=None, ge=1, le=MAX_ROWS, description="drawn for each prompt; the best n are given"
    )


def validate(kind: type[Strict], body: Mapping[str, Any]) -> Any:
    """The request as ``kind``; null means not given, as it does in the OpenAI interface.

    Raises:
        ApiError: 400 with the first wrong field in ``param``.
    """
    given = {key: value for key, value in body.items() if value is not None and key not in WITHOUT_EFFECT}
    for key in given:
        if key in TEMPLATES:
            raise ApiError(400, "A request cannot bring its own template.", param=key, code="unsupported_parameter")
        if key not in kind.model_fields:
            hint = f" {did_you_mean(key, kind.model_fields).capitalize()}" if len(key) < 40 else ""
            name = param_name([key])
            raise ApiError(
                400,
                f"Parameter {name} is not supported.{hint}" if name else "A parameter is not supported.",
                param=name,
                code="unsupported_parameter",
            )
    if isinstance(given.get("messages"), list):
        given["messages"] = [_without_nothing(message) for message in given["messages"][: MAX_MESSAGES + 1]]
    try:
        return kind.model_validate(given)
    except ValidationError as invalid:
        error = invalid.errors(include_input=False, include_url=False)[0]
        missing = error["type"] == "missing"
        path = [part for part in error["loc"] if not (isinstance(part, str) and "[" in part)]
        message = "This field is required." if missing else f"{error['msg']}."
        name = param_name(path) or param_name(path[:-1])
        raise ApiError(
            400,
            f"{name}: {message}" if name else message,
            param=name,
            code="missing_required_parameter" if missing else "invalid_value",
        ) from None


def _without_nothing(message: Any) -> Any:
    """A message as a client sends an earlier answer back: empty lists and nulls stand for fields it does not use."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None and (value != [] or key == "content")}


def choice_scores(tokenizer: Tokenizer, scores: Iterable[TokenScore]) -> dict[str, Any]:
    """``logprobs`` of a chat choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {
            "token": raw.decode("utf-8", errors="replace"),
            "logprob": max(logprob, -9999.0),  # JSON has no -inf
            "bytes": list(raw),
        }

    return {
        "content": [
            {**entry(score.id, score.logprob), "top_logprobs": [entry(*best) for best in score.top]} for score in scores
        ],
        "refusal": None,
    }


class Shape:
    """The JSON of one answer, chat or completion, whole or in chunks."""

    def __init__(self, request_id: str, model: str, *, chat: bool):
        self.chat = chat
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int]) -> dict[str, Any]:
        """``choices`` have text, calls, finish_reason and logprobs, in the order of their index."""
        listed = []
        for index, choice in enumerate(choices):
            text, calls = choice["text"], [call.shown() for call in choice["calls"]]
            message = {"role": "assistant", "content": text}
            if calls:
                message |= {"content": text or None, "tool_calls": calls}
            content = {"message": message} if self.chat else {"text": text}
            rest = {"logprobs": choice["logprobs"], "finish_reason": choice["finish_reason"]}
            listed.append({"index": index, **content, **rest})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": listed, "usage": usage}

    def chunk(
        self,
        index: int,
        text: str | None,
        *,
        calls: Iterable[tuple[int, Call]] = (),
        first: bool = False,
        finish_reason: str | None = None,
        logprobs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A part of choice ``index``; ``calls`` are numbered."""
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            delta |= {} if text is None else {"content": text}
            if numbered := [{"index": i, **call.shown()} for i, call in calls]:
                delta["tool_calls"] = numbered
            content: dict[str, Any] = {"delta": delta}
        else:
            content = {"text": text or ""}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self.head, "object": self._chunk_kind, "choices": [choice]}

    def usage_chunk(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The last chunk of a stream that asked for its usage."""
        return {**self.head, "object": self._chunk_kind, "choices": [], "usage": usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def usage(n_prompt: int, n_completion: int) -> dict[str, int]:
    """Token counts of one request."""
    return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
