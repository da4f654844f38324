"""What the engine is asked for: a prompt, how it is continued, and how much is decoded together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import Field
from torch import Tensor

from octavo.errors import ConfigError
from octavo.infer.sampling import SamplingConfig
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.schema import Config

OnFull = Literal["crop", "stop"]


class Constraint(Protocol):
    """What a text has to follow: a grammar, a schema."""

    def mask(self, logits: Tensor) -> None:
        """Give every token that cannot come next -inf, in logits (V,).

        Raises:
            ConfigError: no token can come next.
        """
        ...

    def accept(self, token: int) -> bool:
        """Take the token that was chosen; True if the text is complete with it."""
        ...


class EngineConfig(Config):
    """How much is decoded together."""

    max_sequences: int = Field(default=64, ge=1, description="Texts that have a state at once.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="Tokens of state of all texts together. Default: their contexts, if they fit."
    )
    block_size: int = Field(default=16, ge=1, description="Tokens of a block of memory.")
    step_tokens: int = Field(default=512, ge=1, description="Tokens read in a step at most; never less than a chunk.")
    chunk: int = Field(default=256, ge=1, description="Tokens of one prompt read in a step at most.")
    share_prefixes: bool = Field(default=True, description="Texts that begin alike share their memory.")
    executor: Literal["auto", "plain", "compiled", "native"] = Field(
        default="auto", description="What runs the model; auto: native where it serves the model, else plain."
    )
    deterministic: bool = Field(default=False, description="Every answer is bit for bit the one it would be alone.")


@dataclass(eq=False)
class Request:
    """One prompt and the texts wanted for it.

    Args:
        prompt: token ids; of an encoder-decoder, the source.
        n: texts to produce; text i draws from the stream ``config.seed + first_stream + i``.
        stop_ids: tokens that end a text.
        on_full: at ``max_seq_len`` tokens, ``stop`` ends a text; ``crop`` keeps the last ones and reads them anew for
            every token (the textbook loop of GPT-2; a state cannot help, as every position moves).
        n_top: with a number, every piece carries its log-probability and those of the ``n_top`` best tokens.
        priority: smaller goes first; of equals the earlier.
        within: prompts share memory only with prompts of the same.
        constraint: makes, for each text, what its tokens have to follow, from the tokens that stand before it and
            ``stop_ids`` (``constraints.Grammar``); such texts are not drafted.
    """

    prompt: Sequence[int]
    config: SamplingConfig = field(default_factory=SamplingConfig)
    n: int = 1
    stop_ids: Collection[int] = ()
    on_full: OnFull = "stop"
    n_top: int | None = None
    priority: int = 0
    first_stream: int = 0
    within: Hashable = ""
    constraint: Callable[[Sequence[int], Collection[int]], Constraint] | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The model failed on a request; nothing more comes of it."""

    error: Exception


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], on_full: OnFull) -> None:
    """Refuse prompts that ``model`` cannot read: empty, with ids outside the vocabulary, too long under ``stop``."""
    if not prompts:
        raise ConfigError("there is no prompt to complete", fix="give at least one list of token ids")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"prompt {row} has no tokens", fix="begin with the beginning-of-text token")
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise ConfigError(
                f"prompt {row} has a token id outside 0..{model.vocab_size - 1}",
                fix="encode it with this model's tokenizer",
            )
        if on_full == "stop" and len(prompt) >= model.max_seq_len and not isinstance(model, EncoderDecoder):
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens, the model's context is {model.max_seq_len}",
                fix="shorten it, or start a new conversation",
            )
