"""Labelled texts: what is read from files, how pairs are framed, and rows of one text each."""

from __future__ import annotations

import json

import numpy as np
import pytest

from octavo.data import labelled
from octavo.data.labelled import LabelledConfig, LabelledRows
from octavo.data.loader import Loader
from octavo.errors import DataError
from octavo.laws.loader import partitioned, resumed
from octavo.tokenizer import Tokenizer, train
from octavo.tokenizer.config import ByteBPE
from octavo.tokenizer.frame import frame


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(ByteBPE(vocab_size=280), ["a text of some words, and another one. " * 20])


FILES = {
    "r.tsv": "text\tlabel\tid\ngood\tpos\t1\n坏的\tneg\t2\n",
    "r.csv": 'text,label\n"good, very",pos\n"of two\nlines",neg\n',
    "r.jsonl": '{"text": "good", "label": "pos"}\n{"text": "bad", "text_b": "so", "label": "neg"}\n',
}


@pytest.mark.rows("A2")
@pytest.mark.parametrize("name", FILES)
def test_rows_of_every_format(name, tmp_path):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    config = LabelledConfig(paths=(str(tmp_path / name),))
    rows = labelled.read(config)
    assert [row.label for row in rows] == ["pos", "neg"]
    assert labelled.classes(rows, config) == ("neg", "pos")
    assert labelled.targets(rows, ("neg", "pos"), "single_label").tolist() == [1, 0]
    assert rows[1].source.endswith(name)
    assert rows[1].text == {"r.tsv": "坏的", "r.csv": "of two\nlines", "r.jsonl": "bad"}[name]
    assert [row.second for row in rows] == [None, "so" if name == "r.jsonl" else None]


def test_several_labels_and_numbers(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}, {"text": "c", "label": "z|x"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = LabelledConfig(paths=(str(path),), problem="multi_label")
    rows = labelled.read(config)
    names = labelled.classes(rows, config)
    assert names == ("x", "y", "z")
    assert labelled.targets(rows, names, "multi_label").tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
    path.write_text('{"text": "a", "label": 0.5}\n{"text": "b", "label": [2]}\n')
    config = LabelledConfig(paths=(str(path),), problem="regression")
    rows = labelled.read(config)
    assert labelled.targets(rows, labelled.classes(rows, config), "regression").tolist() == [[0.5], [2.0]]


BAD = [
    ('{"text": "a"}\n', {}, "there is no 'label'"),
    ('{"text": 3, "label": "x"}\n', {}, "not a string"),
    ('{"text": "a", "label": ["x"]}\n', {}, "not one name"),
    ('{"text": "a", "label": "much"}\n', {"problem": "regression"}, "not a number"),
    ('[1, 2]\n', {}, "expected an object"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "settings", "said"), BAD, ids=str)
def test_a_bad_row_is_named_with_its_place(line, settings, said, tmp_path):
    (tmp_path / "r.jsonl").write_text(line)
    with pytest.raises(DataError) as caught:
        labelled.read(LabelledConfig(paths=(str(tmp_path / "r.jsonl"),), **settings))
    assert said in str(caught.value) and "r.jsonl:1" in str(caught.value)


def test_labels_that_are_unknown_or_alone_are_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n')
    rows = labelled.read(config := LabelledConfig(paths=(str(path),)))
    with pytest.raises(DataError, match="one class, 'x'"):
        labelled.classes(rows, config)
    with pytest.raises(DataError, match="'x' is not one of labels"):
        labelled.classes(rows, config.model_copy(update={"labels": ("a", "b")}))
    with pytest.raises(DataError, match="no file matches"):
        labelled.read(LabelledConfig(paths=(str(tmp_path / "none*"),)))


@pytest.mark.rows("A2")
def test_pairs_stand_between_their_special_tokens_with_types(tokenizer):
    special = tokenizer.special
    assert frame(tokenizer, [7, 8]) == ([special.bos, 7, 8, special.eos], [0] * 4)
    assert frame(tokenizer, [7, 8], [9]) == ([special.bos, 7, 8, special.eos, 9, special.eos], [0, 0, 0, 0, 1, 1])
    for room in range(3, 12):
        ids, types = frame(tokenizer, [7] * 5, [9] * 3, max_tokens=room)
        assert len(ids) == min(room, 11) == len(types)
        left = ids.count(7), ids.count(9)
        assert sum(left) == min(8, room - 3)
        assert left[0] in (left[1], left[1] + 1) or left[1] == 3


def test_bert_and_roberta_frame_as_transformers_does(tmp_path):
    import transformers
    from tokenizers import Tokenizer as Rust
    from tokenizers import models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "##ly", "so"]
    rust = Rust(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    for kind in ("bert", "roberta"):
        if kind == "bert":
            rust.post_processor = processors.TemplateProcessing(
                single=single, pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
            )
        else:
            rust.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
        roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **roles)
        theirs.save_pretrained(tmp_path / kind)
        ours = Tokenizer.load(tmp_path / kind)
        assert (ours.special.cls, ours.special.sep, ours.special.mask) == (2, 3, 4)
        a, b = ours.encode("good badly"), ours.encode("so good")
        wanted = theirs("good badly", "so good", return_token_type_ids=True)
        ids, types = frame(ours, a, b)
        assert ids == wanted["input_ids"]
        if kind == "bert":
            assert types == wanted["token_type_ids"]
        assert frame(ours, a)[0] == theirs("good badly")["input_ids"]


