"""Servers as processes of their own, forked from one that has the libraries loaded: each starts in a moment.

Run as a program it takes one JSON object a line. ``{"start": {...}}`` forks a server and says its process and port;
``{"wait": pid, "seconds": s}`` says how it ended, None where it has not.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

SECONDS = 60.0
PR_SET_PDEATHSIG = 1


@dataclass
class Forked:
    """A server that runs."""

    parent: Parent
    pid: int
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def resident(self) -> int:
        """Bytes of memory it holds."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def metric(self, line: str) -> float:
        """The sum of the figures of /metrics whose lines begin with ``line``."""
        found = httpx.get(f"{self.url}/metrics", timeout=SECONDS).text.splitlines()
        return sum(float(own.rpartition(" ")[2]) for own in found if own.startswith(line))

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = SECONDS) -> int | None:
        """The exit code, -n where signal n ended it; None if it still runs."""
        return self.parent.tell({"wait": self.pid, "seconds": seconds})["code"]

    @property
    def left_behind(self) -> bool:
        """Whether any process of it is still there."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


class Parent:
    """The process that forks servers."""

    def __init__(self, folder: Path):
        self.folder, self.n = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._alive = set[int]()

    def tell(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if answer.get("code") is not None:
            self._alive.discard(order["wait"])
        return answer

    def start(self, **spec: Any) -> Forked:
        """A server; see ``serve``. It answers when this returns."""
        self.n += 1
        log = self.folder / f"server-{self.n}.log"
        said = self.tell({"start": spec | {"log": str(log)}})
        assert said["port"], log.read_text("utf-8")
        self._alive.add(said["pid"])
        server = Forked(self, said["pid"], said["port"], log)
        httpx.get(f"{server.url}/livez", timeout=SECONDS)  # by now its loop has opened what it keeps open
        return server

    def close(self) -> None:
        for pid in list(self._alive):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@contextlib.contextmanager
def running(parent: Parent, **spec: Any) -> Iterator[Forked]:
    """A server that is gone afterwards, by SIGKILL if need be."""
    server = parent.start(**spec)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.signal(signal.SIGKILL)
        server.wait()


# ------------------------------------------------------------------------------------ the other side


def serve(tell: int, *, log: str, reply: str = "", settings: dict[str, Any] | None = None,
          send_buffer: int | None = None, max_seq_len: int = 4096, delay_seconds: float = 0.0) -> int:  # fmt: skip
    """In the child: a server of a scripted model; its port is written to ``tell`` when it is taken."""
    from scripted import Scripted
    from serving import chat_tokenizer

    from octavo.serve.app import create_app
    from octavo.serve.listen import bind, listen
    from octavo.serve.settings import ServeConfig

    tokenizer = chat_tokenizer()
    tokens = [*tokenizer.encode(reply), tokenizer.special.eos]
    model = Scripted(tokens, tokenizer.vocab_size, max_seq_len=max_seq_len, delay_seconds=delay_seconds)
    config = ServeConfig.model_validate({"port": 0, **(settings or {})})
    sock = bind(config)
    if send_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    app = create_app(model, tokenizer, "tiny", config)
    sock.listen(2048)  # whoever comes now waits until the loop takes it
    os.write(tell, b"%d\n" % sock.getsockname()[1])
    os.close(tell)
    return listen(app, sock, config)


def _start(spec: dict[str, Any]) -> dict[str, Any]:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it does not outlive a test that is broken off
            os.close(read)
            log = os.open(spec["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = serve(write, **spec)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        port = file.readline()
    return {"pid": pid, "port": int(port or 0)}


def _wait(pid: int, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while True:
        try:
            found, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return -1
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import scripted  # noqa: F401
    import serving  # noqa: F401

    import octavo.serve.app
    import octavo.serve.listen  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        out = _start(order["start"]) if "start" in order else {"code": _wait(order["wait"], order["seconds"])}
        print(json.dumps(out), flush=True)
