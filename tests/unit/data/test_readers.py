import gzip
import io
import json

import pytest
import zstandard

from octavo.data import readers
from octavo.data.sources import SourceConfig, read, scan
from octavo.errors import DataError


def texts(path, **settings):
    return [d.text for d in read([SourceConfig(path=str(path), **settings)])]


def rows(*values):
    return "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values).encode()


PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: zstandard.ZstdCompressor().compress(data)}


@pytest.mark.parametrize("suffix", PACKERS)
def test_jsonl_is_read_plain_and_compressed(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](rows({"text": "one"}, {"text": "二"}) + b"\n" + rows({"text": ["a", "b"]})))
    documents = list(read([str(path)]))
    assert [(d.text, d.line, d.source) for d in documents] == [
        ("one", 1, str(path)),
        ("二", 2, str(path)),
        ("a\nb", 4, str(path)),
    ]


@pytest.mark.parametrize("suffix", PACKERS)
def test_text_is_read_plain_and_compressed(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACKERS[suffix]("\ufeffone\r\ntwo\r\n三".encode()))
    assert texts(path) == ["one\ntwo\n三"]


def test_zst_of_two_frames_is_one_text(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(b"one ") + zstandard.ZstdCompressor().compress(b"two"))
    assert texts(path) == ["one two"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_off_compressed_file_is_an_error_and_not_a_shorter_text(tmp_path, suffix):
    data = PACKERS[suffix](b"".join(b"%d " % (i * i) for i in range(50_000)))
    path = tmp_path / f"a.txt{suffix}"
    for end in (len(data) - 1, len(data) // 2, 9):
        path.write_bytes(data[:end])
        with pytest.raises(DataError, match="cannot be read") as caught:
            texts(path)
        assert f"a.txt{suffix}:1" in str(caught.value)


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "二", None], "n": [1, 2, 3]}), path)
    with pytest.raises(DataError, match="`text` must be text, got null") as caught:
        texts(path)
    assert "a.parquet:3" in str(caught.value)
    assert texts(path, on_bad_row="skip") == ["one", "二"]
    with pytest.raises(DataError, match=r"no column `txt`.*did you mean `text`"):
        texts(path, text_field="txt")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        texts(path)


def test_html_gives_the_visible_text(tmp_path):
    path = tmp_path / "a.html"
    path.write_text(
        "<html><head><title>T</title><style>p {}</style></head><body><h1>Head</h1><p>One  &amp; <b>two</b>\nthree"
        "<script>var x;</script><p>Next<br>line<ul><li>a<li>b</ul><pre>x\n  y</pre></body>"
    )
    assert texts(path) == ["Head\n\nOne & two three\n\nNext\nline\n\na\nb\n\nx\n  y"]


