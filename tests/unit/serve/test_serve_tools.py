"""Tools and structured answers: what the model reads, what it must write, and what its calls become."""

import asyncio
import json

import jsonschema
import pytest
from serving import Client, chat, connect, events

from octavo.serve.tools import Reading
from octavo.tokenizer import CHATML, Byte, Character, Tokenizer, train

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather somewhere",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"City": {"type": "string", "maxLength": 5}},
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Łódź", "days": 2}}</tool_call>'
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź", "days": 2}}\n</tool_call>'
ARGUMENTS = {"city": "Łódź", "days": 2}
NAMES = {"get_weather", "clock"}
# Of the tokens a scripted model never says, those that end texts and numbers are made likely.
LIKELY = {str(token): 6.0 for token in train(Byte(), []).encode('"}>')}


def run(coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


def read(text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    """An answer that comes in parts of ``size`` characters."""
    reading, said = Reading(NAMES), ""
    for at in range(0, len(text), size):
        said += reading.push(text[at : at + size])[0]
    said += reading.flush()[0]
    return said, [(call.name, call.arguments) for call in reading.calls]


WEATHER_CALL = ("get_weather", json.dumps(ARGUMENTS, ensure_ascii=False))


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (CALL, "", [WEATHER_CALL]),
        (HERMES, "", [WEATHER_CALL]),
        (f"I look it up.\n\n{HERMES}\n{CALL}\n", "I look it up.", [WEATHER_CALL] * 2),
        (f"{CALL} Done.", "Done.", [WEATHER_CALL]),
        (CALL.removesuffix("</tool_call>"), "", [WEATHER_CALL]),
        ('<tool_call>{"name": "clock"}</tool_call>', "", [("clock", "{}")]),
        # An end inside of a text is not the end of the call.
        (
            '<tool_call>{"name": "clock", "arguments": {"a": "} </tool_call>"}}</tool_call>',
            "",
            [("clock", '{"a": "} </tool_call>"}')],
        ),
        (f"<tool_call>no {CALL}", "<tool_call>no", [WEATHER_CALL]),
        # What is no call is said as it was written.
        *[(text, text, []) for text in (
            "1 < 2 <tool 3 ",
            "a  <tool_call> b ",
            "<tool_call>{}</tool_call>",
            '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "clock", "arguments": {"x": 1e999}}</tool_call>',
            '<tool_call>{"name": "get_wea',
        )],
    ],
)  # fmt: skip
def test_calls_are_read_however_the_text_comes(text: str, said: str, calls: list, size: int) -> None:
    assert read(text, size) == (said, calls)


def test_an_answer_made_to_be_slow_to_read_is_not() -> None:
    text = "<tool_call></tool_call>" * 2000
    assert read(text, 50) == (text, [])


def test_words_are_said_as_soon_as_they_cannot_be_a_call() -> None:
    reading = Reading(NAMES)
    parts = [reading.push(part)[0] for part in ("Hi ", "the", "re <", "b> <tool", "_call>{")]
    assert parts == ["Hi", " the", "re", " <b>", ""]


def test_a_call_whole_and_streamed(client: Client, tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with client(reply=f"Wait.\n{CALL}") as http:
            request = chat(tools=[WEATHER, CLOCK])
            answer = (await http.post("/v1/chat/completions", json=request)).json()
            choice = answer["choices"][0]
            (call,) = choice["message"]["tool_calls"]
            assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Wait."
            assert call["type"] == "function" and call["id"].startswith("call_")
            assert call["function"]["name"] == "get_weather"
            assert json.loads(call["function"]["arguments"]) == ARGUMENTS
            rendered = tokenizer.render(request["messages"], add_generation_prompt=True, tools=request["tools"])
            assert "The weather somewhere" in rendered.text
            assert answer["usage"]["prompt_tokens"] == len(rendered.ids)

            streamed = [
                e["choices"][0]
                for e in events(await http.post("/v1/chat/completions", json=request | {"stream": True}))
            ]
            assert "".join(part["delta"].get("content") or "" for part in streamed) == "Wait."
            deltas = [delta for part in streamed for delta in part["delta"].get("tool_calls", [])]
            assert [delta["index"] for delta in deltas] == [0] and deltas[0]["function"] == call["function"]
            assert [part["finish_reason"] for part in streamed if part["finish_reason"]] == ["tool_calls"]

            free = (await http.post("/v1/chat/completions", json=chat())).json()["choices"][0]
            assert (
                free["message"] == {"role": "assistant", "content": f"Wait.\n{CALL}"}
                and free["finish_reason"] == "stop"
            )
            none = (await http.post("/v1/chat/completions", json=request | {"tool_choice": "none"})).json()
            assert none["choices"][0] == free and none["usage"]["prompt_tokens"] < answer["usage"]["prompt_tokens"]

    run(body())


def test_a_conversation_goes_on_after_a_call(client: Client, tokenizer: Tokenizer) -> None:
    """The model reads its call as it wrote it, and the result after it."""
    seen = []

    def spy(messages, **how):
        seen.append((messages, Tokenizer.render(tokenizer, messages, **how)))
        return seen[-1][1]

    async def body() -> None:
        async with client(reply=CALL) as http:
            request = chat(tools=[WEATHER])
            message = (await http.post("/v1/chat/completions", json=request)).json()["choices"][0]["message"]
            assert message["content"] is None
            (call,) = message["tool_calls"]
            result = {"role": "tool", "tool_call_id": call["id"], "content": [{"type": "text", "text": "rain"}]}
            request["messages"] += [message, result]
            tokenizer.render = spy  # type: ignore[method-assign]
            try:
                response = await http.post("/v1/chat/completions", json=request)
            finally:
                del tokenizer.render
            assert response.status_code == 200, response.text
            ((messages, rendered),) = seen
            assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in rendered.text
            assert "<|im_start|>tool\nrain<|im_end|>" in rendered.text
            assert messages[-1]["name"] == "get_weather"

    run(body())


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "clock"}),
        ({"type": "function", "function": {"name": "get_weather"}}, {"get_weather"}),
    ],
)
def test_a_call_that_must_come_comes(client: Client, choice: object, names: set[str]) -> None:
    """Whatever the model would say (here one letter), it calls one of the tools with valid arguments."""

    async def body() -> None:
        async with client(reply="x") as http:
            for seed in range(2):
                request = chat(
                    tools=[WEATHER, CLOCK], tool_choice=choice, temperature=1, seed=seed, max_tokens=400,
                    parallel_tool_calls=False, logit_bias=LIKELY,
                )  # fmt: skip
                response = await http.post("/v1/chat/completions", json=request)
                assert response.status_code == 200, response.text
                reply = response.json()["choices"][0]
                assert reply["finish_reason"] == "tool_calls", reply
                (call,) = reply["message"]["tool_calls"]
                assert call["function"]["name"] in names
                arguments = json.loads(call["function"]["arguments"])
                if call["function"]["name"] == "get_weather":
                    jsonschema.validate(arguments, WEATHER["function"]["parameters"])

    run(body())


