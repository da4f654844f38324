"""Chat files: every shape of row becomes the same messages; bad rows are named by line; empty ones are counted."""

import gzip
import json

import numpy as np
import pytest

from octavo.data import chat
from octavo.data.chat import ChatConfig, ChatReport, Conversation
from octavo.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def read(tmp_path):
    def read(*rows, name="rows.jsonl", **keys):
        path = tmp_path / name
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
        report = ChatReport()
        return chat.read(ChatConfig(paths=(str(path),), **keys), report), report

    return read


ROWS = {
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4", "system": "Be brief."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
        "system": "Be brief.",
    },
    "messages": {"messages": [SYSTEM, USER, ASSISTANT]},
    "pairs": {"prompt": "2+2?", "completion": "4", "system": "Be brief."},
}


@pytest.mark.rows("L1")
@pytest.mark.parametrize("name", ROWS)
def test_each_shape_is_recognised_and_gives_the_same_messages(read, name):
    (conversation,), report = read(ROWS[name])
    assert conversation.messages == [SYSTEM, USER, ASSISTANT]
    assert conversation.line == 1 and list(report.formats.values()) == [name]


def test_other_spellings_of_the_same_shapes(read):
    assert read({"question": "2+2?", "answer": "4"})[0][0].messages == [USER, ASSISTANT]
    assert read({"prompt": [USER], "completion": [ASSISTANT]})[0][0].messages == [USER, ASSISTANT]
    assert read({"conversations": [USER, ASSISTANT]})[0][0].messages == [USER, ASSISTANT]
    parts = [{"type": "text", "value": "4"}]
    assert read({"messages": [USER, {"role": "assistant", "content": parts}]})[0][0].messages == [USER, ASSISTANT]
    history = {"instruction": "And 3+3?", "output": "6", "history": [["2+2?", "4"]]}
    assert [m["content"] for m in read(history)[0][0].messages] == ["2+2?", "4", "And 3+3?", "6"]
    with_input = {"instruction": "Add.", "input": "2 2", "output": "4"}
    assert read(with_input)[0][0].messages[0]["content"] == "Add.\n\n2 2"


