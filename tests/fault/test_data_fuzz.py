"""Whatever is in a file, reading it gives clean documents or a DataError that names the file and the line."""

import gzip
import json
import re
import time
import tracemalloc

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.data import readers
from octavo.data.clean import CleanConfig, clean_text
from octavo.data.document import Document
from octavo.data.sources import SourceConfig, scan
from octavo.errors import DataError

SECONDS = 1.0

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", ""]), inner, max_size=3),
    max_leaves=6,
)
good_rows = st.fixed_dictionaries({"text": st.text(max_size=60)})
row_bytes = st.one_of(
    good_rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=40),
    st.sampled_from(
        [b"[" * 3000, b'{"text": ' * 2000, b"9" * 5000, b'{"text": "\\ud800"}', b"\xef\xbb\xbf", b"NaN", b"\0"]
    ),
)
ends = st.sampled_from([b"\n", b"\r\n", b"\r", b""])
jsonl = st.lists(st.tuples(row_bytes, ends), max_size=8).map(lambda parts: b"".join(a + b for a, b in parts))
html = st.lists(
    st.sampled_from(
        [
            *"<>/!&;-[]\"' ",
            "<p>",
            "</p",
            "<!--",
            "-->",
            "<![",
            "CDATA[",
            "<script>",
            "</head>",
            "&#",
            "x9;",
            "汉",
            "\x00",
        ]
    ),
    max_size=60,
).map(lambda parts: "".join(parts).encode())
texts = st.one_of(
    st.binary(max_size=300), st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")), jsonl
)


@st.composite
def mutated(draw, base):
    data = bytearray(base)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 8))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        if not data:
            break
    return bytes(data)


ROWS = b"".join(json.dumps({"text": f"row {i} 第{i}行"}, ensure_ascii=False).encode() + b"\n" for i in range(20))


def check(path, content, **policies):
    """Read ``content`` as a file; returns what came of it."""
    path.write_bytes(content)
    source = SourceConfig(path=str(path), document_bytes=64, **policies)
    seconds = float("inf")
    for _ in range(2):  # once may be slow for the sake of a garbage collection
        start = time.process_time()
        try:
            items = [item for _, item in scan([source])]
        except DataError as error:
            message = str(error)
            assert re.search(rf"{re.escape(str(path))}:\d+", message), message
            assert message.count("\n") == 0 and len(message) < 1000
            items = None
        seconds = min(seconds, time.process_time() - start)
        if seconds < SECONDS:
            break
    assert seconds < SECONDS
    for item in items or ():
        if isinstance(item, Document):
            assert "\0" not in item.text and item.text.encode() is not None
            clean_text(item.text, CleanConfig())
        else:
            assert item.source == str(path) and item.line >= 1 and item.reason
    return items


policies = st.fixed_dictionaries(
    {
        "on_bad_row": st.sampled_from(["error", "skip"]),
        "encoding_errors": st.sampled_from(["error", "replace", "skip"]),
    }
)
CASES = {
    "a.jsonl": jsonl | mutated(ROWS),
    "a.txt": texts,
    "a.html": html | texts,
    "a.jsonl.gz": mutated(gzip.compress(ROWS, mtime=0)),
    "a.jsonl.zst": mutated(zstandard.ZstdCompressor().compress(ROWS)),
}
quiet = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@pytest.mark.parametrize("name", CASES)
def test_no_content_breaks_a_reader(name, tmp_path):
    @settings(max_examples=150, **quiet)
    @given(CASES[name], policies)
    def run(content, chosen):
        items = check(tmp_path / name, content, **chosen)
        damaged = name.endswith((".gz", ".zst"))  # compression that is broken is an error under every policy
        if chosen == {"on_bad_row": "skip", "encoding_errors": "skip"} and not damaged:
            assert items is not None

    run()


def test_no_damage_to_a_parquet_file_breaks_its_reader(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [f"row {i}" for i in range(50)]}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()

    @settings(max_examples=100, **quiet)
    @given(mutated(whole), policies)
    def run(content, chosen):
        check(tmp_path / "a.parquet", content, **chosen)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_content_breaks_a_reader_many(name, tmp_path):
    @settings(max_examples=10_000, **quiet)
    @given(CASES[name], policies)
    def run(content, chosen):
        check(tmp_path / name, content, **chosen)

    run()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gz", "zst"])
def test_a_small_file_that_unpacks_to_one_huge_line_needs_little_memory(tmp_path, monkeypatch, suffix, compress):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1 << 20)
    path = tmp_path / f"a{suffix}{'.gz' if compress is gzip.compress else '.zst'}"
    path.write_bytes(compress(b"a" * 100_000_000))
    tracemalloc.start()
    try:
        source = SourceConfig(path=str(path), document_bytes=1 << 16, on_bad_row="skip")
        total = sum(len(item.text) for _, item in scan([source]) if isinstance(item, Document))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == (100_000_000 if suffix == ".txt" else 0)
    assert peak < 32 << 20
