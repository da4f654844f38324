"""/metrics: what is counted is what happened, per model; several models in one process."""

import asyncio
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Client, chat, small_decoder
from test_serve_live import http as raw_request

from octavo.serve.metrics import Metrics

LINE = re.compile(
    r'(# (HELP|TYPE) \w+ .+|[a-z_]+(\{[a-z_]+="(\\.|[^"\\])*"(,[a-z_]+="(\\.|[^"\\])*")*\})? -?[0-9.e+-]+)'
)


def run(coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


def value(text: str, line: str) -> float:
    (found,) = [own for own in text.splitlines() if own.startswith(line + " ")]
    return float(found.rpartition(" ")[2])


def test_what_happened_is_counted(client: Client) -> None:
    async def body() -> None:
        async with client() as http:
            answer = (await http.post("/v1/chat/completions", json=chat())).json()
            await http.post("/v1/chat/completions", json=chat(stream=True))
            await http.post("/v1/chat/completions", json=chat(temperature=-1))
            for name in ("made-up-1", "made-up-2"):
                await http.post("/v1/chat/completions", json=chat(model=name))
            await http.get("/v1/models/tiny")
            await http.get("/v1/models/made-up-3")
            await http.get("/no/such/place")
            text = (response := await http.get("/metrics")).text
            assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert all(LINE.fullmatch(line) for line in text.splitlines()) and "made-up" not in text
            route = 'octavo_requests_total{route="/v1/chat/completions",status='
            assert [value(text, f'{route}"{status}"}}') for status in (200, 400, 404)] == [2, 1, 2]
            assert value(text, 'octavo_requests_total{route="other",status="404"}') == 1
            assert value(text, 'octavo_model_requests_total{model="other"}') == 3
            assert value(text, 'octavo_model_requests_total{model="tiny"}') == 3
            usage = answer["usage"]
            assert value(text, 'octavo_prompt_tokens_total{model="tiny"}') == 2 * usage["prompt_tokens"]
            assert value(text, 'octavo_generated_tokens_total{model="tiny"}') == 2 * usage["completion_tokens"]
            for name in ("octavo_time_to_first_token_seconds", "octavo_time_per_token_seconds"):
                buckets = [float(n) for n in re.findall(rf'{name}_bucket{{model="tiny",le="[^"]+"}} (\d+)', text)]
                assert len(buckets) == 16 and buckets == sorted(buckets) and buckets[-1] == 2
                assert value(text, f'{name}_count{{model="tiny"}}') == 2
            assert value(text, "octavo_requests_open") == value(text, 'octavo_running{model="tiny"}') == 0
            assert value(text, 'octavo_ready{model="tiny"}') == 1

    run(body())


def test_names_are_escaped_and_buckets_add_up() -> None:
    metrics = Metrics()
    metrics.add("octavo_cancelled_total", model='a"b\\c\nd')
    for seconds in (0.0005, 0.001, 0.3, 100.0):
        metrics.observe("octavo_time_to_first_token_seconds", seconds, model="m")
    text = metrics.text([("octavo_requests_open", {}, 2)])
    assert 'octavo_cancelled_total{model="a\\"b\\\\c\\nd"} 1\n' in text and "octavo_requests_open 2\n" in text
    name = "octavo_time_to_first_token_seconds"
    assert value(text, f'{name}_bucket{{model="m",le="0.001"}}') == 2
    assert value(text, f'{name}_bucket{{model="m",le="60"}}') == 3
    assert value(text, f'{name}_bucket{{model="m",le="+Inf"}}') == 4
    assert value(text, f'{name}_sum{{model="m"}}') == pytest.approx(100.3015)


def test_several_models_each_answer_for_themselves(live) -> None:
    with live("I am tiny", others={"second": "I am second"}) as server:
        for name, says in (("tiny", "I am tiny"), ("second", "I am second")):
            assert server.post(model=name).json()["choices"][0]["message"]["content"] == says
        server.settled()
        for name in ("tiny", "second"):
            assert server.metric(f'octavo_model_requests_total{{model="{name}"}}') == 1
            assert server.metric(f'octavo_engines_total{{model="{name}"}}') == 1
        server.model.fail_after = 0  # one of them fails: the other goes on
        assert [server.post(model=name).status_code for name in ("tiny", "second")] == [500, 200]


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_is_counted_and_gives_everything_back(live, stream: bool) -> None:
    with live("abcdefghij" * 100, delay_seconds=0.01) as server:
        sockets = [server.raw(raw_request(chat(stream=stream))) for _ in range(4)]
        until = time.monotonic() + 20
        while server.metric("octavo_running") < 4:
            assert time.monotonic() < until
        assert server.metric("octavo_slots_held") == 4 and server.metric("octavo_requests_open") == 4
        for number, sock in enumerate(sockets):
            if number % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
        server.settled()
        while server.metric("octavo_running"):
            assert time.monotonic() < until
        assert server.metric("octavo_cancelled_total") == 4
        held = ("octavo_slots_held", "octavo_requests_open", 'octavo_blocks{model="tiny",state="held"}')
        assert [server.metric(name) for name in held] == [0, 0, 0]


@pytest.mark.rows("I7")
def test_blocks_come_back_when_readers_leave(live, tokenizer) -> None:
    model = small_decoder(tokenizer.vocab_size, max_seq_len=4096)
    endless = chat(stream=True, logit_bias={str(token): -100.0 for token in tokenizer.stop_ids})
    with live(model=model, settings={"max_sequences": 4}) as server:
        sockets = [server.raw(raw_request(endless)) for _ in range(3)]
        for sock in sockets:
            sock.recv(100)
        held, until = 'octavo_blocks{model="tiny",state="held"}', time.monotonic() + 20
        while server.metric(held) < 3:
            assert time.monotonic() < until
        for sock in sockets:
            sock.close()
        server.settled()
        while server.metric(held):
            assert time.monotonic() < until, "blocks were not given back"
        assert server.metric("octavo_cancelled_total") == 3
        assert server.metric("octavo_blocks") == model.max_seq_len * 4 / 16


def test_priority_goes_first(live) -> None:
    with live("abcdefghij" * 3, delay_seconds=0.02, settings={"max_sequences": 1}) as server:
        order = list[int]()

        def ask(priority: int) -> None:
            server.post(priority=priority)
            order.append(priority)

        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(ask, 0)
            while server.metric("octavo_running") < 1:
                time.sleep(0.01)
            late = [pool.submit(ask, 5)]
            while server.metric("octavo_waiting") < 1:
                time.sleep(0.01)
            late.append(pool.submit(ask, -5))
            for done in (first, *late):
                done.result()
        assert order == [0, -5, 5]