def test_bad_rows_name_file_line_column_and_excerpt_the_first_five_and_the_total(tmp_path):
    path = tmp_path / "a.jsonl"
    good, bad = rows({"text": "fine"}), b'{"text": "a" "b"}\n'
    path.write_bytes(good + bad * 3 + good + bad * 4)
    with pytest.raises(DataError) as caught:
        texts(path)
    message = str(caught.value)
    assert f"{path}:2)" in message
    assert "at column 14" in message and '`{"text": "a" "b"}`' in message
    assert "7 bad rows in this file, the first at lines 2, 3, 4, 6, 7" in message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'["text"]', "expected an object with `text`, got a list"),
        (b'{"texts": "x"}', "no field `text` in the row (did you mean `texts`?)"),
        (b'{"text": 3}', "`text` must be text, got a number"),
        (b'{"text": "a\\u0000b"}', "NUL character"),
        (b'{"text": "a\\ud800b"}', "lone surrogate U+D800 at character 2"),
        (b'{"text": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"text": "\xe9"}', "byte 0xE9 is not utf-8 at column 11"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(rows({"text": "fine"}) + row + b"\n")
    with pytest.raises(DataError) as caught:
        texts(path)
    assert message in str(caught.value)
    assert f"{path}:2)" in str(caught.value)
    skipped = list(scan([SourceConfig(path=str(path), on_bad_row="skip", encoding_errors="skip")]))
    assert [type(item).__name__ for _, item in skipped] == ["Document", "Rejected"]
    assert skipped[1][1].line == 2


def test_a_huge_row_is_passed_over_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1000)
    file = io.BytesIO(b"a" * 1000 + b"\n" + b"b" * 5_000_000 + b"\nc\n")
    assert [(n, None if line is None else len(line)) for n, line in readers.lines(file, 1000)] == [
        (1, 1000),
        (2, None),
        (3, 1),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b" * 1000}) + "\n")
    with pytest.raises(DataError, match="row is longer than") as caught:
        texts(path)
    assert f"{path}:2" in str(caught.value)


def test_encoding_errors_have_a_place_and_a_policy(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" + b"x" * 1203 + b"\xe9t\xe9\nfine again\n")
    with pytest.raises(DataError, match="byte 0xE9 is not utf-8 at column 1,204") as caught:
        texts(path)
    assert f"{path}:2)" in str(caught.value)
    assert texts(path, encoding_errors="replace") == ["fine\n" + "x" * 1203 + "\ufffdt\ufffd\nfine again\n"]
    assert texts(path, encoding_errors="skip") == []
    assert texts(path, encoding="latin-1") == ["fine\n" + "x" * 1203 + "été\nfine again\n"]


def test_only_the_piece_with_the_bad_byte_is_skipped(tmp_path):
    path = tmp_path / "a.txt"
    blocks = [(f"{i:02} " * 30 + "\n\n").encode() for i in range(9)]
    blocks[4] = blocks[4][:30] + b"\xff" + blocks[4][31:]
    path.write_bytes(b"".join(blocks))
    kept = texts(path, document_bytes=100, encoding_errors="skip")
    assert [k[:2] for k in kept] == ["00", "01", "02", "03", "05", "06", "07", "08"]


def test_chinese_in_gb18030(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("床前明月光\n疑是地上霜".encode("gb18030"))
    assert texts(path, encoding="gb18030") == ["床前明月光\n疑是地上霜"]


@pytest.mark.parametrize("limit", [64, 100, 1000])
def test_cut_pieces_are_short_enough_and_join_to_the_text(tmp_path, limit):
    text = "\n\n".join(f"段落{i} " + "word " * (i % 40) + "\nline" for i in range(80)) + "x" * 300 + "汉" * 100
    path = tmp_path / "a.txt"
    path.write_text(text)
    documents = list(read([SourceConfig(path=str(path), document_bytes=limit)]))
    assert "".join(d.text for d in documents) == text
    assert max(len(d.text.encode()) for d in documents) <= limit
    numbered = text.split("\n")
    for document in documents:
        assert document.text.split("\n")[0] in numbered[document.line - 1]


def test_cutting_in_blocks_is_cutting_at_once(monkeypatch, tmp_path):
    text = "".join(f"line {i} 汉字 {'y' * (i % 57)}\n" + "\n" * (i % 7 == 0) for i in range(300)) + "z" * 5000
    path = tmp_path / "a.txt"
    path.write_text(text)
    pieces, rest = readers.cut(text.encode(), 256)
    whole = [piece.decode() for piece in [*pieces, rest]]
    for block in (17, 64, 100_000):
        monkeypatch.setattr(readers, "BLOCK_BYTES", block)
        assert texts(path, document_bytes=256) == whole


def test_a_crlf_cut_in_two_by_a_block_is_one_line_end(monkeypatch, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\r\ndef\r\n")
    monkeypatch.setattr(readers, "BLOCK_BYTES", 4)
    assert texts(path) == ["abc\ndef\n"]


def test_a_damaged_gzip_checksum_is_an_error(tmp_path):
    path = tmp_path / "a.txt.gz"
    data = bytearray(gzip.compress(b"some text"))
    data[-6] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="cannot be read"):
        texts(path)
