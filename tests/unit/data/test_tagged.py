"""Words with tags: what is read from files, which tokens are whose, and rows with a label in each place."""

from __future__ import annotations

import json

import numpy as np
import pytest

from octavo.data import tagged
from octavo.data.loader import Loader
from octavo.data.tagged import Sentence, TaggedConfig, TaggedRows
from octavo.errors import DataError
from octavo.laws.loader import partitioned, resumed
from octavo.tokenizer import Tokenizer, train
from octavo.tokenizer.config import Byte, ByteBPE, Unigram
from octavo.tokenizer.words import Aligner, portions, rows_of

TEXT = ["Anna Wolff lives in the old town of Oslo, and Bo lives in another one. " * 20]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(ByteBPE(vocab_size=300), TEXT)


FILES = {
    "r.jsonl": '{"tokens": ["Anna", "sings"], "ner_tags": ["B-PER", "O"]}\n{"tokens": ["Oslo"], "tags": ["B-LOC"]}\n',
    "r.json": '[{"tokens": ["Anna", "sings"], "tags": ["B-PER", "O"]}, {"tokens": ["Oslo"], "tags": ["B-LOC"]}]',
    "r.conll": "-DOCSTART- -X- -X- O\n\nAnna NNP I-NP B-PER\nsings VBZ I-VP O\n\n\nOslo NNP I-NP B-LOC",
    "r.bio": "Anna\tB-PER\r\nsings\tO\r\n \t\r\nOslo\tB-LOC\r\n",
    "r.conllu": "# text = Anna sings\n1\tAnna\tB-PER\t_\n2-3\tsings\t_\t_\n2\tsings\tO\t_\n\n1\tOslo\tB-LOC\t_\n\n",
}


@pytest.mark.rows("A2")
@pytest.mark.parametrize("name", FILES)
def test_sentences_of_every_format(name, tmp_path):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8", newline="")
    columns = {"word_column": 1, "tag_column": 2} if name == "r.conllu" else {}
    config = TaggedConfig(paths=(str(tmp_path / name),), **columns)
    one, two = tagged.read(config)
    assert (one.words, one.tags) == (("Anna", "sings"), ("B-PER", "O"))
    assert (two.words, two.tags) == (("Oslo",), ("B-LOC",))
    assert one.source.endswith(name) and one.line == {"r.conll": 3, "r.conllu": 2}.get(name, 1)
    assert tagged.classes([one, two], config) == ("O", "B-LOC", "B-PER")
    assert tagged.targets(one, ("O", "B-LOC", "B-PER"), named=False) == [2, 0]


def test_a_word_may_hold_what_is_no_ascii_blank(tmp_path):
    path = tmp_path / "r.txt"
    path.write_text("New\u00a0York B-LOC\n\u3000 O\na\u2028b O\n", encoding="utf-8")
    assert tagged.read(TaggedConfig(paths=(str(path),)))[0].words == ("New\u00a0York", "\u3000", "a\u2028b")


def test_tags_that_are_numbers_count_in_labels(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"words": ["a", "b", "c"], "ner_tags": [0, 10, 2]}\n')
    config = TaggedConfig(paths=(str(path),), words="words")
    rows = tagged.read(config)
    names = tagged.classes(rows, config)
    assert names == ("0", "2", "10") and tagged.targets(rows[0], names, named=False) == [0, 2, 1]
    with pytest.raises(DataError, match="the tag 10 is not one of labels"):
        tagged.classes(rows, config.model_copy(update={"labels": ("O", "B-X", "I-X")}))
    labels = tuple("abcdefghijk")
    config = config.model_copy(update={"labels": labels})
    assert tagged.targets(rows[0], tagged.classes(rows, config), named=True) == [0, 10, 2]


BAD = [
    ("r.jsonl", '{"tokens": ["a"], "tags": ["X", "O"]}\n', "1 words, but 2 tags"),
    ("r.jsonl", '{"tokens": "a b", "tags": ["X", "O"]}\n', "no list 'tokens'"),
    ("r.jsonl", '{"tokens": ["a"]}\n', "no list 'tags' or 'ner_tags'"),
    ("r.jsonl", '{"tokens": ["a", ""], "tags": ["X", "O"]}\n', "is no word"),
    ("r.jsonl", '{"tokens": ["a"], "tags": [0.5]}\n', "neither a name nor a number"),
    ("r.conll", "a X\nb\n", "1 columns instead of 2"),
    ("r.conll", "a\nb\n", "a word without a tag"),
    ("r.conll", "a\t\n", "a word without a tag|empty column"),
]


