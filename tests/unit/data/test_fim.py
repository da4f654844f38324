"""Fill in the middle: what rows tell, and that a model trained on them fills gaps by what comes after."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.batch import Batch
from octavo.config import Recipe
from octavo.data.fim import FimRows
from octavo.data.loader import Loader, pretraining_loader
from octavo.data.pack import FIELDS, StreamRows
from octavo.data.shards import Shards
from octavo.errors import ConfigErrors, UnsupportedError
from octavo.infer.infill import encode_gap
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.objectives.likelihood import CausalLikelihood
from octavo.tokenizer import Tokenizer, train
from octavo.tokenizer.config import Byte
from octavo.tokenizer.special import FIM

BOS, EOS, PAD = 1, 2, 0
BEGIN, HOLE, END = MARKERS = (7, 8, 9)


class MemoryShards(Shards):
    """Shards whose documents are given, between bos and eos."""

    def __init__(self, documents):
        whole = [[BOS, *document, EOS] for document in documents]
        self.folder, self.fingerprint = "memory", f"{documents}"
        self.special = {"pad": PAD, "bos": BOS, "eos": EOS}
        self.n_documents, self.n_tokens = len(whole), sum(map(len, whole))
        self.offsets = np.concatenate([[0], np.cumsum([len(d) for d in whole])]).astype(np.int64)
        self.tokens = np.concatenate(whole).astype(np.int64)

    def stream(self, start, stop):
        assert 0 <= start <= stop <= self.n_tokens
        return self.tokens[start:stop]

    def source_ranges(self):
        return [("memory", range(self.n_documents))]


def numbered(lengths):
    """Documents of different numbers, so that every token says where it came from."""
    ends = np.cumsum([0, *lengths])
    return [list(range(1000 + a, 1000 + b)) for a, b in zip(ends, ends[1:])]


def told(packed, epoch=0):
    """The documents as the rows tell them, put together again, in the order of the shards."""
    found = {}
    for number in range(packed.n_rows):
        for piece in packed.pieces(epoch, number):
            tokens = packed.rows(epoch, np.array([number]))["tokens"][0]
            here = tokens[piece.start : piece.start + piece.slots].tolist()
            found.setdefault(piece.number, {})[piece.offset] = here
            if piece.tokens > piece.slots:  # the last token of a row is only a target there
                last = packed.rows(epoch, np.array([number]))["targets"][0][piece.start + piece.slots - 1]
                found[piece.number][piece.offset + piece.slots] = [int(last)]
    documents = []
    for number in sorted(found):
        whole = {at + i: token for at, part in found[number].items() for i, token in enumerate(part)}
        documents.append([whole[i] for i in range(len(whole))])
    return documents


def undone(document):
    """A told document in its own order, and which way it was told."""
    assert document[0] == BOS
    assert document[-1] == EOS
    inner = document[1:-1]
    if inner[:1] != [BEGIN]:
        return inner, "as it is"
    hole, end = inner.index(HOLE), inner.index(END)
    if hole == 1:
        rest, suffix = inner[end + 1 :], inner[2:end]  # prefix and middle stand together: nothing to put back
        return rest + suffix, "spm"
    return inner[1:hole] + inner[end + 1 :] + inner[hole + 1 : end], "psm"


lengths = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@pytest.mark.rows("A10")
@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(2, 40), st.sampled_from([0.3, 1.0]), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_every_document_comes_back_whole_and_to_itself(sizes, seq_len, rate, spm, shuffle):
    documents = numbered(sizes)
    packed = FimRows(StreamRows(MemoryShards(documents), seq_len, seed=5, shuffle=shuffle), MARKERS, rate=rate, spm=spm)
    assert [undone(document)[0] for document in told(packed)] == documents
    batch = packed.rows(0, np.arange(packed.n_rows))
    assert tuple(batch) == FIELDS
    assert (batch["targets"][:, :-1] == batch["tokens"][:, 1:])[batch["valid"][:, 1:]].all()
    assert batch["loss_mask"].sum() == packed.lengths.sum() - len(sizes) == packed.report().targets
    if rate == spm == 1:  # with an empty prefix the two orders are one
        assert {undone(document)[1] for document in told(packed)} == {"spm"}


@pytest.mark.rows("A10")
def test_no_target_is_of_another_document():
    packed = FimRows(StreamRows(MemoryShards(numbered([9, 4, 17, 6])), 11, seed=1), MARKERS, rate=1.0)
    for number in range(packed.n_rows):
        row = {name: values[0] for name, values in packed.rows(0, np.array([number])).items()}
        for piece in packed.pieces(0, number):
            assert len(set(row["doc_ids"][piece.start : piece.start + piece.slots])) == 1
        learnt = np.flatnonzero(row["loss_mask"])
        assert (row["tokens"][learnt] != EOS).all()  # nothing is foretold from the end of a document


def test_it_is_a_function_of_seed_and_document_alone():
    """Not of the pass, the order, how rows are cut, or which other documents are read."""
    documents = numbered([20] * 40)
    shards = MemoryShards(documents)

    def ways(seq_len, seed=3, epoch=0, **named):
        return told(FimRows(StreamRows(shards, seq_len, seed=seed, **named), MARKERS, rate=0.5, spm=0.5), epoch)

    first = ways(16)
    assert first == ways(16) == ways(50) == ways(16, epoch=1) == ways(16, shuffle=False)
    assert first[10:30] == ways(16, documents=range(10, 30))
    assert first != ways(16, seed=4)
    one, other = (FimRows(StreamRows(shards, 16, seed=3), MARKERS, rate=rate) for rate in (0.5, 0.6))
    assert one.fingerprint != other.fingerprint != StreamRows(shards, 16, seed=3).fingerprint


def test_shares_and_cuts_are_spread_evenly():
    n, size = 4000, 9
    stream = StreamRows(MemoryShards(numbered([size] * n)), 64, seed=2, shuffle=False)
    packed = FimRows(stream, MARKERS, rate=0.5, spm=0.25)
    assert abs(packed.chosen.mean() - 0.5) < 0.03
    assert abs(packed.suffix_first[packed.chosen].mean() - 0.25) < 0.03
    cuts = (packed.places * (size + 1)).astype(int)
    assert set(cuts.flatten().tolist()) == set(range(size + 1))  # before the first and behind the last too
    assert np.abs(np.bincount(cuts.flatten()) / cuts.size - 1 / (size + 1)).max() < 0.01
    assert abs(np.corrcoef(packed.places.T)[0, 1]) < 0.05


def test_the_two_orders_by_hand():
    shards = MemoryShards([[10, 11, 12, 13, 14]])
    for spm, wanted in (
        (0.0, [BOS, BEGIN, 10, HOLE, 13, 14, END, 11, 12, EOS]),
        (1.0, [BOS, BEGIN, HOLE, 13, 14, END, 10, 11, 12, EOS]),
    ):
        packed = FimRows(StreamRows(shards, 32, seed=0), MARKERS, rate=1.0, spm=spm)
        packed.places = np.array([[0.6, 0.2]])  # cuts at 3 and 1 of the five
        assert told(packed) == [wanted]


# ----------------------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("names", FIM)
def test_a_tokenizer_is_known_by_the_spelling_of_its_tokens(names, tmp_path):
    plain = train(Byte(), ())
    assert plain.fim is None
    made = plain._with(names, {})
    made.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fim == made.fim == tuple(range(plain.vocab_size, plain.vocab_size + 3))
    assert [again.tokens[i] for i in again.fim] == list(names)
    assert again.hash == made.hash != plain.hash
    assert again.decode(again.encode(f"a{names[0]}b")) == f"a{names[0]}b"
    assert not set(again.encode(names[1])) & set(again.fim)  # written by a user it is text


def test_tokens_are_added_once():
    once = train(Byte(), ()).with_fim()
    assert once.with_fim() is once
    assert once.fim is not None
    assert set(once.fim) <= once.special_ids


def test_a_model_without_them_cannot_fill_gaps():
    with pytest.raises(UnsupportedError, match="not trained to fill gaps"):
        encode_gap(train(Byte(), ()), "a", "b")


# -------------------------------------------------------------------------------------------------- the recipe


def test_code_is_a_recipe_and_tuning_has_no_gaps():
    recipe = Recipe.load("code")
    assert recipe.train is not None
    assert recipe.train.objective.fim.rate == 0.5
    with pytest.raises(ConfigErrors, match=r"objective\.fim is for the train section"):
        Recipe.load("quickstart", ["tune.objective={kind: causal, fim: {rate: 0.5}}"])
    with pytest.raises(ConfigErrors, match="rate"):
        Recipe.load("code", ["train.objective.fim.rate=1.5"])


# ---------------------------------------------------------------------------------------------- it is learnt


@pytest.mark.rows("A10")
def test_a_gap_is_filled_by_what_comes_after_it():
    """Documents are a digit twice: nothing before the gap says which, what comes after it does."""
    tokenizer = train(Byte(), ()).with_fim()
    assert tokenizer.fim is not None
    special = tokenizer.special
    documents = [list(tokenizer.encode(f"{d}{d}")) for d in "0123456789"] * 40
    shards = MemoryShards(documents)
    whole = [[special.bos, *document, special.eos] for document in documents]
    shards.tokens = np.concatenate(whole).astype(np.int64)
    shards.special = {"pad": special.pad, "bos": special.bos, "eos": special.eos}
    make = lambda packed: FimRows(packed, tokenizer.fim, rate=1.0)  # noqa: E731
    loader: Loader = pretraining_loader(shards, 14, 32, seed=1, changed=make)
    assert isinstance(loader.datasets[0], FimRows)
    config = Decoder.Config.model_validate(
        {
            "vocab_size": tokenizer.vocab_size, "d_model": 48, "n_layers": 2, "max_seq_len": 32,
            "blocks": {"b": {"mixer": {"n_heads": 4}}}, "positions": "learned",
        }
    )  # fmt: skip
    torch.manual_seed(0)
    model, objective = build(config, seed=1), CausalLikelihood()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    names = {field.name for field in dataclasses.fields(Batch)} & set(FIELDS)
    for step in range(200):
        arrays = loader.batch(step)
        batch = Batch(**{name: torch.from_numpy(arrays[name]) for name in names})
        out = model(Inputs(batch.tokens, doc_ids=batch.doc_ids, valid=batch.valid.bool()))
        loss = objective.loss_sum(out, batch) / objective.weight(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    right = 0
    for digit in "0123456789":
        with torch.no_grad():
            logits = model(Inputs(torch.tensor([encode_gap(tokenizer, "", digit)]))).logits[0, -1]
        allowed = torch.tensor([tokenizer.encode(d)[0] for d in "0123456789"])
        right += int(logits[allowed].argmax()) == int(digit)
    assert right >= 9


def test_the_prompt_is_how_training_tells_it():
    tokenizer = train(Byte(), ()).with_fim()
    assert tokenizer.fim is not None
    special = tokenizer.special
    text, (a, b) = "abcdef", (2, 4)
    shards = MemoryShards([tokenizer.encode(text)])
    shards.tokens = np.array([special.bos, *tokenizer.encode(text), special.eos])
    shards.special = {"pad": special.pad, "bos": special.bos, "eos": special.eos}
    packed = FimRows(StreamRows(shards, 64, seed=0), tokenizer.fim, rate=1.0)
    packed.places = np.array([[a / 7 + 0.01, b / 7 + 0.01]])
    row = packed.rows(0, np.array([0]))["tokens"][0].tolist()
    prompt = encode_gap(tokenizer, text[:a], text[b:])
    assert row[: len(prompt)] == prompt
    assert row[len(prompt) : len(prompt) + b - a] == tokenizer.encode(text[a:b])
