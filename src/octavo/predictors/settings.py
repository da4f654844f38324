"""What the settings of every counted model have in common."""

from __future__ import annotations

from pydantic import Field

from octavo.errors import ConfigError
from octavo.schema import Config


class CountedConfig(Config):
    """A model whose table is made in one pass over the text."""

    vocab_size: int | None = Field(default=None, ge=2, description="default: the tokenizer's")
    max_seq_len: int = Field(
        default=65_536, ge=1, le=1 << 26, description="tokens of prompt and answer; the model reads the last few"
    )

    @property
    def size(self) -> int:
        """The vocabulary's size, known once there is a tokenizer."""
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size is not set", fix="give it, or take it from a tokenizer")
        return self.vocab_size
