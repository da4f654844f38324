"""ReRoPE and Leaky ReRoPE against their author's patches of Llama (golden/make_rerope.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from proof import agree
from safetensors.torch import load_file, save_file

from octavo.hub.folder import load_model
from octavo.models.decoder import Decoder
from octavo.nn.attention import use_reader
from octavo.nn.contracts import Inputs
from octavo.nn.readers import READERS

GOLDEN = load_file(Path(__file__).parent / "golden" / "rerope.safetensors")
CONFIG = {
    "model_type": "llama", "vocab_size": 19, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
}  # fmt: skip
SETTINGS = {"rerope": {}, "leaky_rerope": {"leak": 4.0}}


def loaded(kind: str, folder: Path, **changes) -> Decoder:
    """The patched Llama's weights, read by our reader."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weights = {name.removeprefix("weights."): t for name, t in GOLDEN.items() if name.startswith("weights.")}
    save_file(weights, folder / "model.safetensors")
    model = load_model(folder)
    use_reader(model, READERS[kind].Config(window=6, trained=16, **SETTINGS[kind] | changes), 24)
    return model.eval()


@pytest.mark.rows("R8")
@pytest.mark.parametrize("kind", SETTINGS)
@torch.no_grad()
def test_logits_equal_the_patched_models(kind, tmp_path):
    model, tokens = loaded(kind, tmp_path), GOLDEN["tokens"]
    reference = f"bojone/rerope, {kind}_patch"
    whole = model(Inputs(tokens)).logits
    agree(kind, reference, whole, GOLDEN[f"{kind}.whole"], case="24 tokens at once")
    state = model.new_state(2, 24)
    steps = torch.cat([model(Inputs(t), state=state).logits for t in tokens.split(1, 1)], 1)
    agree(kind, reference, steps, GOLDEN[f"{kind}.steps"], case="token by token")


@pytest.mark.rows("R8")
@torch.no_grad()
def test_the_two_patches_differ_where_distances_leave_the_window():
    difference = (GOLDEN["rerope.whole"] - GOLDEN["leaky_rerope.whole"]).abs().amax((0, 2))
    assert float(difference[:6].max()) < 1e-5 and float(difference[8:].min()) > 1e-3
