"""What a stage of training reads, and how long and how many its rows are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from octavo.config import Pretrained, Recipe
from octavo.data import prepare
from octavo.data.chat import ChatReport
from octavo.data.loader import Loader, sweep
from octavo.data.pack import Batch, Packed
from octavo.errors import ConfigError
from octavo.training.settings import TrainConfig

VALID_ROWS = 32


@dataclass(frozen=True)
class Feed:
    """What one stage of training reads.

    Args:
        source: the batch of every step.
        valid: the held-out rows, None where there are none.
        tokens: trained on in a pass: of all documents in pretraining, of the answers in tuning.
        given: in tuning, what was read and is trained on, by its number in ``source``: conversations, pairs, texts.
        held_out: the same of ``valid``.
        report: in tuning on conversations, what became of the rows.
        notices: what the user should be told.
        classes: of labelled texts or tagged words.
    """

    source: Loader
    valid: Packed | None
    tokens: int
    given: Sequence[Any] = ()
    held_out: Sequence[Any] = ()
    report: ChatReport = field(default_factory=ChatReport)
    notices: list[str] = field(default_factory=list)
    classes: tuple[str, ...] = ()


def validation_batches(valid: Packed, source: Loader, config: TrainConfig) -> Iterator[Batch]:
    """The rows that every validation looks at."""
    # No more rows at once than in training: that much memory is there.
    rows = min(VALID_ROWS, config.micro_batch_rows or source.rows)
    return islice(sweep(valid, rows), -(-config.valid_batches * VALID_ROWS // rows))


def has_held_out(folder: Path) -> bool:
    """Whether documents of a run are held out."""
    report = prepare.read_json(folder / "data" / "report.json") or {}
    return bool(report.get("splits", {}).get("valid", {}).get("documents"))


def seq_len_of(config: TrainConfig, max_seq_len: int) -> int:
    """Tokens a row: as asked, else the model's whole context, of which a pretrained one may have too much."""
    return config.seq_len or min(max_seq_len, config.step_tokens)


def rows_of_step(config: TrainConfig, seq_len: int) -> int | None:
    """Rows of an optimizer step; None means all."""
    return {"per_sample": 1, "full_batch": None}.get(config.update, max(1, config.step_tokens // seq_len))


def check_seq_len(recipe: Recipe, section: str, seq_len: int) -> None:
    """Refuse rows longer than a pretrained model's table of positions; of a fresh one the recipe knows it itself."""
    if not isinstance(recipe.model, Pretrained.Config):
        return
    from octavo.hub.folder import model_config, read_config
    from octavo.run import find_model

    place = find_model(recipe.model.path)
    shape = model_config(read_config(place)) if (place / "config.json").is_file() else None
    if shape is not None and shape.positions.kind == "learned" and seq_len > shape.max_seq_len:
        raise ConfigError(
            f"{section}.seq_len = {seq_len} exceeds the {shape.max_seq_len} positions of {recipe.model.path}",
            fix=f"use {section}.seq_len={shape.max_seq_len}",
        )


def model_shape(recipe: Recipe) -> Any:
    """The configuration of a recipe's model, or of the pretrained one it names, whose weights are not read for it."""
    if not isinstance(recipe.model, Pretrained.Config):
        return recipe.model
    from octavo.hub.folder import model_config, read_config
    from octavo.run import find_model

    return model_config(read_config(find_model(recipe.model.path)))
