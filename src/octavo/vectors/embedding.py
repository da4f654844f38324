"""Word vectors and the token embedding of a model: one starts from the other, and becomes one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from octavo.errors import ConfigError, UnsupportedError
from octavo.vectors import formats
from octavo.vectors.config import StartVectors
from octavo.vectors.corpus import is_word
from octavo.vectors.query import Vectors

if TYPE_CHECKING:
    from torch import nn

    from octavo.nn.projection import Embedding
    from octavo.tokenizer import Tokenizer


@dataclass(frozen=True)
class Coverage:
    """How many of a vocabulary's ``tokens`` got a vector, and how many words the file had."""

    known: int
    tokens: int
    by_text: int

    def __str__(self) -> str:
        return (
            f"{self.known:,} of {self.tokens:,} tokens ({self.known / max(1, self.tokens):.1%}) start from word "
            f"vectors, {self.by_text:,} of them by their text without the space before it"
        )


def _spellings(tokenizer: Tokenizer) -> Iterator[tuple[int, str, str]]:
    """The id of every token that is no special one, its spelling, and its text without white space around it."""
    for id, token in enumerate(tokenizer.tokens):
        if token is not None and id not in tokenizer.special_ids:
            try:
                text = tokenizer.token_bytes(id).decode("utf-8").strip()
            except UnicodeDecodeError:  # part of a character
                text = ""
            yield id, token, text


def _embedding(model: nn.Module) -> Embedding:
    from octavo.nn.projection import Embedding

    found = [m for m in model.modules() if isinstance(m, Embedding) and m.role == "embed"]
    if len(found) != 1:
        raise UnsupportedError(f"the model has {len(found)} token embeddings", fix="use a model with one")
    return found[0]


def check_width(config: StartVectors, d_model: int) -> None:
    """Refuse vectors that are not as wide as the model, before anything is built.

    Raises:
        ConfigError: they are not.
    """
    if (dim := formats.dim_of(config.path)) != d_model:
        raise ConfigError(
            f"{config.path} has {dim} numbers a word, the model's embedding {d_model}",
            fix=f"use model.d_model={dim}, or train vectors with --dim {d_model}",
        )


def fill(model: nn.Module, tokenizer: Tokenizer, config: StartVectors) -> Coverage:
    """Put word vectors into the embedding rows of the tokens that the file knows.

    A token is known by its spelling in the vocabulary (``Ġthe``, as ``octavo vectors export`` writes it), else by its
    text without the space before it.

    Raises:
        ConfigError: the vectors have another width, or none belongs to a token.
    """
    import torch

    embedding = _embedding(model)
    check_width(config, embedding.d)
    spellings = list(_spellings(tokenizer))
    wanted = {name for _, token, text in spellings for name in (token, text) if name}
    vectors = formats.read(config.path, only=wanted)
    ids, rows, by_text = list[int](), list[int](), 0
    for id, token, text in spellings:
        row = vectors.index.get(token, vectors.index.get(text) if text else None)
        if row is not None:
            ids.append(id)
            rows.append(row)
            by_text += token not in vectors
    if not ids:
        raise ConfigError(
            f"{config.path} has none of the tokenizer's {len(spellings):,} tokens", fix="use other vectors"
        )
    new = torch.from_numpy(vectors.matrix[rows])
    weight = embedding.weight.detach()  # the same numbers
    if config.scale == "match" and (size := float(new.square().mean().sqrt())) > 0:
        new = new * (float(weight[ids].float().square().mean().sqrt()) / size)
    weight[ids] = new.to(weight)
    if embedding.padding_id is not None:
        weight[embedding.padding_id].zero_()
    return Coverage(len(ids), len(spellings), by_text)


def export(model: nn.Module, tokenizer: Tokenizer) -> tuple[Vectors, int]:
    """The embedding of a model as word vectors, spelt as in the vocabulary; and how many tokens cannot be written."""
    weight = _embedding(model).weight.detach().float().cpu().numpy()
    ids = [id for id, token in enumerate(tokenizer.tokens[: len(weight)]) if token is not None and is_word(token)]
    words = [str(tokenizer.tokens[id]) for id in ids]
    return Vectors(words, np.ascontiguousarray(weight[ids])), sum(t is not None for t in tokenizer.tokens) - len(ids)
