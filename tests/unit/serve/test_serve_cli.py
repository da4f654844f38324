"""``octavo serve`` with several models: which, under what names, and what each can do."""

import asyncio
from pathlib import Path

import httpx
import pytest
from serving import chat, chat_tokenizer, small_decoder

from octavo.cli.main import main
from octavo.language_model import LanguageModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served")
    for name, causal in (("talker", True), ("reader", False)):
        tokenizer = chat_tokenizer()
        LanguageModel(small_decoder(tokenizer.vocab_size, causal, 256), tokenizer).save(place / name)
    return place


def served(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list]:
    """The exit code, and the application and settings that would have been listened with."""
    seen = []
    monkeypatch.delenv("OCTAVO_API_KEY", raising=False)
    monkeypatch.setattr("octavo.serve.listen.listen", lambda app, sock, config: seen.extend((app, config)) or 0)
    return main(["serve", "--port", "0", *arguments]), seen


def test_two_models_one_process(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    keys = ("--api-key", "first", "--api-key", "second")
    named = ("--model", f"mine={folders / 'talker'}", "--draft", "lookup", "--max-sequences", "2", *keys)
    code, (app, config) = served(monkeypatch, str(folders / "reader"), *named)
    assert code == 0 and config.api_keys == ("first", "second")
    assert "reader, mine are served at http://127.0.0.1:" in capsys.readouterr().out

    async def body() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        head = {"Authorization": "Bearer second"}
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=head) as http,
        ):
            listed = (await http.get("/v1/models")).json()["data"]
            assert {entry["id"]: entry["tasks"] for entry in listed} == {
                "reader": ["embeddings"],
                "mine": ["chat", "completions", "embeddings"],
            }
            stops = {str(token): -100 for token in chat_tokenizer().stop_ids}
            asked = chat(model="mine", max_tokens=40, logit_bias=stops)
            assert (await http.post("/v1/chat/completions", json=asked)).json()["usage"]["completion_tokens"] == 40
            for name in ("reader", "mine"):
                answer = await http.post("/v1/embeddings", json={"model": name, "input": "a river"})
                assert len(answer.json()["data"][0]["embedding"]) == 16
            figures = (await http.get("/metrics")).text
            assert 'octavo_drafted_tokens_total{model="mine"}' in figures
            (drafted,) = [
                line for line in figures.splitlines() if line.startswith('octavo_drafted_tokens_total{model="mine')
            ]
            assert float(drafted.rpartition(" ")[2]) > 0  # greedy text of an untrained model repeats itself

    asyncio.run(asyncio.wait_for(body(), 60))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "there is no model to serve"),
        (["{talker}", "{reader}", "--name", "x"], "--name is for one model"),
        (["--model", "talker"], "is not NAME=PATH"),
        (["--model", "=x"], "is not NAME=PATH"),
        (["{talker}", "--model", "talker={reader}"], "two models have the same name"),
        (["{talker}", "--model", "b=nowhere"], "nowhere"),
        (["{talker}", "--api-key", "a", "--api-key", " "], "the API key is empty"),
    ],
)
def test_mistakes_are_said_before_a_port_is_taken(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: list[str], says: str
) -> None:
    places = {name: str(folders / name) for name in ("talker", "reader")}
    monkeypatch.setattr("octavo.serve.listen.bind", lambda config: pytest.fail("a port was taken"))
    code, seen = served(monkeypatch, *(argument.format(**places) for argument in arguments))
    assert code == 2 and not seen and says in capsys.readouterr().err


def test_deterministic_answers_are_asked_of_the_engine(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    talker = str(folders / "talker")
    made = []
    monkeypatch.setattr("octavo.serve.service.Engine", lambda *given, **more: made.append(given[2]))
    for words in ([], ["--deterministic"]):
        assert served(monkeypatch, talker, *words)[0] == 0
    assert [config.deterministic for config in made] == [False, True]
    monkeypatch.undo()
    code, seen = served(monkeypatch, talker, "--deterministic", "--draft", "lookup")
    assert code == 2 and not seen and "use one of draft, deterministic" in capsys.readouterr().err
