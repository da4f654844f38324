"""The stages of training: the loop, what it reads, and the model it begins with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo import feed
from octavo.batch import Batch
from octavo.config import Pretrained
from octavo.data.pack import StreamRows
from octavo.errors import ConfigError
from octavo.files import make_folder
from octavo.infer.sampling import SamplingConfig
from octavo.language_model import LanguageModel, load
from octavo.models.cost import cost
from octavo.models.decoder import Decoder, build
from octavo.models.override import carried_over
from octavo.objectives.tables import OBJECTIVES
from octavo.pipeline import origins
from octavo.pipeline.job import Job, sized
from octavo.tokenizer import Tokenizer
from octavo.training.loop import Held, Trainer
from octavo.training.memory import require
from octavo.training.settings import TrainConfig
from octavo.training.tracking import tensorboard
from octavo.vectors import embedding


@dataclass
class Ready:
    """A stage of training about to begin: the loop, what it reads, the model with its tokenizer."""

    trainer: Trainer
    rows: feed.Feed
    lm: LanguageModel
    seq_len: int


def pretrain(job: Job) -> dict[str, Any]:
    """Stage ``pretrain``: train on the shards; the result is base/ (or model/ when nothing follows)."""
    prepared = ready(job, "pretrain")
    config, source, seq_len = prepared.trainer.config, prepared.rows.source, prepared.seq_len
    epochs = config.steps / source.steps_per_epoch
    job.console.note(
        f"{cost(prepared.lm.network).parameters:,} parameters; {config.steps:,} steps of {source.rows * seq_len:,} "
        f"tokens, {epochs:.2f} passes over {prepared.rows.tokens:,} tokens; {config.precision}, "
        f"{'compiled' if config.compile == 'step' else 'not compiled'}, {config.threads} threads"
    )
    figures = prepared.trainer.fit()
    prepared.lm.save(job.folder.base_path if job.recipe.tune else job.folder.model_path)
    vectors = {"vectors": origins.of_vectors(job)[1]} if job.recipe.vectors else {}
    return {
        **vectors,
        "train_flops_per_token": prepared.trainer.held.train_flops_per_token,
        "epochs": round(epochs, 4),
        "tokens": config.steps * source.rows * seq_len,
        **_finite(figures),
    }


def tune(job: Job) -> dict[str, Any]:
    """Stage ``tune``: the same loop on conversations, pairs, labels or tags; the result is model/."""
    kind = feed.kind_of(job.recipe)
    assert kind is not None
    prepared = ready(job, "tune")
    rows, steps = prepared.rows, prepared.trainer.config.steps
    job.console.note(
        f"{len(rows.given):,} {kind.many}, {rows.tokens:,} trained tokens; {steps:,} steps, "
        f"{steps / rows.source.steps_per_epoch:.2f} passes"
    )
    for line in rows.notices:
        job.console.warn(line)
    figures = prepared.trainer.fit()
    prepared.lm.save(job.folder.model_path)
    origin = origins.of_tuning(job)
    told = {} if origin is None else {"told": origin}
    return {**told, f"{kind.noun}s": len(rows.given), "trained_tokens": rows.tokens, **_finite(figures)}


def ready(job: Job, stage: str, folder: Path | None = None) -> Ready:
    """All that the pretraining or the tuning needs, from the files of the run.

    Args:
        folder: where metrics and checkpoints are written instead of the run, which then is only read.

    Raises:
        ConfigError: the recipe has no such stage, or its files do not belong together.
        ResourceError: it needs more memory than there is.
    """
    recipe, config = job.recipe, feed.settings(job.recipe, stage)
    tokenizer = job.tokenizer()
    shape, start = _start(job, tokenizer, stage)
    seq_len = feed.seq_len_of(config, shape.max_seq_len)
    if stage == "pretrain":
        section, rows = "train", feed.pretraining(recipe, job.folder.path, seq_len)
    else:
        kind, tuned = feed.kind_of(recipe), recipe.tune
        assert kind is not None and tuned is not None
        keep = job.folder.tuning_data_path if folder is None else None
        section, rows = "tune", feed.tuning(recipe, tokenizer, seq_len, keep=keep)
        shape = kind.shape(shape, tuned.data, rows)
    if tight := require(shape, config, config.precision, rows.source.rows, section):
        job.console.warn(tight)
    model = start()
    if stage == "tune" and recipe.train:  # base/ has the weights; what only matters in training is the recipe's
        base = _base(job, tokenizer)
        model = carried_over(base, shape, seed=recipe.seed) if rows.classes else _filled(model, base)
    elif rows.classes:
        model = carried_over(model, shape, seed=recipe.seed)
    own = folder or job.folder.path / stage
    make_folder(own)
    lm = LanguageModel(model, tokenizer)
    looked_at = feed.validation_batches(rows.valid, rows.source, config) if rows.valid is not None else ()
    held = Held(
        folder=own,
        run_id=job.folder.id,
        console=job.console,
        stop=job.stop,
        resume_command=job.resume_command,
        valid=[Batch.from_numpy(arrays, config.device) for arrays in looked_at],
        valid_nats_per_bit_byte=_nats_per_bit_byte(rows),
        sample=sampler(job, lm, config, stage) if config.sample_prompts else None,
        train_flops_per_token=cost(model, seq_len).train_flops // seq_len,
        started_from=origins.of_weights(job, stage),
        tensorboard=tensorboard(own) if config.tensorboard and folder is None else None,
    )
    objective = OBJECTIVES[config.objective.kind](config.objective)
    return Ready(Trainer(model, rows.source, objective, config, held, recipe.seed), rows, lm, seq_len)


def _base(job: Job, tokenizer: Tokenizer) -> Decoder:
    """What this run pretrained."""
    base = load(job.folder.base_path)
    if base.tokenizer.hash != tokenizer.hash:  # ids mean nothing under another one, also if it has as many
        raise ConfigError(
            f"{job.folder.base_path} has another tokenizer ({base.tokenizer.vocab_size} ids) than the run "
            f"({tokenizer.vocab_size})",
            fix="restore both, or use a new run folder",
        )
    return base.network


def _filled(model: Decoder, base: Decoder) -> Decoder:
    model.load_state_dict(base.state_dict())
    return model


def _nats_per_bit_byte(rows: feed.Feed) -> float | None:
    """What turns nats a token of the held-out documents into bits a byte; None for other rows."""
    if not isinstance(rows.valid, StreamRows):
        return None
    held_out = rows.valid.shards
    return (held_out.n_tokens - held_out.n_documents) / max(1, held_out.n_bytes) / math.log(2)


def _start(job: Job, tokenizer: Tokenizer, stage: str) -> tuple[Decoder.Config, Callable[[], Decoder]]:
    """The model before training, and how it is made: fresh, or the pretrained one a recipe names."""
    config = job.recipe.model
    if isinstance(config, Pretrained.Config):
        model = load(config.path).network
        return model.config, lambda: model
    config = sized(config, tokenizer)
    vectors = job.recipe.vectors if stage == "pretrain" else None
    if vectors is not None:
        embedding.check_width(vectors, config.d_model)

    def fresh() -> Decoder:
        model = build(config, seed=job.recipe.seed)
        if vectors is not None:
            job.console.note(str(embedding.fill(model, tokenizer, vectors)))
        return model

    return config, fresh


def sampler(job: Job, lm: LanguageModel, config: TrainConfig, stage: str) -> Callable[[], list[dict[str, str]]]:
    """What writes a few texts now and then; asked to stop, it stops between two tokens."""
    questions = [[{"role": "user", "content": prompt}] for prompt in config.sample_prompts]
    kind = feed.kind_of(job.recipe) if stage == "tune" else None
    prompts = questions if kind is not None and kind.asks else list(config.sample_prompts)
    how = SamplingConfig(
        max_new_tokens=config.sample_tokens, temperature=config.sample_temperature, seed=job.recipe.seed
    )

    def sample() -> list[dict[str, str]]:
        return [
            {"prompt": text, "text": "".join(job.stoppable(lm.stream(prompt, how), "while sampling"))}
            for text, prompt in zip(config.sample_prompts, prompts, strict=True)
        ]

    return sample


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 6) for key, value in figures.items() if math.isfinite(value)}
