"""Rotary scalings against transformers: frequencies, magnitudes, whole models, checkpoint folders both ways."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from proof import agree
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.hub.folder import load_model, model_config, save_model
from octavo.nn.contracts import Inputs
from octavo.nn.position import PositionDims
from octavo.nn.rope import RotaryPositions, turned_as_complex

TRAINED, HEAD_DIM = 16, 16
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": TRAINED},
    "yarn": YARN,
    "yarn ramp": {**YARN, "beta_fast": 1.5, "beta_slow": 0.05},
    "yarn not rounded": {**YARN, "beta_fast": 1.5, "beta_slow": 0.05, "truncate": False},
    "yarn magnitude": {**YARN, "attention_factor": 1.25},
    "yarn deepseek": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn deepseek equal": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)], "original_max_position_embeddings": TRAINED,
    },
}  # fmt: skip
FAMILY = {"longrope": transformers.Phi3Config}


def hf_config(name: str, *, max_tokens: int = TRAINED, **values) -> transformers.PretrainedConfig:
    rope = ROPES[name]
    if "original_max_position_embeddings" in rope:
        max_tokens = 4 * TRAINED
    shape = {
        "vocab_size": 31, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 1, "max_position_embeddings": max_tokens, "pad_token_id": 0, "eos_token_id": 1,
        "rope_parameters": {**rope, "rope_theta": 500.0}, **values,
    }  # fmt: skip
    if name == "longrope":
        return transformers.Phi3Config(**shape, original_max_position_embeddings=TRAINED)
    return transformers.LlamaConfig(**shape)


def reference(name: str, **values):
    torch.manual_seed(0)
    config = hf_config(name, **values)
    theirs = (transformers.Phi3ForCausalLM if name == "longrope" else transformers.LlamaForCausalLM)(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return theirs


def scheme(name: str, tmp_path) -> RotaryPositions:
    config = hf_config(name)
    config.save_pretrained(tmp_path)
    ours = model_config(json.loads((tmp_path / "config.json").read_text()))
    return RotaryPositions(ours.positions, PositionDims(32, HEAD_DIM, ours.max_seq_len))


@pytest.mark.rows("R6", "R7", "R10")
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_magnitude(name, tmp_path):
    positions = scheme(name, tmp_path)
    wanted, magnitude = ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]](hf_config(name), "cpu")
    kind = positions.config.scaling.kind
    torch.testing.assert_close(positions.frequencies, wanted, rtol=3e-7, atol=0)
    agree(kind, "transformers modeling_rope_utils", positions.frequencies, wanted, case=f"frequencies, {name}")
    assert positions.scaling.magnitude == pytest.approx(magnitude, rel=1e-12)
    low = positions.frequencies.bfloat16()  # the tables themselves stay float32, whatever the model is
    agree(kind, "transformers modeling_rope_utils", low, wanted.bfloat16(), case=f"frequencies, {name}")


@pytest.mark.rows("R7")
@pytest.mark.parametrize("length", [3, TRAINED, TRAINED + 1, 40, 1000])
def test_dynamic_frequencies_follow_the_length(length, tmp_path):
    positions = scheme("dynamic", tmp_path)
    wanted, _ = ROPE_INIT_FUNCTIONS["dynamic"](hf_config("dynamic"), "cpu", seq_len=length)
    got = positions.scaling.frequencies_for(torch.tensor([length]), HEAD_DIM, 500.0)[0]
    agree("dynamic", "transformers modeling_rope_utils", got, wanted, case=f"{length} tokens")
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


@pytest.mark.rows("R6", "R10")
@pytest.mark.parametrize("name", [name for name in ROPES if name not in ("dynamic", "longrope")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_logits_of_a_checkpoint_folder(name, dtype, tmp_path):
    """Beyond the trained length too: 40 tokens where 16 were trained."""
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    ours, tokens = load_model(tmp_path).to(dtype), torch.randint(31, (2, 40))
    kind = ours.config.positions.scaling.kind
    agree(
        kind, "transformers LlamaForCausalLM", ours(Inputs(tokens)).logits, theirs.to(dtype)(tokens).logits, case=name
    )


@pytest.mark.rows("R10")
@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3", "Gemma2", "Olmo2"])
@torch.no_grad()
def test_every_family_of_the_shape_reads_and_writes_yarn(family, tmp_path):
    torch.manual_seed(0)
    values = hf_config("yarn").to_dict()
    kept = ("vocab_size hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads"
            " max_position_embeddings pad_token_id eos_token_id rope_parameters").split()  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{key: values[key] for key in kept}, head_dim=HEAD_DIM)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokens = load_model(tmp_path / "theirs"), torch.randint(31, (1, 40))
    agree("yarn", f"transformers {family}ForCausalLM", ours(Inputs(tokens)).logits, theirs(tokens).logits)
    assert save_model(ours, tmp_path / "ours") == family.lower()
    assert load_model(tmp_path / "ours").config == ours.config


@pytest.mark.rows("R7")
@pytest.mark.parametrize("reader", ["one pass", "prefill and decode"])
@torch.no_grad()
def test_dynamic_gives_the_last_token_what_a_full_pass_of_that_length_gives(reader, tmp_path):
    """One layer: every length from 1 to 2.5 times the trained one, keys cached unturned while the base grows.

    With more layers transformers' own earlier states change with every token, which no cache can follow.
    """
    theirs = reference("dynamic", num_hidden_layers=1)
    theirs.save_pretrained(tmp_path)
    ours, tokens = load_model(tmp_path), torch.randint(31, (2, 40))
    if reader == "one pass":
        got = ours(Inputs(tokens)).logits
    else:
        state = ours.new_state(2, 40)
        got = torch.cat([ours(Inputs(t), state=state).logits for t in tokens.split([10, 3, 1, 7, 1, 1, 17], 1)], 1)
    for length in (1, 9, TRAINED, TRAINED + 1, 24, 40):
        fresh = reference("dynamic", num_hidden_layers=1)  # its tables remember the longest text they saw
        wanted = fresh(tokens[:, :length]).logits[:, -1]
        agree("dynamic", "transformers LlamaForCausalLM", got[:, length - 1], wanted, case=f"{reader}, {length} tokens")
    whole = theirs(tokens[:, :TRAINED]).logits
    agree("dynamic", "transformers LlamaForCausalLM", got[:, :TRAINED], whole, case="within the trained length")
    low = ours.bfloat16()(Inputs(tokens)).logits[:, -1]
    agree("dynamic", "transformers LlamaForCausalLM", low, theirs.bfloat16()(tokens).logits[:, -1], case="last token")


@pytest.mark.rows("R6", "R7", "R10")
@pytest.mark.parametrize("name", [name for name in ROPES if name != "longrope"])
@torch.no_grad()
def test_a_scaling_is_written_in_their_words(name, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert save_model(ours, tmp_path / "ours") == "llama"
    said = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert ROPES[name].items() <= said["rope_parameters"].items()
    assert said["rope_scaling"] == said["rope_parameters"]
    assert load_model(tmp_path / "ours").config == ours.config
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.randint(31, (1, 30))
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.rows("R10")
@torch.no_grad()
def test_the_older_spelling_of_a_scaling(tmp_path):
    theirs = reference("yarn")
    theirs.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    del said["rope_parameters"]
    older = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
    (tmp_path / "config.json").write_text(json.dumps(said | {"rope_theta": 500.0, "rope_scaling": older}))
    tokens = torch.randint(31, (1, 40))
    torch.testing.assert_close(load_model(tmp_path)(Inputs(tokens)).logits, theirs(tokens).logits, rtol=0, atol=1e-4)


def test_what_is_left_out_is_what_transformers_takes(tmp_path):
    config = hf_config("yarn", rope_parameters={"rope_type": "yarn", "factor": None, "rope_theta": 500.0,
                                                "original_max_position_embeddings": TRAINED})  # fmt: skip
    config.save_pretrained(tmp_path)
    read = model_config(json.loads((tmp_path / "config.json").read_text())).positions
    assert (read.scaling.factor, read.scaling.original, read.scaling.beta_fast) == (4.0, TRAINED, 32.0)


@pytest.mark.parametrize("kind", ["ntk", "dynamic_simple", "truncation"])
def test_what_transformers_has_no_word_for_is_written_in_our_layout(kind, tmp_path):
    plain = reference("linear")
    plain.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    from octavo.models.override import set_rope_scaling
    from octavo.nn.rope_scaling import ROPE_SCALINGS

    set_rope_scaling(ours, ROPE_SCALINGS[kind].Config())
    assert save_model(ours, tmp_path / "ours") == "octavo"
    again = load_model(tmp_path / "ours")
    assert again.config == ours.config
    tokens = torch.randint(31, (1, 30))
    assert torch.equal(again(Inputs(tokens)).logits, ours(Inputs(tokens)).logits)


@pytest.mark.rows("R4")
@pytest.mark.parametrize("scaling", [None, {"kind": "linear"}, {"kind": "llama3", "original": 64}])
def test_the_complex_twin(scaling):
    """Half-split, interleaved and complex form are one rotation; magnitudes apart, scalings only change frequencies."""
    torch.manual_seed(0)
    x, at = torch.randn(2, 9, 3, 8, dtype=torch.float64), torch.arange(9).expand(2, 9) * 5
    order = torch.arange(8).view(2, 4).T.flatten()
    made = {
        layout: RotaryPositions(
            RotaryPositions.Config.model_validate({"layout": layout, "scaling": scaling}), PositionDims(0, 8, 16)
        )
        for layout in ("half", "interleaved")
    }
    wanted = turned_as_complex(x, at, made["half"].frequencies)
    interleaved, half = made["interleaved"].rotation(at)(x), made["half"].rotation(at)(x[..., order.argsort()])
    torch.testing.assert_close(interleaved, wanted, rtol=0, atol=1e-5)  # the tables' angles are float32
    torch.testing.assert_close(half[..., order], interleaved, rtol=0, atol=1e-12)
    agree("rope", "complex numbers, torch.polar", interleaved, wanted, case="interleaved")


@pytest.mark.rows("R7", "R9")
@pytest.mark.parametrize("kind", ["ntk", "dynamic_simple", "truncation"])
def test_closed_forms_in_python_floats(kind):
    """What transformers has no function for, worked out pair by pair from the formulas of the sources."""
    base, lengths = 500.0, [8, TRAINED, 24, 100]
    thetas = [base ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]
    values = {"ntk": {"factor": 3.0}, "dynamic_simple": {}, "truncation": {"keep": 0.3, "zero": 0.01, "middle": 0.02}}
    config = RotaryPositions.Config.model_validate({"theta": base, "scaling": {"kind": kind, **values[kind]}})
    scaling = RotaryPositions(config, PositionDims(0, HEAD_DIM, TRAINED)).scaling
    if kind == "ntk":
        got, scaled = scaling.frequencies(HEAD_DIM, base), base * 3.0 ** (HEAD_DIM / (HEAD_DIM - 2))
        wanted = [scaled ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]
    elif kind == "truncation":
        got = scaling.frequencies(HEAD_DIM, base)
        wanted = [theta if theta >= 0.3 else 0.0 if theta <= 0.01 else 0.02 for theta in thetas]
    else:
        got = scaling.frequencies_for(torch.tensor(lengths), HEAD_DIM, base).flatten()
        wanted = [(base * max(1.0, T / TRAINED)) ** (-2 * i / HEAD_DIM) for T in lengths for i in range(HEAD_DIM // 2)]
    agree(kind, "its formula in Python floats", got, torch.tensor(wanted, dtype=torch.float64))
