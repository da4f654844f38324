import hashlib
import json
import random
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from pydantic import ValidationError

from octavo.data import prepare
from octavo.data.prepare import DataConfig, SplitConfig, clean_documents, hold_out, iter_documents, iter_texts
from octavo.data.shards import Shards, write_shards
from octavo.errors import DataError
from octavo.tokenizer import Tokenizer, train
from octavo.tokenizer.config import Byte

WORDS = [f"{a}{b}{c}" for a in "bcdfgklm" for b in "aeiou" for c in "bdgkmnrst"]
HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"


def make_corpus(folder, seed=0, n=240):
    """Two files: JSON lines with exact and near copies and bad rows, and Chinese text."""
    rng = random.Random(seed)
    folder.mkdir()
    texts = [" ".join(rng.choice(WORDS) for _ in range(120)) for _ in range(n)]
    rows = []
    for i, text in enumerate(texts):
        rows.append(json.dumps({"text": text}))
        if i % 20 == 3:
            rows.append(json.dumps({"text": text.upper()}))
        if i % 20 == 7:
            rows.append(json.dumps({"text": text[:-4] + "zzz"}))
        if i % 60 == 11:
            rows.append("{not json}")
    rows.append(json.dumps({"text": "too short"}))
    (folder / "a.jsonl").write_text("\n".join(rows) + "\n")
    poems = ["".join(rng.choice(HAN) for _ in range(60)) for _ in range(60)]
    (folder / "b.txt").write_text("\n\n".join([*poems, poems[5] + "。"]))
    return folder


def config_for(corpus, **changes):
    sources = [
        {"path": str(corpus / "a.jsonl"), "on_bad_row": "skip"},
        {"path": str(corpus / "b.txt"), "document_bytes": 200},
    ]
    return DataConfig.model_validate({"sources": sources, "split": {"held_out": 0.1}, **changes})


def hashes(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train(Byte(), ["x"]).save(folder)
    return folder


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(prepare, "SEGMENT_BYTES", 20_000)
    monkeypatch.setattr(prepare, "BATCH_BYTES", 5_000)


def test_what_is_kept_and_what_goes_is_counted_with_examples(corpus, tmp_path):
    report = clean_documents(config_for(corpus), tmp_path, workers=1)
    removed = {reason: entry["documents"] for reason, entry in report.removed.items()}
    assert removed == {"exact_duplicate": 12, "near_duplicate": 13, "unreadable_row": 4, "min_characters": 1}
    assert report.documents == 240 + 24 + 1 + 61 and report.kept_documents == 240 + 60
    assert report.bytes == sum(source["bytes"] for source in report.by_source)
    assert [s["kept_documents"] for s in report.by_source] == [240, 60]
    assert report.splits["train"]["documents"] + report.splits["valid"]["documents"] == 300
    assert report.splits["train"]["bytes"] + report.splits["valid"]["bytes"] == report.kept_bytes
    example = report.removed["near_duplicate"]["examples"][0]
    assert "a.jsonl:9" in example["detail"] and example["line"] == 10  # line 5 was an exact copy
    assert all(len(entry["examples"]) <= 3 for entry in report.removed.values())
    assert "near_duplicate" in str(report)
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == 4 and all("not JSON" in row["reason"] for row in rejected)
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()


def test_the_documents_come_back_in_order_and_in_two_disjoint_splits(corpus, tmp_path, small_segments):
    clean_documents(config_for(corpus), tmp_path, workers=1)
    kept = list(iter_texts(tmp_path, "train")), list(iter_texts(tmp_path, "valid"))
    assert len(kept[0]) + len(kept[1]) == 300 and not set(kept[0]) & set(kept[1])
    assert 10 <= len(kept[1]) <= 60
    places = [(d.source, d.line) for d in iter_documents(tmp_path, "train")]
    assert places == sorted(places)


def test_a_second_call_does_nothing_and_another_config_or_file_does_it_anew(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "text", n=40)
    out = tmp_path / "out"
    first = clean_documents(config_for(corpus), out, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(prepare._Preparation, "run", None)
        assert clean_documents(config_for(corpus), out, workers=1).to_dict() == first.to_dict()
    without = clean_documents(config_for(corpus, clean={"near_duplicates": None}), out, workers=1)
    assert without.kept_documents > first.kept_documents
    with open(corpus / "b.txt", "a") as file:
        file.write("\n\n一篇新的文章，和别的都不一样，放在最后面的地方。")
    assert clean_documents(config_for(corpus), out, workers=1).kept_documents == first.kept_documents + 1


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(corpus, tokenizer, tmp_path, small_segments, workers):
    for name, n in (("one", 1), ("more", workers)):
        clean_documents(config_for(corpus), tmp_path / name, workers=n)
        for split in ("train", "valid"):
            write_shards(tmp_path / name, split, tokenizer, workers=n)
    assert len(hashes(tmp_path / "one" / "train")) > 3
    assert hashes(tmp_path / "one") == hashes(tmp_path / "more")


KILLED = """
    import json, os, signal, sys
    from octavo.data import prepare
    from octavo.data.shards import write_shards
    config, out, tokenizer, workers, moment = json.loads(sys.argv[1])
    prepare.SEGMENT_BYTES, prepare.BATCH_BYTES = 20_000, 5_000
    replace, n = os.replace, 0

    def dying_replace(a, b):
        global n
        n += 1
        if n == moment:
            if n % 2:
                replace(a, b)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(a, b)

    os.replace = dying_replace
    prepare.clean_documents(prepare.DataConfig.model_validate(config), out, workers=workers)
    for split in ("train", "valid"):
        write_shards(out, split, tokenizer, workers=1)
"""


def test_killed_again_and_again_it_ends_in_the_same_bytes_with_any_number_of_workers(
    corpus, tokenizer, tmp_path, small_segments
):
    config = config_for(corpus)
    clean_documents(config, tmp_path / "whole", workers=1)
    for split in ("train", "valid"):
        write_shards(tmp_path / "whole", split, tokenizer, workers=1)
    out = tmp_path / "killed"
    kills, journals = 0, []
    for attempt, moment in enumerate([3, 6, 9, 8, 12, 10_000]):
        arguments = json.dumps([config.model_dump(mode="json"), str(out), str(tokenizer), 1 + attempt % 2, moment])
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), arguments])
        kills += done.returncode == -signal.SIGKILL
        journal = prepare.read_json(out / "documents" / "journal.json")
        journals.append(len(journal["segments"]) if journal else 0)
    assert done.returncode == 0 and kills == 5
    assert journals[1] > 0 and journals[2] > journals[1]
    assert hashes(out) == hashes(tmp_path / "whole")


