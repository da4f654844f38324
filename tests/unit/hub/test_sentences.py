"""A folder that says how its texts become vectors is believed, against the sum written out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Pieces
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer

import octavo
from octavo.cli.main import main
from octavo.errors import CheckpointError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the bank of river gave money a sea and".split()]
TEXTS = ["the bank of the river", "money", "the sea and the river and the bank and a sea of money", "zzz the"]
LIMIT = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A BERT folder as transformers writes it, and its class."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    shape = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**shape, intermediate_size=24, max_position_embeddings=32, initializer_range=0.4)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    pieces = Pieces(WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    pieces.pre_tokenizer = BertPreTokenizer()
    names = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, **names).save_pretrained(folder)
    return folder, model


def says(folder, pooling, kinds=("Transformer", "Pooling", "Normalize"), text=None, more=None):
    places = ["", "1_Pooling", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i > 1)]
    modules = [{"idx": i, "path": place, "type": f"a.b.{kind}"} for i, (place, kind) in enumerate(zip(places, kinds))]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps(text or {"max_seq_length": LIMIT}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(more or {}))


def by_hand(model, pooling):
    vectors = []
    for text in TEXTS:
        words = [WORDS.index(word) if word in WORDS else 1 for word in text.split()][: LIMIT - 2]
        with torch.no_grad():
            hidden = model(torch.tensor([[2, *words, 3]])).last_hidden_state[0]
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]
        vectors.append((vector / vector.norm()).numpy())
    return np.stack(vectors)


@pytest.mark.rows("A7")
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_vectors_are_pooled_normed_and_cut_as_the_folder_says(made, pooling, spelling, tmp_path):
    folder, model = made
    old = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}[pooling]
    flags = {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False, f"pooling_mode_{old}": True}
    says(folder, flags if spelling == "old" else {"pooling_mode": pooling})
    wanted = by_hand(model, pooling)
    lm = octavo.load(folder)
    np.testing.assert_allclose(lm.embed(TEXTS), wanted, atol=2e-6)
    lm.save(tmp_path / "again")  # and a copy says the same
    np.testing.assert_allclose(octavo.load(tmp_path / "again").embed(TEXTS), wanted, atol=2e-6)
    longer = np.linalg.norm(lm.embed(TEXTS, normalise=False, max_tokens=32), axis=1)
    assert not np.allclose(longer, 1)


@pytest.mark.parametrize(
    ("pooling", "kinds", "text", "more", "said"),
    [
        ({"pooling_mode": "max"}, ("Transformer", "Pooling"), None, None, "the pooling max"),
        ({"pooling_mode": ["mean", "cls"]}, ("Transformer", "Pooling"), None, None, "the pooling mean, cls"),
        (
            {"pooling_mode": "mean"},
            ("Transformer", "Pooling", "Dense"),
            None,
            None,
            "steps Transformer, Pooling, Dense",
        ),
        ({"pooling_mode": "mean"}, ("Transformer", "Pooling"), {"do_lower_case": True}, None, "changes texts"),
        ({"pooling_mode": "mean"}, ("Transformer", "Pooling"), None, {"default_prompt_name": "q"}, "changes texts"),
    ],
)
def test_what_is_not_built_here_is_refused_unless_a_pooling_is_chosen(made, pooling, kinds, text, more, said, tmp_path):
    folder, _ = made
    says(folder, pooling, kinds, text, more)
    lm = octavo.load(folder)
    with pytest.raises(CheckpointError, match=said):
        lm.embed(TEXTS)
    assert lm.embed(TEXTS, pooling="mean").shape == (4, 16)
    lm.save(tmp_path / "again")
    with pytest.raises(CheckpointError, match="steps another"):
        octavo.load(tmp_path / "again").embed(TEXTS)


def test_a_damaged_list_of_steps_is_named(made):
    folder, _ = made
    says(folder, {"pooling_mode": "mean"})
    (folder / "modules.json").write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match=r"modules\.json does not make sense"):
        octavo.load(folder)


def test_the_command_follows_the_folder_and_its_own_options(made, tmp_path):
    folder, model = made
    says(folder, {"pooling_mode": "cls"})
    (tmp_path / "t.txt").write_text("\n".join(TEXTS) + "\n")
    out = str(tmp_path / "v.npy")
    assert main(["embed", str(folder), str(tmp_path / "t.txt"), "--out", out]) == 0
    np.testing.assert_allclose(np.load(out), by_hand(model, "cls"), atol=2e-6)
    assert main(["embed", str(folder), str(tmp_path / "t.txt"), "--out", out, "--pooling", "mean"]) == 0
    np.testing.assert_allclose(np.load(out), by_hand(model, "mean"), atol=2e-6)
