"""A quantised model: the original untouched, saved and read strictly, the same text before and after, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from octavo.cli.main import main
from octavo.errors import CheckpointError, ConfigError, DataError, UnsupportedError
from octavo.hub.folder import load_model, save_model
from octavo.language_model import LanguageModel
from octavo.models.decoder import Decoder, build
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.contracts import Inputs
from octavo.nn.projection import Projection
from octavo.nn.quantized import IntegerWeights, QuantizedGroupedProjection, QuantizedProjection, quantized_modules
from octavo.quantize.model import dequantized, quantize
from octavo.quantize.scheme import SCHEMES, Scheme, scheme_of
from octavo.quantize.text import calibration_rows
from octavo.tokenizer import Byte, Tokenizer, train

TIED = {"d_model": 32, "n_layers": 2, "max_seq_len": 48, "tie_embeddings": True, "init": {"std": 0.25}}
ATTENTION = {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}
TEXT = "Weights of a few bits are read in a fraction of the time; what they lose has to be measured. " * 30


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(Byte(), [])


def decoder(channel: dict | None = None, mixer: dict | None = None, **changes) -> Decoder:
    block = {"mixer": mixer or ATTENTION, "channel": channel or {"kind": "glu", "d_ff": 96}}
    config = TIED | {"vocab_size": 264, "blocks": {"block": block}} | changes
    return build(Decoder.Config.model_validate(config), seed=3).eval()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    return decoder(vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer) -> list[list[int]]:
    return calibration_rows([TEXT], tokenizer, 1024, 32)


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(Inputs(tokens)).logits


@torch.no_grad()
def away(one: torch.nn.Module, other: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Mean KL in nats from the first model's next-token distributions to the second's."""
    p, q = (logits(m, tokens).log_softmax(-1) for m in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


BOUNDS = {"int8": 2e-3, "int8-dynamic": 5e-3, "fp8": 4e-2, "fp8-e5m2": 0.12, "fp8-blocks": 6e-2, "int4": 0.3}


@pytest.mark.parametrize(("scheme", "most"), BOUNDS.items())
def test_every_scheme_stays_near_the_model(model, rows, scheme, most):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made, tokens = quantize(model, scheme), torch.tensor(rows[:4])
    assert 0 < away(model, made, tokens) < most
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(quantized_modules(made)) == 2 * 7 + 1
    assert torch.equal(made.embed.weight, model.embed.weight)


def test_the_loss_orders_the_schemes(model, rows):
    tokens = torch.tensor(rows[:6])
    loss = {name: away(model, quantize(model, name), tokens) for name in ("int8", "fp8", "fp8-e5m2", "int4")}
    assert 3 * loss["int8"] < loss["fp8"] < loss["fp8-e5m2"] / 1.5 < loss["int4"] / 1.5


def test_calibration_comes_nearer_than_rounding(model, rows):
    """The rows that are judged were not calibrated on."""
    half = len(rows) // 2
    judged = torch.tensor(rows[half:])
    rounded, solved = quantize(model, "int4"), quantize(model, "int4", rows[:half])
    assert away(model, solved, judged) < 0.7 * away(model, rounded, judged)


def test_a_tied_head_becomes_a_product_of_its_own(model):
    made = quantize(model, "int8")
    assert model.head is None and isinstance(made.head, QuantizedProjection) and not made.config.tie_embeddings
    kept = quantize(model, scheme_of("int8", head="kept"))
    assert kept.head is None and len(quantized_modules(kept)) == 2 * 7
    mixed = quantize(model, scheme_of("int4", head="int8"))
    assert (mixed.head.bits, mixed.blocks[0].layers["mixer"].mixer.q.bits) == (8, 4)


def test_a_bias_of_a_tied_head_is_kept():
    biased = decoder(head_bias=True)
    torch.nn.init.normal_(biased.head_bias)
    made = quantize(biased, "int8")
    assert torch.equal(made.head.bias, biased.head_bias)
    assert away(biased, made, torch.arange(40)[None]) < 1e-3


@pytest.mark.parametrize("calibrated", [False, True])
def test_experts_are_quantised_and_the_router_is_not(rows, calibrated):
    mixed = decoder(channel={"kind": "moe", "n_experts": 4, "experts_per_token": 2, "d_ff": 48})
    made = quantize(mixed, "int4", rows if calibrated else None)
    moe = made.blocks[0].layers["channel"].mixer
    assert isinstance(moe.experts.up, QuantizedGroupedProjection) and isinstance(moe.router, Projection)
    assert away(mixed, made, torch.tensor(rows[:4])) < (0.15 if calibrated else 0.4)


@pytest.mark.parametrize(
    "mixer", [{"kind": "retention", "n_heads": 2}, {"kind": "mamba2", "head_dim": 16, "d_state": 8}]
)
def test_recurrent_models_are_quantised_and_decode(mixer):
    plain = decoder(mixer=mixer)
    made = quantize(plain, "int8", [list(range(i, i + 32)) for i in range(8)])
    tokens = torch.arange(20)[None]
    assert away(plain, made, tokens) < 5e-3
    state = made.new_state(1, 20)
    with torch.no_grad():
        steps = [made(Inputs(tokens[:, i : i + 1]), state=state).logits[:, 0] for i in range(20)]
    torch.testing.assert_close(torch.stack(steps, 1), logits(made, tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_gives_the_same_model_again(model, tokenizer, tmp_path, scheme):
    lm = LanguageModel(quantize(model, scheme), tokenizer)
    assert lm.save(tmp_path / "small") == "octavo"
    again = octavo.load(tmp_path / "small")
    tokens = torch.arange(40)[None]
    assert torch.equal(logits(again.model, tokens), logits(lm.model, tokens))
    settings = {"max_new_tokens": 20, "temperature": 0.0}
    assert again.complete("Weights", **settings).ids == lm.complete("Weights", **settings).ids
    assert again.score(TEXT[:200]) == lm.score(TEXT[:200])
    states = again.model.state_dict()
    assert all(states[name].dtype == tensor.dtype for name, tensor in lm.model.state_dict().items())


def test_a_mixed_scheme_and_a_kept_head_come_back(model, rows, tmp_path):
    for head in ("int8", "kept"):
        made = quantize(model, scheme_of("int4", group=64, head=head), rows)
        save_model(made, tmp_path / head)
        assert torch.equal(
            logits(load_model(tmp_path / head), torch.arange(30)[None]), logits(made, torch.arange(30)[None])
        )


def test_the_file_is_as_small_as_it_says(model, tmp_path):
    save_model(quantize(model, scheme_of("int4", group=32)), tmp_path / "small")
    names = load_file(tmp_path / "small" / "model.safetensors")
    product = names["blocks.0.layers.mixer.mixer.q.codes"]
    assert product.dtype == torch.uint8 and product.shape == (32, 16)
    assert "blocks.0.layers.mixer.mixer.q.weight" not in names


def test_bf16_models_keep_their_dtype(model, tmp_path):
    made = quantize(decoder().bfloat16(), "int4")
    assert made.embed.weight.dtype == torch.bfloat16 and made.head.scales.dtype == torch.float16
    save_model(made, tmp_path / "small")
    again = load_model(tmp_path / "small")
    assert again.head.weight.dtype == torch.bfloat16
    assert torch.equal(logits(again, torch.arange(9)[None]), logits(made, torch.arange(9)[None]))


def damaged(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("head.scales"), "missing: head.scales"),
        (lambda t: t.update({"head.weight": torch.zeros(2)}), "not used: head.weight"),
        (lambda t: t.update({"head.scales": t["head.scales"].float()}), "head.scales holds torch.float32"),
        (lambda t: t.update({"head.codes": t["head.codes"][:-1].clone()}), "head.codes has"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(model, tmp_path, change, said):
    save_model(quantize(model, "int4"), tmp_path / "small")
    damaged(tmp_path / "small", change)
    with pytest.raises(CheckpointError, match=said):
        load_model(tmp_path / "small")


WORDS = (
    [],
    {"weights": {"kind": "integer", "bits": 3}, "others": {}},
    {"weights": {"kind": "float8"}, "others": {"x": None}},
    {"weights": {"kind": "integer"}},
    {"weights": {"kind": "integer"}, "others": []},
)


@pytest.mark.parametrize("words", WORDS)
def test_words_that_mean_nothing_are_refused(model, tmp_path, words):
    save_model(quantize(model, "int8"), tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": words}))
    with pytest.raises(CheckpointError, match=r"config\.json does not make sense: quantization"):
        load_model(tmp_path / "small")


def test_dequantised_weights_are_what_the_codes_stand_for(model):
    made = quantize(model, "int4")
    plain = dequantized(made)
    assert not quantized_modules(plain)
    torch.testing.assert_close(logits(plain, torch.arange(30)[None]), logits(made, torch.arange(30)[None]))


def test_what_cannot_be_is_refused(model, rows):
    with pytest.raises(ConfigError, match="quantised already"):
        quantize(quantize(model, "int8"), "int4")
    with pytest.raises(ConfigError, match="rounded to nearest"):
        quantize(model, "fp8", rows)
    with pytest.raises(ConfigError, match="share one set of weights"):
        quantize(decoder(shared=["block"]), "int4", rows)
    with pytest.raises(ConfigError, match="no scheme 'int3'") as error:
        scheme_of("int3")
    assert "int4" in str(error.value) or "int8" in str(error.value)
    with pytest.raises(ConfigError, match="group = 48"):
        scheme_of("int4", group=48)
    with pytest.raises(ConfigError, match="fp8 has no groups"):
        scheme_of("fp8", group=64)
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        quantize(model, "int8").train()


def test_an_encoder_decoder_is_rounded_and_not_calibrated(rows):
    small, own = {"d_model": 32, "n_layers": 1, "max_seq_len": 32}, {"mixer": {"kind": "attention", "n_heads": 2}}
    crossed = own | {"cross": {"kind": "cross_attention", "n_heads": 2}}
    config = {
        "vocab_size": 50,
        "encoder": small | {"causal": False, "blocks": {"block": own}},
        "decoder": small | {"blocks": {"block": crossed}},
    }
    plain = build(EncoderDecoder.Config.model_validate(config), seed=1).eval()
    made = quantize(plain, "int8")
    inputs = Inputs(torch.arange(10)[None], source=torch.arange(12)[None])
    with torch.no_grad():
        one, two = plain(inputs).logits, made(inputs).logits
    assert 0 < (one - two).norm() / one.norm() < 0.05
    with pytest.raises(ConfigError, match="only decoders"):
        quantize(plain, "int8", rows)


def test_rows_come_from_all_over_the_text(tokenizer):
    text = "a" * 4000 + "b" * 4000
    found = calibration_rows([text], tokenizer, 10 * 32, 32)
    assert len(found) == 10 and {len(row) for row in found} == {32}
    decoded = [tokenizer.decode(row) for row in found]
    assert "a" in decoded[0] and "b" in decoded[-1]
    with pytest.raises(DataError, match="shorter than one row"):
        calibration_rows(["short"], tokenizer, 64, 32)


def test_the_verb_makes_a_folder_that_answers(model, tokenizer, tmp_path, capsys):
    source, text = tmp_path / "model", tmp_path / "text.txt"
    LanguageModel(model, tokenizer).save(source)
    text.write_text(TEXT)
    command = ["quantize", str(source), "--scheme", "int4", "--calibrate", str(text), "--tokens", "256"]
    assert main([*command, "--eval", str(text), "--eval-bytes", "400", "--out", str(tmp_path / "small")]) == 0
    said = "".join(capsys.readouterr())
    assert "bits per byte" in said and "int4" in said
    made = octavo.load(tmp_path / "small")
    assert quantized_modules(made.model) and made.generate("Weights", max_new_tokens=3, temperature=0.0) is not None
    assert main([*command, "--out", str(tmp_path / "small")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main(["quantize", str(source), "--scheme", "int5", "--out", str(tmp_path / "other")]) == 2
    assert "there is no scheme 'int5'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_convert_refuses_quantised_weights_or_makes_them_plain(model, tokenizer, tmp_path, capsys):
    small = tmp_path / "small"
    LanguageModel(quantize(model, "int8"), tokenizer).save(small)
    assert main(["convert", str(small), str(tmp_path / "no"), "--to", "hf"]) == 2
    assert "weights are quantised" in capsys.readouterr().err
    assert main(["convert", str(small), str(tmp_path / "no"), "--family", "llama"]) == 2
    assert "weights are quantised" in capsys.readouterr().err
    assert main(["convert", str(small), str(tmp_path / "plain"), "--to", "hf", "--dequantize"]) == 0
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "llama"
    tokens = torch.arange(30)[None]
    torch.testing.assert_close(
        logits(octavo.load(tmp_path / "plain").model, tokens), logits(octavo.load(small).model, tokens)
    )
    assert main(["convert", str(tmp_path / "plain"), str(tmp_path / "no"), "--dequantize"]) == 2
    assert "not quantised" in capsys.readouterr().err


def test_a_scheme_of_ones_own():
    scheme = Scheme(weights=IntegerWeights(bits=8, group=None))
    made = quantize(decoder(), scheme)
    assert made.head.scales.shape == (264, 1)
