"""Tokenizers on disk."""

import json
import random

import pytest
from tokenizer_texts import MIXED, trained

from octavo.errors import CheckpointError, OctavoError
from octavo.tokenizer import CHATML, Tokenizer
from octavo.tokenizer.pieces import byte_alphabet


def edit(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(value))


def test_what_is_saved_is_loaded(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "new" / "folder")
    again = Tokenizer.load(tmp_path / "new" / "folder")
    assert again.hash == any_tokenizer.hash
    assert again.special == any_tokenizer.special
    assert again.chat_template == CHATML
    assert again.to_json() == any_tokenizer.to_json()
    assert again.encode(MIXED) == any_tokenizer.encode(MIXED)
    again.save(tmp_path / "twice")
    for file in (tmp_path / "new" / "folder").iterdir():
        assert (tmp_path / "twice" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.rows("T2")
def test_layout_is_the_one_others_read(make, tmp_path):
    make("byte_bpe").save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == (tmp_path / "chat_template.jinja").read_text() == CHATML
    assert (config["pad_token"], config["eos_token"]) == ("<|pad|>", "<|eos|>")


def test_bare_tokenizer_json_gives_the_same_ids(make, tmp_path):
    make("byte_bpe").save(tmp_path)
    for file in tmp_path.iterdir():
        if file.name != "tokenizer.json":
            file.unlink()
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        bare = Tokenizer.load(path)
        assert bare.encode(MIXED) == make("byte_bpe").encode(MIXED)
        assert (bare.special.pad, bare.special.bos, bare.special.eos) == (0, 1, 2)
        assert bare.chat_template is None


def test_template_file_wins_over_the_config_and_lists_are_read(make, tmp_path):
    make("byte_bpe").save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(tmp_path).chat_template == "from the file"
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.load(tmp_path).chat_template == CHATML
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    edit(tmp_path / "tokenizer_config.json", chat_template=several)
    assert Tokenizer.load(tmp_path).chat_template == "d"
    edit(tmp_path / "tokenizer_config.json", chat_template=None)
    assert Tokenizer.load(tmp_path).chat_template is None


def test_roles_and_added_tokens_from_the_config(make, tmp_path):
    make("byte_bpe").save(tmp_path)
    size = make("byte_bpe").vocab_size
    edit(
        tmp_path / "tokenizer_config.json",
        eos_token={"content": "<|stop|>", "lstrip": False},
        pad_token=None,
        octavo={},
        added_tokens_decoder={
            str(size): {"content": "<|stop|>", "special": True},
            str(size + 1): {"content": "<tool>", "special": False},
        },
    )
    (tmp_path / "special_tokens_map.json").write_text("{}")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.special.eos == size
    assert loaded.special.pad is None
    assert loaded.special.turn_end == 4  # read off the template
    assert loaded.vocab_size == size + 2
    assert size not in loaded.encode("<|stop|>")
    assert loaded.encode("<|stop|>", parse_special=True) == [size]
    assert loaded.encode("a<tool>b")[1] == size + 1  # not special: part of the language
    assert loaded.decode(loaded.encode("a<tool>b<|stop|>")) == "a<tool>b<|stop|>"
    assert loaded.token_bytes(size + 1) == b"<tool>"


def gpt2_folder(folder, names=("encoder.json", "vocab.bpe")):
    letters = list(byte_alphabet().values())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("ä", "½")]
    tokens = [*letters, *(a + b for a, b in merges), "<|endoftext|>"]
    (folder / names[0]).write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return tokens


@pytest.mark.rows("T4")
@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_files(tmp_path, names):
    tokens = gpt2_folder(tmp_path, names)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.tokens == tuple(tokens)
    assert [loaded.tokens[i] for i in loaded.encode("hello world")] == ["hello", "Ġw", "o", "r", "l", "d"]
    assert loaded.special.eos == loaded.special.bos == len(tokens) - 1
    assert loaded.special.pad is None  # never eos in disguise
    assert loaded.encode("<|endoftext|>", parse_special=True) == [len(tokens) - 1]
    assert len(loaded.encode("<|endoftext|>")) > 5
    assert loaded.token_bytes(tokens.index("ä½")) == b"\xe4\xbd"  # half of a Chinese character
    assert loaded.decode(loaded.encode(MIXED)) == MIXED
    assert sum(len(loaded.token_bytes(i)) for i in loaded.encode(MIXED)) == len(MIXED.encode())


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model": null}',
        '{"model": {"type": "BPE"}}',
        '{"model": {"type": "Magic", "vocab": {}}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
        '{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [{"content": "x"}]}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [{"content": "x", "id": 9}]}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "CTC"}}',
        '{"model": {"type": "WordLevel", "vocab": {"a": 99999999999}}}',
        '{"model": {"type": "WordLevel", "vocab": {"a": -1}}}',
        '{"model": {"type": "Unigram", "vocab": [["a"]]}}',
        '{"model": {"type": "WordLevel", "vocab": {"a": 4000000000}}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [{"content": "x", "id": 4e9}]}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [[1, 2]]}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "Replace"}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": 5}',
        "[" * 100_000,
        "\ufeff{}",
    ],
)
def test_damaged_files_are_refused(tmp_path, damage):
    (tmp_path / "tokenizer.json").write_text(damage, encoding="utf-8")
    with pytest.raises(CheckpointError):
        Tokenizer.load(tmp_path)