@pytest.mark.parametrize("tools", [[], [CLOCK]])
def test_answers_in_json(client: Client, tools: list) -> None:
    """The scripted model wants to say a letter for ever; under a format it says JSON, or calls a tool where it may."""
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["answer", "n"],
        "additionalProperties": False,
    }
    formats = [
        ({"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}, schema),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "text"}, None),
    ]

    async def body() -> None:
        async with client(reply="x") as http:
            for wanted, valid in formats:
                request = chat(response_format=wanted, temperature=1, seed=2, max_tokens=1500, logit_bias=LIKELY)
                request |= {"tools": tools} if tools else {}
                reply = (await http.post("/v1/chat/completions", json=request)).json()["choices"][0]
                message = reply["message"]
                if valid is None:
                    assert message["content"].startswith("x")
                elif "tool_calls" in message:
                    assert tools and message["tool_calls"][0]["function"]["name"] == "clock"
                else:
                    assert reply["finish_reason"] == "stop", reply
                    jsonschema.validate(json.loads(message["content"]), valid)

    run(body())


def test_the_best_of_several_completions(client: Client, tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with client() as http:
            # Two tokens are about as likely as each other for the first letter; the model itself prefers H by far.
            other = str(tokenizer.encode("F")[0])
            request = {"model": "tiny", "prompt": "x", "max_tokens": 1, "logit_bias": {other: 60.0}, "seed": 3}

            async def texts(**more: object) -> tuple[list[str], int]:
                response = await http.post("/v1/completions", json={**request, **more})
                assert response.status_code == 200, response.text
                answer = response.json()
                return [choice["text"] for choice in answer["choices"]], answer["usage"]["completion_tokens"]

            drawn, _ = await texts(n=8)
            assert set(drawn) == {"H", "F"}
            assert await texts(best_of=8) == (["H"], 8)
            best, _ = await texts(best_of=8, n=6)
            assert best == sorted(drawn, reverse=True)[:6]

    run(body())


def test_a_template_without_tools_says_so(client: Client, tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with client() as http:
            template = tokenizer.chat_template
            tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
            try:
                response = await http.post("/v1/chat/completions", json=chat(tools=[CLOCK]))
            finally:
                tokenizer.chat_template = template
            assert response.status_code == 400 and response.json()["error"]["param"] == "tools"

    run(body())


def test_a_schema_that_leads_nowhere_is_the_requests_own_fault() -> None:
    """A vocabulary without braces writes no JSON object: 400, and the server stays ready for others."""
    made = train(Character(), ["abc \n"])
    made.chat_template = CHATML

    async def body() -> None:
        async with connect(made, reply="ab") as http:
            for _ in range(4):
                response = await http.post("/v1/chat/completions", json=chat(response_format={"type": "json_object"}))
                assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_schema"
            assert (await http.get("/readyz")).status_code == 200
            assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200

    run(body())


def test_the_openai_package_calls_tools_and_parses(live) -> None:
    """The official client's own helpers read what comes back: a call, a stream with a call, and a parsed answer."""
    from openai import OpenAI
    from pydantic import BaseModel

    class Reply(BaseModel):
        ok: bool

    with live(reply=CALL) as server:
        api = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        how = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
        message = api.chat.completions.create(**how, tools=[WEATHER]).choices[0].message
        assert json.loads(message.tool_calls[0].function.arguments) == ARGUMENTS
        with api.chat.completions.stream(**how, tools=[WEATHER]) as stream:
            final = stream.get_final_completion().choices[0].message
        assert final.tool_calls[0].function.name == "get_weather"
        again = [
            *how["messages"],
            message,
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"},
        ]
        assert api.chat.completions.create(**{**how, "messages": again}, tools=[WEATHER]).choices
        parsed = api.chat.completions.parse(**how, response_format=Reply).choices[0].message.parsed
        assert parsed.ok in (True, False)
