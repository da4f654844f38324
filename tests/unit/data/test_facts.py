"""Facts of the standard library: true, unambiguous, worded apart from the held-out questions."""

import builtins
import hashlib
import importlib
import json
import subprocess
import sys
import warnings
from collections import Counter

import pytest

from octavo.data import chat, facts
from octavo.data.facts import FactsConfig
from octavo.errors import DataError


@pytest.fixture(scope="module")
def built():
    return facts.build(seed=0)


def questions(built):
    return {m["content"] for c in built.train for m in c.messages if m["role"] == "user"}


def test_held_out_wordings_are_never_trained_but_their_facts_are(built):
    asked = questions(built)
    assert len(built.held_out) >= 200
    assert not any(q.question in asked for q in built.held_out)
    trained = {(m[-2]["content"], m[-1]["content"]) for c in built.train if len(m := c.messages) == 2}
    for q in built.held_out:
        wordings = {wording.format(q.name) for wording in facts.TRAINED[q.kind]}
        assert {(wording, q.answer) for wording in wordings} <= trained
    assert {q.kind for q in built.held_out} == {"module", "signature", "purpose"}


def test_no_wording_is_both_trained_and_held_out():
    for kind, wordings in facts.HELD_OUT.items():
        assert len(facts.TRAINED[kind]) >= 12 and len(wordings) >= 3
        assert not {w.replace("`", "").lower() for w in wordings} & {
            w.replace("`", "").lower() for w in facts.TRAINED[kind]
        }
    everything = [w for table in (facts.TRAINED, facts.HELD_OUT) for wordings in table.values() for w in wordings]
    assert len(set(everything)) == len(everything)
    assert all(w.count("{}") == 1 for w in everything)


def test_a_question_has_one_answer(built):
    answers = {}
    for conversation in built.train:
        question, answer = (m["content"] for m in conversation.messages[:2])
        assert answers.setdefault(question, answer) == answer
    assert max(len(fact.answer) for fact in built.facts) <= FactsConfig().max_answer_chars


def test_facts_are_true(built):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for fact in built.facts:
            module = importlib.import_module(fact.module)
            assert callable(getattr(module, fact.name)), fact
            assert not hasattr(builtins, fact.name), fact
    known = {(f.name, f.kind): f.answer for f in built.facts}
    assert known["fnmatchcase", "module"] == "fnmatch"
    assert known["fnmatchcase", "signature"] == "fnmatchcase(name, pat)"
    assert known["fnmatchcase", "purpose"] == "Test whether FILENAME matches PATTERN, including case."


def test_the_majority_answer_is_rarely_right(built):
    assert built.majority_accuracy < 0.03
    by_hand = 0
    for kind in ("module", "signature", "purpose"):
        of_kind = [q.answer for q in built.held_out if q.kind == kind]
        by_hand += Counter(of_kind)[built.majority[kind]]
        assert Counter(of_kind)[built.majority[kind]] == max(Counter(of_kind).values())
    assert built.majority_accuracy == by_hand / len(built.held_out)
    assert len({f.module for f in built.facts}) >= 60


def test_two_turns_stay_with_the_name_or_ask_anew(built):
    known = {(f.name, f.kind): f.answer for f in built.facts}
    longer = [c.messages for c in built.train if len(c.messages) == 4]
    assert len(longer) > 100
    follow = {w: kind for kind, wordings in facts.FOLLOW_UPS.items() for w in wordings}
    its = [m for m in longer if m[2]["content"] in follow]
    assert its
    for messages in its:
        names = [
            name
            for name, _ in known
            if f"`{name}`" in messages[0]["content"] or f" {name} " in messages[0]["content"] + " "
        ]
        assert messages[3]["content"] in {known.get((name, follow[messages[2]["content"]])) for name in names}


def test_small_talk_is_short_and_honest(built):
    said = {c.messages[0]["content"]: c.messages[1]["content"] for c in built.train}
    assert "Octavo" in said["Who are you?"]
    assert said["What is the capital of France?"].startswith("I do not know")
    assert all(len(answer) < 80 for answer, _ in facts.SMALL_TALK)


def test_the_seed_decides_and_another_process_agrees(built):
    script = (
        "import hashlib, json; from octavo.data import facts; b = facts.build(0)\n"
        "print(hashlib.sha256(json.dumps([c.messages for c in b.train]).encode()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    mine = hashlib.sha256(json.dumps([c.messages for c in built.train]).encode()).hexdigest()
    assert run.stdout.strip() == mine
    other = facts.build(1)
    assert [c.messages for c in other.train] != [c.messages for c in built.train]
    assert other.held_out == built.held_out


def test_what_is_written_is_an_ordinary_chat_source(built, tmp_path):
    path = built.write(tmp_path / "facts")
    report = chat.ChatReport()
    back = chat.read(chat.ChatConfig(paths=(str(path),)), report)
    assert report.formats == {str(path): "messages"}
    assert [c.messages for c in back] == [c.messages for c in built.train]
    rows = [json.loads(line) for line in (tmp_path / "facts" / "held_out.jsonl").read_text().splitlines()]
    assert [(r["messages"][0]["content"], r["answer"]) for r in rows] == [
        (q.question, q.answer) for q in built.held_out
    ]


def test_more_facts_than_the_library_has_is_an_error(tmp_path):
    (tmp_path / "textwrap.py").write_text('def dedent_all(text):\n    """Remove all leading spaces."""\n')
    with pytest.raises(DataError, match="facts of kind module, 144 are asked for"):
        facts.build(root=tmp_path)


def test_names_that_live_twice_or_are_hidden_are_not_asked(tmp_path):
    for module in ("textwrap", "difflib"):
        (tmp_path / f"{module}.py").write_text(
            f'__all__ = ["shared_name", "{module}_only", "{module}"]\n'
            'def shared_name(a):\n    """Do the shared thing."""\n'
            f'def {module}_only(a):\n    """Do the special thing well."""\n'
            f'def {module}(a):\n    """Named as its module is."""\n'
            'def not_exported(a):\n    """Stay inside the module."""\n'
        )
    built = facts.build(root=tmp_path, config=FactsConfig(n_facts=60, purpose_share=0.1, signature_share=0))
    names = {f.name for f in built.facts}
    assert {"textwrap_only", "difflib_only"} <= names
    assert not names & {"shared_name", "textwrap", "difflib", "not_exported"}
    assert len(built.held_out) == 240 and len({q.question for q in built.held_out}) == 240
    with pytest.raises(DataError, match="n_held_out = 300"):
        facts.build(root=tmp_path, config=FactsConfig(n_facts=60, purpose_share=0.1, signature_share=0, n_held_out=300))
