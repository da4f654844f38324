"""What tuning reads: the kind of its data decides how."""

from __future__ import annotations

from pathlib import Path

from octavo.config import Recipe
from octavo.errors import ConfigError
from octavo.feed.chats import Chats, Facts
from octavo.feed.classes import Labelled, Tagged
from octavo.feed.kinds import Kind
from octavo.feed.rows import Feed, check_seq_len, model_shape
from octavo.feed.sources import Pairs
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.tokenizer import Tokenizer

KINDS: dict[str, Kind] = {
    "python-stdlib": Facts(),
    "chat": Chats(),
    "pairs": Pairs(),
    "labelled": Labelled(),
    "tagged": Tagged(),
}


def kind_of(recipe: Recipe) -> Kind | None:
    """What a recipe is tuned on; None if it is not."""
    return None if recipe.tune is None else KINDS[recipe.tune.data.kind]


def tuning(recipe: Recipe, tokenizer: Tokenizer, seq_len: int, *, keep: Path | None = None) -> Feed:
    """Rows of ``seq_len`` tokens of the kind that the recipe says.

    Args:
        keep: a folder in which what is held out, and was built or chosen here, is written for the scores.

    Raises:
        ConfigError: it has no tune section, or another model is needed for such data.
        DataError: nothing can be read, or nothing in it can be trained on.
    """
    if recipe.tune is None:
        raise ConfigError("the recipe has no tune section", fix="look at another stage")
    check_seq_len(recipe, "tune", seq_len)
    kind = KINDS[recipe.tune.data.kind]
    both = isinstance(model_shape(recipe), EncoderDecoder.Config)
    if kind.of_pairs and not both:
        raise ConfigError("pairs are for an encoder-decoder", fix="set model.kind to encoder_decoder")
    if both and not kind.of_pairs:
        raise ConfigError(
            f"an encoder-decoder is tuned on pairs, not on data of kind {recipe.tune.data.kind}",
            fix="tune.data={kind: pairs, files: [pairs.jsonl]}",
        )
    return kind.read(recipe, recipe.tune, tokenizer, seq_len, keep)
