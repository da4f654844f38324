"""What a user reads when text, shards or a recipe are not as they should be: code, place, value, rule and fix.

A table of the failures that a message is promised for, each brought about for real and its one line checked.
"""

from __future__ import annotations

import ast
import gzip
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training
import zstandard
from message_form import refused, run, says
from recipes import tiny_recipe, write_texts

import octavo as package
from octavo.cli.main import main
from octavo.data import readers
from octavo.data.loader import Loader
from octavo.data.pack import StreamRows
from octavo.data.shards import Shards, write_shards
from octavo.data.sources import SourceConfig, scan
from octavo.tokenizer import Byte, ByteBPE, Tokenizer, train

FIRST = {"text": "The first document of all, which is long enough to be kept."}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def octavo(place, capsys):
    return partial(run, capsys)


# ------------------------------------------------------------------------------------------- text files

ROW = json.dumps(FIRST).encode()
TEXT_FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "a byte that is not UTF-8": (
        "a.txt", b"one line\nnaive caf\xe9 here\n", ("byte 0xE9", "column 10", "a.txt:2", "encoding_errors")),
    "a byte that is not UTF-8 in a row": (
        "a.jsonl", ROW + b'\n{"text": "caf\xe9"}\n', ("byte 0xE9", "column 14", "a.jsonl:2", "encoding")),
    "a NUL": ("a.txt", b"one\ntwo\0three\n", ("NUL character", "column 4", "a.txt:2")),
    "a NUL in a row": ("a.jsonl", ROW + b'\n{"text": "a\\u0000b"}', ("NUL character", "character 2", "a.jsonl:2")),
    "half a character in a row": ("a.jsonl", ROW + b'\n{"text": "\\ud83d"}', ("lone surrogate U+D83D", "a.jsonl:2")),
    "a row that is not JSON": (
        "a.jsonl", ROW + b'\n{"text": "x",}\n',
        ("row is not JSON", "column", "near `", "a.jsonl:2", "on_bad_row: skip")),
    "a list for an object": (
        "a.jsonl", ROW + b"\n[1, 2]\n", ("expected an object with `text`, got a list", "[1, 2]", "a.jsonl:2")),
    "a number for text": ("a.jsonl", ROW + b'\n{"text": 3}\n', ("`text` must be text, got a number", "a.jsonl:2")),
    "another field": ("a.jsonl", b'{"content": "x", "txet": "y"}\n', ("no field `text`", "`txet`", "text_field")),
    "an empty row": ("a.jsonl", b"{}\n", ("no field `text`", "it is empty", "a.jsonl:1")),
    "nine bad rows": (
        "a.jsonl", ROW + b"\n" + b"{\n" * 9,
        ("9 bad rows in this file", "the first at lines 2, 3, 4, 5, 6", "a.jsonl:2")),
    "gzip that ends early": (
        "a.txt.gz", gzip.compress(b"text " * 500)[:-9], ("a.txt.gz cannot be read", "undamaged copy")),
    "no gzip": ("a.txt.gz", b"text", ("a.txt.gz cannot be read", "undamaged copy")),
    "zstandard that ends early": (
        "a.txt.zst", zstandard.ZstdCompressor().compress(b"text " * 500)[:-3],
        ("a.txt.zst cannot be read", "ends early")),
    "an empty file": ("a.txt", b"", ("the sources hold no text", "not empty")),
    "blank lines": ("a.jsonl", b"\n \n\r\n", ("the sources hold no text",)),
    "nothing but short texts": (
        "a.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": ""}\n',
        ("no document is left of 3 read", "min_characters 2", "empty 1", "data.clean.filters")),
    "nothing but symbols and one word": (
        "a.jsonl", b'{"text": "%s"}\n{"text": "%s"}\n' % (b"#" * 60, b"x" * 3000),
        ("no document is left of 2 read", "max_symbol_share 1", "max_word_characters 1")),
    "one document and some to hold out": (
        "a.txt", b"One document that is long enough to be kept.",
        ("too few to hold out", "document_bytes", "held_out: 0")),
    "a binary": ("a.bin", b"\x7fELF", ("has no known format (.bin)", ".jsonl", "format: text")),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXT_FILES)
