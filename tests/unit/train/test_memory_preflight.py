"""What cannot fit into the memory is refused before a step of it, with settings that make it fit."""

import re

import pytest

from octavo.errors import ResourceError
from octavo.models.decoder import Decoder
from octavo.training import memory
from octavo.training.settings import TrainConfig

MODEL = Decoder.Config.model_validate({"d_model": 32, "n_layers": 2, "max_seq_len": 256, "vocab_size": 4096})


def settings(**changes) -> TrainConfig:
    fixed = {"steps": 1, "step_tokens": 64 * 256, "precision": "fp32", "compile": "off"}
    return TrainConfig.model_validate({**fixed, **changes})


def needed(**changes) -> int:
    return memory.training_bytes(MODEL, settings(**changes), "fp32", 64).total


def test_what_cannot_fit_is_refused_with_two_settings_that_do(monkeypatch):
    room = (needed() + needed(micro_batch_rows=16)) // 2
    monkeypatch.setattr(memory, "available_bytes", lambda: room)
    assert needed() > memory.REFUSED_ABOVE * room
    with pytest.raises(ResourceError, match="train needs about") as caught:
        memory.require(MODEL, settings(), "fp32", 64, "train")
    assert caught.value.exit_code == 6 and "nothing of this stage was begun" in caught.value.kept
    rows = re.search(r"train\.micro_batch_rows=(\d+)", caught.value.fix)
    assert rows and "train.activation_checkpointing=true" in caught.value.fix
    assert memory.require(MODEL, settings(micro_batch_rows=int(rows[1])), "fp32", 64, "train") == ""


def test_what_will_be_tight_is_only_said(monkeypatch):
    whole = needed()
    monkeypatch.setattr(memory, "available_bytes", lambda: whole - 1)
    assert "it may run out" in memory.require(MODEL, settings(), "fp32", 64, "train")
    monkeypatch.setattr(memory, "available_bytes", lambda: whole)
    assert memory.require(MODEL, settings(), "fp32", 64, "train") == ""
