"""On a real socket: OpenAI's own client, clients that leave or do not read, overload, failures, signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from serving import REPLY, chat, small_decoder

from octavo.errors import ConfigError
from octavo.infer.engine import Engine
from octavo.infer.text import CertainText
from octavo.serve.listen import bind
from octavo.serve.settings import ServeConfig
from octavo.tokenizer import Tokenizer

LONG = "abcdefghij" * 100


def http(body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + content


@pytest.mark.rows("I7")
def test_the_openai_client(live) -> None:
    with live() as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
        answer = client.chat.completions.create(**ask)
        assert answer.choices[0].message.content == REPLY and answer.usage.total_tokens > 0
        stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == REPLY
        assert chunks[-1].usage == answer.usage
        text = client.completions.create(model="tiny", prompt="Say: ", max_tokens=5, temperature=0)
        assert text.choices[0].text == "Hello"
        follow = client.chat.completions.create(model="tiny", messages=[*ask["messages"], answer.choices[0].message])
        assert follow.choices[0].finish_reason == "stop"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(**{**ask, "model": "other"})
        assert missing.value.code == "model_not_found" and missing.value.param == "model"
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(**ask, max_tokens=10**6)
        assert long.value.code == "context_length_exceeded"


def test_the_openai_client_embeds_and_responds(live, tokenizer: Tokenizer) -> None:
    model = small_decoder(tokenizer.vocab_size)
    with live(model=model) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for given in ("a river", ["a river", "河"], [5, 6, 7], [[5, 6], [7]]):
            for form in ("float", "base64", openai.NOT_GIVEN):  # not given: the client asks for base64 and decodes it
                answer = client.embeddings.create(model="tiny", input=given, encoding_format=form)
                n = 2 if isinstance(given[0], list) or (isinstance(given, list) and isinstance(given[0], str)) else 1
                assert len(answer.data) == n and answer.usage.total_tokens > 0
                if form != "base64":
                    assert abs(sum(x * x for x in answer.data[0].embedding) - 1) < 1e-4
    with live() as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        ask = {"model": "tiny", "input": "hi", "temperature": 0}
        whole = client.responses.create(**ask, instructions="Be brief.")
        assert whole.output_text == REPLY and whole.status == "completed" and whole.usage.output_tokens > 0
        with client.responses.stream(**ask) as stream:
            deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
            assert "".join(deltas) == stream.get_final_response().output_text == REPLY
        turns = [{"role": "user", "content": "hi"}, *whole.output, {"role": "user", "content": "more"}]
        assert client.responses.create(model="tiny", input=turns).status == "completed"
        with pytest.raises(openai.BadRequestError) as stored:
            client.responses.create(**ask, previous_response_id=whole.id)
        assert stored.value.param == "previous_response_id"


def test_the_openai_client_with_a_key(live) -> None:
    with live(settings={"api_keys": ("other", "right")}) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="right", max_retries=0) as client:
            assert client.models.list().data[0].id == "tiny"


def test_the_openai_client_tries_again_when_the_server_is_busy(live) -> None:
    with live(LONG[:40], delay_seconds=0.02, settings={"max_requests": 1}) as server:
        busy = server.raw(http(chat(stream=True)))
        busy.recv(1)
        assert server.post().status_code == 429
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5) as client:
            answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
        assert answer.choices[0].message.content == LONG[:40]
        busy.close()


def test_the_openai_client_tries_again_when_the_model_does_not_work(live) -> None:
    with live(fail_after=0) as server:
        threading.Timer(0.3, lambda: setattr(server.model, "fail_after", None)).start()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=8) as client:
            ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
            assert client.chat.completions.create(**ask).choices[0].message.content == REPLY
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            server.gate.draining = True
            with pytest.raises(openai.InternalServerError) as gone:
                client.chat.completions.create(**ask)
            assert gone.value.status_code == 503 and gone.value.response.headers["retry-after"] == "5"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_leaves_stops_its_generation(live, stream: bool, reset: bool) -> None:
    with live(LONG, delay_seconds=0.01) as server:
        sock = server.raw(http(chat(stream=stream)))
        if stream:
            sock.recv(100)
        while server.model.n_passes < 5:
            time.sleep(0.005)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
        server.settled()
        at = server.model.n_passes
        time.sleep(0.1)
        assert server.model.n_passes <= at + 1 < len(LONG)
        assert server.post(max_tokens=3).json()["choices"][0]["message"]["content"] == LONG[:3]


def test_a_client_that_leaves_the_queue_costs_nothing(live) -> None:
    with live(LONG[:30], delay_seconds=0.02) as server:
        first = server.raw(http(chat(stream=True)))
        first.recv(1)
        waiting = [server.raw(http(chat(stream=True))) for _ in range(5)]
        while len(server.gate.open_jobs) < 6:
            time.sleep(0.005)
        for sock in waiting:
            sock.close()
        while len(server.gate.open_jobs) > 1:
            time.sleep(0.005)
        while first.recv(65536):
            pass
        server.settled()
        assert server.model.n_passes <= 31 + 1  # the first answer's tokens and its end, nothing of the others


def test_overload_is_said_at_once_and_nobody_accepted_is_lost(live) -> None:
    with live(LONG[:20], delay_seconds=0.01, settings={"max_requests": 4}) as server, ThreadPoolExecutor(24) as pool:

        def ask(_: int) -> tuple[httpx.Response, float]:
            began = time.monotonic()
            return server.post(), time.monotonic() - began

        answers = list(pool.map(ask, range(24)))
        served = [response for response, _ in answers if response.status_code == 200]
        refused = [(response, seconds) for response, seconds in answers if response.status_code == 429]
        assert len(served) + len(refused) == 24 and len(served) >= 4 and refused
        assert all(r.json()["choices"][0]["message"]["content"] == LONG[:20] for r in served)
        for response, _ in refused:
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "overloaded"
        server.settled()


def test_a_reader_that_stalls_is_dropped(live) -> None:
    with live(LONG, send_buffer=2048, settings={"stall_seconds": 0.3}) as server:
        sock = server.raw(http(chat(stream=True)), receive_bytes=2048)
        until = time.monotonic() + 10
        while server.gate.open_jobs or server.model.n_passes == 0:
            assert time.monotonic() < until, "the place was never given back"
            time.sleep(0.05)
        assert server.metric("octavo_cancelled_total") == 1
        while server.metric("octavo_slots_held"):
            assert time.monotonic() < until, "the text is still decoded"
        assert server.post(max_tokens=2).status_code == 200
        sock.close()


def test_a_request_that_fails_takes_nothing_with_it(live) -> None:
    with live(fail_after=0) as server:
        for n in range(1, 4):
            failed = server.post()
            assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
            assert httpx.get(f"{server.url}/readyz").status_code == (503 if n == 3 else 200)
            assert httpx.get(f"{server.url}/livez").status_code == 200
        server.model.fail_after = None
        assert server.post().status_code == 200
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        server.model.fail_after = 3
        lines = [line for line in server.post(stream=True).text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]" and "error" in json.loads(lines[-2][6:])
        assert json.loads(lines[-3][6:])["choices"][0]["finish_reason"] == "error"


def test_a_step_that_raises_ends_whoever_was_in_it_and_the_next_engine_serves(live, monkeypatch) -> None:
    step, broken = Engine.step, threading.Event()

    def fragile(engine: Engine) -> object:
        if broken.is_set():
            raise RuntimeError("the engine itself")
        return step(engine)

    monkeypatch.setattr(Engine, "step", fragile)
    with live() as server:
        broken.set()
        assert server.post().status_code == 500
        broken.clear()
        assert server.post().json()["choices"][0]["message"]["content"] == REPLY
        assert server.metric("octavo_engines_total") == 2 and server.metric("octavo_failures_total") == 1


def test_after_three_failures_it_tries_by_itself_and_is_ready_again(live, monkeypatch) -> None:
    monkeypatch.setattr("octavo.serve.worker.RETRY_SECONDS", 0.05)
    with live(fail_after=0) as server:
        for _ in range(3):
            assert server.post().status_code == 500
        assert httpx.get(f"{server.url}/readyz").status_code == 503 and server.metric("octavo_ready") == 0
        server.model.fail_after = None
        until = time.monotonic() + 20
        while httpx.get(f"{server.url}/readyz").status_code != 200:  # nobody asks anything meanwhile
            assert time.monotonic() < until
            time.sleep(0.02)
        assert server.metric("octavo_engines_total") >= 2 and server.post().status_code == 200


def test_a_token_that_cannot_be_read_out_is_its_own_requests_fault(live, monkeypatch) -> None:
    """The detokenizer fails on one of two that are decoded together: the other goes on."""
    push = CertainText.push

    def fragile(text: CertainText, token: int, is_end: bool) -> object:
        if text.stops == ("poison",) and chr(token) == "j":
            raise ValueError("no such token")
        return push(text, token, is_end)

    monkeypatch.setattr(CertainText, "push", fragile)
    with live(LONG[:60], delay_seconds=0.005) as server, ThreadPoolExecutor(2) as pool:
        good, bad = pool.submit(server.post), pool.submit(server.post, stop="poison")
        assert bad.result().status_code == 500
        assert good.result().json()["choices"][0]["message"]["content"] == LONG[:60]
        assert server.metric("octavo_engines_total") == 1


def test_slow_headers_are_cut_off(live) -> None:
    with live(settings={"header_seconds": 0.3}) as server:
        whole = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for begun in (b"", whole[:20], whole + whole[:10]):
            sock = server.raw(begun)
            sock.settimeout(3)
            began = time.monotonic()
            try:
                while sock.recv(4096):
                    pass
            except ConnectionResetError:
                pass
            assert 0.2 < time.monotonic() - began < 2.5
            sock.close()
        assert httpx.get(f"{server.url}/livez").status_code == 200


def test_a_long_answer_is_not_cut_by_the_header_limit(live) -> None:
    with live(LONG[:40], delay_seconds=0.02, settings={"header_seconds": 0.2}) as server:
        assert server.post().json()["choices"][0]["message"]["content"] == LONG[:40]


def test_the_address_is_taken_first(tokenizer: Tokenizer) -> None:
    with bind(ServeConfig(port=0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
            sock.listen()
            bind(ServeConfig(port=port))
    for host in ("0.0.0.0", "::", "192.168.1.1"):
        with pytest.raises(ConfigError, match="there is no key"):
            bind(ServeConfig(host=host, port=0))
    bind(ServeConfig(host="0.0.0.0", port=0, api_keys=("k",))).close()
    with pytest.raises(ConfigError, match="not an address"):
        bind(ServeConfig(host="no such name.invalid", port=0, api_keys=("k",)))


SERVER = """
import sys
from scripted import Scripted
from octavo.serve.app import create_app
from octavo.serve.settings import ServeConfig
from octavo.serve.listen import bind, listen
from octavo.tokenizer import CHATML, Byte, train
tokenizer = train(Byte(), [])
tokenizer.chat_template = tokenizer.chat_template or CHATML
reply = [*tokenizer.encode("abcdefghij" * 10), tokenizer.special.eos]
model = Scripted(reply, tokenizer.vocab_size, delay_seconds=0.02)
config = ServeConfig(port=0, grace_seconds=float(sys.argv[1]))
sock = bind(config)
print(sock.getsockname()[1], flush=True)
sys.exit(listen(create_app(model, tokenizer, "tiny", config), sock, config))
"""


@pytest.mark.parametrize(("sig", "grace", "whole"), [(signal.SIGTERM, 20, True), (signal.SIGINT, 0.3, False)])
def test_a_signal_ends_it_in_order(sig: signal.Signals, grace: float, whole: bool) -> None:
    tests = str(Path(__file__).parents[2])
    path = os.pathsep.join([os.environ["PYTHONPATH"], tests])
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(grace)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        wait_until_ready(url)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=chat(stream=True), timeout=30) as response:
            parts = response.iter_text()
            text = next(parts)
            process.send_signal(sig)
            if whole:  # with the short grace nobody may be in time to be told
                time.sleep(0.15)
                late = httpx.post(f"{url}/v1/chat/completions", json=chat(), timeout=5)
                assert late.status_code == 503 and late.json()["error"]["code"] == "shutting_down"
                assert httpx.get(f"{url}/readyz").status_code == 503
            text += "".join(parts)
        assert text.endswith("data: [DONE]\n\n")
        assert ('"error"' not in text) == whole
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()


def wait_until_ready(url: str) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            assert httpx.get(f"{url}/readyz").status_code == 200
            return
        except httpx.TransportError:
            assert time.monotonic() < until
            time.sleep(0.05)
