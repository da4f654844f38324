"""A training run small enough for a unit test: 30 uneven samples, a decoder of 16 channels, a few steps."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo.batch import Batch
from octavo.data.loader import Loader, sweep
from octavo.data.pack import WholeRows
from octavo.metrics_file import read_metrics
from octavo.models.decoder import Decoder, build
from octavo.objectives.likelihood import CausalLikelihood
from octavo.stop import StopSignal
from octavo.training import checkpoint
from octavo.training.loop import Held, Trainer
from octavo.training.progress import Console
from octavo.training.settings import TrainConfig

VOCAB, SEQ_LEN = 50, 24
TIMINGS = ("seconds", "tokens_per_second", "mfu")


def packed(seed: int = 0, n: int = 30) -> WholeRows:
    """Samples of uneven lengths with uneven masks."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(n):
        length = int(rng.integers(4, SEQ_LEN + 2))
        mask = rng.random(length) < rng.random()
        mask[-1] = True
        samples.append((rng.integers(0, VOCAB, length).tolist(), mask.astype(int).tolist()))
    return WholeRows(samples, SEQ_LEN)


def tiny(dropout: float = 0.1, seed: int = 1, **changes: Any) -> Decoder:
    block = {"mixer": {"kind": "attention", "n_heads": 2, "dropout": dropout}, "dropout": dropout}
    settings: dict[str, Any] = {"d_model": 16, "n_layers": 2, "max_seq_len": SEQ_LEN, "vocab_size": VOCAB}
    return build(Decoder.Config.model_validate({**settings, "blocks": {"block": block}, **changes}), seed=seed)


def settings(**changes: Any) -> TrainConfig:
    fixed: dict[str, Any] = {"steps": 12, "precision": "fp32", "compile": "off", "threads": 1, "log_every": 1}
    fixed |= {"schedule": {"kind": "cosine", "warmup": 2}, "optimizer": {"kind": "adamw", "lr": 1e-2}}
    return TrainConfig.model_validate({**fixed, **changes})


class Counted:
    """A source that counts the steps it was asked for: the clock of a time limit that needs no waiting."""

    def __init__(self, loader: Loader):
        self.loader, self.fingerprint, self.n = loader, loader.fingerprint, 0

    def prefetch(self, step: int) -> None:
        """Nothing to make ahead."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        self.n += 1
        return self.loader.batch(step)


def trainer(
    folder: Path,
    *,
    model: Decoder | None = None,
    source: Any = None,
    objective: CausalLikelihood | None = None,
    stop_after: int | None = None,
    seed: int = 7,
    sample: Callable[[], list[dict[str, str]]] | None = None,
    **changes: Any,
) -> Trainer:
    source = Counted(Loader(packed(), 4, seed=3)) if source is None else source
    stop = StopSignal(stop_after, clock=lambda: source.n) if stop_after is not None else StopSignal()
    held = Held(
        folder,
        "run",
        Console("quiet"),
        stop,
        "octavo resume here",
        valid=[Batch.from_numpy(arrays) for arrays in sweep(packed(seed=9, n=6), 2)],
        valid_nats_per_bit_byte=0.5,
        sample=sample,
    )
    config = settings(**changes)
    return Trainer(model or tiny(), source, objective or CausalLikelihood(), config, held, seed)


def weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The figures without timings; floats as hex, so that equal means equal in every bit."""
    return [
        {k: v.hex() if isinstance(v, float) else v for k, v in record.items() if k not in TIMINGS}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def saved_step(folder: Path) -> int | None:
    """The newest step that verifies."""
    found = checkpoint.newest(folder / "checkpoints")
    return found.step if found is not None else None


def first_batch(n_rows: int = 8) -> Batch:
    return Batch.from_numpy(packed().rows(0, np.arange(n_rows)))
