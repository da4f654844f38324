"""Everything planted is found, clean data pass, and nothing is changed by looking."""

import gzip
import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from recipes import tiny_recipe, write_pairs, write_texts

from octavo import feed, launch
from octavo.cli.main import main
from octavo.config import Recipe
from octavo.data import check, check_chat, check_files
from octavo.data.chat import ChatReport, Conversation
from octavo.data.check import Documents, Finding, HeldOut, script_of, scripts, worst
from octavo.data.document import Document
from octavo.data.shards import Shards
from octavo.pipeline import judging
from octavo.tokenizer import CHATML, Byte, ByteBPE, Tokenizer, Word, train
from octavo.training.progress import Console

WORDS = [f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in "mnrst"]


def sentence(chance: random.Random, n: int = 60) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(n))


def by_name(findings) -> dict[str, Finding]:
    found = list(findings)
    assert len({f.name for f in found}) == len(found)
    return {f.name: f for f in found}


def looked_at(texts, held_out=None, limit=10_000, cleaned=False) -> dict[str, Finding]:
    documents = Documents(limit, None if held_out is None else HeldOut(held_out))
    for line, text in enumerate(texts, 1):
        documents.add(Document(text, "file", line))
    return by_name(documents.findings(cleaned=cleaned))


# ---- documents ----


def test_clean_documents_pass():
    chance = random.Random(0)
    texts = [sentence(chance) for _ in range(200)]
    found = looked_at(texts, [sentence(chance) for _ in range(20)])
    assert {f.verdict for f in found.values()} == {"ok"}
    assert found["documents"].figures["documents"] == 200
    assert found["documents"].figures["bytes"] == sum(map(len, texts))


@pytest.mark.parametrize(
    ("name", "spoil", "places"),
    [
        ("exact duplicates", lambda texts: texts[7].upper().replace(" ", "  "), "file:41 equals file:8"),
        ("near duplicates", lambda texts: texts[7] + " and so", "file:41 is 0.9"),
        ("empty", lambda texts: " \n ", "file:41"),
        ("replacement characters", lambda texts: "x" * 99 + "\ufffd" + texts[0][:50], "file:41: "),
        ("repairable", lambda texts: "cafÃ© naÃ¯ve dÃ©jÃ vu, cela Ã©tait trÃ¨s bien " * 3, "file:41"),
        ("repairable", lambda texts: "line\r\n" * 4 + "\x07", "file:41"),
    ],
)
def test_what_is_planted_is_found_with_its_place(name, spoil, places):
    chance = random.Random(1)
    texts = [sentence(chance) for _ in range(40)]
    found = looked_at([*texts, spoil(texts)])
    assert found[name].figures["count"] == 1 and found[name].examples[0].startswith(places)
    assert found[name].figures["share"] == pytest.approx(1 / 41)
    others = {f.name: f.figures.get("count", 0) for f in found.values() if f.name not in (name, "documents", "scripts")}
    assert set(others.values()) == {0}
    assert found[name].verdict == ("ok" if name == "near duplicates" else "warn") and bool(found[name].fix) == (
        found[name].verdict == "warn"
    )


def test_text_that_is_mostly_the_same_spoils_a_training():
    found = looked_at(["the very same text again and again"] * 9)
    assert found["exact duplicates"].verdict == "fail" and found["exact duplicates"].figures["count"] == 8
    assert looked_at([])["documents"].verdict == "fail"


def test_no_more_than_the_limit_is_looked_at_and_that_is_said():
    found = looked_at(["same"] * 50, limit=10)
    assert "the first 10 are looked at" in found["documents"].text and found["documents"].figures["documents"] == 50
    assert found["exact duplicates"].figures == {"count": 9, "of": 10, "share": 0.9}