def test_text_files(name, octavo, place):
    file, content, parts = TEXT_FILES[name]
    (place / file).write_bytes(content)
    code, line = octavo("data", "prepare", file, "--workers", "1")
    says(line, 3, code, *parts)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("nowhere.txt", ("nowhere.txt does not exist", "did you mean", "noware.txt")),
        ("folder", ("nothing to read in folder", "it has no files")),
        ("*.xyz", ("nothing to read in pattern", "*.xyz")),
        ("https://example.com/a.txt", ("is a URL", "download it first")),
        ("~nobody-of-that-name/a.txt", ("there is no such user", "write the path in full")),
        ("n" * 300, ("does not exist",)),
    ],
)
def test_sources_that_are_not_there(source, parts, octavo, place):
    (place / "folder").mkdir()
    (place / "noware.txt").write_text("x")
    code, line = octavo("data", "prepare", source)
    says(line, 3, code, *parts)


def test_a_row_longer_than_any_is_told_by_its_line(octavo, place, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1 << 20)
    (place / "a.jsonl").write_bytes(ROW + b'\n{"text": "' + b"a" * (2 << 20) + b'"}\n')
    code, line = octavo("data", "prepare", "a.jsonl")
    says(line, 3, code, "row is longer than 1 MiB", "a.jsonl:2", "on_bad_row: skip")


def test_a_mark_of_byte_order_and_line_ends_of_windows_are_taken(octavo, place):
    text = "\ufeffThe first line of it.\r\nThe second line, which is the last of the two.\r\n"
    (place / "a.txt").write_bytes(text.encode())
    (place / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + ROW + b"\r\n")
    code, said = octavo("data", "prepare", "a.txt", "b.jsonl", "--out", "out", "--held-out", "0")
    assert code == 0, said
    packed = (place / "out/documents/documents-00000.jsonl.zst").read_bytes()
    rows = [json.loads(row) for row in zstandard.ZstdDecompressor().stream_reader(packed).read().splitlines()]
    assert [row["text"].rstrip("\n") for row in rows] == [
        "The first line of it.\nThe second line, which is the last of the two.", FIRST["text"],
    ]  # fmt: skip


def test_what_is_skipped_is_listed_and_duplicates_are_counted(octavo, place, capsys):
    other = json.dumps({"text": "Another document that has nothing to do with the first."}).encode()
    (place / "a.jsonl").write_bytes(b"\n".join([ROW, b"{", ROW, other, b'{"text": 3}']))
    assert main(["data", "prepare", "a.jsonl", "--out", "out", "--held-out", "0", "--on-bad-row", "skip"]) == 0
    rejected = [json.loads(line) for line in (place / "out/rejected.jsonl").read_text().splitlines()]
    assert [(row["source"], row["line"]) for row in rejected] == [("a.jsonl", 2), ("a.jsonl", 5)]
    assert "row is not JSON" in rejected[0]["reason"] and "must be text" in rejected[1]["reason"]
    removed = json.loads((place / "out/report.json").read_text())["removed"]
    assert {name: entry["documents"] for name, entry in removed.items()} == {"unreadable_row": 2, "exact_duplicate": 1}
    assert "exact_duplicate" in capsys.readouterr().out.replace(" ", "_")


def test_a_file_that_goes_while_it_is_prepared(place):
    for name in ("a.txt", "b.txt"):
        (place / name).write_text("x")
    found = scan([SourceConfig(path="*.txt")])
    next(found)
    (place / "b.txt").unlink()
    refused(3, lambda: list(found), "b.txt is not there any more", "put it back")