def mutate(value, rng):
    """One random change somewhere inside a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return {**value, key: mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], mutate(value[at], rng), *value[at + 1 :]]
    return rng.choice([None, -1, 2**31, 1e300, "", "x", "<|eos|>", [], {}, [[]], True, "ByteLevel", {"type": "Fuse"}])


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram-bytes", "wordpiece", "word"])
def test_mutated_files_load_or_are_refused(kind):
    rng = random.Random(7)
    spec = json.loads(trained(kind).to_json())
    spec["model"]["vocab"] = (
        spec["model"]["vocab"] if kind != "byte_bpe" else dict(list(spec["model"]["vocab"].items())[:300])
    )
    spec["model"]["merges"] = [] if kind == "byte_bpe" else spec["model"].get("merges", [])
    for _ in range(150):
        try:
            tokenizer = Tokenizer(json.dumps(mutate(spec, rng)))
            tokenizer.decode(tokenizer.encode("the <|eos|> 你"))
        except OctavoError:
            continue


@pytest.mark.parametrize("cut", [10, 100, 1000, 5000])
def test_truncated_files_are_refused(make, tmp_path, cut):
    make("byte_bpe").save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        whole = (tmp_path / name).read_bytes()
        if cut < len(whole):
            (tmp_path / name).write_bytes(whole[:cut])
            with pytest.raises(CheckpointError):
                Tokenizer.load(tmp_path)
        (tmp_path / name).write_bytes(whole)
    Tokenizer.load(tmp_path)


def test_missing_and_foreign_things_are_named(make, tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        Tokenizer.load(tmp_path / "nope")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(OctavoError, match=r"AutoTokenizer|no tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert "save_pretrained" in str(caught.value)
    make("byte_bpe").save(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8: byte 0"):
        Tokenizer.load(tmp_path)


def test_wrong_role_or_moved_id_is_refused(make, tmp_path):
    make("byte_bpe").save(tmp_path)
    edit(tmp_path / "tokenizer_config.json", eos_token="<|nowhere|>")
    with pytest.raises(CheckpointError, match=r"eos token '<\|nowhere\|>' is not in the vocabulary"):
        Tokenizer.load(tmp_path)
    edit(tmp_path / "tokenizer_config.json", eos_token="<|eos|>", added_tokens_decoder={"7": {"content": "<|eos|>"}})
    with pytest.raises(CheckpointError, match=r"has id 2 in tokenizer\.json and 7"):
        Tokenizer.load(tmp_path)


def test_truncation_in_the_file_does_not_shorten_ids(make, tmp_path):
    make("byte_bpe").save(tmp_path)
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit(tmp_path / "tokenizer.json", truncation=cut)
    assert len(Tokenizer.load(tmp_path).encode("a b c d e f")) > 4


def test_loaded_decoders_of_other_families():
    # A Llama-style chain: spaces as a mark, one put in front, bytes as <0xNN>.
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "<0xE4>": 5, "<0xBD>": 6, "<0xA0>": 7}
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    front = {"type": "Prepend", "prepend": "▁"}
    marks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [front, marks]},
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": vocab, "merges": [["▁", "a"]]},
    }
    tokenizer = Tokenizer(json.dumps(spec))
    ids = tokenizer.encode("ab 你a")
    assert ids == [4, 3, 1, 5, 6, 7, 2]
    assert tokenizer.decode(ids) == "ab 你a"
    assert tokenizer.token_bytes(4) == b" a"
    assert tokenizer.token_bytes(5) == b"\xe4"
    assert trained("byte").token_bytes(5) == b"\x00"
