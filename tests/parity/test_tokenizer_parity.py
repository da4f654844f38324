"""Tokenizers against transformers, the `tokenizers` trainers and sentencepiece."""

import io
import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit" / "tokenizer"))

from tokenizer_texts import CHATML_PLAIN, CHINESE, CODE, KINDS, LLAMA2, LLAMA3, MIXED, PROSE, TEXTS, trained

from octavo.tokenizer import Tokenizer, bpe, unigram
from octavo.tokenizer.pieces import unmap_bytes

CORPORA = {
    "prose": Counter(PROSE.split()),
    "code": Counter(CODE.split()),
    "chinese": Counter(CHINESE.split()),
    "mixed": Counter((MIXED * 4).split()),
    "repeats": Counter({"aaaa": 3, "aaaaaa": 2, "abababab": 5, "bababa": 2, "aab": 1, "baa": 4}),
    "random": Counter(random.Random(3).choices(["".join(w) for w in itertools.product("abc", repeat=5)], k=300)),
}


@pytest.mark.rows("T3")
@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("min_frequency", [1, 3])
def test_merges_equal_those_of_the_library(corpus, min_frequency):
    tokenizers = pytest.importorskip("tokenizers")
    words = CORPORA[corpus]
    rust = tokenizers.Tokenizer(tokenizers.models.BPE())
    rust.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    alphabet = {char for word in words for char in word}
    size = len(alphabet) + 150
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, min_frequency=min_frequency, show_progress=False)
    rust.train_from_iterator([" ".join([word] * n) for word, n in words.items()], trainer)
    theirs = [tuple(pair) for pair in json.loads(rust.to_str())["model"]["merges"]]
    steps = list(bpe.train_steps(words, len(theirs) + 1, min_frequency=min_frequency))
    # The library stops at its vocabulary size; a merge that makes a known token again costs it no entry.
    ours = [step.pair for step in steps][: len(theirs)]
    assert ours == theirs
    assert len(ours) >= 5
    for word in list(words)[:200]:
        assert list(bpe.encode(word, ours)) == rust.encode(word).tokens


@pytest.mark.rows("T4")
def test_byte_level_ids_are_those_of_the_plain_encoder():
    tokenizer = trained("byte_bpe")
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_json())["model"]["merges"]]
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.Tokenizer.from_str(tokenizer.to_json()).pre_tokenizer
    for text in [PROSE[:2000], CHINESE, MIXED]:
        words = [word for word, _ in split.pre_tokenize_str(text)]
        pieces = [piece for word in words for piece in bpe.encode(word, merges)]
        assert pieces == [tokenizer.tokens[i] for i in tokenizer.encode(text)]
        assert b"".join(map(unmap_bytes, pieces)) == text.encode()


@pytest.mark.rows("T5")
@pytest.mark.parametrize("kind", ["unigram", "unigram-bytes"])
def test_library_finds_the_viterbi_path(kind):
    tokenizer = trained(kind)
    vocab = json.loads(tokenizer.to_json())["model"]["vocab"]
    scores = {piece: score for piece, score in vocab[6:] if not piece.startswith("<0x")}
    for word in sorted(set(PROSE.split()))[:300]:
        text = "▁" + word
        path, best = unigram.viterbi(text, scores)
        if not path:
            continue
        found = [tokenizer.tokens[i] for i in tokenizer.encode(" " + word)]
        assert sum(scores[piece] for piece in found) == pytest.approx(best, abs=1e-9)


@pytest.fixture(scope="module")
def sentencepiece_model():
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in PROSE.splitlines() if line.strip()),
        model_writer=model,
        vocab_size=300,
        model_type="unigram",
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.rows("T5")
def test_paths_of_sentencepiece(sentencepiece_model):
    sp = sentencepiece_model
    scores = {sp.id_to_piece(i): sp.get_score(i) for i in range(3, sp.get_piece_size())}
    for word in sorted(set(PROSE.split()))[:250]:
        text = "▁" + word
        path, best = unigram.viterbi(text, scores)
        if not path:
            continue
        theirs = sp.encode(word, out_type=str)
        assert sum(scores[piece] for piece in theirs) == pytest.approx(best, abs=1e-4)
        ours = [score for _, score in unigram.n_best(text, scores, 4)]
        others = sp.nbest_encode_as_pieces(word, 4)
        assert [sum(scores[p] for p in split) for split in others] == pytest.approx(ours, abs=1e-4)


