"""/v1/embeddings: the vectors of the model itself, of length 1; who makes none says so."""

import asyncio
import base64

import httpx
import numpy as np
import pytest
from serving import chat, chat_tokenizer, small_decoder

from octavo.infer import embed as embedding
from octavo.infer.embed import embed
from octavo.infer.engine import Engine
from octavo.serve.app import serve_all
from octavo.serve.embeddings import Vectors
from octavo.serve.metrics import Metrics
from octavo.serve.service import Service
from octavo.serve.settings import ServeConfig

TEXTS = ["a", "the river", "the bank of the river 河"]


def run(body, *, causal: bool = True, pooling: str = "mean", vectors: bool = True) -> None:
    tokenizer, config, metrics = chat_tokenizer(), ServeConfig(max_sequences=2), Metrics()
    made = small_decoder(tokenizer.vocab_size, causal)
    own = Vectors(made, tokenizer, pooling, max_tokens=32) if vectors else None
    service = Service(made, tokenizer, "tiny", config, decodes=causal, vectors=own, metrics=metrics)
    app = serve_all([service], config, metrics)

    async def go() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http,
        ):
            await body(http, made, tokenizer)

    asyncio.run(asyncio.wait_for(go(), 60))


@pytest.mark.parametrize(("causal", "pooling"), [(True, "last"), (False, "mean")])
def test_vectors_are_the_models_own(causal: bool, pooling: str) -> None:
    async def body(http, made, tokenizer) -> None:
        wanted = embed(made, tokenizer, TEXTS, pooling=pooling, normalise=True)

        async def ask(given: object, **more: object) -> dict:
            response = await http.post("/v1/embeddings", json={"model": "tiny", "input": given, **more})
            assert response.status_code == 200, response.text
            return response.json()

        answer = await ask(TEXTS)
        got = np.array([entry["embedding"] for entry in answer["data"]])
        assert [entry["index"] for entry in answer["data"]] == [0, 1, 2] and np.allclose(got, wanted, atol=1e-5)
        assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
        assert answer["object"] == "list" and answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 30
        one = await ask(TEXTS[1], encoding_format="base64", dimensions=16, user="me")
        raw = np.frombuffer(base64.b64decode(one["data"][0]["embedding"]), "<f4")
        assert np.allclose(raw, wanted[1], atol=1e-5)
        ids = [list(tokenizer.encode(text)) for text in TEXTS[:2]]
        assert np.allclose([e["embedding"] for e in (await ask(ids))["data"]], wanted[:2], atol=1e-5)
        assert np.allclose((await ask(ids[1]))["data"][0]["embedding"], wanted[1], atol=1e-5)

    run(body, causal=causal, pooling=pooling)


WRONG = [
    ({"input": ""}, 400, "input"),
    ({"input": []}, 400, "input"),
    ({"input": ["a", ""]}, 400, "input"),
    ({"input": [[]]}, 400, "input"),
    ({"input": [10**6]}, 400, "input"),
    ({"input": [-1]}, 400, "input"),
    ({"input": ["a"] * 2049}, 400, "input"),
    ({"input": "x" * 40}, 400, "input"),
    ({}, 400, "input"),
    ({"input": "a", "dimensions": 8}, 400, "dimensions"),
    ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
    ({"input": "a", "model": "none"}, 404, "model"),
    ({"input": "a", "temperature": 1}, 400, "temperature"),
]


def test_wrong_requests() -> None:
    async def body(http, made, tokenizer) -> None:
        for change, status, param in WRONG:
            response = await http.post("/v1/embeddings", json={"model": "tiny", **change})
            assert response.status_code == status, (change, response.text)
            assert response.json()["error"]["param"] == param, (change, response.text)
        long = (await http.post("/v1/embeddings", json={"model": "tiny", "input": "x" * 40})).json()["error"]
        assert long["code"] == "context_length_exceeded" and "32" in long["message"]

    run(body)


def test_an_encoder_says_that_it_writes_nothing() -> None:
    async def body(http, made, tokenizer) -> None:
        (entry,) = (await http.get("/v1/models")).json()["data"]
        assert entry["tasks"] == ["embeddings"]
        assert (await http.get("/readyz")).status_code == 200
        for path, request in (
            ("/v1/chat/completions", chat()),
            ("/v1/completions", {"model": "tiny", "prompt": "a"}),
            ("/v1/responses", {"model": "tiny", "input": "a"}),
        ):
            refused = await http.post(path, json=request)
            assert refused.status_code == 400 and "/v1/embeddings" in refused.json()["error"]["message"]

    run(body, causal=False)


def test_a_model_without_vectors_says_so() -> None:
    async def body(http, made, tokenizer) -> None:
        assert "embeddings" not in (await http.get("/v1/models")).json()["data"][0]["tasks"]
        refused = await http.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "no_embeddings"

    run(body, vectors=False)


def test_texts_are_embedded_while_others_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch stands between two steps, so neither waits for all of the other."""
    monkeypatch.setattr("octavo.infer.embed.BATCH_TOKENS", 8)

    async def body(http, made, tokenizer) -> None:
        order, step, batch = list[str](), Engine.step, embedding._vectors
        monkeypatch.setattr(Engine, "step", lambda engine: order.append("step") or step(engine))
        monkeypatch.setattr(embedding, "_vectors", lambda *a, **k: order.append("batch") or batch(*a, **k))
        asked = {"model": "tiny", "prompt": "abc", "max_tokens": 30, "logit_bias": {str(tokenizer.special.eos): -100}}
        written, read = await asyncio.gather(
            http.post("/v1/completions", json=asked),
            http.post("/v1/embeddings", json={"model": "tiny", "input": ["some text"] * 30}),
        )
        assert written.status_code == read.status_code == 200
        first, last = order.index("batch"), len(order) - order[::-1].index("batch")
        assert "step" in order[first:last], order

    run(body)
