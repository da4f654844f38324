"""Files of word vectors: what is written reads back bit for bit, and what is wrong is refused with its line."""

import struct

import numpy as np
import pytest

from octavo.errors import ConfigError, DataError
from octavo.vectors import Vectors, formats, query


def some(words=("the", "爱", "naïve", "a\u00a0b", "ˈx\u2028"), dim: int = 6) -> Vectors:
    """Numbers of all sizes, words with white space that is no space."""
    chance = np.random.default_rng(0)
    matrix = chance.normal(size=(len(words), dim)) * 10.0 ** chance.integers(-30, 30, (len(words), dim))
    return Vectors(list(words), matrix.astype(np.float32))


@pytest.mark.rows("N7")
@pytest.mark.parametrize("format", ["vec", "glove", "bin"])
@pytest.mark.parametrize("dim", [1, 6, 300])
def test_what_is_written_reads_back_with_the_same_bits(format, dim, tmp_path):
    vectors, path = some(dim=dim), tmp_path / "any"
    formats.write(vectors, path, format)
    for told in (format, None):
        back = formats.read(path, told)
        assert back.words == vectors.words
        assert back.matrix.dtype == np.float32 and (back.matrix == vectors.matrix).all()
    assert formats.dim_of(path) == dim
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_as_other_programs_write_them(tmp_path):
    vectors = Vectors(["a", "bc"], np.array([[1, -0.5], [0.25, 3e-9]], np.float32))
    for name, content in {
        "x.vec": b"2 2\na 1 -0.5\nbc 0.25 3e-09\n",
        "x.txt": b"a 1 -0.5\nbc 0.25 3e-09\n",
    }.items():
        formats.write(vectors, tmp_path / name)
        got = (tmp_path / name).read_bytes()
        assert [line.split()[0] for line in got.splitlines()] == [line.split()[0] for line in content.splitlines()]
        (tmp_path / name).write_bytes(content)
        assert (formats.read(tmp_path / name).matrix == vectors.matrix).all()
    formats.write(vectors, tmp_path / "x.bin")
    packed = b"2 2\na " + struct.pack("<2f", 1, -0.5) + b"\nbc " + struct.pack("<2f", 0.25, np.float32(3e-9)) + b"\n"
    assert (tmp_path / "x.bin").read_bytes() == packed
    # gensim writes no line's end after a word's numbers, word2vec does; Windows has \r\n, fastText a last space.
    (tmp_path / "x.bin").write_bytes(packed.replace(b"\nbc", b"bc").rstrip(b"\n"))
    assert formats.read(tmp_path / "x.bin").words == ["a", "bc"]
    (tmp_path / "y.vec").write_bytes(b"2 2\r\na 1 -0.5 \r\nbc 0.25 3e-09 \r\n\r\n")
    assert (formats.read(tmp_path / "y.vec").matrix == vectors.matrix).all()


def test_a_part_of_a_file_is_read(tmp_path):
    formats.write(some(), tmp_path / "x.vec")
    assert formats.read(tmp_path / "x.vec", limit=2).words == ["the", "爱"]
    part = formats.read(tmp_path / "x.vec", only={"naïve", "nowhere"})
    assert part.words == ["naïve"] and (part.matrix[0] == some().matrix[2]).all()
    none = formats.read(tmp_path / "x.vec", only={"nowhere"})
    assert len(none) == 0 and none.dim == 6


