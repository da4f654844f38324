"""/v1/responses: the same answers in the newer form, whole and as named events; nothing is stored."""

import asyncio
import json

import httpx
import pytest
from serving import REPLY, Client, chat

ASK = {"model": "tiny", "input": "hi", "temperature": 0}


def run(coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


def named(response: httpx.Response) -> list[dict]:
    """The events of a stream; the name stands on a line of its own and in the data."""
    found = []
    for block in response.text.strip().split("\n\n"):
        head, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert head == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_it_says_what_a_chat_says(client: Client) -> None:
    async def body() -> None:
        async with client() as http:
            answer = (await http.post("/v1/responses", json=ASK)).json()
            old = (await http.post("/v1/chat/completions", json=chat())).json()
            (item,) = answer["output"]
            assert item["content"][0]["text"] == old["choices"][0]["message"]["content"] == REPLY
            assert answer["status"] == "completed" and answer["incomplete_details"] is None
            assert answer["usage"]["input_tokens"] == old["usage"]["prompt_tokens"]
            assert answer["usage"]["total_tokens"] == old["usage"]["total_tokens"]
            turns = [
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                item,
                {"role": "user", "content": "and?"},
            ]
            more = await http.post("/v1/responses", json={**ASK, "input": turns, "instructions": "Be brief."})
            assert more.status_code == 200 and more.json()["instructions"] == "Be brief."
            messages = [("system", "Be brief."), ("user", "hi"), ("assistant", REPLY), ("user", "and?")]
            listed = [{"role": role, "content": text} for role, text in messages]
            same = (await http.post("/v1/chat/completions", json=chat(messages=listed))).json()
            assert more.json()["usage"]["input_tokens"] == same["usage"]["prompt_tokens"]
            short = (await http.post("/v1/responses", json={**ASK, "max_output_tokens": 5})).json()
            assert short["status"] == "incomplete" and short["incomplete_details"] == {"reason": "max_output_tokens"}
            assert short["output"][0]["content"][0]["text"] == "Hello"

    run(body())


def test_a_stream_has_the_events_in_order(client: Client) -> None:
    async def body() -> None:
        async with client() as http:
            whole = (await http.post("/v1/responses", json=ASK)).json()
            response = await http.post("/v1/responses", json={**ASK, "stream": True, "top_logprobs": 1})
            found = named(response)
            kinds = [event["type"] for event in found]
            assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                                 "response.content_part.added"]  # fmt: skip
            assert set(kinds[4:-4]) == {"response.output_text.delta"}
            assert kinds[-4:] == ["response.output_text.done", "response.content_part.done",
                                  "response.output_item.done", "response.completed"]  # fmt: skip
            assert "".join(event["delta"] for event in found[4:-4]) == REPLY
            assert [entry["token"] for event in found[4:9] for entry in event["logprobs"]] == list("Hello")
            last = found[-1]["response"]
            assert last["usage"] == whole["usage"] and last["output"][0]["content"][0]["text"] == REPLY
            short = named(await http.post("/v1/responses", json={**ASK, "stream": True, "max_output_tokens": 3}))
            assert short[-1]["type"] == "response.incomplete"

    run(body())


def test_a_failure_in_the_middle_is_an_event(client: Client) -> None:
    async def body() -> None:
        async with client(fail_after=3) as http:
            found = named(await http.post("/v1/responses", json={**ASK, "stream": True}))
            assert found[-1]["type"] == "response.failed" and found[-1]["response"]["error"]["code"] == "server_error"
        async with client(fail_after=0) as http:
            assert (await http.post("/v1/responses", json={**ASK, "stream": True})).status_code == 500

    run(body())


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, None),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format.type"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_is_refused(client: Client, change: dict, param: str | None) -> None:
    async def body() -> None:
        async with client() as http:
            response = await http.post("/v1/responses", json={**ASK, **change})
            assert response.status_code == (404 if param == "model" else 400), response.text
            error = response.json()["error"]
            assert "\n" not in error["message"] and (param is None or error["param"].startswith(param)), error

    run(body())
