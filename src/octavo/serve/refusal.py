"""The one form of an HTTP error: OpenAI's body, the right status, and never a value that the client sent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi.responses import JSONResponse

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")


class ApiError(Exception):
    """A refused request.

    Args:
        status: the HTTP status.
        message: what is wrong and how to put it right; shown to the client.
        param: the field of the request, ``messages.0.role``.
        code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "rate_limit_error" if self.status == 429 else "server_error"
        if self.status < 500 and self.status != 429:
            kind = "authentication_error" if self.status == 401 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, headers=dict(self.headers or {}))


def param_name(parts: Iterable[str | int]) -> str | None:
    """A field's path for ``param``; None where the client's own words would be repeated."""
    words = [str(part) for part in parts]
    return ".".join(words) if words and all(w.isdecimal() or _NAME.fullmatch(w) for w in words) else None
