import os

import pytest
from pydantic import ValidationError

from octavo.data.sources import SourceConfig, expand, fingerprint, read, total_bytes
from octavo.errors import DataError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("b.txt", "a/x.md", "a/deep/y.py", "a/z.jsonl", "a/.hidden/no.txt", "a/picture.png", "a/noext"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "row"}\n' if name.endswith("jsonl") else f"text of {name}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(path, **settings):
    return [str(p) for p in expand(SourceConfig(path=path, **settings))]


def test_folders_patterns_and_files_come_sorted(tree):
    assert found("b.txt") == ["b.txt"]
    assert found(".") == ["a/deep/y.py", "a/x.md", "a/z.jsonl", "b.txt"]
    assert found("**/*.md") == ["a/x.md"]
    assert found("a/**") == ["a/deep/y.py", "a/x.md", "a/z.jsonl"]
    assert found("a/noext", format="text") == ["a/noext"]
    assert [d.text for d in read(["a", "b.txt"])] == ["text of a/deep/y.py", "text of a/x.md", "row", "text of b.txt"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("b.tx", "b.tx does not exist. Fix: did you mean b.txt?"),
        ("aa/x.md", "aa does not exist"),
        ("a/picture.png", "no known format (.png)"),
        ("a/noext", "no known format (no suffix). Fix: set `format: text`"),
        ("*.csv", "nothing to read in pattern *.csv; it has no files"),
        ("a/*.png", "it has 1 files of other kinds (.png)"),
        ("https://example.org/a.txt", "is a URL"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(tree, path, message):
    with pytest.raises(DataError) as caught:
        found(path)
    assert message in str(caught.value)
    assert caught.value.exit_code == 3


def test_an_empty_folder_says_so(tree):
    (tree / "empty").mkdir()
    with pytest.raises(DataError, match="folder empty; it has no files"):
        found("empty")


def test_a_bare_string_is_a_path_and_unknown_keys_and_encodings_are_refused():
    assert SourceConfig.model_validate("x.txt") == SourceConfig(path="x.txt")
    for bad in ({"weight": 0}, {"pth": "x"}, {"encoding": "utf-16"}, {"encoding": "klingon"}, {"document_bytes": 3}):
        with pytest.raises(ValidationError):
            SourceConfig.model_validate({"path": "x", **bad})


def test_the_built_in_corpus_is_a_source():
    source = SourceConfig.model_validate(
        {"path": "python-stdlib", "stdlib": {"parts": ["topics"], "max_bytes": 50_000}}
    )
    documents = list(read([source]))
    assert documents and documents[0].source.startswith("python-stdlib:")


def test_the_fingerprint_changes_with_files_and_settings_but_not_with_weights(tree):
    base = fingerprint([SourceConfig(path="a")])
    assert fingerprint([SourceConfig(path="a", weight=3)]) == base
    assert fingerprint([SourceConfig(path="a", document_bytes=100)]) != base
    os.utime("a/x.md", ns=(1, 1))
    touched = fingerprint([SourceConfig(path="a")])
    assert touched != base
    (tree / "a/new.txt").write_text("new")
    assert fingerprint([SourceConfig(path="a")]) != touched


def test_total_bytes_is_known_for_plain_files_only(tree):
    assert total_bytes([SourceConfig(path="b.txt")]) == len("text of b.txt")
    assert total_bytes([SourceConfig(path="b.txt"), SourceConfig(path="python-stdlib")]) == 0
