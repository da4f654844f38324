"""Simon Willison's `llm`, a client that was not made with this server in mind, asks and streams."""

import pytest
from serving import REPLY

llm = pytest.importorskip("llm", reason="NOT RUN: no llm package; it is in the dev extra")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))


@pytest.mark.parametrize("stream", [True, False])
def test_it_talks(live, stream: bool) -> None:
    from llm.default_plugins.openai_models import Chat

    with live(settings={"api_keys": ("sesame",)}) as server:
        model = Chat("mine", model_name="tiny", api_base=f"{server.url}/v1")
        conversation = model.conversation()
        for n in (1, 2):
            answer = conversation.prompt("hi", system="Be brief.", stream=stream, key="sesame", temperature=0)
            assert answer.text() == REPLY and len(conversation.responses) == n
        assert answer.usage().output == len(REPLY.encode()) + 1
        with pytest.raises(Exception, match="401"):
            model.prompt("hi", stream=stream, key="wrong").text()


def test_its_models_of_vectors(live, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm.default_plugins.openai_models import OpenAIEmbeddingModel
    from serving import small_decoder

    with live(model=small_decoder(tokenizer.vocab_size)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        model = OpenAIEmbeddingModel("mine", "tiny")
        model.key = "none"
        vectors = list(model.embed_multi(["a river", "a bank"]))
        assert [len(vector) for vector in vectors] == [16, 16] and vectors[0] != vectors[1]
