"""A hub on this machine: the few endpoints that a client of huggingface.co asks, and the ways they go wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository.

    Attributes:
        files: content by name; those in ``large`` are described by sha256, the others by git's hash.
        breaks: bytes after which the connection drops while a file is sent, one entry a request.
        wrong: other content that is sent in place of a file's own.
        answers: status (and X-Error-Code) given to requests whose path contains the key.
        no_range: whether a request for a part gets the whole.
        pause: waited for before a connection drops.
        page: sent in place of the description of the repository.
    """

    repository: str = "org/tiny"
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    breaks: list[int] = field(default_factory=list)
    wrong: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    no_range: bool = False
    pause: threading.Event | None = None
    page: bytes | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def listing(self) -> dict[str, object]:
        siblings = []
        for name, content in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(content)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if name in self.large:
                sha = hashlib.sha256(content).hexdigest()
                entry |= {"lfs": {"sha256": sha, "size": len(content), "pointerSize": 130}, "blobId": "0" * 40}
            siblings.append(entry)
        return {"id": self.repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}

    def sent(self, name: str) -> int:
        """How often a file, or a part of it, was asked for."""
        return sum(path.endswith(f"/{name}") for path, _ in self.asked)


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` at ``hub.url`` while inside."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((path, self.headers.get("Range")))
            for part, (status, code) in hub.answers.items():
                if part in path:
                    return self.answer(b"{}", status, {"X-Error-Code": code} if code else {})
            if path == "/api/models":
                author = parse_qs(urlsplit(self.path).query).get("author", [""])[0]
                mine = [{"id": hub.repository}] if hub.repository.startswith(f"{author}/") else []
                return self.answer(json.dumps(mine).encode())
            if path.startswith(f"/api/models/{hub.repository}"):
                revision = path.partition("/revision/")[2]
                if revision in ("", "main", "v1", COMMIT):
                    return self.answer(hub.page or json.dumps(hub.listing()).encode())
                return self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
            start = f"/{hub.repository}/resolve/{COMMIT}/"
            if path.startswith(start) and path.removeprefix(start) in hub.files:
                return self.file(path.removeprefix(start))
            return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

        def file(self, name: str) -> None:
            content = hub.wrong.get(name, hub.files[name])
            start, headers, status = 0, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, 200
            wanted = self.headers.get("Range")
            if wanted and not hub.no_range:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(content[start:], status, headers, hub.breaks.pop(0) if hub.breaks else None)

        def answer(
            self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, stop: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body if stop is None else body[:stop])
            self.wfile.flush()
            if stop is not None and stop < len(body):
                if hub.pause is not None:
                    hub.pause.wait(30)
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
