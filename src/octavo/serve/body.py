"""Request bodies: bounded in bytes, in time and in depth, and strict JSON.

Python's parser takes NaN, turns 1e999 into infinity, raises three different errors for input that is too deep
or too long, and lets lone surrogates through, which fail much later; here each of them is a 400.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

from fastapi import Request

from octavo.serve.refusal import ApiError

MAX_BODY_BYTES = 8 << 20
MAX_BUFFERED_BYTES = 64 << 20
MAX_DEPTH = 64
BODY_SECONDS = 30.0
CLOSE = {"Connection": "close"}
RETRY = {"Retry-After": "1"}


class Bodies:
    """Reads bodies; all that are being read together never hold more than ``MAX_BUFFERED_BYTES``."""

    def __init__(self, seconds: float = BODY_SECONDS):
        self.seconds = seconds
        self.held = 0

    async def read(self, request: Request) -> bytes:
        """The whole body.

        Raises:
            ApiError: 413 above 8 MiB (counted, whatever Content-Length says), 408 when it takes too long,
                429 when too many large bodies arrive at once, 400 when the client left in the middle.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "The request ended before its body did.", code="incomplete_body")
                    chunk = message.get("body", b"")
                    body += chunk
                    self.held += len(chunk)
                    if len(body) > MAX_BODY_BYTES:
                        raise ApiError(
                            413,
                            f"The body is larger than {MAX_BODY_BYTES} bytes.",
                            code="body_too_large",
                            headers=CLOSE,
                        )
                    if self.held > MAX_BUFFERED_BYTES:
                        raise ApiError(
                            429, "Too many large requests at once.", code="overloaded", headers=CLOSE | RETRY
                        )
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408, f"The body took longer than {self.seconds:g} seconds.", code="body_too_slow", headers=CLOSE
            ) from None
        finally:
            self.held -= len(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, finite numbers, at most 64 levels deep, whole characters, an object at the top.

    Raises:
        ApiError: 400 for anything else.
    """
    try:
        value = json.loads(body.decode("utf-8"))
    except RecursionError:
        raise _invalid(f"The body is nested deeper than {MAX_DEPTH} levels.") from None
    except UnicodeDecodeError:
        raise _invalid("The body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"The body is not valid JSON: {error.msg}, line {error.lineno} column {error.colno}.") from None
    except ValueError:
        raise _invalid("The body has a number with too many digits.") from None
    _check(value)
    if not isinstance(value, dict):
        raise _invalid("The body must be a JSON object.")
    return value


def _check(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH and any(isinstance(item, dict | list) for item in level):
            raise _invalid(f"The body is nested deeper than {MAX_DEPTH} levels.")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str):
                _check_text(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise _invalid("The body has a number that is not finite.")
        level = below


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _invalid("The body has a lone surrogate, which is not a character.") from None


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")