# ---------------------------------------------------------------------------------------------- shards


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Cleaned documents, two tokenizers, and shards of the first."""
    folder = tmp_path_factory.mktemp("prepared")
    write_texts(folder / "texts.jsonl", 20)
    assert main(["data", "prepare", str(folder / "texts.jsonl"), "--out", str(folder / "data"), "--workers", "1"]) == 0
    train(Byte(), []).save(folder / "tokenizer")
    train(ByteBPE(vocab_size=300), ["the cat sees a letter " * 50]).save(folder / "other")
    write_shards(folder / "data", "train", folder / "tokenizer", workers=1)
    return folder


@pytest.fixture
def shards(prepared, tmp_path):
    return Path(shutil.copytree(prepared / "data" / "train", tmp_path / "train"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


SHARD_DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "a file cut short": (
        lambda f: (f / "tokens-00000.npy").write_bytes((f / "tokens-00000.npy").read_bytes()[:-2]),
        ("tokens-00000.npy has", "bytes, not", "prepare the data again", "Kept: the source texts")),
    "a flipped byte": (
        lambda f: (f / "tokens-00000.npy").write_bytes((f / "tokens-00000.npy").read_bytes()[:-1] + b"\x01"),
        ("tokens-00000.npy", "SHA-256 differs")),
    "a missing file": (lambda f: (f / "documents-00000.npy").unlink(), ("documents-00000.npy is missing",)),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), ("no token shards in", "octavo data prepare")),
    "a manifest that is a list": (lambda f: (f / "manifest.json").write_text("[1]"), ("no token shards in",)),
    "a manifest that is deep": (lambda f: (f / "manifest.json").write_text("[" * 9000), ("no token shards in",)),
    "a manifest without files": (
        lambda f: rewrite(f / "manifest.json", lambda m: m.pop("files")), ("manifest.json does not describe shards",)),
    "a manifest that names a file above": (
        lambda f: rewrite(f / "manifest.json", lambda m: m["files"][0].update(name="../x")), ("outside itself: ../x",)),
    "an id beyond the vocabulary": (
        lambda f: rewrite(f / "manifest.json", lambda m: m.update(vocab_size=9)), ("holds id", "of a vocabulary of 9")),
    "documents that do not add up": (
        lambda f: rewrite(f / "manifest.json", lambda m: m.update(n_tokens=5)), ("do not add up to its tokens",)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARD_DAMAGE)
def test_damaged_shards(name, shards):
    damage, parts = SHARD_DAMAGE[name]
    damage(shards)
    refused(3, lambda: Shards.open(shards), *parts)


def test_shards_of_another_tokenizer(prepared, shards):
    one, other = Shards.open(shards), Tokenizer.load(prepared / "other")
    one.require(Tokenizer.load(prepared / "tokenizer"))
    refused(3, lambda: one.require(other), "was written with tokenizer", "of 261 ids", "prepare")


def test_a_run_whose_tokenizer_was_exchanged(octavo, place, prepared):
    (place / "tiny.yaml").write_text(json.dumps(tiny_recipe(place, tune=None, eval=None)))
    assert octavo("run", "tiny.yaml", "--no-chat", "--workers", "1", "--out", "r", "train.steps=2")[0] == 0
    shutil.rmtree(place / "r/pretrain")
    (place / "r/stages.json").write_text(
        json.dumps({k: v for k, v in json.loads((place / "r/stages.json").read_text()).items() if k != "pretrain"})
    )
    shutil.rmtree(place / "r/tokenizer")
    shutil.copytree(prepared / "other", place / "r/tokenizer")
    code, said = octavo("resume", "r")
    says(said, 3, code, "was written with tokenizer", "prepare the data again")


@pytest.mark.parametrize("action", ["cut", "removed"])
def test_a_shard_that_changes_under_a_training(action, shards, tmp_path):
    """Cut, it is told with the step, and what was trained is saved; removed, its bytes stay where they are mapped."""
    opened = Shards.open(shards)
    loader = Loader(StreamRows(opened, training.SEQ_LEN), 4, seed=1)
    path = shards / "tokens-00000.npy"

    class Changing:
        fingerprint = loader.fingerprint

        def prefetch(self, step: int) -> None:
            """Nothing to make ahead."""

        def batch(self, step: int) -> dict[str, np.ndarray]:
            if step == 3 and action == "cut":
                with open(path, "r+b") as file:
                    file.truncate(100)
            elif step == 3:
                path.unlink()
            return loader.batch(step)

    one = training.trainer(tmp_path / "run", model=training.tiny(vocab_size=300), source=Changing(), save_every=100)
    one.held.valid = []
    if action == "cut":
        refused(3, one.fit, "tokens-00000.npy was cut from", "to 100 bytes", "step 3", "Kept: ", "checkpoints")
        assert training.saved_step(tmp_path / "run") == 3
    else:
        one.fit()
        assert training.saved_step(tmp_path / "run") == 12


# -------------------------------------------------------------------------------------------- recipes

RECIPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a misspelt key": ({"train": {"stesp": 5}}, ("train.stesp is not a known key", "mine.yaml:", "`train.steps`?")),
    "a key of another section": ({"train": {"lr": 1}}, ("train.lr is not a known key", "mine.yaml:")),
    "a value of another type": (
        {"train": {"steps": "many"}}, ("train.steps = 'many'", "valid integer", "mine.yaml:", "correct the value")),
    "a value out of range": (
        {"train": {"steps": 0}}, ("train.steps = 0", "greater than or equal to 1", "mine.yaml:")),
    "a kind that is none": (
        {"train": {"schedule": "cosin"}}, ("train.schedule = 'cosin' is not one of", "`cosine`?", "mine.yaml:")),
    "heads that do not divide": (
        {"model": {"d_model": 30, "blocks": {"block": {"mixer": {"n_heads": 4}}}}},
        ("n_heads = 4 must divide d_model = 30", "mine.yaml:")),
    "tokens of a step that do not divide": (
        {"train": {"step_tokens": 1000}}, ("train.step_tokens = 1000 must be a multiple of seq_len = 64", "use 1024")),
    "a warm-up longer than the run": (
        {"train": {"steps": 50, "schedule": {"kind": "cosine", "warmup": 50}}},
        ("schedule.warmup = 50 must be below steps = 50", "mine.yaml:")),
    "rows longer than the positions": (
        {"model": {"positions": "learned"}, "train": {"seq_len": 128}},
        ("train.seq_len = 128 exceeds model.max_seq_len = 64",)),
    "a vocabulary below the tokenizer's": (
        {"model": {"vocab_size": 300}, "tokenizer": {"kind": "byte_bpe", "vocab_size": 512}},
        ("model.vocab_size = 300 is below tokenizer.vocab_size = 512", "leave model.vocab_size out")),
    "no text": ({"data": None}, ("train needs text: set data.sources",)),
    "nothing to do": ({"train": None, "data": None}, ("nothing to do",)),
    "an empty list of sources": ({"data": {"sources": []}}, ("there must be at least one source", "mine.yaml:")),
    "an encoding that is none": (
        {"data": {"sources": [{"path": "a.txt", "encoding": "utf-9"}]}}, ("unknown encoding 'utf-9'", "gb18030")),
    "an encoding for no file": (
        {"data": {"sources": [{"path": "a.txt", "encoding": "idna"}]}}, ("'idna' cannot read files", "utf-8")),
    "a share above one": (
        {"data": {"sources": ["a.txt"], "split": {"held_out": 1.5}}},
        ("held_out must be a share below 1", "mine.yaml:")),
    "a column of no format": (
        {"tune": {"data": {"kind": "chat", "paths": ["a.jsonl"], "columns": {"promt": "x"}}}},
        ("columns.promt is not a column", "`prompt`?", "mine.yaml:")),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, octavo, place):
    changes, parts = RECIPES[name]
    base: dict[str, Any] = {"data": {"sources": ["none.txt"]}, "model": {"max_seq_len": 64}, "train": {}}
    recipe = {**base, **{key: {**base.get(key, {}), **value} if isinstance(value, dict) else value
                         for key, value in changes.items()}}  # fmt: skip
    (place / "mine.yaml").write_text(json.dumps(recipe, indent=1))
    code, line = octavo("run", "mine.yaml", "--no-chat")
    says(line, 2, code, *parts)
    assert [path.name for path in place.iterdir()] == ["mine.yaml"], "before any data is read nothing is written"


def test_all_faults_of_a_recipe_are_told_at_once(place, capsys):
    (place / "mine.yaml").write_text("trian: {}\nseed: x\ndata: {sources: [a], slpit: {}}\ntrain: {steps: -1}\n")
    assert main(["run", "mine.yaml", "--no-chat"]) == 2
    said = sorted(capsys.readouterr().err.splitlines(), key=lambda line: line.split("mine.yaml:")[1])
    for line, number in zip(said, (1, 2, 3, 4), strict=True):
        says(line, 2, 2, f"(mine.yaml:{number})")


ERRORS = "ConfigError UnsupportedError LockedError DataError CheckpointError NumericError ResourceError".split()


@pytest.mark.parametrize("room", ["data", "tokenizer", "hub", "config", "feed", "pipeline", "objectives"])
def test_every_refusal_has_a_fix(room):
    """Read off the source: what no test brings about has one too."""
    without, paths = [], sorted((Path(package.__file__).parent / room).rglob("*.py"))
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                if not any(keyword.arg in ("fix", None) for keyword in node.keywords):
                    without.append(f"{path.name}:{node.lineno}")
    assert not without, without
