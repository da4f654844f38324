"""The tokens that are no text: what they are for, by role."""

from __future__ import annotations

from dataclasses import dataclass, fields

MASK = "<|mask|>"  # how a mask token is spelt where we add one
SENTINEL = "<extra_id_{}>"  # what stands for a span of a text, as T5 spells it

# What marks prefix, suffix and middle of a text whose middle is told last: as we spell it (and Qwen), StarCoder's,
# DeepSeek-Coder's.
FIM = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


@dataclass(frozen=True)
class Special:
    """Ids of the special tokens by role; None where the tokenizer has none."""

    pad: int | None = None
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    turn_start: int | None = None
    turn_end: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None

    @property
    def first(self) -> int | None:
        """What a text begins with: bos, or in an encoder's vocabulary cls."""
        return self.cls if self.bos is None else self.bos

    @property
    def last(self) -> int | None:
        """What a text ends with: eos, or sep."""
        return self.sep if self.eos is None else self.eos


def as_dict(special: Special) -> dict[str, int | None]:
    """Id by role, None where there is none."""
    return {field.name: getattr(special, field.name) for field in fields(special)}