def made(tokenizer: Tokenizer, n: int = 20, **settings) -> LabelledRows:
    rows = [labelled.Labelled("word " * (i + 1), "other" if i % 2 else None, str(i % 3)) for i in range(n)]
    return LabelledRows(rows, labelled.targets(rows, ("0", "1", "2"), "single_label"), tokenizer, 24, **settings)


@pytest.mark.rows("A2")
def test_rows_bring_their_labels_through_the_loader(tokenizer):
    rows = made(tokenizer, typed=True)
    loader = Loader(rows, 4, seed=1)
    resumed(loader, 6)
    partitioned(loader, 4)
    batch, places = loader.batch(0), loader.places(0, 4)
    assert batch["labels"].tolist() == [index % 3 for _, _, index in places]
    for row, (_, _, index) in enumerate(places):
        ids, types = rows.framed[index]
        assert batch["tokens"][row, : len(ids)].tolist() == ids
        assert batch["token_types"][row, : len(ids)].tolist() == types
        assert batch["valid"][row].sum() == len(ids)
    assert "token_types" not in made(tokenizer).rows(0, np.arange(2))
    assert rows.cut > 0


def test_padding_of_all_rows_is_left_out_of_a_batch(tokenizer):
    from octavo.batch import Batch

    rows = made(tokenizer)
    batch = Batch.from_numpy(rows.rows(0, np.arange(3)))
    longest = max(len(ids) for ids, _ in rows.framed[:3])
    assert longest <= batch.tokens.shape[1] < longest + 8
    assert batch.padding == "end" and batch.extra["labels"].tolist() == [0, 1, 2]


def test_what_is_held_out_is_spread_over_a_sorted_file(tokenizer, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps({"text": f"t {i}", "label": "ab"[i >= 50]}) + "\n" for i in range(100)))
    config = LabelledConfig(paths=(str(path),))
    args = {"held_out": 0.2, "seed": 1, "typed": False}
    trained, held, names = labelled.prepare(config, tokenizer, 24, **args)
    assert (trained.n_rows, held.n_rows, names) == (80, 20, ("a", "b"))
    assert 5 <= (held.labels == 0).sum() <= 15
    assert not {row.text for row in trained.given} & {row.text for row in held.given}
    assert labelled.prepare(config, tokenizer, 24, **args)[1].fingerprint == held.fingerprint
