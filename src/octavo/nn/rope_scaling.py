"""RoPE for longer texts: other frequencies, and a magnitude of the tables.

``factor`` s is how many times longer texts shall be; ``original`` the tokens of the first training, the model's
max_seq_len where it is not given. All but ``longrope`` may be put on a trained model (models/override.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from octavo.schema import Config


def rope_frequencies(dim: int, theta: float, factors: Tensor | float = 1.0) -> Tensor:
    """``1 / (factor_i theta^(2i/dim))`` for i in 0..dim/2-1, float32 (Su et al. 2021, equation 15).

    The order of operations is that of the published checkpoints' code: far positions multiply a last bit.
    """
    return 1.0 / (factors * theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


class RopeScaling(ABC):
    """How a rotary table reaches beyond the lengths it was first trained on: other frequencies, a magnitude."""

    Config: ClassVar[type[Config]]
    magnitude: float = 1.0  # what cos and sin are multiplied by
    limit: int | None = None  # positions this table is good for, if it ends
    by_length = False  # whether each query has frequencies of its own, by the length of the text up to it

    @abstractmethod
    def frequencies(self, dim: int, theta: float) -> Tensor:
        """The frequency of each of the dim/2 pairs, float32, on the CPU."""

    def frequencies_for(self, lengths: Tensor, dim: int, theta: float) -> Tensor:
        """Where ``by_length``: the frequencies for a text of each of ``lengths`` (...), (..., dim/2) float32."""
        raise TypeError(f"{type(self).__name__} is the same for all lengths")


Factor = Field(default=4.0, ge=1, description="times the trained length")
Original = Field(default=None, ge=2, description="tokens of the first training; default: max_seq_len")


def _several_pairs(kind: str, n_pairs: int) -> None:
    if n_pairs < 2:
        raise ValueError(f"{kind} raises to the power H / (H - 2): it needs two pairs of channels or more")


class Linear(RopeScaling):
    """``h_i = theta_i / s``: position interpolation, every position divided by the factor s.

    Source: Chen et al. 2023 (Extending Context Window), section 2.3. It wants a little training on long texts.
    """

    class Config(Config):
        kind: Literal["linear"] = "linear"
        factor: float = Factor

    def __init__(self, config: Linear.Config, max_seq_len: int):
        self.factor = config.factor

    def frequencies(self, dim: int, theta: float) -> Tensor:
        return rope_frequencies(dim, theta) / self.factor


class Ntk(RopeScaling):
    """``h_i = (b s^(H / (H - 2)))^(-2i/H)``: a larger base, so that the slowest pair is interpolated by s exactly.

    The fastest pair stays as it was. Source: bloc97 2023 (NTK-aware scaled RoPE); Peng et al. 2023 (YaRN),
    section 3.1.
    """

    class Config(Config):
        kind: Literal["ntk"] = "ntk"
        factor: float = Factor

        def check(self, n_pairs: int) -> None:
            """Raise ValueError if there are too few pairs of channels."""
            _several_pairs(self.kind, n_pairs)

    def __init__(self, config: Ntk.Config, max_seq_len: int):
        self.factor = config.factor

    def frequencies(self, dim: int, theta: float) -> Tensor:
        return rope_frequencies(dim, theta * self.factor ** (dim / (dim - 2)))


class _ByLength(RopeScaling):
    """A base that grows with the text: ``original`` and below it is the trained one."""

    by_length = True
    original: int

    @abstractmethod
    def growth(self, lengths: Tensor, dim: int) -> Tensor:
        """What the base is multiplied by for texts of ``lengths`` >= original, float64."""

    def frequencies(self, dim: int, theta: float) -> Tensor:
        return rope_frequencies(dim, theta)

    def frequencies_for(self, lengths: Tensor, dim: int, theta: float) -> Tensor:
        lengths = lengths.clamp(min=self.original).double()
        base = theta * self.growth(lengths, dim)[..., None]
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=lengths.device) / dim
        return (base**-exponents).float()


class Dynamic(_ByLength):
    """``h_i(T) = (b ((s T / T_max) - (s - 1))^(H / (H - 2)))^(-2i/H)``: NTK whose base grows with the text's length T.

    T is each query's own: the tokens of its document up to itself, at least ``original``. So the pass is causal,
    and as keys are kept unturned, reading in any cut equals reading at once. A layer gives the last token what
    transformers gives it for a text that ends there; transformers turns earlier queries by the last one's base
    too, which no cache can know in advance. Source: emozilla 2023 (Dynamically Scaled RoPE).
    """

    class Config(Config):
        kind: Literal["dynamic"] = "dynamic"
        factor: float = Factor
        original: int | None = Original

        def check(self, n_pairs: int) -> None:
            """Raise ValueError if there are too few pairs of channels."""
            _several_pairs(self.kind, n_pairs)

    def __init__(self, config: Dynamic.Config, max_seq_len: int):
        self.factor, self.original = config.factor, config.original or max_seq_len

    def growth(self, lengths: Tensor, dim: int) -> Tensor:
        return ((self.factor * lengths / self.original) - (self.factor - 1)) ** (dim / (dim - 2))


class DynamicSimple(_ByLength):
    """``h_i(T) = (b max(1, T / T_max))^(-2i/H)``: a base that grows in proportion to the text's length T.

    A simpler form than ``dynamic``, often written down in its place: without the power H / (H - 2) the slowest
    pair is interpolated by less than T / T_max. T as in ``dynamic``.
    """

    class Config(Config):
        kind: Literal["dynamic_simple"] = "dynamic_simple"
        original: int | None = Original

    def __init__(self, config: DynamicSimple.Config, max_seq_len: int):
        self.original = config.original or max_seq_len

    def growth(self, lengths: Tensor, dim: int) -> Tensor:
        return lengths / self.original


class Yarn(RopeScaling):
    """``h_i = (1 - r_i) theta_i / s + r_i theta_i``: slow pairs interpolated, fast ones kept, a ramp between.

    The ramp r runs between the pairs that turn ``beta_fast`` and ``beta_slow`` times in ``original`` tokens
    (``truncate``: rounded outwards to whole pairs). cos and sin are multiplied by ``magnitude``, by default
    0.1 ln(s) + 1, or with ``mscale`` and ``mscale_all_dim`` the quotient of the two (DeepSeek-V2, V3).
    Source: Peng et al. 2023, sections 3.2 to 3.4.
    """

    class Config(Config):
        kind: Literal["yarn"] = "yarn"
        factor: float = Factor
        original: int | None = Original
        beta_fast: float = Field(default=32.0, gt=0)
        beta_slow: float = Field(default=1.0, gt=0)
        truncate: bool = True
        magnitude: float | None = Field(default=None, gt=0)
        mscale: float | None = Field(default=None, gt=0)
        mscale_all_dim: float | None = Field(default=None, gt=0)

        @model_validator(mode="after")
        def _ordered(self) -> Yarn.Config:
            if self.beta_fast < self.beta_slow:
                raise ValueError(f"beta_fast = {self.beta_fast} must not be below beta_slow = {self.beta_slow}")
            return self

    def __init__(self, config: Yarn.Config, max_seq_len: int):
        self.config, self.original = config, config.original or max_seq_len
        s, one, all_dim = config.factor, config.mscale, config.mscale_all_dim
        both = one is not None and all_dim is not None
        usual = yarn_mscale(s, one) / yarn_mscale(s, all_dim) if both else yarn_mscale(s)  # type: ignore[arg-type]
        self.magnitude = config.magnitude or usual

    def frequencies(self, dim: int, theta: float) -> Tensor:
        kept, slowed = rope_frequencies(dim, theta), rope_frequencies(dim, theta, self.config.factor)
        low, high = (self._pair(turns, dim, theta) for turns in (self.config.beta_fast, self.config.beta_slow))
        if self.config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
        slow = ramp.clamp(0, 1)
        return slowed * slow + kept * (1 - slow)

    def _pair(self, turns: float, dim: int, theta: float) -> float:
        """The pair, between two whole numbers, that turns so many times in ``original`` tokens."""
        return dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """``0.1 m ln(s) + 1``, 1 for s <= 1 (Peng et al. 2023, equation 22; m as in DeepSeek's code)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


class Llama3(RopeScaling):
    """``h_i = theta_i / s`` where a wavelength exceeds T / low, ``theta_i`` where it is below T / high, else between.

    T is ``original``; between the two, the weight of theta_i is (T / wavelength - low) / (high - low).
    Source: Grattafiori et al. 2024 (Llama 3), the code of Llama 3.1.
    """

    class Config(Config):
        kind: Literal["llama3"] = "llama3"
        factor: float = Factor
        low_freq_factor: float = Field(default=1.0, gt=0)
        high_freq_factor: float = Field(default=4.0, gt=0)
        original: int | None = Original

        @model_validator(mode="after")
        def _ordered(self) -> Llama3.Config:
            if self.high_freq_factor <= self.low_freq_factor:
                raise ValueError(
                    f"high_freq_factor = {self.high_freq_factor} must exceed low_freq_factor = {self.low_freq_factor}"
                )
            return self

    def __init__(self, config: Llama3.Config, max_seq_len: int):
        self.config, self.original = config, config.original or max_seq_len

    def frequencies(self, dim: int, theta: float) -> Tensor:
        low, high = self.config.low_freq_factor, self.config.high_freq_factor
        kept = rope_frequencies(dim, theta)
        turns = self.original / (2 * math.pi / kept)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * (kept / self.config.factor) + keep * kept


class LongRope(RopeScaling):
    """``h_i = theta_i / f_i``: each pair has a searched factor, of one list for short texts, another for long ones.

    Which list is used is settled once, when the model is built: ``long`` if its max_seq_len exceeds
    ``original``, else ``short``, and then the table ends at ``original``. A token's rotation depends on its
    position alone, so a cache stays true. (transformers chooses at every call, by the longest row of the
    batch, and drops the cache where the choice changes.) cos and sin are multiplied by ``magnitude``, by
    default ``sqrt(1 + ln(extended / original) / ln(original))``. Source: Ding et al. 2024 (LongRoPE), section 3;
    the magnitude, Abdin et al. 2024 (Phi-3) and its code.
    """

    class Config(Config):
        kind: Literal["longrope"] = "longrope"
        short: tuple[float, ...]
        long: tuple[float, ...]
        original: int = Field(ge=2, description="tokens of the first training")
        extended: int = Field(ge=2, description="tokens the long factors reach to")
        magnitude: float | None = Field(default=None, gt=0)

        @model_validator(mode="after")
        def _positive(self) -> LongRope.Config:
            if any(factor <= 0 for factor in (*self.short, *self.long)):
                raise ValueError("the factors of longrope must be positive")
            return self

        def check(self, n_pairs: int) -> None:
            """Raise ValueError unless there is one factor a pair."""
            for name, factors in (("short", self.short), ("long", self.long)):
                if len(factors) != n_pairs:
                    raise ValueError(f"longrope.{name} has {len(factors)} factors for {n_pairs} pairs of channels")

    def __init__(self, config: LongRope.Config, max_seq_len: int):
        reach = math.log(max(config.extended / config.original, 1.0)) / math.log(config.original)
        self.magnitude = config.magnitude or math.sqrt(1 + reach)
        self.factors = config.long if max_seq_len > config.original else config.short
        self.limit = None if max_seq_len > config.original else config.original

    def frequencies(self, dim: int, theta: float) -> Tensor:
        return rope_frequencies(dim, theta, torch.tensor(self.factors, dtype=torch.float32))


class Truncation(RopeScaling):
    """``h_i = theta_i`` if theta_i >= c, ``beta`` if a < theta_i < c, ``0`` if theta_i <= a.

    Fast pairs have shown every angle in training and are kept; slow ones never came around and stand still; those
    between turn at one small frequency. By default c = 2 pi / ``original`` (one turn in the training), a = c / 4,
    beta = a / 4; Pal et al. 2023 (Giraffe), section 3, leave the three to be chosen for a model.
    """

    class Config(Config):
        kind: Literal["truncation"] = "truncation"
        keep: float | None = Field(default=None, gt=0, description="c: pairs at least as fast are kept")
        zero: float | None = Field(default=None, ge=0, description="a: pairs at most as fast stand still")
        middle: float | None = Field(default=None, ge=0, description="beta: the frequency of all others")
        original: int | None = Original

        @model_validator(mode="after")
        def _ordered(self) -> Truncation.Config:
            if self.keep is not None and max(self.zero or 0.0, self.middle or 0.0) >= self.keep:
                raise ValueError(f"zero = {self.zero} and middle = {self.middle} must be below keep = {self.keep}")
            return self

    def __init__(self, config: Truncation.Config, max_seq_len: int):
        self.keep = 2 * math.pi / (config.original or max_seq_len) if config.keep is None else config.keep
        self.zero = self.keep / 4 if config.zero is None else config.zero
        self.middle = self.zero / 4 if config.middle is None else config.middle

    def frequencies(self, dim: int, theta: float) -> Tensor:
        kept = rope_frequencies(dim, theta)
        slowed = torch.where(kept > self.zero, self.middle, 0.0)
        return torch.where(kept >= self.keep, kept, slowed)


ROPE_SCALINGS: dict[str, type[RopeScaling]] = {
    "linear": Linear,
    "ntk": Ntk,
    "dynamic": Dynamic,
    "dynamic_simple": DynamicSimple,
    "yarn": Yarn,
    "llama3": Llama3,
    "longrope": LongRope,
    "truncation": Truncation,
}