def test_scripts_are_counted_by_letter_and_say_no_language():
    assert [script_of(c) for c in "aé中ひカ한дعא9 。"] == [
        "Latin", "Latin", "Han", "Kana", "Kana", "Hangul", "Cyrillic", "Arabic", "Hebrew", "", "", ""
    ]  # fmt: skip
    assert scripts("人工智能 and the cat, 3 次。") == {"Han": 5, "Latin": 9}
    found = looked_at(["人工智能看见了月亮" * 3, "an English text", "还有一个句子 in two scripts", "123 456"])
    assert found["scripts"].figures["documents"] == {"Latin": 2, "Han": 1, "no letters": 1}
    assert "says no language" in found["scripts"].text
    assert sum(found["scripts"].figures["letters"].values()) == pytest.approx(1)


def test_planted_leaks_are_found_and_a_thousand_clean_texts_raise_none():
    chance = random.Random(2)
    trained = [sentence(chance, 40) for _ in range(300)]
    clean = [sentence(chance, 40) for _ in range(1000)]
    leaked = [f"{sentence(chance, 3)} {trained[i]}" for i in range(100)]
    held = HeldOut([*clean, *leaked, "too short"])
    for text in trained:
        held.see(text)
    finding = held.finding()
    assert finding.figures["count"] == 100 and finding.figures["of"] == 1100 and finding.figures["too_short"] == 1
    assert finding.verdict == "warn" and "1 are too short" in finding.text
    # 28 of the 31 13-grams of each leaked text, and none of the others.
    assert finding.figures["gram_share"] == pytest.approx(100 * 28 / (1000 * 28 + 100 * 31))
    alone = HeldOut(clean)
    for text in trained:
        alone.see(text)
    assert alone.finding().figures["gram_share"] == 0 and alone.finding().verdict == "ok"


def test_leaks_in_chinese_are_found_by_character():
    text = "人工智能看见了月亮，老师在图书馆忘记了一封信，小猫走向古老的城市。"
    held = HeldOut([text])
    held.see(f"前面还有别的话。{text}后面也有。")
    assert held.finding().verdict == "fail" and held.finding().figures["gram_share"] == 1


# ---- tokens ----


def token_findings(tokenizer, texts, seq_len=None):
    counted = check_files._Counts(tokenizer, 1000)
    for text in texts:
        counted.add(text)
    return by_name(counted.findings(seq_len))


def test_tokens_are_counted():
    found = token_findings(train(Byte(), ["x"]), ["abc", "abcdé"], seq_len=4)
    assert found["tokens"].figures == {"tokens": 9, "tokens_per_byte": 1.0, "unused_ids": 261 - 6}
    assert found["lengths"].figures["longest"] == 6 and "50.0% are longer than a row of 4" in found["lengths"].text


def test_a_tokenizer_of_other_text_is_noticed():
    text = "the cat sees the moon and the dog follows the cat " * 40
    fit = train(ByteBPE(vocab_size=1200), [sentence(random.Random(4), 20000)])
    assert token_findings(fit, ["看见了月亮" * 50])["tokens"].verdict == "warn"
    words = train(Word(vocab_size=40), [text])
    assert token_findings(words, [text])["unknown tokens"].figures["count"] == 0
    spoiled = token_findings(words, [text, "zebra " * 40])["unknown tokens"]
    assert spoiled.verdict == "warn" and spoiled.figures["count"] == 40


def test_documents_must_end_with_one_end_and_begin_once():
    tokenizer = train(Byte(), ["x"])
    bos, eos = tokenizer.special.bos, tokenizer.special.eos
    good = np.array([bos, 70, 71, eos])
    assert check.document_ends([good, good], tokenizer).verdict == "ok"
    assert check.document_ends([good, np.array([bos, *good])], tokenizer).text.startswith("bos stands twice in 1 of")
    open_ = check.document_ends([good, good[:-1]], tokenizer)
    assert open_.verdict == "fail" and open_.examples == ["document 1"]


# ---- conversations ----


def told(*turns: tuple[str, str], line: int = 1) -> Conversation:
    return Conversation([{"role": role, "content": text} for role, text in turns], "chat.jsonl", line)


