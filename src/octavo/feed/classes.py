"""Tuning a head of classes: texts with labels, words with tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.config import LabelledData, Recipe, TaggedData, TuneConfig
from octavo.data import labelled, show, tagged
from octavo.data.loader import Loader
from octavo.feed.kinds import Kind
from octavo.feed.rows import Feed, model_shape, rows_of_step
from octavo.models.override import head_for, with_classes
from octavo.tokenizer import Tokenizer


class Labelled(Kind):
    """A text, or a pair of texts, a row; what is longer is cut."""

    noun, many = "text", "labelled texts"

    def read(self, recipe: Recipe, tune: TuneConfig, tokenizer: Tokenizer, seq_len: int, keep: Path | None) -> Feed:
        assert isinstance(tune.data, LabelledData)
        typed = (getattr(model_shape(recipe), "n_token_types", None) or 0) > 1
        rows, held_out, names = labelled.prepare(
            tune.data, tokenizer, seq_len, held_out=tune.held_out, seed=recipe.seed, typed=typed
        )
        cut = [f"{rows.cut:,} of {rows.n_rows:,} texts are longer than {seq_len} tokens, and cut"] * bool(rows.cut)
        loader, held = Loader(rows, rows_of_step(tune, seq_len), seed=recipe.seed), held_out.given if held_out else ()
        return Feed(loader, held_out, rows.n_tokens, rows.given, held, notices=cut, classes=names)

    def told(self, one: labelled.Labelled, tokenizer: Tokenizer) -> show.Told:
        named = one.label if isinstance(one.label, str) else ", ".join(map(str, one.label))
        return show.Told(f"{one.source}:{one.line}, label {named}")

    def fingerprint(self, data: Any) -> str | None:
        return labelled.fingerprint(data)

    def shape(self, shape: Any, data: Any, feed: Feed) -> Any:
        return with_classes(shape, head_for(shape, feed.classes, data.problem, data.pooling))


class Tagged(Kind):
    """Sentences whole where they fit; longer ones go on in the next row."""

    noun, many = "text", "tagged sentences"

    def read(self, recipe: Recipe, tune: TuneConfig, tokenizer: Tokenizer, seq_len: int, keep: Path | None) -> Feed:
        assert isinstance(tune.data, TaggedData)
        rows, held_out, names = tagged.prepare(tune.data, tokenizer, seq_len, held_out=tune.held_out, seed=recipe.seed)
        split = [f"{rows.n_split:,} rows go on with a sentence longer than {seq_len} tokens"] * bool(rows.n_split)
        loader, held = Loader(rows, rows_of_step(tune, seq_len), seed=recipe.seed), held_out.given if held_out else ()
        return Feed(loader, held_out, rows.n_trained, rows.given, held, notices=split, classes=names)

    def told(self, one: tagged.Sentence, tokenizer: Tokenizer) -> show.Told:
        return show.Told(f"{one.source}:{one.line}, {tagged.told(one.words, one.tags)}")

    def fingerprint(self, data: Any) -> str | None:
        return tagged.fingerprint(data)

    def shape(self, shape: Any, data: Any, feed: Feed) -> Any:
        return with_classes(shape, head_for(shape, feed.classes, data.problem, over="token"))
