"""Whatever a model would write: what comes out is JSON under its schema, matches its pattern, follows its grammar."""

import json
import random
import re
import sys
from pathlib import Path

import jsonschema
import pytest
import torch

from octavo.cli.main import main
from octavo.errors import ConfigError
from octavo.infer import constraints
from octavo.infer.constraints import GrammarError
from octavo.infer.engine import Engine
from octavo.infer.generate import best, generate, pieces
from octavo.infer.request import EngineConfig, Request
from octavo.infer.sampling import SamplingConfig
from octavo.infer.text import Completion, Piece, TokenScore
from octavo.language_model import LanguageModel
from octavo.models.decoder import Decoder, build
from octavo.tokenizer import BPE, Byte, ByteBPE, Character, Tokenizer, Unigram, WordPiece, train

TEXTS = [
    '{"name": "Ada", "age": 36, "list": [1, 2.5, true, false, null]}',
    "To be, or not to be: that is it!",
    "你好 🎉",
]
MIXERS = {
    "attention": {"mixer": {"kind": "attention", "n_heads": 2}},
    "window": {"mixer": {"kind": "attention", "n_heads": 2, "window": 9}},
    "mamba2": {"mixer": {"kind": "mamba2", "n_heads": 4, "d_state": 8}},
    "lstm": {"mixer": {"kind": "lstm"}, "channel": None},
}
KINDS = {
    "byte": Byte(),
    "byte_bpe": ByteBPE(vocab_size=300),
    "bpe": BPE(vocab_size=200),
    "unigram": Unigram(vocab_size=400, byte_fallback=True),
    "character": Character(),
    "wordpiece": WordPiece(vocab_size=200),
}


def tokenizer_of(kind: str) -> Tokenizer:
    return train(KINDS[kind], TEXTS * 20 + [chr(i) for i in range(32, 127)])


def model_of(tokenizer: Tokenizer, kind: str = "attention", seed: int = 3, max_seq_len: int = 1024) -> Decoder:
    values = {"vocab_size": tokenizer.vocab_size, "d_model": 16, "n_layers": 1, "max_seq_len": max_seq_len}
    return build(Decoder.Config.model_validate({**values, "blocks": {"block": MIXERS[kind]}}), seed=seed).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(Byte(), [])


def random_schema(rng: random.Random, depth: int = 2) -> dict:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * 2 * (depth > 0))
    if kind == "string":
        low = rng.randint(0, 3)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 6)}
    if kind in ("integer", "number"):
        low = rng.randint(-50, 50)
        limits = {"minimum": low, "maximum": low + rng.randint(1, 100)}
        return {"type": kind, **(limits if rng.random() < 0.7 else {})}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 3, None, True, [1, "x"], {"a": 1}, 'he said "no" \\ é'], 3)}
    if kind == "const":
        return {"const": rng.choice(["only", 7, {"k": [1]}])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice([r"^[a-c]{2,4}$", r"^\d{3}-\d{2}$", r"^(yes|no)$"])}
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": low, "maxItems": low + 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    if kind == "object":
        names = rng.sample(["a", "name", "größe", "x y", 'n"q', "b"], rng.randint(0, 4))
        properties = {name: random_schema(rng, depth - 1) for name in names}
        required = [name for name in names if rng.random() < 0.6]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_what_random_models_write_is_valid_under_random_schemas(tokenizer: Tokenizer, kind: str) -> None:
    """Fifty schemas for each of four models: at temperature 1 every text that ends is JSON and valid."""
    rng = random.Random(kind)
    schemas = [random_schema(rng) for _ in range(50)]
    model = model_of(tokenizer, kind, seed=rng.randrange(99))
    # A random model rarely closes a string or a number by itself.
    config = SamplingConfig(
        max_new_tokens=700, seed=rng.randrange(99), logit_bias=dict.fromkeys(tokenizer.encode('"}],'), 1.5)
    )
    engine = Engine(model, tokenizer, EngineConfig(max_sequences=50, max_tokens=50 * 800))
    requests = []
    for schema in schemas:
        constraint = constraints.json_schema(tokenizer, schema)
        request = Request([5, 9, 3], config, stop_ids=tokenizer.stop_ids, constraint=constraint)
        engine.add(request)
        requests.append(request)
    texts, reasons = dict.fromkeys(requests, ""), {}
    for request, piece in engine.run():
        assert isinstance(piece, Piece), piece
        texts[request] += piece.text
        reasons[request] = piece.finish_reason
    for request, schema in zip(requests, schemas, strict=True):
        assert reasons[request] == "stop", (schema, texts[request])
        jsonschema.validate(json.loads(texts[request]), schema)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_tokenizer(kind: str) -> None:
    """Patterns in letters that every kind can spell, from the very beginning of a text and in the middle of one."""
    tokenizer = tokenizer_of(kind)
    model = model_of(tokenizer, max_seq_len=256)
    # What a kind without white space of its own decodes has spaces between its words.
    patterns = [r"[a-z ]{5,12}!", r" ?(To|be|not)( (or|that|is)){2,4}"]
    prompts = [[tokenizer.special.bos or 0], [tokenizer.special.bos or 0, *tokenizer.encode("To be")]]
    for pattern in patterns:
        made = generate(
            model, tokenizer, prompts * 3, SamplingConfig(max_new_tokens=99, seed=2),
            constraint=constraints.regex(tokenizer, pattern),
        )  # fmt: skip
        for completion in made:
            assert completion.finish_reason == "stop" and re.fullmatch(pattern, completion.text), completion.text


