"""A config.json that makes no sense is a damaged checkpoint, never our bug."""

import json

import pytest

from octavo.errors import CheckpointError
from octavo.hub.folder import load_model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "octavo"},
        {"model_type": "octavo", "model": {"kind": "nothing"}},
        {"model_type": "octavo", "model": {"kind": "decoder", "d_model": -1}},
        {"model_type": "octavo", "model": []},
        {**LLAMA, "hidden_size": None},
        {**LLAMA, "num_attention_heads": 0},
        {**LLAMA, "intermediate_size": "wide"},
    ],
    ids=str,
)
def test_it_is_refused_as_damaged(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("place", ["model", "mixer"])
def test_code_that_a_config_names_does_not_run(tmp_path, monkeypatch, place):
    module = f"stranger_{place}"
    (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    named = {"kind": f"{module}:Thing"}
    model = named if place == "model" else {"kind": "decoder", "vocab_size": 8, "blocks": {"block": {"mixer": named}}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "octavo", "model": model}))
    with pytest.raises(CheckpointError, match=f"stranger_{place}:Thing.* is code to run"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()
