"""What a user reads when a tokenizer, a chat template or conversations are not as they should be."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from message_form import refused, run, says
from recipes import write_pairs

from octavo.data import chat
from octavo.data.chat import ChatConfig, ChatReport, Conversation
from octavo.data.pack import WholeRows
from octavo.errors import DataError
from octavo.hub.folder import save_model
from octavo.models.decoder import Decoder, build
from octavo.tokenizer import BPE, Byte, ByteBPE, Tokenizer, train


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def octavo(place, capsys):
    return partial(run, capsys)


# ------------------------------------------------------------------------------------------ tokenizers


def saved_model(folder: Path, tokenizer: Tokenizer, vocab_size: int, **model: Any) -> Path:
    block = {"mixer": {"n_heads": 2}, **model.pop("block", {})}
    config = {"d_model": 8, "n_layers": 1, "max_seq_len": 32, "vocab_size": vocab_size, "blocks": {"block": block}}
    save_model(build(Decoder.Config.model_validate({**config, **model})), folder)
    tokenizer.save(folder)
    return folder


def test_a_tokenizer_with_more_ids_than_the_model(octavo, place):
    other = train(ByteBPE(vocab_size=300), ["the cat sees a letter " * 50])
    saved_model(place / "m", other, 261)
    ids = other.vocab_size
    code, line = octavo("generate", "m", "a")
    says(line, 2, code, f"the tokenizer has {ids} ids, the embedding 261 rows", "belongs to the model")
    write_pairs(place / "pairs.jsonl", 4)
    code, said = octavo("tune", "m", "--data", "pairs.jsonl", "--out", "t", "tune.steps=2", "tune.schedule.warmup=1")
    says(said, 2, code, f"the tokenizer has {ids} ids")


def test_rows_longer_than_a_pretrained_table_of_positions(octavo, place):
    gpt2 = {"mixer": {"n_heads": 2, "qkv_bias": True, "o_bias": True}, "channel": {"kind": "mlp", "bias": True}}
    more = {"positions": "learned", "norm": "layernorm", "block": gpt2}
    saved_model(place / "m", train(Byte(), []), 261, **more)
    write_pairs(place / "pairs.jsonl", 4)
    words = ("tune.steps=2", "tune.schedule.warmup=1", "tune.seq_len=48", "tune.step_tokens=96", "tune.compile=off")
    code, said = octavo("tune", "m", "--data", "pairs.jsonl", "--out", "t", *words)
    says(said, 2, code, "tune.seq_len = 48 exceeds the 32 positions of m", "tune.seq_len=32")


def test_a_tokenizer_without_padding_gets_none_and_its_stop_token_is_trained(tmp_path):
    """Padding is told by lengths: what stands there is no token of the text, whatever its id."""
    spec = json.loads(train(Byte(), []).to_json())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<|pad|>"]
    del spec["model"]["vocab"]["<|pad|>"]
    spec["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    roles = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.special.pad is None and loaded.special.eos == 2
    batch = WholeRows([([1, 7, 2], [0, 1, 1])], 6, pad=loaded.special.pad or 0).rows(0, np.arange(1))
    assert batch["loss_mask"][0].tolist() == [True, True, False, False, False, False]
    assert batch["targets"][0][:2].tolist() == [7, 2] and batch["valid"][0].tolist() == [True, True] + [False] * 4


# ---------------------------------------------------------------------------------------- conversations

GOOD = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
GOOD_ROW = json.dumps(GOOD).encode()
CHAT_FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "no JSON": ("c.jsonl", GOOD_ROW + b"\n{x\n",
        ("row is not JSON", "column 2", "near `{x`", "1 of 2 rows", "c.jsonl:2")),
    "a byte that is not UTF-8": ("c.jsonl", GOOD_ROW + b'\n{"a": "\xe9"}\n', ("byte 0xE9", "column 8", "c.jsonl:2")),
    "a byte that is not UTF-8 in a list": ("c.json", b'[{"a":\n "\xe9"}]', ("byte 0xE9", "column 3", "c.json:2")),
    "a list for an object": ("c.jsonl", GOOD_ROW + b"\n[1]\n", ("expected an object, got a list", "c.jsonl:2")),
    "unknown columns": ("c.jsonl", b'{"text": "x"}\n',
        ("columns text are not those of", "ShareGPT", "c.jsonl:1", "`columns`")),
    "a missing column": (
        "c.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n',
        ("`completion` is missing", "has prompt", "c.jsonl:2")),
    "a role that is none": (
        "c.jsonl", b'{"messages": [{"role": "alien", "content": "a"}]}', ("`role` = 'alien' is none of", "c.jsonl:1")),
    "a role that is a list": ("c.jsonl", b'{"messages": [{"role": [], "content": "a"}]}', ("`role` = []", "c.jsonl:1")),
    "a NUL": ("c.jsonl", b'{"prompt": "a\\u0000", "completion": "b"}', ("message 0: NUL character", "c.jsonl:1")),
    "half a character": ("c.jsonl", b'{"prompt": "a\\ud800", "completion": "b"}',
        ("lone surrogate U+D800", "c.jsonl:1")),
    "a list that is not closed": ("c.json", b"[" + GOOD_ROW + b",\n", ("the list is not closed", "c.json:2")),
    "more behind the list": ("c.json", b"[" + GOOD_ROW + b"]\n" + GOOD_ROW,
        ("more behind the end of the list", "c.json:2")),
    "gzip that ends early": ("c.jsonl.gz", gzip.compress(GOOD_ROW * 9)[:-9],
        ("c.jsonl.gz cannot be read", "undamaged")),
    "nothing": ("c.jsonl", b"", ("no conversation in c.jsonl", "the files are empty")),
    "only system": (
        "c.jsonl", b'{"messages": [{"role": "system", "content": "x"}]}\n' * 3,
        ("no conversation in", "3 no assistant message")),
    "only empty answers": (
        "c.jsonl", GOOD_ROW.replace(b'"4"', b'" "') + b"\n" + GOOD_ROW.replace(b"2+2?", b""),
        ("1 empty answer", "1 empty prompt")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAT_FILES)
def test_chat_files(name, place):
    file, content, parts = CHAT_FILES[name]
    (place / file).write_bytes(content)
    refused(3, lambda: chat.read(ChatConfig(paths=(file,))), *parts)


def test_no_chat_file_is_there(place):
    refused(3, lambda: chat.read(ChatConfig(paths=("none*.jsonl",))), "none*.jsonl matches no chat file", ".jsonl")
    refused(3, lambda: chat.read(ChatConfig(paths=("n" * 300,))), "matches no chat file")


def told(*messages: tuple[str, str]) -> Conversation:
    return Conversation([{"role": role, "content": text} for role, text in messages], "c.jsonl", 7)


def with_template(template: str, kind: Any = None) -> Tokenizer:
    base = train(kind or Byte(), ["the cat " * 20])
    return Tokenizer(base.to_json(), special=base.special_text, chat_template=template)


TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bos twice": (
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}" + TURN + "<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("begins twice with <|bos|>", "c.jsonl:7", "write bos_token once")),
    "no end of the answer": (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        ("without a token that ends it", "<|eos|>", "c.jsonl:7", "eos_token")),
    "an end outside the trained part": (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("without a token that ends it", "c.jsonl:7", "generation block")),
    "another prompt than is trained": (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% generation %}{{ m['content'] }}"
        "<|im_end|>{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
        ("the prompt before the last answer is not how the rendered conversation begins", "c.jsonl:7")),
    "no marks, and turns rewritten": (
        "{{ bos_token }}{{ messages | length }}{% for m in messages %}" + TURN + "<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("cannot be found: the template rewrites earlier turns", "c.jsonl:7, message 1", "{% generation %}")),
    "a refusal of the template's own": (
        "{{ raise_exception('roles must alternate\nhere') }}", ("roles must alternate\\nhere", "c.jsonl:7, message")),
    "a template that never ends": (
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        ("the template", "c.jsonl:7", "change that message or use a template")),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_would_teach_the_wrong_thing(name):
    template, parts = TEMPLATES[name]
    tokenizer = with_template(template)
    refused(3, lambda: chat.tokenise([told(("user", "2+2?"), ("assistant", "4"))], tokenizer, 99), *parts)


def test_no_template_at_all():
    tokenizer = Tokenizer(train(Byte(), []).to_json())
    short = told(("user", "a"), ("assistant", "b"))
    refused(3, lambda: chat.tokenise([short], tokenizer, 99), "no chat template", "c.jsonl:7")


def test_a_template_without_marks_is_masked_by_its_prompts():
    template = (
        "{{ bos_token }}{% for m in messages %}" + TURN + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_template(template)
    (sample,) = chat.tokenise([told(("user", "2+2?"), ("assistant", "four"))], tokenizer, 99)
    kept = [int(i) for i, m in zip(sample.ids, sample.loss_mask) if m]
    assert tokenizer.decode(kept, skip_special=False) == "four<|im_end|>"


def test_rows_with_nothing_to_train_are_counted_and_none_left_is_told():
    tokenizer, report = train(Byte(), []), ChatReport()
    short, long = told(("user", "a"), ("assistant", "b")), told(("user", "a" * 300), ("assistant", "b"))
    cut = told(("user", "a"), ("assistant", "b" * 300))
    with pytest.warns(UserWarning) as caught:
        assert len(chat.tokenise([short, long, cut, cut], tokenizer, 60, report)) == 3
    said = " ".join(str(one.message) for one in caught)
    assert "3 of 4 answers are cut at seq_len = 60" in said and "1 of 4 conversations have nothing to train on" in said
    assert report.dropped == {"answer cut off": 1} and report.truncated_answers == 3
    refused(3, lambda: chat.tokenise([long], tokenizer, 60), "within seq_len = 60", "1 answer cut off", "raise")
    # Smaller than the template itself.
    refused(3, lambda: chat.tokenise([short] * 5, tokenizer, 4), "within seq_len = 4", "5 answer cut off")


def test_a_sample_whose_mask_has_another_length():
    refused(3, lambda: WholeRows([([1, 2], [1])], 4), "sample 0 has 2 tokens and 1 mask values", "one mask value")


def test_a_whole_tuning_tells_the_row_of_the_file(octavo, place):
    model = saved_model(place / "m", with_template(TEMPLATES["bos twice"][0]), 261)
    write_pairs(place / "pairs.jsonl", 4)
    words = ("tune.steps=2", "tune.schedule.warmup=1", "tune.seq_len=32", "tune.step_tokens=96", "tune.compile=off")
    code, said = octavo("tune", str(model), "--data", "pairs.jsonl", "--out", "t", *words)
    says(said, 3, code, "begins twice with <|bos|>", "pairs.jsonl:1")


def test_unknown_letters_do_not_pass_for_known_ones():
    """A kind that does not know a character says so by its unknown id, never by another token."""
    tokenizer = train(BPE(vocab_size=40), ["abc abc"])
    assert tokenizer.encode("龘") == [tokenizer.special.unk]
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode("\ud800")
