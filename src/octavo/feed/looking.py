"""Exactly the rows that a step trains on, or that validation looks at, to be shown."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from octavo.config import Recipe
from octavo.data import prepare, show
from octavo.data.pack import Packed
from octavo.errors import ConfigError, DataError
from octavo.feed.kinds import Kind
from octavo.feed.rows import validation_batches
from octavo.feed.stage import of_stage, settings
from octavo.feed.table import KINDS, kind_of
from octavo.run import RunFolder
from octavo.tokenizer import Tokenizer


@dataclass(frozen=True)
class Look:
    """Rows of one batch to be shown: ``noun`` is what lies in them, ``lead`` says which batch of how many it is."""

    rows: list[show.Row]
    noun: str
    lead: str


def look(recipe: Recipe, folder: Path, stage: str, *, split: str = "train", step: int = 0, n: int = 4) -> Look:
    """The first ``n`` rows of exactly the batch that a step trains on, or that validation looks at.

    Args:
        folder: of a run.
        stage: pretrain or tune.
        split: train or valid.
        step: counted from 0; of ``valid``, the number of the batch.

    Raises:
        ConfigError: there is no such stage, step or split.
        DataError: what it reads is not there.
    """
    config = settings(recipe, stage)
    found = of_stage(recipe, folder, stage)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    kind = kind_of(recipe)
    noun = "document" if stage == "pretrain" or kind is None else kind.noun
    if split == "valid":
        if found.valid is None:
            raise ConfigError(f"{stage} has no held-out rows", fix="look at --split train")
        batches = list(validation_batches(found.valid, found.source, config))
        _check_step(step, len(batches), f"validation of {stage} looks at")
        batch, before = batches[step], sum(len(b["tokens"]) for b in batches[:step])
        in_step, of = len(batch["tokens"]), f"batch {step} of {len(batches)} of every validation"
        places: list[tuple[Packed, int, int]] = [(found.valid, 0, before + i) for i in range(min(n, in_step))]
    else:
        _check_step(step, config.steps, f"{stage} has")
        batch, places = found.source.batch(step), found.source.places(step, n)
        in_step, of = found.source.rows, f"step {step:,} of {config.steps:,} (metrics: step {step + 1:,})"
    if stage == "pretrain" or kind is None:
        tell = _of_documents(folder, split, places)
    else:
        tell = partial(_of_given, kind, found.given if split == "train" else found.held_out, tokenizer)
    shown = min(n, in_step)
    lead = f"{of}, {in_step:,} rows of {found.source.seq_len:,} tokens; the first {shown}" * (shown < in_step) or (
        f"{of}, {in_step:,} rows of {found.source.seq_len:,} tokens"
    )
    return Look(show.rows_of(batch, places, tokenizer, tell), noun, lead)


def _check_step(step: int, n: int, what: str) -> None:
    if not 0 <= step < n:
        raise ConfigError(f"step {step}: {what} {n:,} of them", fix=f"give one from 0 to {n - 1}")


def _of_given(kind: Kind, given: Sequence[Any], tokenizer: Tokenizer, number: int) -> show.Told:
    return kind.told(given[number], tokenizer)


def _of_documents(folder: Path, split: str, places: list[tuple[Packed, int, int]]) -> show.Tell:
    """What is known of the documents in the rows to be shown."""
    numbers = {piece.number for packed, epoch, row in places for piece in packed.pieces(epoch, row)}
    known = show.origins(folder / "data", split, numbers)
    return lambda number: show.Told(known.get(number, ""))


def changed(recipe: Recipe, folder: Path) -> list[str]:
    """What is no longer as it was when a run's stages read it, so that looking again may show something else."""
    run = RunFolder(folder)
    before = run.stages().get("tune", {})
    if recipe.tune is None or not before:
        return []
    kind = KINDS[recipe.tune.data.kind]
    try:
        now = kind.fingerprint(recipe.tune.data)
    except DataError:
        return []
    if now is not None:
        return [] if now == before.get("told") else [f"the {kind.many} have changed since this run was tuned on them"]
    made_by = (prepare.read_json(run.environment_path) or {}).get("python")
    here = platform.python_version()
    return [] if made_by in (None, here) else [f"the questions are those of Python {here}, the run's of {made_by}"]