@pytest.mark.parametrize(("name", "text", "said"), BAD, ids=str)
def test_what_cannot_be_read_is_named_with_its_place(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        tagged.read(TaggedConfig(paths=(str(tmp_path / name),)))
    assert f"{name}:" in str(caught.value)


def test_one_tag_alone_and_columns_that_are_not_there_are_refused(tmp_path):
    path = tmp_path / "r.conll"
    path.write_text("a O\nb O\n")
    config = TaggedConfig(paths=(str(path),))
    with pytest.raises(DataError, match="one tag, 'O'"):
        tagged.classes(tagged.read(config), config)
    with pytest.raises(DataError, match="tag_column 3 is not among 2 columns"):
        tagged.read(config.model_copy(update={"tag_column": 3}))
    with pytest.raises(DataError, match="no sentence"):
        path.write_text("\n\n")
        tagged.read(config)


# ------------------------------------------------------------------------------------------- alignment

KINDS = {"byte_bpe": ByteBPE(vocab_size=300), "byte": Byte(), "unigram": Unigram(vocab_size=80)}


@pytest.mark.rows("A2")
@pytest.mark.parametrize("kind", KINDS)
def test_words_apart_are_the_tokens_of_the_text(kind):
    made = train(KINDS[kind], TEXT)
    words = ["Anna", "Wolff", "lives", "in", "Oslo"]
    pieces = Aligner(made).encode([words])[0]
    assert [id for ids in pieces for id in ids] == made.encode(" ".join(words))
    for ids, word in zip(pieces, words, strict=True):
        assert made.decode(ids).strip() == word


@pytest.mark.rows("A2")
def test_the_first_or_last_or_every_piece_carries_the_tag(tokenizer):
    aligner = Aligner(tokenizer)
    words = aligner.encode([["Bo", "zzz"]])[0]
    assert len(words[1]) == 4 and tokenizer.decode(words[1][:1]) == " "  # nothing was learnt of it: a blank and letters
    assert [aligner.place(words[1], how) for how in ("first", "last", "all")] == [[1], [3], [1, 2, 3]]
    (row,) = rows_of(aligner, [["Bo", "zzz"]], 24, "first")
    n = len(words[0])
    assert row.ids == [tokenizer.special.bos, *words[0], *words[1], tokenizer.special.eos]
    assert row.read_at == [1, 1 + n + 1]
    sentence = Sentence(("Bo", "zzz"), ("X", "O"))
    for how, wanted in (("first", [1]), ("last", [3]), ("all", [1, 2, 3])):
        rows = TaggedRows([sentence], [[1, 0]], tokenizer, 24, pieces=how)  # type: ignore[arg-type]
        labels = rows.rows(0, np.array([0]))["labels"][0]
        assert np.flatnonzero(labels == 0).tolist() == [1 + n + k for k in wanted]
        once = TaggedRows([sentence], [[1, 0]], tokenizer, 24, pieces=how, once=True)  # type: ignore[arg-type]
        assert once.n_trained == 2


@pytest.mark.rows("A2")
def test_the_same_tokens_carry_the_tags_as_in_transformers():
    """``word_ids`` of a WordPiece tokenizer: the first token of each word is the one that is usually labelled."""
    import transformers
    from tokenizers import Tokenizer as Rust
    from tokenizers import models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "An", "##na", "sing", "##s", "-", "so"]
    rust = Rust(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep")}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **roles)
    words = ["Anna", "sings", "so-so", "?!", "Anna"]
    wanted = theirs(words, is_split_into_words=True)
    ours = Tokenizer(rust.to_str(), special={role: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep")})
    (row,) = rows_of(Aligner(ours), [words], 32, "first")
    assert row.ids == wanted["input_ids"]
    assert row.read_at == [wanted.word_ids().index(i) for i in range(len(words))]
    assert Aligner(ours).encode([["so", "\u3000"]]) == [[[9], [1]]]  # of a blank it makes nothing: the unknown token


def test_long_sentences_stand_in_several_rows_with_every_word_once(tokenizer):
    words = ["Anna", "zzz", "lives", "in", "the", "zzzzzzzzzzzzzzzzzz", "town", "of", "Oslo"]
    tags = [i % 2 for i in range(len(words))]
    sentence = Sentence(tuple(words), tuple("OX"[t] for t in tags))
    rows = TaggedRows([sentence, Sentence(("Bo",), ("X",))], [tags, [1]], tokenizer, 10)
    assert rows.n_rows > 3 and rows.n_split == rows.n_rows - 2
    assert [i for row in rows.framed[:-1] for i in row.words] == list(range(len(words)))
    assert all(len(row.ids) <= 10 for row in rows.framed) and rows.n_trained == len(words) + 1
    said = [([int(t) for t in labels[labels >= 0]], [0] * int((labels >= 0).sum())) for labels in rows.labels]
    assert rows.joined(said) == ([tags, [1]], [[0] * len(words), [0]])
    assert list(portions([[1] * 3, [1], [1] * 9, []], 4)) == [range(2), range(2, 3), range(3, 4)]


@pytest.mark.rows("A2")
def test_rows_bring_a_label_for_each_place_through_the_loader(tokenizer, tmp_path):
    from octavo.batch import Batch

    path = tmp_path / "r.jsonl"
    lines = [{"tokens": ["Anna"] * (i % 5 + 1), "tags": ["B-X" if i % 2 else "O"] * (i % 5 + 1)} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, held, names = tagged.prepare(TaggedConfig(paths=(str(path),)), tokenizer, 24, held_out=0.25, seed=1)
    assert held is not None and (rows.n_rows, held.n_rows, names) == (30, 10, ("O", "B-X"))
    assert not {r.line for r in rows.given} & {r.line for r in held.given}
    loader = Loader(rows, 4, seed=1)
    resumed(loader, 6)
    partitioned(loader, 4)
    batch = Batch.from_numpy(loader.batch(0))
    labels = batch.extra["labels"]
    assert labels.shape == batch.tokens.shape and batch.padding == "end"
    assert not (labels[~batch.valid] >= 0).any()
    for row, (_, _, index) in enumerate(loader.places(0, 4)):
        assert int((labels[row] >= 0).sum()) == len(rows.given[rows.framed[index].sentence].words)
