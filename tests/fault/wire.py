"""HTTP by hand, for tests that need to see each byte: requests as bytes, and whether an answer came whole."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

RESET = struct.pack("ii", 1, 0)
CHAT, TEXT, EMBED, RESPOND = (f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "responses"))


def request(
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    headers: Iterable[str] = (),
    host: str = "localhost",
    keep: bool = False,
) -> bytes:
    """A whole request; ``body`` is bytes or what becomes JSON."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1", f"Host: {host}", *headers]
    if body is not None:
        lines.append(f"Content-Length: {len(content)}")
        if not any(line.lower().startswith("content-type") for line in lines):
            lines.append("Content-Type: application/json")
    if not keep:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + content


@dataclass
class Reply:
    """What came back. ``status`` is 0 where the connection ended before a status line."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a refusal, which must have OpenAI's form."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], error
        return error

    @property
    def events(self) -> list[Any]:
        """The events that came whole; "[DONE]" as it is."""
        found = [part[6:] for part in self.body.decode("utf-8", "replace").split("\n\n")[:-1]]
        return [part if part == "[DONE]" else json.loads(part) for part in found]

    @property
    def done(self) -> bool:
        """Whether all of it came, and by what is in it nothing is missing and nothing failed."""
        if self.status != 200 or not self.whole:
            return False
        if not self.headers.get("content-type", "").startswith("text/event-stream"):
            return True
        events = self.events
        return bool(events) and events[-1] == "[DONE]" and not any("error" in event for event in events[:-1])

    def texts(self, n: int = 1) -> list[str]:
        """The text of each choice, of a chat or a completion, whole or streamed."""
        out = [""] * n
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            for event in self.events:
                for choice in event.get("choices", ()) if event != "[DONE]" else ():
                    out[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            return out
        for choice in self.json()["choices"]:
            out[choice["index"]] = choice["text"] if "text" in choice else choice["message"]["content"]
        return out


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """One answer, as far as it comes."""
    reply = Reply()
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        reply.status = int(first.split(" ")[1])
        reply.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if reply.headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readuntil(b"\r\n"), 16):
                reply.body += await _exactly(reader, size, reply)
                await reader.readexactly(2)
            await reader.readexactly(2)
            reply.whole = True
        elif "content-length" in reply.headers:
            reply.body += await _exactly(reader, int(reply.headers["content-length"]), reply)
            reply.whole = True
        else:
            reply.body += await reader.read()  # until it is closed: nobody can say whether this is all
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    return reply


async def _exactly(reader: asyncio.StreamReader, n: int, reply: Reply) -> bytes:
    try:
        return await reader.readexactly(n)
    except asyncio.IncompleteReadError as error:
        reply.body += error.partial
        raise


async def ask(port: int, data: bytes, seconds: float = 60) -> Reply:
    """Send ``data`` on a connection of its own, and read one answer."""
    async with asyncio.timeout(seconds):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        except ConnectionError:
            return Reply()
        try:
            try:
                writer.write(data)
                await writer.drain()
            except ConnectionError:
                pass  # refused before all was sent: there may be an answer
            return await read_reply(reader)
        finally:
            writer.transport.abort()


def leave(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    """Close a connection, by FIN or by RST."""
    if reset:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
    else:
        writer.close()


def quantile(values: Iterable[float], share: float) -> float:
    """The value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
