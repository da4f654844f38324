"""Where a compiled step cannot be built after all: one notice, and the same training without it."""

import torch
from torch._inductor.exc import InductorError
from training import log_of, trainer, weights_hash


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
