"""Compiled steps with dropout; where a step cannot be built after all: one notice, and the same training without it."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from training import log_of, tiny, trainer, weights_hash

from octavo.errors import StopRequested
from octavo.training.loop import Trainer


def test_without_a_compiler_the_run_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    plain = trainer(tmp_path / "plain")
    plain.fit(until=3)

    def broken(*args, **kwargs):
        raise InductorError(RuntimeError("g++: not found"), None)

    monkeypatch.setattr(torch, "compile", lambda function, **settings: broken)
    tried = trainer(tmp_path / "tried", compile="step")
    tried.fit(until=3)
    said = capsys.readouterr()
    assert (said.out + said.err).count("going on without compilation, slower: InductorError") == 1
    assert weights_hash(tried.model) == weights_hash(plain.model)
    losses = [[r["loss"] for r in log_of(tmp_path / name) if r["kind"] == "train"] for name in ("plain", "tried")]
    assert losses[0] and losses[0] == losses[1]


def test_however_many_trainings_there_were_the_next_is_compiled_too(tmp_path, monkeypatch):
    """torch compiles a function for so many objects only; here, more trainings than that have one step each."""
    compiled, compile = 0, torch.compile

    def counting(graph, _):
        nonlocal compiled
        compiled += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **named: compile(function, backend=counting, **named))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in range(4):
            before = compiled
            trainer(tmp_path / str(number), compile="step").fit(until=1)
            assert compiled > before


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_run_with_dropout_resumes_to_the_same_bits(tmp_path, recompute):
    def made(folder: str, **changes: Any) -> Trainer:
        model = tiny(dropout=0.2, embed_dropout=0.2)
        return trainer(
            tmp_path / folder, model=model, compile="step", activation_checkpointing=recompute, steps=6, **changes
        )

    torch._dynamo.reset()
    counters.clear()
    whole = made("whole")
    whole.fit()
    assert recompute or not counters["graph_break"]
    with pytest.raises(StopRequested):
        made("part", stop_after=3).fit()
    torch.manual_seed(99)  # another process
    part = made("part")
    part.fit()
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")
    assert weights_hash(part.model) == weights_hash(whole.model)