def test_nothing_left_is_an_error_with_the_counts(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match="no document is left of 1 read: min_characters 1") as caught:
        clean_documents(DataConfig.model_validate({"sources": str(tmp_path / "a.txt")}), tmp_path / "out", workers=1)
    assert caught.value.exit_code == 3
    with pytest.raises(DataError, match="hold no text"):
        clean_documents(DataConfig.model_validate({"sources": str(tmp_path / "b.txt")}), tmp_path / "out", workers=1)


def test_one_document_cannot_be_split_and_the_fix_works(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"Paragraph {i} of a text that is long enough." for i in range(30)))
    source = {"path": str(tmp_path / "a.txt")}
    with pytest.raises(DataError, match=r"too few to hold out 1.*Fix: set `document_bytes`"):
        clean_documents(DataConfig.model_validate({"sources": [source]}), tmp_path / "out", workers=1)
    fixed = DataConfig.model_validate({"sources": [{**source, "document_bytes": 256}]})
    assert clean_documents(fixed, tmp_path / "out", workers=1).splits["valid"]["documents"] >= 1


def test_documents_are_held_out_by_their_text_and_not_by_their_place():
    names = [hashlib.sha256(str(i).encode()).digest()[:16] for i in range(1000)]
    held = hold_out(names, SplitConfig(held_out=0.1))
    assert 70 < held.sum() < 130
    order = np.random.default_rng(0).permutation(1000)
    assert (hold_out([names[i] for i in order], SplitConfig(held_out=0.1)) == held[order]).all()
    assert hold_out(names, SplitConfig(held_out=37)).sum() == 37
    assert hold_out(names, SplitConfig(held_out=0)).sum() == 0
    assert hold_out(names[:2], SplitConfig(held_out=0.001)).sum() == 1
    assert hold_out(names[:2], SplitConfig(held_out=0.999)).sum() == 1
    assert (hold_out(names, SplitConfig(held_out=0.1, seed=1)) != held).any()
    assert len(set(hold_out(names[:1] * 5 + names[1:3], SplitConfig(held_out=1))[:5].tolist())) == 1


