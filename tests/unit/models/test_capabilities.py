"""What a mixer does not promise is refused by its name."""

import dataclasses

import pytest
import torch

from octavo.errors import UnsupportedError
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.nn.reader import FullReader


@pytest.mark.parametrize(("promise", "what"), [("incremental", "decode with a state"), ("packed", "packed documents")])
def test_what_is_not_promised_is_refused(promise, what, monkeypatch):
    less = dataclasses.replace(FullReader.capabilities, **{promise: False})
    monkeypatch.setattr(FullReader, "capabilities", less)
    model = build(Decoder.Config(d_model=16, n_layers=1, vocab_size=11, max_seq_len=8))
    tokens = torch.arange(6)[None]
    assert model(Inputs(tokens)).logits.shape == (1, 6, 11)
    with pytest.raises(UnsupportedError, match=rf"Attention \(0\.mixer\) .*{what}"):
        if promise == "incremental":
            model(Inputs(tokens), state=model.new_state(1))
        else:
            model(Inputs(tokens, doc_ids=torch.zeros_like(tokens)))