def test_tool_calls_keep_their_place(read):
    call = {"name": "add", "arguments": {"a": 2, "b": 2}}
    row = {
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4"},
        ],
        "tools": json.dumps([{"name": "add"}]),
    }
    (conversation,), _ = read(row)
    assert conversation.tools == [{"name": "add"}]
    assert conversation.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert [m["role"] for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    reasoning = [{"type": "reasoning", "value": "two and two"}, {"type": "tool_call", "value": json.dumps(call)}]
    (conversation,), _ = read({"messages": [USER, {"role": "assistant", "content": reasoning}]})
    assert conversation.messages[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "two and two",
        "tool_calls": [{"type": "function", "function": call}],
    }


def test_columns_can_be_named(read):
    row = {"frage": "2+2?", "antwort": "4"}
    columns = {"prompt": "frage", "completion": "antwort"}
    assert read(row, columns=columns)[0][0].messages == [USER, ASSISTANT]
    assert read(row, columns=columns, format="pairs")[1].kept == 1
    # A file with both shapes is read as the one asked for.
    both = {"instruction": "x", "output": "y", "prompt": "2+2?", "completion": "4"}
    assert read(both, format="pairs")[0][0].messages == [USER, ASSISTANT]
    assert read(both)[0][0].messages[1]["content"] == "y"
    with pytest.raises(ValueError, match="did you mean `prompt`"):
        ChatConfig(paths=("x",), format="pairs", columns={"promt": "frage"})


def test_json_lists_gzip_bom_and_folders(tmp_path):
    rows = [ROWS["pairs"], {"prompt": "a", "completion": "b"}]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\r\n" for r in rows).encode()))
    (tmp_path / "c.json").write_text(json.dumps(ROWS["alpaca"]))
    (tmp_path / "notes.txt").write_text("not chat")
    report = ChatReport()
    found = chat.read(ChatConfig(paths=(str(tmp_path),)), report)
    assert [(c.source.rpartition("/")[2], c.line) for c in found] == [
        ("a.json", 2),
        ("a.json", 7),
        ("b.jsonl.gz", 1),
        ("b.jsonl.gz", 2),
        ("c.json", 1),
    ]
    assert report.rows == report.kept == 5
    assert chat.read(ChatConfig(paths=(str(tmp_path / "*.gz"), str(tmp_path / "b.jsonl.gz")))) == found[2:4]
    with pytest.raises(DataError, match="matches no chat file"):
        chat.read(ChatConfig(paths=(str(tmp_path / "none*.jsonl"),)))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "a", "completion": }', r"row is not JSON: Expecting value at column 31, near"),
        ("[1, 2", r"expected an object"),
        ('{"prompt": 3, "completion": "b"}', "expected text in `prompt`, got a number"),
        ('{"prompt": "a"}', "`completion` is missing; the row has prompt"),
        ('{"prompt": [{"role": "alien", "content": "a"}], "completion": "b"}', "`role` = 'alien' is none of"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "b"}', "'image' is not text"),
        ('{"prompt": "a\\ud83d", "completion": "b"}', "lone surrogate"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(read, row, reason):
    if row == "[1, 2":
        row = "3"
    with pytest.raises(DataError, match=reason) as error:
        read(ROWS["pairs"], "", row, ROWS["pairs"])
    assert error.value.where.endswith("rows.jsonl:3") and "1 of 3 rows" in str(error.value)
    with pytest.warns(UserWarning, match="1 of 3 rows were dropped: 1 bad row"):
        conversations, report = read(ROWS["pairs"], "", row, ROWS["pairs"], on_bad_row="skip")
    assert [c.line for c in conversations] == [1, 4]
    assert report.dropped == {"bad row": 1}


def test_the_first_five_errors_and_the_total_are_shown(read):
    with pytest.raises(DataError) as error:
        read(ROWS["pairs"], *["{"] * 9)
    text = str(error.value)
    assert "9 of 10 rows" in text and error.value.where.endswith("rows.jsonl:2")
    assert "rows.jsonl:6" in text and "rows.jsonl:7" not in text and "\n" not in text
    assert error.value.exit_code == 3


def test_unreadable_bytes_and_broken_lists_have_a_line(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"byte 0xE9 is not utf-8 at column 16.* \(.*bytes.jsonl:2\)"):
        chat.read(ChatConfig(paths=(str(tmp_path / "bytes.jsonl"),)))
    good = json.dumps([ROWS["pairs"]] * 3, indent=1)
    (tmp_path / "cut.json").write_text(good[:-2])
    with pytest.raises(DataError, match=r"the list is not closed.* \(.*cut.json:\d+\)"):
        chat.read(ChatConfig(paths=(str(tmp_path / "cut.json"),)))
    (tmp_path / "wrong.json").write_text(good.replace('"4"', "4,,", 1))
    with pytest.raises(DataError, match=r"row is not JSON: .* at column \d+, near .* \(.*wrong.json:4\)"):
        chat.read(ChatConfig(paths=(str(tmp_path / "wrong.json"),)))


def test_rows_of_an_unknown_shape_say_what_is_expected(read):
    with pytest.raises(DataError, match=r"columns text are not those of Alpaca .*ShareGPT.*messages.*pairs"):
        read({"text": "only text"})


def test_rows_with_nothing_to_learn_are_counted(read):
    with pytest.warns(UserWarning, match="4 of 5 rows were dropped"):
        conversations, report = read(
            {"messages": [USER, ASSISTANT, USER]},
            {"messages": [USER]},
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            {"messages": [{"role": "user", "content": ""}, ASSISTANT]},
            {"messages": [USER, ASSISTANT | {"weight": 0}]},
        )
    assert [c.messages for c in conversations] == [[USER, ASSISTANT]], "what follows the last answer is left off"
    assert report.dropped == {
        "no assistant message": 1,
        "empty answer": 1,
        "empty prompt": 1,
        "an answer of weight 0 (every answer is trained)": 1,
    }
    with pytest.raises(DataError, match=r"no conversation in .*: 1 no assistant message"):
        read({"messages": [USER]})


@pytest.fixture(scope="module")
def tokenizer():
    from octavo.tokenizer import train
    from octavo.tokenizer.config import Byte

    return train(Byte(), [])


@pytest.mark.rows("L1")
def test_only_answers_and_their_stop_token_are_trained(tokenizer):
    report = ChatReport()
    (sample,) = chat.tokenise([Conversation([SYSTEM, USER, ASSISTANT])], tokenizer, 512, report)
    assert sample.ids.dtype == np.uint32 and sample.loss_mask.dtype == np.uint8
    assert len(sample.ids) == len(sample.loss_mask)
    trained = sample.ids[sample.loss_mask == 1]
    assert tokenizer.decode(trained, skip_special=False).startswith("4")
    assert trained[-1] == tokenizer.special.turn_end or trained[-2] == tokenizer.special.turn_end
    assert b"2+2" not in tokenizer.decode_bytes(trained)
    assert report.tokens == len(sample.ids) and report.trained_tokens == len(trained)


def test_long_conversations_are_cut_and_counted(tokenizer):
    short, long = Conversation([USER, ASSISTANT]), Conversation([USER, ASSISTANT | {"content": "4" * 500}])
    hopeless = Conversation([USER | {"content": "x" * 500}, ASSISTANT])
    report = ChatReport()
    with pytest.warns(UserWarning) as caught:
        samples = chat.tokenise([short, long, long, hopeless], tokenizer, 100, report)
    assert [len(s.ids) for s in samples][1:] == [100, 100] and len(samples[0].ids) < 100
    assert report.truncated_answers == 3 and report.dropped == {"answer cut off": 1} and report.samples == 3
    said = [str(w.message)[:21] for w in caught if w.category is UserWarning]
    assert said == ["3 of 4 answers are cu", "1 of 4 conversations "]
    with pytest.raises(DataError, match="no conversation has a trained token within seq_len = 100: 1 answer cut off"):
        chat.tokenise([hopeless], tokenizer, 100)


def test_tool_calls_that_the_template_leaves_out_drop_the_row(tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    calling = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        ASSISTANT,
    ]
    conversation = Conversation(calling, tools=[{"name": "add"}])
    (sample,) = chat.tokenise([conversation], tokenizer, 4096)
    assert b'"add"' in tokenizer.decode_bytes(sample.ids[sample.loss_mask == 1])
    deaf = type(tokenizer)(
        tokenizer.to_json(),
        special=tokenizer.special_text,
        chat_template=tokenizer.chat_template.replace("message['tool_calls'] or []", "[]"),
    )
    with pytest.raises(DataError, match="1 tool calls unknown to the chat template"):
        chat.tokenise([conversation], deaf, 4096)
