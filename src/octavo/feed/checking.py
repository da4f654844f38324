"""Findings about all that a run reads: its text, its tokens, what it is tuned on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from octavo.config import Pretrained, Recipe
from octavo.data import check as data_check
from octavo.data import check_files, prepare
from octavo.data.check import Documents, Finding, HeldOut
from octavo.data.shards import Shards
from octavo.errors import CheckpointError, DataError
from octavo.feed.rows import has_held_out
from octavo.feed.stage import row_length
from octavo.feed.table import KINDS, kind_of
from octavo.tokenizer import Tokenizer


def check(recipe: Recipe, folder: Path, *, limit: int = 20_000) -> Iterator[tuple[str, Finding]]:
    """Findings about all that a run reads, each with the part of the data it is about; nothing is written.

    Args:
        folder: of a run.
        limit: documents and conversations that are looked at.
    """
    found: list[tuple[str, Callable[[], Iterator[Finding]]]] = []
    if recipe.data is not None:
        found += [("text", lambda: _check_text(folder, limit)), ("tokens", lambda: _check_tokens(recipe, folder))]
    if (kind := kind_of(recipe)) is not None:
        found.append((kind.many, lambda: _check_tuning(recipe, folder, limit)))
    for part, look_at in found:
        try:
            for finding in look_at():
                yield part, finding
        except (DataError, CheckpointError) as error:
            yield part, check_files.refusal(part, error)


def _check_text(folder: Path, limit: int) -> Iterator[Finding]:
    data, held = folder / "data", None
    report = prepare.read_json(data / "report.json") or {}
    removed = {name: entry["documents"] for name, entry in report.get("removed", {}).items()}
    told = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in removed.items()) or "nothing"
    read = report.get("documents", 0)
    yield Finding("left out", "ok", f"of {read:,} documents read, cleaning left out {told}", figures=removed)
    if has_held_out(folder):
        held = HeldOut(islice(prepare.iter_texts(data, "valid"), limit))
    documents = Documents(limit, held)
    for document in prepare.iter_documents(data, "train"):
        documents.add(document)
    yield from documents.findings(cleaned=True)


def _check_tokens(recipe: Recipe, folder: Path) -> Iterator[Finding]:
    tokenizer, seq_len = Tokenizer.load(folder / "tokenizer"), None
    model_ids = None if isinstance(recipe.model, Pretrained.Config) else recipe.model.vocab_size
    if model_ids is not None and model_ids < tokenizer.vocab_size:
        text = f"the tokenizer has {tokenizer.vocab_size:,} ids, the model {model_ids:,}"
        yield Finding("model", "fail", text, "leave model.vocab_size out")
    if recipe.train is not None:
        seq_len = row_length(recipe, recipe.train)
    yield from data_check.tokens(Shards.open(folder / "data" / "train"), tokenizer, seq_len)
    if has_held_out(folder):
        for finding in data_check.tokens(Shards.open(folder / "data" / "valid"), tokenizer, seq_len):
            if finding.verdict != "ok":
                yield replace(finding, name=f"held-out {finding.name}")


def _check_tuning(recipe: Recipe, folder: Path, limit: int) -> Iterator[Finding]:
    if recipe.tune is not None:
        tokenizer, seq_len = Tokenizer.load(folder / "tokenizer"), row_length(recipe, recipe.tune)
        yield from KINDS[recipe.tune.data.kind].findings(recipe.tune, recipe.seed, tokenizer, seq_len, limit)