def test_the_first_token_is_held_to_what_it_is_decoded_to() -> None:
    """A word of WordPiece begins a text without the space that it has later, so ``to.*`` holds there only."""
    tokenizer = tokenizer_of("wordpiece")
    raw = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    to = raw.index(b" to")
    assert tokenizer.decode([to]) == "to"
    grammar = constraints.regex(tokenizer, "to.*")
    bos = tokenizer.special.bos or 0
    for prompt, allowed in (([bos], True), ([bos, to], False)):
        logits = torch.zeros(tokenizer.vocab_size)
        grammar(prompt, ()).mask(logits)
        assert (logits[to] == 0) == allowed


def test_a_text_may_end_where_the_grammar_may(tokenizer: Tokenizer) -> None:
    """``ab*``: after each b the model chooses between another one and any token that ends texts; ``ab`` ends alone."""
    eos, (a, b) = tokenizer.special.eos, tokenizer.encode("ab")
    follow = constraints.regex(tokenizer, "ab*")([5], [eos, 7])
    said = []
    for token in (a, b):
        logits = torch.zeros(tokenizer.vocab_size)
        follow.mask(logits)
        said.append(set((logits == 0).nonzero()[:, 0].tolist()))
        assert not follow.accept(token)
    assert said == [{a}, {b, eos, 7}]
    assert follow.accept(eos)
    whole = constraints.regex(tokenizer, "ab")([5], [eos])
    assert [whole.accept(a), whole.accept(b)] == [False, True]


def test_the_rest_of_the_distribution_is_the_models_own(tokenizer: Tokenizer) -> None:
    logits = torch.randn(tokenizer.vocab_size, generator=torch.Generator().manual_seed(1))
    free = logits.clone()
    constraints.regex(tokenizer, "[a-d]x")([5], ()).mask(logits)
    kept = torch.tensor(tokenizer.encode("abcd"))
    assert torch.equal(logits[kept], free[kept]) and int((logits > -torch.inf).sum()) == 4


def test_any_spelling_of_a_text_is_allowed() -> None:
    """Not only the tokenizer's own: where a text is certain the model still chooses how to cut it."""
    tokenizer = tokenizer_of("byte_bpe")
    logits = torch.zeros(tokenizer.vocab_size)
    text = max((tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)), key=len)
    constraints.regex(tokenizer, re.escape(text.decode()))(tokenizer.encode("x"), ()).mask(logits)
    spelt = {tokenizer.token_bytes(i) for i in (logits == 0).nonzero()[:, 0].tolist()}
    assert spelt == {b for i in range(tokenizer.vocab_size) if (b := tokenizer.token_bytes(i)) and text.startswith(b)}
    assert len(spelt) > 1


def test_a_lark_grammar_and_whole_characters(tokenizer: Tokenizer) -> None:
    grammar = 'start: greeting ("," " " NAME)+\ngreeting: "hi" | "你好"\nNAME: /[A-C][a-zé]{1,3}/'
    model = model_of(tokenizer)
    config = SamplingConfig(max_new_tokens=60, seed=1, logit_bias={tokenizer.encode(",")[0]: -1.0})
    made = generate(model, tokenizer, [[5]] * 4, config, constraint=constraints.lark(tokenizer, grammar))
    for completion in made:
        assert re.fullmatch(r"(hi|你好)(, [A-C][a-zé]{1,3})+", completion.text), completion.text


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"json_schema": {"type": "colour"}}, "JSON schema cannot be followed"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "Unsatisfiable"),
        ({"json_schema": [1]}, "is an object"),
        ({"json_schema": {"const": object()}}, "is not JSON"),
        ({"json_schema": {"$ref": "http://example.com/x"}}, "cannot be followed"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)"}, "regular expression cannot be followed"),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"regex": "a", "grammar": 'start: "a"'}, "cannot follow both"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(tokenizer: Tokenizer, wanted: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        constraints.follow(tokenizer, **wanted)
    assert "\n" not in str(refused.value)


def test_unenforceable_keywords_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(GrammarError) as refused:
        constraints.json_schema(tokenizer, {"type": "array", "uniqueItems": True})
    assert refused.value.keywords == ("uniqueItems",)


