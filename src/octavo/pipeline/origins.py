"""Fingerprints of the files that stages are made from. A finished stage needs its files no longer."""

from __future__ import annotations

from typing import Any

from octavo import feed
from octavo.config import Pretrained
from octavo.errors import CheckpointError, ConfigError, DataError
from octavo.files import sha256_file
from octavo.pipeline.job import Job
from octavo.run import find_model, fingerprint


def of_documents(job: Job) -> str:
    """Of the settings and the files of the text.

    Raises:
        CheckpointError: they are others than those that this run began to train on.
        DataError: they are not there, and nothing was made of them yet.
    """
    config = job.recipe.data
    assert config is not None
    before = job.folder.stages().get("data", {}).get("source")
    try:
        now = config.fingerprint()
    except DataError as error:
        if before is None:
            raise
        job.console.warn(f"{error.what}; the documents prepared before are used")
        return before
    if before not in (None, now) and job.folder.checkpoints_path("pretrain").is_dir() and not job.redo_data:
        raise CheckpointError(
            "the files of data.sources changed since this run began to train on them",
            fix="use a new run folder, or restore the files",
            kept="the run is as it was",
        )
    return now


def of_tuning(job: Job) -> str | None:
    """Of the conversations', pairs' or labels' files; None where tuning reads none."""
    kind, tune = feed.kind_of(job.recipe), job.recipe.tune
    if kind is None or tune is None:
        return None
    try:
        return kind.fingerprint(tune.data)
    except DataError as error:
        before = job.folder.stages().get("tune", {}).get("told")
        if before is None:
            raise
        job.console.warn(f"{error.what}; the model tuned before is kept")
        return before


def of_model(job: Job) -> str | None:
    """Of the pretrained model's files; None where the model is made here."""
    model = job.recipe.model
    if not isinstance(model, Pretrained.Config):
        return None
    try:
        files = sorted(find_model(model.path).glob("*.safetensors"))
    except ConfigError:
        before = job.folder.stages().get("tokenizer", {}).get("brought")
        if before is None:
            raise
        return before
    return fingerprint(model.path, [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def of_vectors(job: Job) -> list[Any]:
    """Of the word vectors that the embedding starts from: their scale and their file; empty where there are none."""
    config = job.recipe.vectors
    if config is None:
        return []
    try:
        return [config.scale, sha256_file(config.path)]
    except OSError:
        before = job.folder.stages().get("pretrain", {}).get("vectors")
        if before is None:
            raise DataError(f"vectors.path {config.path} cannot be read", fix="check the path") from None
        return [config.scale, before]


def of_weights(job: Job, stage: str) -> str:
    """Of the weights that a stage of training begins with; empty for fresh ones, which the seed decides."""
    if stage == "tune" and job.recipe.train:
        folder = job.folder.base_path
    elif isinstance(job.recipe.model, Pretrained.Config):
        folder = find_model(job.recipe.model.path)
    else:
        return fingerprint(of_vectors(job)) if job.recipe.vectors else ""
    return fingerprint([(file.name, sha256_file(file)) for file in sorted(folder.glob("*.safetensors"))])
