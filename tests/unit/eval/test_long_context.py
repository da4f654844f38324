"""``octavo longcontext``: what is measured on which tokens, and what the command writes and refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from octavo.cli.main import main
from octavo.errors import ConfigError, DataError, UnsupportedError
from octavo.eval.long_context import METHODS, Plan, Texts, measure, passkey, perplexity, reading
from octavo.language_model import LanguageModel
from octavo.models.decoder import Decoder, build
from octavo.nn.attention import Attention
from octavo.nn.contracts import Inputs, Outputs
from octavo.tokenizer import Byte, train

PLAN = Plan(lengths=(32, 80), trained=32, texts=2, trials=3, choices=4, cue=6, key=4)


class Stream:
    """One document of counted tokens, or several."""

    def __init__(self, *lengths, vocab=19):
        self.rows = [np.arange(n, dtype=np.int32) % (vocab - 2) + 2 for n in lengths]
        self.n_documents = len(self.rows)

    def document(self, index):
        return self.rows[index]


def small(**settings):
    block = {"mixer": {"kind": "attention", "n_heads": 2, "n_kv_heads": 1}}
    config = {"d_model": 16, "n_layers": 1, "max_seq_len": 32, "vocab_size": 19, "blocks": {"b": block}}
    return build(Decoder.Config.model_validate(config | settings), seed=1)


class Copier:
    """A model that has read everything: it says what followed the last three tokens before, if they came before."""

    def __init__(self, vocab, wrong=False):
        self.vocab, self.wrong, self.training = vocab, wrong, False

    def new_state(self, rows, max_tokens):
        return Seen()

    def __call__(self, inputs, state=None, needs=("logits",)):
        state = state or Seen()
        rows = [seen + row for seen, row in zip(state.rows * len(inputs.tokens), inputs.tokens.tolist())]
        T = inputs.tokens.shape[1]
        guesses = [[self.guess(row[: len(row) - T + t + 1]) for t in range(T)] for row in rows]
        state.rows = rows
        logits = torch.nn.functional.one_hot(torch.tensor(guesses), self.vocab).float() * 20
        return Outputs(logits=logits, hidden=logits)

    def logits(self, hidden):
        return hidden

    def guess(self, row):
        for i in range(len(row) - 4, -1, -1):
            if row[i : i + 3] == row[-3:]:
                return (row[i + 3] + self.wrong) % self.vocab
        return 0


class Seen:
    def __init__(self):
        self.rows = [[]]

    def select(self, rows):
        self.rows = [self.rows[i] for i in rows][:1]


def test_texts_of_every_length_end_in_the_same_tokens():
    texts = Texts.choose(Stream(500, 60, 300, vocab=400), PLAN, bos=1, eos=None)
    for i in range(PLAN.texts):
        short, long = texts.text(i, 32)[0], texts.text(i, 80)[0]
        assert short[0] == long[0] == 1
        assert torch.equal(short[1:], long[-31:])
    assert texts.text(0, 80)[0, -1] != texts.text(1, 80)[0, -1]


@pytest.mark.parametrize("length", [32, 80])
def test_a_passkey_prompt_holds_the_cue_twice_and_its_key_once(length):
    plan = Plan(lengths=(32, 80), trained=32, trials=5, choices=4, cue=6, key=3)
    texts = Texts.choose(Stream(5000, vocab=5000), plan, bos=1, eos=None)
    places = []
    for trial in range(plan.trials):
        prompt = texts.prompt(trial, length)[0].tolist()
        cue, key = texts.cues[trial].tolist(), texts.keys[trial, 0].tolist()
        assert len(prompt) == length - plan.key and prompt[0] == 1 and prompt[-6:] == cue
        (at,) = [i for i in range(length - 12) if prompt[i : i + 9] == cue + key]
        places.append(at)
    assert places == sorted(places) and places[0] < length / 4 and places[-1] > length / 3


def test_a_model_that_copies_finds_every_key_and_one_that_miscopies_none():
    plan = Plan(lengths=(80,), trained=32, trials=6, choices=8)
    texts = Texts.choose(Stream(5000, vocab=5000), plan, bos=None, eos=None)
    ticks = []
    assert passkey(Copier(5000), texts, 80, plan, ticks.append) == 1.0
    assert ticks == [80] * 6
    assert passkey(Copier(5000, wrong=True), texts, 80, plan, ticks.append) == 0.0


def test_perplexity_is_that_of_the_last_tokens():
    model, texts = small(), Texts.choose(Stream(300), PLAN, bos=None, eos=None)
    got, seconds = perplexity(model, texts, 80, PLAN, lambda n: None)
    nats = []
    for i in range(PLAN.texts):
        ids = texts.text(i, 80)
        with torch.no_grad():
            said = model(Inputs(ids)).logits.log_softmax(-1)
        nats += [-float(said[0, t - 1, ids[0, t]]) for t in range(80 - 15, 80)]
    assert PLAN.n_scored == 15
    assert math.isclose(got, math.exp(np.mean(nats)), rel_tol=1e-5) and seconds > 0


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_reads_otherwise_beyond_the_trained_length_and_leaves_no_trace(method):
    model, ids = small().double().eval(), torch.arange(80)[None] * 7 % 19
    attention = next(module for module in model.modules() if isinstance(module, Attention))
    with torch.no_grad():
        before = model(Inputs(ids)).logits
        with reading(model, method, 32, 80):
            inside = model(Inputs(ids)).logits
        with reading(model, method, 32, 32):
            short = model(Inputs(ids[:, :16])).logits
        after = model(Inputs(ids)).logits
    assert torch.equal(before, after)
    assert type(attention.reader).__name__ == "FullReader"
    assert torch.equal(inside, before) == (method == "plain")
    assert torch.allclose(short, before[:, :16], atol=1e-5), "up to half the trained length all methods are the same"


def test_a_result_has_every_cell():
    result = measure(
        small(), Stream(300), Plan((32, 80), 32, ("plain", "lambda", "infllm"), texts=1, trials=1, cue=3, key=1)
    )
    cells = {(cell["method"], cell["length"]): cell for cell in result["cells"]}
    assert len(cells) == 6 and not [cell for cell in cells.values() if cell["why"]]
    assert all(cell["passkey"] in (0.0, 1.0) and cell["perplexity"] > 1 for cell in cells.values())
    per_token = 2 * 8 * 4  # keys and values of one head of 8 channels, in fp32
    assert cells["plain", 80]["state_bytes"] == 80 * per_token
    assert cells["lambda", 80]["state_bytes"] == cells["lambda", 32]["state_bytes"] == (28 + 4) * per_token + 8
    assert cells["infllm", 80]["apart_bytes"] == (80 - 4 - 16 - 2 * 5) * per_token
    assert result["chance"] == 1 / 8


def test_what_does_not_fit_a_model_is_left_out_or_refused():
    learned = small(positions={"kind": "learned"})
    result = measure(learned, Stream(300), Plan((32, 80), 32, ("plain", "yarn", "lambda"), texts=1, trials=0))
    why = [(cell["method"], cell["length"], bool(cell["why"])) for cell in result["cells"]]
    assert why == [
        ("plain", 32, False),
        ("plain", 80, True),
        *((m, n, True) for m in ("yarn", "lambda") for n in (32, 80)),
    ]
    with pytest.raises(UnsupportedError, match="lambda: the model has positions learned, not rope"):
        measure(learned, Stream(300), Plan((32,), 32, ("lambda",), trials=0))
    with pytest.raises(DataError, match="the longest text has 60 tokens, 81 are needed") as refused:
        measure(small(), Stream(60, 20), PLAN)
    assert "--lengths up to 59" in str(refused.value)
    with pytest.raises(ConfigError, match="16 tokens is too short"):
        measure(small(), Stream(300), Plan((16,), 32))


def test_the_command_on_a_folder(tmp_path, capsys):
    tokenizer = train(Byte(), [])
    config = Decoder.Config(d_model=16, n_layers=1, max_seq_len=32, vocab_size=tokenizer.vocab_size)
    LanguageModel(build(config, seed=1), tokenizer).save(tmp_path / "model")
    (tmp_path / "long.txt").write_text("one two three 三 " * 40, encoding="utf-8")
    words = ["longcontext", str(tmp_path / "model"), "--data", str(tmp_path / "long.txt"), "--lengths", "64,50",
             "--texts", "1", "--trials", "1"]  # fmt: skip
    chosen = ["--methods", "plain,pcw,lambda", "--out", str(tmp_path / "all.json"), "--plot", str(tmp_path / "a.svg")]
    assert main([*words, *chosen]) == 0
    shown = capsys.readouterr()
    assert "passkey found, 1 trials (chance 12.5%)" in shown.out
    assert [line.split()[0] for line in shown.out.splitlines() if line.startswith("lambda")] == ["lambda"] * 4
    result = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert result["plan"]["lengths"] == [50, 64] and len(result["cells"]) == 6
    assert "Perplexity against length" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert main([*words, "--methods", "plain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"] == {"plain": "as trained: the control"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "lamda"], "did you mean"),
        (["--lengths", "256;512"], "is not a list of numbers"),
        (["--lengths", "0,5"], "cannot be read"),
        (["--plot", "x.pdf"], "neither in .png nor in .svg"),
        ([], "does not exist"),
    ],
)
def test_the_command_refuses_before_any_model_is_loaded(options, said, tmp_path, capsys):
    assert main(["longcontext", str(tmp_path / "gone"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error[CONFIG]: ") and said in error