GOOD = [told(("user", f"question {i}"), ("assistant", f"answer {i}"), line=i) for i in range(1, 30)]


def test_good_conversations_pass():
    found = by_name(check_chat.rows(GOOD, ChatReport(rows=29)))
    assert {f.verdict for f in found.values()} == {"ok"}
    assert found["roles"].figures == {"user": 29, "assistant": 29}
    assert {f.verdict for f in check_chat.overlap(GOOD[:20], GOOD[20:])} == {"ok"}
    rendered = by_name(check_chat.rendering(GOOD, train(Byte(), ["x"]), 100, 1000))
    assert {f.verdict for f in rendered.values()} == {"ok"}
    assert rendered["stop token"].figures == {"answers": 29, "ended": 29}


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("out of turn", [("assistant", "I begin"), ("user", "no"), ("assistant", "yes")]),
        ("out of turn", [("user", "a"), ("user", "b"), ("assistant", "c")]),
        ("out of turn", [("user", "a"), ("assistant", "b"), ("assistant", "c")]),
        ("empty turns", [("system", ""), ("user", "a"), ("assistant", "c")]),
        ("equal conversations", [("user", "question 4"), ("assistant", "answer 4")]),
    ],
)
def test_turns_that_are_odd_are_found_with_their_place(name, turns):
    found = by_name(check_chat.rows([*GOOD, told(*turns, line=77)], ChatReport()))
    assert found[name].figures["count"] == 1 and found[name].examples == ["chat.jsonl:77"]
    assert all(f.figures.get("count", 0) == 0 for f in found.values() if f.name != name)


def test_tools_and_system_turns_are_in_turn():
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("tool", "c"), ("tool", "d"), ("assistant", "e")]
    assert by_name(check_chat.rows([told(*turns)], ChatReport()))["out of turn"].figures["count"] == 0


def test_conversations_on_both_sides_are_found():
    found = by_name(check_chat.overlap(GOOD, [GOOD[3], GOOD[4]]))
    assert found["held out and trained"].verdict == "fail" and found["held out and trained"].figures["count"] == 2


def tokenizer_with(template: str) -> Tokenizer:
    made = train(Byte(), ["x"])
    return Tokenizer(made.to_json(), special=made.special_text, chat_template=template)


TEMPLATES = {
    "good": CHATML,
    "no stop": "{{ bos_token }}{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "bos twice": "{{ bos_token }}" + CHATML,
    "other prompt": CHATML.replace(
        "{{- '<|im_start|>assistant\\n' }}\n{%- endif %}", "{{- '<|im_start|>assistant: ' }}\n{%- endif %}"
    ),
    "stop outside": CHATML.replace("{{- '<|im_end|>' }}\n        {%- endgeneration %}", "{%- endgeneration %}").replace(
        "{{- '\\n' }}\n    {%- elif", "{{- '<|im_end|>\\n' }}\n    {%- elif"
    ),
}


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        ("good", set()),
        ("no stop", {"stop token"}),
        ("bos twice", {"bos twice"}),
        ("other prompt", {"prompts that differ"}),
        ("stop outside", {"stop token"}),
    ],
)
def test_a_template_that_spoils_the_tuning_is_found(template, wrong):
    found = by_name(check_chat.rendering(GOOD, tokenizer_with(TEMPLATES[template]), 100, 1000))
    assert {f.name for f in found.values() if f.verdict == "fail"} == wrong
    for name in wrong:
        assert found[name].fix and found[name].examples[0].startswith("chat.jsonl:1")


def test_a_prompt_may_differ_in_its_text_or_only_in_its_tokens():
    other = by_name(check_chat.rendering(GOOD, tokenizer_with(TEMPLATES["other prompt"]), 100, 1000))
    assert "the text before message 1 is another one" in other["prompts that differ"].examples[0]
    # The line end that opens an answer and the one that it begins with are one token, but not in the prompt.
    merging = train(ByteBPE(vocab_size=300), ["a\n\nb\n\nc" * 200])
    rows = [*GOOD, told(("user", "x"), ("assistant", "\nand so"), line=99)]
    found = by_name(check_chat.rendering(rows, merging, 100, 1000))["prompts that differ"]
    assert found.figures["count"] == 1 and found.verdict == "warn"
    assert found.examples == ["chat.jsonl:99: the tokens before message 1 are others in the prompt"]


