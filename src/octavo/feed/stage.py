"""The training stages of a recipe, and what each reads."""

from __future__ import annotations

from pathlib import Path

from octavo.config import Recipe
from octavo.errors import ConfigError, did_you_mean
from octavo.feed.documents import pretraining
from octavo.feed.rows import Feed, model_shape, seq_len_of
from octavo.feed.table import tuning
from octavo.predictors.settings import CountedConfig
from octavo.tokenizer import Tokenizer
from octavo.training.settings import TrainConfig


def stages(recipe: Recipe) -> list[str]:
    """The training stages a recipe has."""
    return [name for name, config in (("pretrain", recipe.train), ("tune", recipe.tune)) if config is not None]


def settings(recipe: Recipe, stage: str) -> TrainConfig:
    """What the recipe says about a training stage.

    Raises:
        ConfigError: it has no such stage.
    """
    found = {"pretrain": recipe.train, "tune": recipe.tune}.get(stage)
    if found is None and isinstance(recipe.model, CountedConfig):
        raise ConfigError(
            f"the recipe has no stage {stage!r}: its model is counted in one pass, without steps",
            fix="look at its text with octavo data check",
        )
    if found is None:
        raise ConfigError(f"the recipe has no stage {stage!r}", fix=did_you_mean(stage, stages(recipe), thing="stage"))
    return found


def of_stage(recipe: Recipe, folder: Path, stage: str) -> Feed:
    """What a training stage reads, from the shards and the tokenizer in a run folder; nothing is written."""
    config = settings(recipe, stage)
    seq_len = row_length(recipe, config)
    if stage == "pretrain":
        return pretraining(recipe, folder, seq_len)
    return tuning(recipe, Tokenizer.load(folder / "tokenizer"), seq_len)


def row_length(recipe: Recipe, config: TrainConfig) -> int:
    """Tokens in a row of a stage; the weights of a pretrained model are not read for it."""
    return config.seq_len or seq_len_of(config, model_shape(recipe).max_seq_len)
