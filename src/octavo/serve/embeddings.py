"""/v1/embeddings: texts in, vectors of length 1 out."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from octavo.infer.embed import embed_in_batches
from octavo.serve.protocol import Strict, Tokens, listed
from octavo.serve.refusal import ApiError
from octavo.serve.worker import Job, Worker
from octavo.tokenizer import Tokenizer
from octavo.tokenizer.frame import frame

MAX_TEXTS = 2048


class EmbeddingRequest(Strict):
    """POST /v1/embeddings"""

    model: str
    input: Annotated[Tokens, BeforeValidator(listed, json_schema_input_type=str | Tokens)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Vectors:
    """How a model's hidden states become the vector of a text.

    Args:
        pooling: which tokens are kept: ``octavo.infer.embed``.
        max_tokens: the longest text, with its special tokens; longer ones are refused.
    """

    model: Any
    tokenizer: Tokenizer
    pooling: Literal["mean", "first", "last"] = "mean"
    max_tokens: int | None = None

    @property
    def width(self) -> int:
        return self.model.config.d_model

    def encoded(self, given: Sequence[Any]) -> list[list[int]]:
        """Token ids of each text, with what stands around it.

        Raises:
            ApiError: no text, an empty one, one that is too long, or ids that the model does not have.
        """
        texts = [given] if given and isinstance(given[0], int) else given
        if not 1 <= len(texts) <= MAX_TEXTS:
            raise ApiError(400, f"From 1 to {MAX_TEXTS} texts in one request.", param="input", code="invalid_value")
        raw = [list(self.tokenizer.encode(text)) if isinstance(text, str) else list(text) for text in texts]
        limit = min(self.max_tokens or self.model.max_seq_len, self.model.max_seq_len)
        for number, ids in enumerate(raw):
            if not ids:
                raise ApiError(400, f"Text {number} has no tokens.", param="input", code="invalid_value")
            if not 0 <= min(ids) <= max(ids) < self.tokenizer.vocab_size:
                raise ApiError(
                    400, f"Token ids are 0 to {self.tokenizer.vocab_size - 1}.", param="input", code="invalid_value"
                )
        framed = [frame(self.tokenizer, ids)[0] for ids in raw]
        if (longest := max(map(len, framed))) > limit:
            raise ApiError(
                400,
                f"This model reads {limit} tokens; a text has {longest} with its special ones.",
                param="input",
                code="context_length_exceeded",
            )
        return framed


@dataclass(frozen=True)
class Embedded:
    """An answer of /v1/embeddings: the worker reads a batch of texts between any two steps of its engine."""

    worker: Worker
    vectors: Vectors
    texts: list[list[int]]
    name: str
    as_base64: bool
    stream: bool = False

    def start(self, job: Job) -> None:
        self.worker.meter.add("octavo_prompt_tokens_total", sum(map(len, self.texts)))
        job.start_chore(self.worker, self._batches())

    def _batches(self) -> Iterator[tuple[list[int], np.ndarray]]:
        own = self.vectors
        pad = own.tokenizer.special.pad or 0
        return embed_in_batches(own.model, self.texts, pooling=own.pooling, normalise=True, pad=pad)

    async def whole(self, job: Job) -> dict[str, Any]:
        found: dict[int, np.ndarray] = {}
        async for parts in job.results():
            for rows, vectors in parts:
                found.update(zip(rows, vectors, strict=True))
        if len(found) < len(self.texts):
            raise ApiError(499, "The client has closed the request.", code="cancelled")
        n = sum(map(len, self.texts))
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": self._written(found[i])}
                for i in range(len(self.texts))
            ],
            "model": self.name,
            "usage": {"prompt_tokens": n, "total_tokens": n},
        }

    def _written(self, vector: np.ndarray) -> str | list[float]:
        if not self.as_base64:
            return vector.tolist()
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")

    def events(self, job: Job) -> AsyncIterator[bytes]:
        raise AssertionError("embeddings are not streamed")