HOSTILE = {
    "empty": (b"", None, "has no word vectors", ""),
    "no header": (b"a 1 2\n", "vec", "the first line must be", ":1"),
    "huge": (b"999999999999 9\na 1\n", "vec", "are not possible", ":1"),
    "wide": (b"9 99999999999\na 1\n", "vec", "are not possible", ":1"),
    "large": (b"200000000 60000\na 1\n", "vec", "bytes or more, the file has", ":1"),
    "large binary": (b"1000 300\na " + bytes(90), "bin", "bytes or more, the file has", ":1"),
    "no numbers": (b"1 0\na\n", "vec", "are not possible", ":1"),
    "few numbers": (b"2 2\na 1 2\nb 1\n", None, "1 numbers, where 2 are expected", ":3"),
    "many numbers": (b"2 2\na 1 2\nb 1 2 3\n", None, "3 numbers, where 2 are expected", ":3"),
    "two spaces": (b"2 2\na 1 2\nb  1 2\n", None, "3 numbers, where 2 are expected", ":3"),
    "no number": (b"2 2\na 1 2\nb 1 x\n", None, "not a number: 'x'", ":3"),
    "grouped": (b"2 2\na 1 2\nb 1 1_000\n", None, "not finite, or not written as one", ":3"),
    "nan": (b"2 2\na 1 2\nb 1 nan\n", None, "not finite", ":3"),
    "overflow": (b"a 1 2\nb 1 1e39\n", None, "not finite", ":2"),
    "cut off": (b"3 2\na 1 2\nb 1 2\n", "vec", "the first line says 3 words, here are 2", ":3"),
    "more": (b"1 2\na 1 2\nb 1 2\n", "vec", "more words than the 1", ":3"),
    "twice": (b"3 2\na 1 2\nb 1 2\na 3 4\n", None, "the word 'a' stands here a second time", ":4"),
    "no word": (b"2 2\na 1 2\n 1 2\n", None, "a word of 0 bytes", ":3"),
    "not UTF-8": (b"2 2\na 1 2\n\xff 1 2\n", None, "not UTF-8: byte 0xFF", ":3"),
    "empty line": (b"a 1 2\n\nb 1 2\n", None, "0 numbers", ":2"),
    "only a word": (b"hello\n", None, "a word with 0 numbers", ":1"),
    "endless line": (b"a 1\n" + b"b" * 9000 + b" 1\n", None, "longer than", ":2"),
    "binary cut": (b"2 2\na " + bytes(8) + b"b " + bytes(7), "bin", "ends in the middle", "word 2 of 2"),
    "binary more": (b"1 2\na " + bytes(8) + b"\nb", "bin", "more follows after the 1", ""),
    "binary nan": (b"1 1\na " + struct.pack("<f", float("nan")), "bin", "not finite", "word 1 of 1"),
    "binary word": (b"2 1\n" + b"a" * 20000, "bin", "a word of more than 4,096 bytes", "word 1 of 2"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_wrong_is_refused_with_its_place(name, tmp_path):
    content, format, what, where = HOSTILE[name]
    path = tmp_path / "bad.vec"
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        formats.read(path, format)
    line = str(refused.value)
    assert line.startswith("error[DATA]: ") and what in line and "Fix: " in line and "\n" not in line
    assert where in refused.value.where


def test_files_that_are_not_there_or_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        formats.read(tmp_path / "nothing.vec")
    with pytest.raises(DataError, match="not a plain file"):
        formats.read(tmp_path)
    with pytest.raises(ConfigError, match="no format"):
        formats.format_of("x.npz")
    for word in ("a b", "", "a\nb", "x" * 5000):
        with pytest.raises(DataError, match="no way to write"):
            formats.write(some([word]), tmp_path / "x.vec")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ what is asked


def square() -> Vectors:
    words = ["man", "woman", "king", "queen", "apple", "zero"]
    rows = [[1, 0, 1], [1, 1, 1], [3, 0, -2], [3, 1, -2], [0, 2, 9], [0, 0, 0]]
    return Vectors(words, np.array(rows, np.float32))


def test_neighbours_are_ranked_by_cosine_without_the_word_itself():
    vectors = square()
    found = vectors.near("king", 3)
    length = np.linalg.norm(vectors.matrix, axis=1)
    cosines = {
        word: float(vectors["king"] @ row / (np.linalg.norm(vectors["king"]) * size))
        for word, row, size in zip(vectors.words, vectors.matrix, length)
        if word not in ("king", "zero")
    } | {"zero": 0.0}
    assert [word for word, _ in found] == sorted(cosines, key=lambda w: -cosines[w])[:3]
    assert dict(found) == pytest.approx({word: cosines[word] for word, _ in found}, rel=1e-5)
    assert vectors.near("king", 5)[3:] == [("zero", 0.0), ("apple", pytest.approx(cosines["apple"], rel=1e-5))]
    assert len(vectors.near("king", 100)) == 5


@pytest.mark.rows("N7")
@pytest.mark.parametrize("method", ["add", "mul"])
def test_analogies_follow_their_formula(method):
    vectors = square()
    found = vectors.analogy("man", "woman", "king", 10, method)
    assert found[0][0] == "queen" and {word for word, _ in found} == {"queen", "apple", "zero"}
    unit = {w: vectors[w] / max(np.linalg.norm(vectors[w]), 1e-9) for w in vectors.words}
    for word, score in found:
        a, b, c = (float(unit[word] @ unit[w]) for w in ("man", "woman", "king"))
        formula = b - a + c if method == "add" else (b + 1) / 2 * ((c + 1) / 2) / ((a + 1) / 2 + 0.001)
        assert score == pytest.approx(formula, rel=1e-5, abs=1e-6)


def test_a_word_without_a_vector_is_refused_with_the_nearest():
    for word in ("kimg", "King"):
        with pytest.raises(ConfigError, match=word) as refused:
            square().near(word)
        assert "did you mean `king`?" in str(refused.value)


def test_questions_are_counted_by_section(tmp_path):
    lines = ": royal\nman woman king queen\nking queen man woman\n# remark\n\n: other\nman woman king apple\n? ? ? ?"
    sections = query.questions(lines.split("\n"), "q.txt")
    assert [(name, square().answer(asked)) for name, asked in sections] == [("royal", (2, 2)), ("other", (0, 1))]
    with pytest.raises(DataError) as refused:
        query.questions(["a b c d", "a b c"], "q.txt")
    assert refused.value.where == "q.txt:2"
    with pytest.raises(DataError, match="no analogies"):
        query.questions([": empty"], "q.txt")
