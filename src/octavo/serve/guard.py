"""What stands before every request: who asks, from which page, with what kind of body, with which key.

A server on loopback is reachable from every page in the user's browser. The Host list stops DNS rebinding
(which always needs a name, so addresses are allowed), the Origin check and the JSON content type stop forms
and scripts of other sites.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from octavo.serve.refusal import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware with all checks that need no body.

    Args:
        hosts: names that may stand in ``Host`` next to localhost and plain addresses.
        api_keys: one of them is required as ``Authorization: Bearer KEY`` when any is given.
        public: paths that need no key.
    """

    def __init__(self, app: Any, *, hosts: frozenset[str], api_keys: Sequence[str], public: frozenset[str]):
        self.app, self.hosts, self.public = app, hosts | {"localhost"}, public
        self.keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                headers += [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
                message = {**message, "headers": headers}
            await send(message)

        try:
            self.check(scope["method"], scope["path"], scope["headers"])
        except ApiError as error:
            await error.response()(scope, receive, send_safely)
        else:
            await self.app(scope, receive, send_safely)

    def check(self, method: str, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Refuse what must not reach the application.

        Raises:
            ApiError: 403 for a foreign Host or Origin, 401 for the key, 415 for the kind of body.
        """
        values: dict[str, str] = {}
        for name, value in headers:
            word = name.decode("latin-1").lower()
            if word in ("host", "origin", "content-type") and word in values:
                raise ApiError(400, f"The header {word} is given twice.", code="duplicate_header")
            values[word] = value.decode("latin-1")
        host = values.get("host", "")
        if not self._is_ours(host):
            raise ApiError(
                403,
                "This Host is not served here. The operator can allow it with --allow-host.",
                code="host_not_allowed",
            )
        origin = values.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            raise ApiError(403, "Requests from other sites are refused.", code="origin_not_allowed")
        if self.keys and path not in self.public:
            scheme, _, given = values.get("authorization", "").partition(" ")
            right = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self.keys]
            if not (any(right) and scheme.lower() == "bearer"):
                raise ApiError(
                    401,
                    "Wrong or missing API key. Send it as `Authorization: Bearer KEY`.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if method == "POST":
            kind, _, rest = values.get("content-type", "").partition(";")
            charset = rest.strip().lower()
            if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8", 'charset="utf-8"'):
                raise ApiError(415, "Send the body as `Content-Type: application/json`.", code="unsupported_media_type")
            if values.get("content-encoding", "identity").lower() != "identity":
                raise ApiError(415, "Compressed bodies are not read.", code="unsupported_media_type")

    def _is_ours(self, host: str) -> bool:
        name, port = host.lower(), ""
        if host.startswith("["):
            name, _, port = host[1:].partition("]")
            port = port.removeprefix(":")
        elif ":" in host:
            name, _, port = name.rpartition(":")
        if port and not port.isdecimal():
            return False
        if name.rstrip(".") in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
