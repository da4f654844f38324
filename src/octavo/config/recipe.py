"""The sections of a recipe, and what they must have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from octavo.config.explaining import explain
from octavo.config.reading import apply_overrides, read_mapping, set_key
from octavo.data.chat import ChatConfig
from octavo.data.facts import FactsConfig
from octavo.data.labelled import LabelledConfig
from octavo.data.pairs import PairsConfig
from octavo.data.prepare import DataConfig
from octavo.data.tagged import TaggedConfig
from octavo.errors import ConfigErrors
from octavo.eval.runner import EvalConfig
from octavo.models.decoder import Decoder
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.models.tables import MODELS
from octavo.predictors.kinds import PREDICTORS
from octavo.predictors.settings import CountedConfig
from octavo.schema import Config, one_of
from octavo.tokenizer.config import ByteBPE, TokenizerConfig
from octavo.training.settings import TrainConfig
from octavo.vectors.config import StartVectors

DENOISING = ("spans", "infilling")


class Pretrained:
    """A model that exists: a run, or a Hugging Face folder of a known family; its tokenizer comes with it."""

    class Config(Config):
        kind: Literal["pretrained"] = "pretrained"
        path: str


class FactsData(Config):
    """Questions and answers about the standard library of the Python that runs us."""

    kind: Literal["python-stdlib"] = "python-stdlib"
    facts: FactsConfig = FactsConfig()


class ChatData(ChatConfig):
    """Conversations on disk: Alpaca, ShareGPT, messages or prompt and completion, recognised per file."""

    kind: Literal["chat"] = "chat"


class PairsData(PairsConfig):
    """Pairs of a source and a target, for an encoder-decoder."""

    kind: Literal["pairs"] = "pairs"


class LabelledData(LabelledConfig):
    """Texts or pairs of texts with a label: a head of classes is trained, with the objective of that name."""

    kind: Literal["labelled"] = "labelled"


class TaggedData(TaggedConfig):
    """Words with a tag each: a head of classes of tokens is trained, with the objective `classes`."""

    kind: Literal["tagged"] = "tagged"


class TuneConfig(TrainConfig):
    """Instruction tuning: the same loop, with a chat source and the renderer's loss mask; of pairs, from the start."""

    data: FactsData | ChatData | PairsData | LabelledData | TaggedData = Field(
        default=FactsData(), discriminator="kind"
    )
    held_out: float = Field(default=0.05, ge=0, lt=1, description="share of a file's conversations kept for validation")

    @model_validator(mode="before")
    @classmethod
    def _objective_of_the_data(cls, raw: Any) -> Any:
        data = raw.get("data") if isinstance(raw, Mapping) else None
        if isinstance(data, Mapping) and data.get("kind") in ("labelled", "tagged") and "objective" not in raw:
            return {**raw, "objective": {"kind": "classes", "problem": data.get("problem", "single_label")}}
        return raw

    @model_validator(mode="after")
    def _one_purpose(self) -> TuneConfig:
        labelled, kind = isinstance(self.data, LabelledData | TaggedData), self.objective.kind
        if kind == "masked":
            raise ValueError("objective masked is for the train section; use causal or classes")
        if getattr(self.objective, "fim", None) is not None:
            raise ValueError("objective.fim is for the train section: conversations are told as they are")
        if labelled != (kind == "classes"):
            raise ValueError(f"objective {kind} does not go with data {self.data.kind}; use classes with labels")
        if isinstance(self.data, LabelledData | TaggedData) and self.objective.problem != self.data.problem:
            raise ValueError(f"objective.problem = {self.objective.problem}, data.problem = {self.data.problem}")
        return self


