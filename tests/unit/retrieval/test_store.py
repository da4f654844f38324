"""A store of passages: search against brute force, changes that show at once, files that are checked."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Scripted
from serving import chat as request
from serving import chat_tokenizer

from octavo.cli import chat as chat_verb
from octavo.cli.main import main
from octavo.cli.store import looking_up
from octavo.errors import ConfigError, DataError
from octavo.infer.sampling import SamplingConfig
from octavo.retrieval.answering import looked_up, with_passages
from octavo.retrieval.index import Bm25, Dense
from octavo.retrieval.store import Store, StoreConfig, cut
from octavo.retrieval.words import words_of
from octavo.serve import protocol
from octavo.serve.service import Service
from octavo.serve.settings import ServeConfig

FACTS = [
    ("The tower of Velm was built in 1307 by stonemasons from the coast.", "velm.md"),
    ("A library in Orsk keeps nine thousand maps of the northern sea.", "orsk.md"),
    ("Velm lies on a river; its bridge fell in the great flood.", "velm.md"),
    ("海拔最高的山峰在北方, 名叫云顶。", "zh.md"),
]


class Lines(list):
    """Standard input of a script."""

    def isatty(self):
        return False


def letters(texts):
    """A vector of a text: how often each letter stands in it."""
    return np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)


@pytest.fixture(params=["bm25", "dense"])
def store(request, tmp_path):
    config = StoreConfig() if request.param == "bm25" else StoreConfig(index=Dense.Config(model="letters"))
    made = Store.create(tmp_path / "facts", config, letters)
    made.add(FACTS)
    return made


def test_words_are_folded_and_ideographs_stand_alone_and_in_pairs():
    assert words_of("The CAFÉ, naïve_text 3x!") == ["the", "café", "naïve_text", "3x"]
    assert words_of("云顶 ok") == ["云", "顶", "云顶", "ok"]
    assert words_of("ＡＢ") == ["ab"]
    assert words_of(" .,") == []


def by_formula(texts, query, k1=1.5, b=0.75):
    """BM25 as its docstring has it, a loop over words."""
    words = [words_of(text) for text in texts]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for document in words:
        score = 0.0
        for word in words_of(query):
            n, tf = sum(word in other for other in words), document.count(word)
            idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["tower of velm", "the northern sea maps", "最高的山峰", "velm velm bridge"])
def test_scores_are_those_of_the_formula(query):
    texts = [text for text, _ in FACTS]
    expected = by_formula(texts, query)
    found = Bm25(Bm25.Config(), texts).search(query, len(texts))
    assert [i for i, _ in found] == [i for i in np.argsort(-np.array(expected), kind="stable") if expected[i] > 0]
    assert [score for _, score in found] == pytest.approx(
        sorted((s for s in expected if s > 0), reverse=True), rel=1e-5
    )


def test_nothing_in_common_finds_nothing():
    assert Bm25(Bm25.Config(), ["abc def"]).search("xyz", 3) == []
    assert Bm25(Bm25.Config(), ["... !"]).search("abc", 3) == []


def test_near_vectors_are_found_one_by_one_and_by_the_graph():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(300, 12)).astype(np.float32)
    asked = vectors[17:18] + 0.01
    exact = Dense(vectors, lambda _: asked).search("", 5)
    graph = Dense(vectors, lambda _: asked, exact=False).search("", 5)
    assert exact[0][0] == graph[0][0] == 17
    assert {i for i, _ in exact} == {i for i, _ in graph}
    assert [s for _, s in graph] == pytest.approx([s for _, s in exact], abs=1e-5)


@pytest.mark.rows("A7")
def test_what_is_found_changes_when_the_store_changes(store):
    assert "tower of Velm" in store.search("the tower of Velm", 1)[0].passage.text
    assert store.remove(ids=[1]) == 1
    assert all("1307" not in hit.passage.text for hit in store.search("the tower of Velm", 4))
    (new,) = store.add([("The tower of Velm was rebuilt in 1990.", "news.md")])
    assert store.search("the tower of Velm rebuilt in 1990", 1)[0].passage == new
    assert store.remove(source="velm.md") == 1
    assert [passage.id for passage in store.passages] == [2, 4, 5]  # numbers are never given twice


def test_a_store_opens_as_it_was_closed(store):
    store.remove(ids=[2])
    again = Store.open(store.folder, letters)
    assert again.passages == store.passages and again.next_id == store.next_id
    assert again.search("velm bridge", 2) == store.search("velm bridge", 2)
    assert sorted(path.name for path in store.folder.iterdir()) == sorted(
        ["store.json", "passages-3.jsonl"] + (["vectors-3.npy"] if store.dense else [])
    )


def test_damage_is_named(store):
    (file,) = store.folder.glob("passages-*.jsonl")
    file.write_text(file.read_text().replace("1307", "1308"))
    with pytest.raises(DataError, match="is not what the store wrote"):
        Store.open(store.folder, letters)
    file.unlink()
    with pytest.raises(DataError, match="missing"):
        Store.open(store.folder, letters)
    (store.folder / "store.json").write_text("[]")
    with pytest.raises(DataError, match="does not make sense"):
        Store.open(store.folder, letters)


def test_no_store_and_a_full_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no store"):
        Store.open(tmp_path)
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        Store.create(tmp_path, StoreConfig())
    with pytest.raises(ConfigError, match="needs a model"):
        Store.create(tmp_path / "new", StoreConfig(index=Dense.Config(model="m")))


@given(st.text(alphabet="ab \n.字", max_size=300), st.integers(20, 60))
def test_no_passage_is_too_long_and_no_letter_is_lost(text, size):
    passages = list(cut(text, size))
    assert all(0 < len(passage) <= size for passage in passages)
    assert "".join("".join(passages).split()) == "".join(text.split())


def test_paragraphs_stay_together_as_far_as_they_fit():
    assert list(cut("one\n\ntwo\n\n" + "long " * 10, 30)) == [
        "one\ntwo",
        "long long long long long long",
        "long long long long",
    ]


@pytest.mark.rows("A7")
def test_passages_stand_before_the_last_question_only(store):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Who built the tower of Velm?"},
    ]
    asked, hits = looked_up(store, messages, 2)
    assert len(hits) == 2
    assert asked[:3] == messages[:3]
    assert asked[3]["content"].startswith("[1] The tower of Velm") and asked[3]["content"].endswith(
        messages[3]["content"]
    )
    assert messages[3]["content"] == "Who built the tower of Velm?"
    assert with_passages(messages, []) == messages


def test_the_command_line_makes_changes_and_searches(tmp_path, capfd):
    notes, more, folder = tmp_path / "notes.md", tmp_path / "more.jsonl", str(tmp_path / "facts")
    notes.write_text("The tower of Velm was built in 1307.\n", encoding="utf-8")
    more.write_text(json.dumps({"text": "Orsk has a library."}) + "\n", encoding="utf-8")
    assert main(["store", "build", folder, str(notes)]) == 0
    assert main(["store", "add", folder, str(more)]) == 0
    capfd.readouterr()
    assert main(["store", "search", folder, "library", "--json"]) == 0
    (hit,) = json.loads(capfd.readouterr().out)["hits"]
    assert (hit["id"], hit["text"], hit["source"]) == (2, "Orsk has a library.", str(more))
    assert main(["store", "remove", folder, "--source", str(more)]) == 0
    assert main(["store", "search", folder, "library"]) == 0
    assert "nothing fits" in capfd.readouterr().out
    assert main(["store", "remove", folder, "--id", "77"]) == 2
    assert main(["store", "build", folder, str(notes)]) == 2
    assert main(["store", "search", str(tmp_path), "x"]) == 2
    assert main(["store", "add", folder, str(tmp_path / "none.md")]) == 3
    more.write_text("{}\n")
    assert main(["store", "add", folder, str(more)]) == 3
    assert f"{more}:1 has no text" in capfd.readouterr().err


@pytest.mark.rows("A7")
def test_chat_and_server_read_what_was_found_and_a_store_that_changed(tmp_path, monkeypatch, capsys):
    folder, tokenizer = tmp_path / "facts", chat_tokenizer()
    store = Store.create(folder, StoreConfig())
    store.add(FACTS)
    look_up = looking_up(folder, 1)
    question = {"role": "user", "content": "Who built the tower of Velm?"}

    asked = []
    monkeypatch.setattr(chat_verb, "_answer", lambda *given: asked.append(given[1]) or "Nobody knows.")

    monkeypatch.setattr("sys.stdin", Lines([question["content"] + "\n", "hello\n"]))
    chat_verb.converse(Scripted([0, 1], 300), tokenizer, SamplingConfig(), look_up=look_up)
    assert asked[0][-1]["content"].startswith("[1] The tower of Velm was built")
    assert asked[1][0] == question  # what is remembered is what was typed

    service, prepared = Service(Scripted([1], tokenizer.vocab_size), tokenizer, "tiny", ServeConfig(), look_up), []

    def prompt():
        body = protocol.validate(protocol.ChatRequest, request(messages=[question]))
        prepared.append(tokenizer.decode(service._conversation(body, [])))
        return prepared[-1]

    assert "1307" in prompt()
    Store.open(folder).remove(source="velm.md")
    Store.open(folder).add([("The tower of Velm was built in 1450.", "new.md")])
    assert "1450" in prompt() and "1307" not in prepared[-1]