@pytest.mark.rows("T5")
def test_training_is_as_good_as_that_of_sentencepiece(sentencepiece_model):
    sp = sentencepiece_model
    theirs = {sp.id_to_piece(i): sp.get_score(i) for i in range(3, sp.get_piece_size())}
    words = Counter("▁" + word for word in PROSE.split())
    *_, last = unigram.train_steps(words, len(theirs), seed_size=1500, max_chars=12)

    def nats(scores):
        counted = [(unigram.log_probability(w, scores), n) for w, n in words.items()]
        return -sum(score * n for score, n in counted) / sum(words.values())

    assert nats(last.scores) < nats(theirs) * 1.02


# -- transformers


def hugging_face(tokenizer: Tokenizer, folder: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.rows("T1", "T2")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids_and_text(kind, tmp_path):
    ours = trained(kind)
    theirs = hugging_face(ours, tmp_path)
    assert len(theirs) == ours.vocab_size
    special = ours.special
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (special.pad, special.bos, special.eos)
    assert theirs.unk_token_id == special.unk
    for text in [*TEXTS, "  two  spaces ", "\n\n", "x" * 300, "<b> & <0x41>"]:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert theirs(text).input_ids == [special.bos, *ids]  # a document begins with bos
    parsed = "the <|im_end|>cat<|eos|>"
    assert ours.encode(parsed, parse_special=True) == theirs(parsed, add_special_tokens=False).input_ids


TALKS = [
    [{"role": "user", "content": " What is <b>? "}, {"role": "assistant", "content": "A tag.\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好\n\n"},
        {"role": "assistant", "content": "Привет 👩‍🚀"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "ok"},
    ],
]


@pytest.mark.rows("T2")
@pytest.mark.parametrize("template", ["default", CHATML_PLAIN, LLAMA2, LLAMA3], ids=["default", "plain", "l2", "l3"])
def test_transformers_renders_the_same(template, tmp_path):
    base = trained("byte_bpe")
    source = base.chat_template if template == "default" else template
    ours = Tokenizer(base.to_json(), special=base.special_text, chat_template=source)
    theirs = hugging_face(ours, tmp_path)
    for talk, prompt in itertools.product(TALKS, [False, True]):
        rendered = ours.render(talk, add_generation_prompt=prompt)
        assert rendered.text == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
        masked = template == "default"
        result = theirs.apply_chat_template(
            talk, add_generation_prompt=prompt, return_dict=True, return_assistant_tokens_mask=masked
        )
        assert rendered.ids == result["input_ids"]
        if masked:
            assert rendered.loss_mask == result["assistant_masks"]


@pytest.mark.rows("T2")
def test_transformers_renders_tools_the_same(tmp_path):
    ours = trained("byte_bpe")
    theirs = hugging_face(ours, tmp_path)
    tools = [{"type": "function", "function": {"name": "add", "description": "a <b> é", "parameters": {}}}]
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "1+1?"}]
    rendered = ours.render(talk, tools=tools, add_generation_prompt=True)
    assert rendered.ids == theirs.apply_chat_template(talk, tools=tools, add_generation_prompt=True)["input_ids"]


@pytest.mark.rows("T2")
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_tokenizers_saved_by_transformers_load(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    normalizers, decoders, pre, models = (
        getattr(tokenizers, name) for name in ("normalizers", "decoders", "pre_tokenizers", "models")
    )
    text = "hello world, hello 你好 there"
    if family == "llama":
        rust = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        rust.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        names = [*special.values(), *(f"<0x{b:02X}>" for b in range(256))]
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False)
        rust.train_from_iterator([PROSE.replace(" ", "▁")[:3000]], trainer)
        spec = json.loads(rust.to_str())
        spec["added_tokens"] = spec["added_tokens"][:3]
        rust = tokenizers.Tokenizer.from_str(json.dumps(spec))
    elif family == "bert":
        rust = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        rust.normalizer = normalizers.BertNormalizer(lowercase=True)
        rust.pre_tokenizer = pre.BertPreTokenizer()
        rust.decoder = decoders.WordPiece(cleanup=True)
        special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=list(special.values()), show_progress=False
        )
        rust.train_from_iterator([PROSE, text], trainer)
    else:
        rust = tokenizers.Tokenizer(models.Unigram())
        rust.pre_tokenizer = pre.Metaspace()
        rust.decoder = decoders.Metaspace()
        special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=300, special_tokens=list(special.values()), unk_token="<unk>", show_progress=False
        )
        rust.train_from_iterator(PROSE.splitlines(), trainer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **special)
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.vocab_size == len(theirs)
    for line in [text, *(line for line in PROSE.splitlines() if line.strip())][:150]:
        ids = theirs(line, add_special_tokens=False).input_ids
        assert ours.encode(line) == ids
        decoded = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == decoded
        stream = ours.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == decoded