@pytest.mark.parametrize("value", [-1, 1.5, float("nan")])
def test_a_share_that_means_nothing_is_refused(value):
    with pytest.raises(ValidationError):
        SplitConfig(held_out=value)


def test_progress_may_stop_a_preparation_which_then_goes_on(corpus, tmp_path, small_segments):
    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if done > 60_000:
            raise Stop

    with pytest.raises(Stop):
        clean_documents(config_for(corpus), tmp_path / "a", workers=1, progress=stop)
    assert prepare.read_json(tmp_path / "a/documents/journal.json")["items"] > 0
    clean_documents(config_for(corpus), tmp_path / "a", workers=1)
    clean_documents(config_for(corpus), tmp_path / "b", workers=1)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_tokens_of_the_shards_are_the_tokens_of_the_documents(corpus, tokenizer, tmp_path, small_segments):
    clean_documents(config_for(corpus), tmp_path, workers=1)
    shards = write_shards(tmp_path, "train", tokenizer, workers=1)
    assert len(shards.manifest["parts"]) > 2
    loaded = Tokenizer.load(tokenizer)
    texts = list(iter_texts(tmp_path, "train"))
    assert shards.n_documents == len(texts) and shards.n_tokens == shards.offsets[-1]
    for i in range(0, len(texts), 17):
        expected = [loaded.special.bos, *loaded.encode(texts[i]), loaded.special.eos]
        assert shards.document(i).tolist() == expected
        assert shards.document_bytes[i] == len(texts[i].encode())
    whole = np.concatenate([shards.document(i) for i in range(shards.n_documents)])
    assert (shards.stream(0, shards.n_tokens) == whole).all()
    assert (shards.stream(1000, 9000) == whole[1000:9000]).all()
    ranges = shards.source_ranges()
    assert [path for path, _ in ranges] == [str(corpus / "a.jsonl"), str(corpus / "b.txt")]
    assert [i for _, r in ranges for i in r] == list(range(shards.n_documents))
    sources = [d.source for d in iter_documents(tmp_path, "train")]
    assert all(sources[i] == path for path, r in ranges for i in (r.start, r.stop - 1))


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "foreign", "manifest"])
def test_damaged_shards_are_refused_by_name(corpus, tokenizer, tmp_path, damage):
    clean_documents(config_for(corpus), tmp_path, workers=1)
    folder = tmp_path / "train"
    write_shards(tmp_path, "train", tokenizer, workers=1)
    path = folder / "tokens-00000.npy"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-2])
    elif damage == "missing":
        path.unlink()
    elif damage == "foreign":
        path.write_bytes(b"not an array".ljust(len(data), b" "))
    else:
        path = folder
        (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError) as caught:
        Shards.open(folder)
    assert str(path) in str(caught.value)
    if damage == "foreign":
        with pytest.raises(DataError, match="is not an array file"):
            Shards.open(folder, verify=False)


def test_another_tokenizer_is_another_set_of_shards(corpus, tokenizer, tmp_path):
    clean_documents(config_for(corpus), tmp_path / "out", workers=1)
    first = write_shards(tmp_path / "out", "valid", tokenizer, workers=1)
    from octavo.tokenizer.config import ByteBPE

    train(ByteBPE(vocab_size=300), iter_texts(tmp_path / "out", "train")).save(tmp_path / "bpe")
    second = write_shards(tmp_path / "out", "valid", tmp_path / "bpe", workers=1)
    assert second.vocab_hash != first.vocab_hash and second.n_tokens < first.n_tokens
    assert second.n_bytes == first.n_bytes


def test_tokenising_that_was_broken_off_goes_on_and_leaves_nothing_of_another(
    corpus, tokenizer, tmp_path, small_segments
):
    """Finished parts are taken over as they are; those of another tokenizer are gone from the folder."""
    clean_documents(config_for(corpus), tmp_path, workers=1)
    folder = tmp_path / "train"

    def stop(stage, done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        write_shards(tmp_path, "train", tokenizer, workers=1, progress=stop)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("tokens-*.npy")}
    assert kept and not (folder / "manifest.json").exists()
    stray = folder / "tokens-99999.npy"
    stray.write_bytes(b"of another")
    write_shards(tmp_path, "train", tokenizer, workers=1)
    now = {path.name: path.stat().st_mtime_ns for path in folder.glob("tokens-*.npy")}
    assert len(now) > len(kept) and {name: now[name] for name in kept} == kept
    assert not stray.exists()
