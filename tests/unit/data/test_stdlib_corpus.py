"""The built-in corpus: what is read, what is left out, and that it is the same every time."""

import hashlib
import subprocess
import sys

import pytest

from octavo.data import stdlib
from octavo.data.stdlib import StdlibConfig, StdlibReport

MODULE = '''"""Tools for boxes.

    Indented text.
"""
import os

TABLE = {
ROWS}


# Opens a box.
@os.decorate
def open_box(box, *, force=False):
    """Open a box.

    Returns it.
    """
    return box


class Box:
    """A box."""

    def __init__(self, size=3):
        self.size = size

    def fold(self, times=1):
        """Fold it."""


def bare():
    return 1
'''.replace("ROWS", "".join(f"    'key{i}': {i},\n" for i in range(200)))


@pytest.fixture
def library(tmp_path):
    for name, text in {
        "boxes.py": MODULE,
        "test/test_boxes.py": MODULE,
        "site-packages/foreign.py": MODULE,
        "_sysconfigdata_linux.py": MODULE,
        "broken.py": "def (:\n",
        "latin.py": "# just a comment\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n'''Caf\xe9 " + b"au lait " * 40 + b"'''\n")
    return tmp_path


def of_library(library, **keys):
    report = StdlibReport()
    documents = stdlib.documents(StdlibConfig(min_document_bytes=0, **keys), report, library)
    return {d.source.partition(":")[2]: d for d in documents}, report


@pytest.fixture(scope="module")
def corpus():
    report = StdlibReport()
    return list(stdlib.documents(report=report)), report


def test_docstrings_are_dedented_and_named(library):
    found, report = of_library(library, parts=("docstrings",))
    assert found["boxes"].text == (
        "module boxes\n\nTools for boxes.\n\nIndented text.\n\n\n"
        "boxes.open_box(box, *, force=False)\n\nOpen a box.\n\nReturns it.\n\n\n"
        "class boxes.Box(size=3)\n\nA box.\n\n\n"
        "boxes.Box.fold(times=1)\n\nFold it.\n"
    )
    assert found["latin"].text.startswith("module latin\n\nCafé au lait")
    assert "foreign" not in found and "test.test_boxes" not in found and "_sysconfigdata_linux" not in found
    assert report.skipped["unreadable file"] == 1


def test_source_loses_docstrings_only_when_they_are_a_part_of_their_own(library):
    alone, _ = of_library(library, parts=("source",))
    both, _ = of_library(library, parts=("docstrings", "source"))
    assert "Returns it." in alone["boxes"].text and "Open a box." in alone["boxes"].text
    code = both["boxes"].text
    assert code == (
        "# boxes\n\nimport os\n\nTABLE = ...\n\n\n"
        "# Opens a box.\n@os.decorate\ndef open_box(box, *, force=False):\n    return box\n\n\n"
        "class Box:\n    def __init__(self, size=3):\n        self.size = size\n\n"
        "    def fold(self, times=1):\n        pass\n\n\n"
        "def bare():\n    return 1\n"
    )
    compile(code, "boxes", "exec")


def test_without_source_files_docstrings_come_from_imported_modules(tmp_path):
    report = StdlibReport()
    found = list(stdlib.documents(StdlibConfig(parts=("docstrings", "source")), report, tmp_path / "missing"))
    text = "\n".join(d.text for d in found)
    assert "json.dumps(obj, *" in text and "textwrap.dedent(text)" in text and "math.comb(n, k, /)" in text
    assert report.skipped["source not installed"] == 1 and report.documents["source"] == 0


def test_the_corpus_of_this_python_is_large_and_cut_small(corpus):
    documents, report = corpus
    assert report.bytes["docstrings"] > 1_000_000 and report.bytes["topics"] > 200_000
    assert report.bytes["source"] > 3_000_000
    assert sum(report.documents.values()) == len(documents)
    sizes = [len(d.text.encode()) for d in documents]
    assert sum(sizes) == sum(report.bytes.values())
    assert sum(512 <= size <= 9000 for size in sizes) > 0.9 * len(sizes)
    assert len({d.text for d in documents}) == len(documents)
    assert not any("\x00" in d.text or " at 0x7" in d.text for d in documents if d.meta["part"] == "docstrings")


def test_another_process_sees_the_same_corpus(corpus):
    documents, _ = corpus
    script = (
        "import hashlib; from octavo.data import stdlib\n"
        "print(hashlib.sha256('\\0'.join(d.source + d.text for d in stdlib.documents()).encode()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hashlib.sha256("\0".join(d.source + d.text for d in documents).encode()).hexdigest()


def test_max_bytes_takes_whole_documents_of_every_part(tmp_path):
    parts = ("topics", "docstrings")
    everything = list(stdlib.documents(StdlibConfig(parts=parts), root=tmp_path))
    report = StdlibReport()
    few = list(stdlib.documents(StdlibConfig(parts=parts, max_bytes=300_000), report, tmp_path))
    assert 290_000 < sum(report.bytes.values()) <= 300_000
    assert min(report.bytes[part] for part in parts) > 50_000
    remaining = iter(d.text for d in everything)
    assert all(d.text in remaining for d in few), "the order is kept"
    assert report.skipped["over max_bytes"] == len(everything) - len(few)


def test_topics_share_no_paragraph_pairs():
    topics = list(stdlib.documents(StdlibConfig(parts=("topics",))))
    assert any('The "with" statement' in d.text for d in topics)
    longs = [p for d in topics for p in d.text.split("\n\n") if len(p) > 300]
    assert len(set(longs)) > 0.97 * len(longs)
