"""What pretraining reads: rows of documents, as the objective wants them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.config import DENOISING, Recipe
from octavo.data import denoising
from octavo.data.fim import FimRows
from octavo.data.loader import pretraining_loader
from octavo.data.masking import MaskedRows
from octavo.data.pack import Packed, StreamRows
from octavo.data.shards import Shards
from octavo.errors import ConfigError
from octavo.feed.rows import Feed, check_seq_len, has_held_out, model_shape, rows_of_step
from octavo.tokenizer import Tokenizer

# What becomes of rows of documents, so that an objective can be asked of them.
Change = Callable[[Packed], Packed]


def pretraining(recipe: Recipe, folder: Path, seq_len: int) -> Feed:
    """Rows of ``seq_len`` tokens from the shards in a run folder.

    Raises:
        ConfigError: the tokenizer has no tokens for what the objective does.
        DataError: there are no shards, or they are damaged.
    """
    if recipe.train is None:
        raise ConfigError("the recipe has no train section", fix="look at another stage")
    check_seq_len(recipe, "train", seq_len)
    shards, tokenizer = Shards.open(folder / "data" / "train"), Tokenizer.load(folder / "tokenizer")
    shards.require(tokenizer)
    weights = [source.weight for source in recipe.data.sources] if recipe.data else None
    n_rows = rows_of_step(recipe.train, seq_len)
    trained, held_out = _changes(recipe, tokenizer)
    source = pretraining_loader(shards, seq_len, n_rows, seed=recipe.seed, weights=weights, changed=trained)
    valid: Packed | None = None
    if has_held_out(folder):
        valid = held_out(StreamRows(Shards.open(folder / "data" / "valid"), seq_len, shuffle=False))
    return Feed(source, valid, shards.n_tokens)


def _changes(recipe: Recipe, tokenizer: Tokenizer) -> tuple[Change, Change]:
    """What the objective makes of the rows it trains on, and of those held out."""
    objective: Any = recipe.train.objective if recipe.train else None
    if objective.kind == "masked":

        def masked(packed: Packed, *, static: bool) -> Packed:
            shares = objective.model_dump(include={"probability", "mask", "random", "whole_words"})
            return MaskedRows(packed, tokenizer, seed=recipe.seed, static=static, **shares)

        return lambda packed: masked(packed, static=objective.static), lambda packed: masked(packed, static=True)
    if objective.kind == "prefix":
        return _both(lambda packed: denoising.PrefixRows(packed, seed=recipe.seed))
    if objective.kind in DENOISING:
        return _both(_damaged(recipe, objective, tokenizer))
    if getattr(objective, "fim", None) is not None:
        return _middle_last(objective, tokenizer), _as_they_are
    return _both(_as_they_are)


def _as_they_are(packed: Packed) -> Packed:
    return packed


def _both(change: Change) -> tuple[Change, Change]:
    return change, change


def _middle_last(objective: Any, tokenizer: Tokenizer) -> Change:
    """What ``fim`` makes of the rows of documents."""
    markers = tokenizer.fim
    if markers is None:
        raise ConfigError(
            "fim needs three tokens that mark prefix, suffix and middle, and this tokenizer has none",
            fix="train a tokenizer, or start from a model that has them",
        )

    def made(packed: Packed) -> Packed:
        assert isinstance(packed, StreamRows)
        return FimRows(packed, markers, rate=objective.fim.rate, spm=objective.fim.spm)

    return made


def _damaged(recipe: Recipe, objective: Any, tokenizer: Tokenizer) -> Change:
    """What an objective that mends text makes of the rows of documents."""
    shape = model_shape(recipe)
    start, vocab_size = shape.first_token(tokenizer.special), shape.vocab_size or tokenizer.vocab_size
    share = {"probability": objective.probability, "mean_span": objective.mean_span, "seed": recipe.seed}
    if objective.kind == "spans":
        return lambda packed: denoising.SpanRows(packed, tokenizer, start, vocab_size, **share)
    return lambda packed: denoising.InfilledRows(packed, tokenizer, start, permute=objective.permute, **share)