def test_a_template_that_refuses_names_the_rows():
    template = "{% for m in messages %}{{ raise_exception('no') if '7' in m.content }}{{ m.content }}{% endfor %}"
    found = by_name(check_chat.rendering(GOOD, tokenizer_with(template), 100, 1000))
    assert found["chat template"].figures == {"refused": 3} and found["chat template"].examples[0].startswith(
        "chat.jsonl:7: the chat template refuses the conversation: no"
    )


def test_answers_that_are_cut_off_warn_from_half_of_them_on():
    tokenizer = train(Byte(), ["x"])
    of = [told(("user", "a"), ("assistant", "b" * n), line=n) for n in range(1, 41)]
    room = len(tokenizer.render(of[0].messages).ids)  # the shortest fits, with the line end that follows it
    few = by_name(check_chat.rendering(of, tokenizer, room + 30, 1000))["answers cut off"]
    most = by_name(check_chat.rendering(of, tokenizer, room + 10, 1000))["answers cut off"]
    for finding, seq_len in ((few, room + 30), (most, room + 10)):
        cut = sum(any(tokenizer.render(c.messages).loss_mask[seq_len + 1 :]) for c in of)
        assert finding.figures["count"] == cut and str(seq_len) in finding.text
    assert (few.verdict, most.verdict) == ("ok", "warn")
    none = by_name(check_chat.rendering(of, tokenizer, 5, 1000))
    assert none["no trained token"].verdict == "fail" and none["no trained token"].figures["count"] == 40
    assert none["stop token"].verdict == "fail" and "0 of 0" in none["stop token"].text


def test_verdicts_add_up_to_the_worst():
    assert [worst([Finding("a", v, "") for v in vs]) for vs in ((), ("ok",), ("ok", "warn"), ("fail", "warn"))] == [
        "ok", "ok", "warn", "fail"
    ]  # fmt: skip


# ---- runs, recipes and files ----


def tree(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked")
    raw = tiny_recipe(folder, eval=None, train={"steps": 1, "sample_prompts": []}, tune={"steps": 1})
    (folder / "recipe.yaml").write_text(json.dumps(raw))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "report", lambda _: {})  # its drawings take seconds
        launch.run(Recipe.parse(raw), out=folder / "run", console=Console("quiet"), workers=1)
    return folder / "run", folder / "recipe.yaml"