def test_a_dead_end_is_an_error_of_its_request_alone() -> None:
    """A vocabulary that cannot spell what a grammar wants fails that request; its neighbour goes on."""
    tokenizer = train(Character(), ["abc"])
    model = model_of(tokenizer, max_seq_len=64)
    engine = Engine(model, tokenizer, EngineConfig(max_sequences=2))
    config = SamplingConfig(max_new_tokens=5)
    stuck = Request([5], config, constraint=constraints.regex(tokenizer, "aZ"))
    free = Request([5], config)
    engine.add(stuck)
    engine.add(free)
    seen = list(engine.run())
    failures = [event for request, event in seen if request is stuck and not isinstance(event, Piece)]
    assert len(failures) == 1 and "allows no token" in str(failures[0].error)
    assert sum(request is free for request, _ in seen) == 5


def test_the_api(tokenizer: Tokenizer) -> None:
    lm = LanguageModel(model_of(tokenizer), tokenizer)
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    assert json.loads(lm.generate("x", json_schema=schema, seed=1))["ok"] in (True, False)
    assert re.fullmatch("[ab]{3}", lm.generate("x", regex="[ab]{3}", seed=1))
    assert "".join(lm.stream("x", grammar='start: "one" | "two"', seed=1)) in ("one", "two")
    with pytest.raises(ConfigError, match="cannot follow both"):
        lm.generate("x", regex="a", grammar='start: "a"')
    with pytest.raises(ConfigError, match="geometric path"):
        lm.generate("x", temperature_end=0.0, temperature_path="geometric")


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    LanguageModel(model_of(tokenizer, max_seq_len=256), tokenizer).save(path)
    return path


def test_the_verb(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"enum": ["red", "green"]}')
    grammar.write_text('start: "one" | "two"')
    verb = ["generate", str(folder), "x", "--seed", "1"]
    assert main([*verb, "--json-schema", str(schema)]) == 0
    assert capsys.readouterr().out in ('x"red"\n', 'x"green"\n')
    assert main([*verb, "--regex", "[ab]{3}", "--draft", "lookup"]) == 0
    assert re.fullmatch("x[ab]{3}\n", capsys.readouterr().out)
    assert main([*verb, "--grammar", str(grammar), "--best-of", "3", "--n", "2"]) == 0
    assert re.fullmatch("--- 1\nx(one|two)\n--- 2\nx(one|two)\n", capsys.readouterr().out)
    assert main([*verb, "--temperature-end", "0.1", "--temperature-path", "geometric", "--max-new-tokens", "3"]) == 0
    assert main([*verb, "--best-of", "2", "--max-new-tokens", "3", "--typical-p", "0.5"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "("], "unclosed group"),
        (["--json-schema", "nowhere.json"], "cannot be read"),
        (["--json-schema", __file__], "is not JSON"),
        (["--regex", "a", "--grammar", __file__], "cannot follow both"),
        (["--regex", "a", "--beams", "2"], "follows no grammar"),
        (["--best-of", "2", "--n", "3"], "--best-of 2"),
        (["--temperature-end", "0", "--temperature-path", "geometric"], "geometric path"),
        (["--temperature-path", "steep"], "--temperature-path"),
    ],
)
def test_the_verb_refuses_in_one_line(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), "x", *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_without_llguidance_what_is_missing_is_said(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="needs llguidance") as refused:
        constraints.regex(tokenizer, "a")
    assert "octavo[structured]" in refused.value.fix


def test_constrained_texts_do_not_depend_on_their_neighbours(tokenizer: Tokenizer) -> None:
    model, grammar = model_of(tokenizer), constraints.regex(tokenizer, "[a-z]{2,20}")
    together = generate(model, tokenizer, [[5], [6, 7]], SamplingConfig(seed=4), constraint=grammar)
    alone = generate(model, tokenizer, [[6, 7]], SamplingConfig(seed=5), constraint=grammar)
    assert together[1] == alone[0]
    streamed = list(pieces(model, tokenizer, [[6, 7]], SamplingConfig(seed=5), constraint=grammar))
    assert "".join(piece.text for piece in streamed) == alone[0].text


def test_best_of_is_the_best_by_mean_log_probability(tokenizer: Tokenizer) -> None:
    def drawn(*values: float) -> Completion:
        return Completion(str(values), (1,) * len(values), "stop", tuple(TokenScore(1, v) for v in values))

    short, long, bad = drawn(-1.0), drawn(-0.5, -1.0, -0.9), drawn(-3.0, -0.1)
    assert best([short, bad, long], 2) == [long, short] and best([bad, bad]) == [bad]
    model = model_of(tokenizer)
    config = SamplingConfig(max_new_tokens=6, seed=1)
    all_drawn = generate(model, tokenizer, [[5, 9]] * 4, config, n_top=0)
    means = [sum(score.logprob for score in one.scores) / 6 for one in all_drawn]
    lm = LanguageModel(model, tokenizer)
    lm.prompt_ids = lambda prompt: [5, 9]  # type: ignore[method-assign]
    assert lm.complete("", config, best_of=4) == all_drawn[means.index(max(means))]
    assert len({one.text for one in all_drawn}) > 1
