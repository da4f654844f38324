"""Random numbers belong to the step or to the checkpoint, never to the history of a process."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import Counted, log_of, packed, tiny, trainer, weights_hash

from octavo.data.loader import Loader
from octavo.errors import StopRequested
from octavo.training.loop import Trainer


def draws() -> list[dict[str, str]]:
    """A number of every global generator, as what is sampled."""
    return [{"prompt": "", "text": f"{random.random()} {np.random.random()} {torch.rand(1).item()}"}]


class Beginning(Counted):
    """The first batch of a run sets Python's and numpy's generators: imports draw from them too."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        if step == 0:
            random.seed(1)
            np.random.seed(1)
        return super().batch(step)


def made(folder: Path, **changes: Any) -> Trainer:
    source = Beginning(Loader(packed(), 4, seed=3))
    return trainer(
        folder, model=tiny(dropout=0.3), source=source, sample=draws, sample_every=1, save_every=5, **changes
    )


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_draws_what_an_uninterrupted_one_does(tmp_path, stop):
    whole = made(tmp_path / "whole")
    whole.fit()
    with pytest.raises(StopRequested):
        made(tmp_path / "part", stop_after=stop).fit()
    random.seed(99)  # another process
    np.random.seed(99)
    torch.manual_seed(99)
    part = made(tmp_path / "part")
    part.fit()
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")
    assert weights_hash(part.model) == weights_hash(whole.model)


def test_dropout_of_a_step_depends_on_nothing_before_it(tmp_path):
    losses = []
    for draw in (0, 5):
        one = trainer(tmp_path / str(draw), model=tiny(dropout=0.3))
        torch.manual_seed(draw)
        torch.rand(draw)
        losses.append([one.train_step()["loss"] for _ in range(3)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3
    other = trainer(tmp_path / "other", model=tiny(dropout=0.3), seed=8)
    assert other.train_step()["loss"] != losses[0][0]