def test_a_run_and_its_recipe_pass_and_stay_as_they_are(run, capsys):
    folder, recipe = run
    before = tree(folder.parent)
    outputs = []
    for words in ([str(folder)], [str(recipe), "--workers", "1"]):
        assert main(["data", "check", *words]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and tree(folder.parent) == before
    for part in ("text", "tokens", "conversations", "verdict: ", ", 0 fail", "stop token"):
        assert part in outputs[0]
    assert main(["data", "check", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] in ("ok", "warn") and found["checked"] == [str(folder)]
    parts = {(finding["part"], finding["name"]) for finding in found["findings"]}
    assert {("text", "near duplicates"), ("tokens", "ids"), ("conversations", "prompts that differ")} <= parts


def test_the_figures_of_a_run_are_those_of_its_shards(run):
    folder, path = run
    found = {(part, f.name): f for part, f in feed.check(Recipe.load(path), folder)}
    shards = Shards.open(folder / "data" / "train")
    assert found["tokens", "ids"].figures == {"ids": shards.n_tokens}
    assert found["text", "documents"].figures["documents"] == shards.n_documents
    assert found["tokens", "tokens"].figures["tokens_per_byte"] == 1.0
    assert found["conversations", "conversations"].text.startswith("38 to train on, of 40 rows")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("flip", "SHA-256 differs"),
        ("tokenizer", "made by another tokenizer"),
        ("no tokenizer", "tokens"),
        ("documents", "is missing or was changed"),
        ("conversations", "2 of 42 rows cannot be read"),
    ],
)
def test_a_damaged_run_is_named_and_leaves_with_3(run, tmp_path, capsys, spoil, message):
    folder = Path(shutil.copytree(run[0], tmp_path / "run"))
    if spoil == "flip":
        path = folder / "data/train/tokens-00000.npy"
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    elif spoil == "tokenizer":
        shutil.rmtree(folder / "tokenizer")
        train(ByteBPE(vocab_size=300), ["other"]).save(folder / "tokenizer")
    elif spoil == "no tokenizer":
        shutil.rmtree(folder / "tokenizer")
    elif spoil == "documents":
        next((folder / "data/documents").glob("*.zst")).unlink()
    else:
        pairs = tmp_path / "pairs.jsonl"
        write_pairs(pairs)
        pairs.write_text(pairs.read_text() + '{"instruction": 1, "output": "x"}\nnot json\n')
        recipe = Recipe.load(run[1]).replace({"tune.data.paths": [str(pairs)]})
        (folder / "recipe.yaml").write_text(json.dumps(recipe.plain()))
    assert main(["data", "check", str(folder)]) == 3
    shown = capsys.readouterr()
    assert message in shown.out + shown.err and "fail" in shown.out
    assert "error[DATA]: these data would spoil a training" in shown.err and "Traceback" not in shown.err


def test_files_are_told_apart_and_all_that_is_wrong_is_found_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = write_texts(tmp_path / "texts.jsonl")
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "latin.txt").write_bytes("une été à la plage\n".encode("latin-1"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text " * 99)[:-9])
    (tmp_path / "held.jsonl").write_text("".join(texts.read_text().splitlines(keepends=True)[:6]))
    train(Byte(), ["x"]).save(tmp_path / "run/tokenizer")
    before = tree(tmp_path)
    assert main(["data", "check", "texts.jsonl", "pairs.jsonl", "--tokenizer", "run", "--seq-len", "64"]) == 0
    shown = capsys.readouterr().out
    assert "\nconversations\n" in shown and "40 to train on" in shown and "stop token" in shown
    assert main(["data", "check", "texts.jsonl", "latin.txt", "cut.txt.gz", "--held-out", "held.jsonl"]) == 3
    shown = capsys.readouterr().out
    assert "latin.txt:1: byte 0xE9 is not utf-8" in shown and "cut.txt.gz cannot be read" in shown
    assert "6 of 6 (100.0%) texts stand in the training text" in shown
    assert main(["data", "check", "latin.txt", "--encoding", "latin-1"]) == 0
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "b"}\n')
    assert main(["data", "check", "bad.jsonl"]) == 3
    shown = capsys.readouterr().out
    assert "expected text in `prompt`, got a number" in shown and "(bad.jsonl:2)" in shown
    (tmp_path / "bad.jsonl").unlink()
    assert tree(tmp_path) == before


def test_text_of_the_data_cannot_steer_the_terminal(tmp_path, capsys):
    rows = [{"prompt": "a\x1b[2J", "completion": "b"}, {"prompt": 3, "completion": "\x1b]0;x\x07"}]
    path = tmp_path / "x\x1b[31m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(path)]) == 3
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere.txt"], 3, "does not exist"),
        (["quickstrat.yaml"], 2, "cannot be read"),
        (["run", "--seq-len", "8"], 2, "--seq-len is for files"),
        (["run", "train.steps=3"], 2, "a run is what it is"),
    ],
)
def test_refusals(run, capsys, monkeypatch, words, code, message):
    monkeypatch.chdir(run[0].parent)
    assert main(["data", "check", *words]) == code
    assert message in capsys.readouterr().err
