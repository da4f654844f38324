"""Exact match of answers: what counts as equal, the interval, the majority answer, who stopped."""

import pytest

from octavo.errors import DataError
from octavo.eval.answers import Question, choose, normalise, score_answers, wilson


def ask(text, answer, kind="all"):
    return Question([{"role": "user", "content": text}], answer, kind)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  json \n", "json"),
        ("`json`.", "json"),
        ("`json.`", "json"),
        ('"os.path"', "os.path"),
        ("“functools”。", "functools"),
        ("「文件」", "文件"),
        ("``x``", "x"),
        ("loads(s,\n   *, cls=None)", "loads(s, *, cls=None)"),
        ("and so on...", "and so on..."),
        ("`a` or `b`", "`a` or `b`"),
        ("'s", "'s"),
        ("e\u0301", "\u00e9"),
        ("JSON", "JSON"),
        (".", ""),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


def test_wilson_interval():
    # 8 of 10: (0.8 + 3.8415/20 +- 1.96 sqrt(0.016 + 3.8415/400)) / 1.38415
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)


def test_figures():
    questions = [
        ask("Which module has loads?", "json", "module"),
        ask("Which module has dumps?", "json", "module"),
        ask("Which module has sleep?", "time", "module"),
        ask("Signature of sleep?", "sleep(secs)", "signature"),
    ]
    given = {"loads": ("`json`.", True), "dumps": ("pickle", True), "sleep?": ("time", True), "Sig": ("sleep(", False)}
    batches = []

    def generate(conversations):
        batches.append(len(conversations))
        texts = [messages[-1]["content"] for messages in conversations]
        return [given["Sig"] if t.startswith("Sig") else next(v for k, v in given.items() if k in t) for t in texts]

    done = []
    result = score_answers(questions, generate, batch_rows=3, on_answer=done.append)
    assert batches == done == [3, 1]
    assert (result["questions"], result["right"], result["exact_match"]) == (4, 2, 0.5)
    assert result["stopped_by_itself"] == 0.75
    assert (result["majority_answer"], result["majority_exact_match"]) == ("json", 0.5)
    assert result["majority_by_kind_exact_match"] == 0.75  # json for modules, sleep(secs) for signatures
    assert result["kinds"]["module"]["exact_match"] == pytest.approx(2 / 3)
    assert result["kinds"]["signature"]["right"] == 0
    assert [row["right"] for row in result["examples"]] == [True, False, True, False]
    assert result["interval_95"] == list(wilson(2, 4))


def test_a_generator_that_loses_an_answer_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        score_answers([ask("a", "b"), ask("c", "d")], lambda conversations: [("b", True)])


def test_choose_keeps_the_shares_of_the_kinds():
    questions = [ask(str(i), "x", "many" if i % 4 else "few") for i in range(80)]
    chosen = choose(questions, 20)
    assert len(chosen) == 20
    assert sum(question.kind == "few" for question in chosen) == 5
    assert chosen == choose(questions, 20)
    assert chosen != choose(questions, 20, seed=1)
    assert choose(questions, 100) == questions


def test_read():
    row = {"messages": [{"role": "user", "content": "q"}], "answer": "a", "kind": "k"}
    assert Question.read(row) == Question(row["messages"], "a", "k")
    for broken in (
        {**row, "answer": "`.`"},
        {**row, "messages": []},
        {**row, "messages": [{"role": "assistant", "content": "a"}]},
        {"messages": row["messages"]},
    ):
        with pytest.raises(DataError, match="question needs"):
            Question.read(broken, "questions.jsonl:3")
    with pytest.raises(DataError, match="no questions"):
        score_answers([], lambda _: [])
