"""Tuning an encoder-decoder on pairs of a source and a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.config import PairsData, Recipe, TuneConfig
from octavo.data import pairs, show
from octavo.data.loader import Loader
from octavo.errors import ConfigError
from octavo.feed.kinds import Kind, spread
from octavo.feed.rows import Feed, model_shape, rows_of_step
from octavo.infer.generate import encode_source
from octavo.tokenizer import Tokenizer

HELD_PAIRS = "held_pairs.jsonl"


class Pairs(Kind):
    """One pair a row; the share that is held out is spread over them."""

    noun, many = "pair", "pairs"
    of_pairs = True

    def read(self, recipe: Recipe, tune: TuneConfig, tokenizer: Tokenizer, seq_len: int, keep: Path | None) -> Feed:
        data, shape = tune.data, model_shape(recipe)
        assert isinstance(data, PairsData)
        eos, pad = tokenizer.special.eos, tokenizer.special.pad or 0
        if eos is None:
            raise ConfigError("the tokenizer has no token that ends a text", fix="use one that has")
        longest, start = data.max_source or shape.encoder.max_seq_len, shape.first_token(tokenizer.special)

        def rows(some: list[pairs.Pair]) -> pairs.PairRows:
            ids = [(encode_source(tokenizer, p.source), [*tokenizer.encode(p.target), eos]) for p in some]
            return pairs.PairRows(ids, start, seq_len, longest, pad=pad)

        trained, held_out = spread(pairs.read(data, recipe.seed), tune.held_out)
        source = rows(trained)
        valid = rows(held_out) if held_out else None
        notices = [f"{source.dropped:,} pairs are longer than the model reads, and left out"] if source.dropped else []
        held = [held_out[i] for i in valid.numbers] if valid is not None else []
        if keep is not None and held:
            pairs.write(keep / HELD_PAIRS, held)
        return Feed(
            Loader(source, rows_of_step(tune, source.seq_len), seed=recipe.seed),
            valid,
            source.report().targets,
            [trained[i] for i in source.numbers],
            held,
            notices=notices,
        )

    def told(self, one: pairs.Pair, tokenizer: Tokenizer) -> show.Told:
        return show.Told(one.where)

    def fingerprint(self, data: Any) -> str | None:
        return data.fingerprint()