class Recipe(Config):
    """Everything a run is made from. A section that is left out is a stage that is not run."""

    name: str = Field(default="run", pattern=r"^[\w.-]+$")
    seed: int = Field(default=1, ge=0, lt=2**63)
    data: DataConfig | None = None
    tokenizer: TokenizerConfig = ByteBPE()
    model: one_of({**MODELS, **PREDICTORS, "pretrained": Pretrained}, default="decoder") = Decoder.Config()  # type: ignore[valid-type]
    vectors: StartVectors | None = Field(default=None, description="word vectors that the embedding starts from")
    train: TrainConfig | None = None
    tune: TuneConfig | None = None
    eval: EvalConfig | None = EvalConfig()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, raw: Any) -> Any:
        model = raw.get("model") if isinstance(raw, Mapping) else None
        if not (isinstance(model, Mapping) and "preset" in model):
            return raw
        from octavo.presets import expand

        return {**raw, "model": expand(model)}

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        pretrained = isinstance(self.model, Pretrained.Config)
        if self.vectors is not None and (isinstance(self.model, Pretrained.Config) or self.train is None):
            raise ValueError("vectors are what a fresh model starts from: leave the vectors section out")
        if isinstance(self.model, CountedConfig):
            return self._countable(self.model)
        if self.train is not None and self.data is None:
            raise ValueError("train needs text: set data.sources")
        if self.train is not None:
            self._asked_both_ways(self.train.objective.kind)
        if self.train is None and self.tune is None:
            raise ValueError("nothing to do: give a train section, a tune section or both")
        paired = self.tune is not None and isinstance(self.tune.data, PairsData)
        mended = self.train is not None and self.train.objective.kind in DENOISING
        both = isinstance(self.model, EncoderDecoder.Config)
        wrong = (self.tune is not None and paired != both) or (self.train is not None and mended != both)
        if wrong and not pretrained:
            raise ValueError(
                "an encoder-decoder trains on damaged text (train.objective.kind spans or infilling) and is tuned on "
                "pairs (tune.data.kind pairs), and no other model is"
            )
        if self.train is None and not pretrained and not paired:
            raise ValueError("tune alone needs a trained model: set model.kind to pretrained and model.path to it")
        if not pretrained:
            limit = self.model.max_seq_len
            for name, section in (("train", self.train), ("tune", self.tune)):
                if section is None:
                    continue
                seq_len = section.seq_len or limit
                if seq_len > limit and self.model.positions.kind == "learned":
                    raise ValueError(f"{name}.seq_len = {seq_len} exceeds model.max_seq_len = {limit}")
                if section.update == "mini_batch" and section.step_tokens % seq_len:
                    rows = max(1, round(section.step_tokens / seq_len))
                    raise ValueError(
                        f"{name}.step_tokens = {section.step_tokens} must be a multiple of seq_len = {seq_len}; "
                        f"use {rows * seq_len}"
                    )
            size = getattr(self.tokenizer, "vocab_size", None)
            if self.model.vocab_size is not None and size is not None and self.model.vocab_size < size:
                raise ValueError(
                    f"model.vocab_size = {self.model.vocab_size} is below tokenizer.vocab_size = {size}; "
                    "leave model.vocab_size out"
                )
            if self.data is not None and self.eval is not None and (self.eval.stride or 1) > limit:
                raise ValueError(
                    f"eval.stride = {self.eval.stride} exceeds model.max_seq_len = {limit}; use {max(1, limit // 2)}"
                )
        elif self.tokenizer != ByteBPE():
            raise ValueError("a pretrained model brings its tokenizer: leave the tokenizer section out")
        return self

    def _asked_both_ways(self, kind: str) -> None:
        """Hidden tokens are asked of a model that reads both ways, the next token of one that does not."""
        if kind == "classes":
            raise ValueError("train.objective classes needs labelled texts; use tune.data.kind=labelled or tagged")
        causal = getattr(self.model, "causal", None)
        if causal is not None and kind in ("masked", "causal", "prefix") and causal != (kind != "masked"):
            fix = "model.causal=false" if kind == "masked" else "train.objective.kind=masked"
            raise ValueError(f"train.objective {kind} does not go with model.causal = {str(causal).lower()}; use {fix}")

    def _countable(self, model: CountedConfig) -> Recipe:
        kind = model.kind  # type: ignore[attr-defined] - every entry of the table has one
        for name in ("train", "tune"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: a model of kind {kind} is counted in one pass and has no weights to train; "
                    f"use {name}=null, or another model.kind"
                )
        if self.data is None:
            raise ValueError(f"a model of kind {kind} is counted from text: set data.sources")
        size = getattr(self.tokenizer, "vocab_size", None)
        if model.vocab_size is not None and size is not None and model.vocab_size < size:
            raise ValueError(
                f"model.vocab_size = {model.vocab_size} is below tokenizer.vocab_size = {size}; "
                "leave model.vocab_size out"
            )
        return self

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """A recipe by name or path, with ``section.key=value`` overrides.

        Raises:
            ConfigErrors: everything that is wrong with it.
        """
        raw, lines, where = read_mapping(name_or_path)
        raw = apply_overrides(raw, overrides, lines)
        return cls.parse(raw, where, lines)

    @classmethod
    def parse(
        cls, raw: Mapping[str, Any], where: str = "recipe", lines: Mapping[tuple[Any, ...], str | int] | None = None
    ) -> Recipe:
        """Validate plain values; all errors at once, each with its place and fix."""
        try:
            return cls.model_validate(dict(raw))
        except ValidationError as error:
            raise ConfigErrors(explain(cls, raw, error, where, lines or {})) from None

    def plain(self) -> dict[str, Any]:
        """JSON-able values: what a run's recipe.yaml holds."""
        return self.model_dump(mode="json")

    def replace(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys set, validated anew."""
        raw = self.plain()
        for key, value in changes.items():
            set_key(raw, key.split("."), value)
        return Recipe.parse(raw)


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
