"""/v1/responses: the newer form of a conversation. Nothing is stored: every request brings the whole of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from octavo.serve.answers import Decoded
from octavo.serve.protocol import MAX_MESSAGES, Strict, choice_scores, event
from octavo.serve.refusal import ApiError
from octavo.serve.worker import Job


def _as_text(value: Any) -> Any:
    """A string, or the joined texts of a list of parts."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            raise ValueError("only parts of type `input_text` and `output_text` are read")
        texts.append(part["text"])
    return "".join(texts)


class InputPart(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(Strict):
    """One turn; an earlier answer may come back as it was given."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | list[InputPart])]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class TextFormat(Strict):
    type: Literal["text"]


class TextOptions(Strict):
    format: TextFormat = TextFormat(type="text")


class ResponseRequest(Strict):
    """POST /v1/responses"""

    model: str
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_logprobs: int = Field(default=0, ge=0, le=20)
    stream: bool = False
    text: TextOptions = TextOptions()
    truncation: Literal["disabled"] = "disabled"

    def messages(self) -> list[dict[str, str]]:
        """The conversation as /v1/chat/completions takes it."""
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*first, {"role": "user", "content": self.input}]
        return [*first, *({"role": message.role, "content": message.content} for message in self.input)]


def refuse_stored(body: dict[str, Any]) -> None:
    """There is no storage to go on from.

    Raises:
        ApiError: 400 for a request that refers to something stored.
    """
    for key in ("previous_response_id", "conversation", "prompt"):
        if body.get(key) is not None:
            message = f"{key}: nothing is stored here; send the whole conversation in `input`."
            raise ApiError(400, message, param=key, code="unsupported_parameter")


@dataclass(frozen=True)
class Response:
    """An answer of /v1/responses."""

    decoded: Decoded
    request: ResponseRequest
    id: str
    name: str
    created: float = field(default_factory=lambda: float(int(time.time())))

    @property
    def stream(self) -> bool:
        return self.request.stream

    def start(self, job: Job) -> None:
        self.decoded.start(job)

    async def whole(self, job: Job) -> dict[str, Any]:
        (choice,), n_new = await self.decoded.choices(job)
        scores = (choice["logprobs"] or {}).get("content", [])
        return self._object(choice["finish_reason"], [self._item(choice["text"], scores)], n_new)

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        number, text, n_new, reason = 0, "", 0, ""
        scores = list[dict[str, Any]]()

        def said(kind: str, **more: Any) -> bytes:
            nonlocal number
            number += 1
            head = f"event: {kind}\n".encode()
            return head + event({"type": kind, "sequence_number": number - 1, **more})

        where = {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}
        try:
            async for pieces in job.results():
                parts = list[bytes]()
                if number == 0:
                    parts += [
                        said("response.created", response=self._object("", [], 0)),
                        said("response.in_progress", response=self._object("", [], 0)),
                        said("response.output_item.added", output_index=0, item=self._item(None)),
                        said("response.content_part.added", **where, part=_part("", [])),
                    ]
                for piece in pieces:
                    n_new += 1
                    text += piece.text
                    reason = piece.finish_reason or reason
                    tokenizer = self.decoded.tokenizer
                    own = choice_scores(tokenizer, [piece.score])["content"] if piece.score is not None else []
                    scores += own
                    if piece.text or own:
                        parts.append(said("response.output_text.delta", **where, delta=piece.text, logprobs=own))
                yield b"".join(parts)
        except ApiError as error:
            if not number:
                raise
            failed = {**self._object("", [], n_new), "status": "failed"}
            failed["error"] = {"code": "server_error", "message": error.message}
            yield said("response.failed", response=failed)
            return
        if not reason:  # stopped without an error: nobody reads this any more
            return
        item = self._item(text, scores)
        yield b"".join([
            said("response.output_text.done", **where, text=text, logprobs=scores),
            said("response.content_part.done", **where, part=_part(text, scores)),
            said("response.output_item.done", output_index=0, item=item),
            said(
                "response.completed" if reason == "stop" else "response.incomplete",
                response=self._object(reason, [item], n_new),
            ),
        ])  # fmt: skip

    def _item(self, text: str | None, scores: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """The one message of the answer; None: it has not begun."""
        content = [] if text is None else [_part(text, scores or [])]
        status = "in_progress" if text is None else "completed"
        return {"id": f"msg_{self.id}", "type": "message", "role": "assistant", "status": status, "content": content}

    def _object(self, reason: str, output: list[dict[str, Any]], n_new: int) -> dict[str, Any]:
        """The response; ``reason`` is why it ended, empty while it goes on."""
        asked, n_prompt = self.request, self.decoded.n_prompt
        usage = {
            "input_tokens": n_prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": n_new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": n_prompt + n_new,
        }
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": {"": "in_progress", "stop": "completed"}.get(reason, "incomplete"),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "model": self.name,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": asked.top_logprobs,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": usage if reason else None,
        }


def _part(text: str, scores: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}
