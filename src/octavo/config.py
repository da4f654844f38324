"""One recipe describes a whole pipeline: data, tokenizer, model, train, tune, eval.

A recipe is YAML, shipped with the package or the user's own, with dotted overrides. Everything wrong with
it is reported at once, with the line it stands on and the nearest known name, before any data is read.
"""

from __future__ import annotations

import copy
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from octavo.data.chat import ChatConfig
from octavo.data.facts import FactsConfig
from octavo.data.labelled import LabelledConfig
from octavo.data.pairs import PairsConfig
from octavo.data.prepare import DataConfig
from octavo.data.tagged import TaggedConfig
from octavo.errors import ConfigError, ConfigErrors, did_you_mean, nearest
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
MAX_BYTES, MAX_ENTRIES, MAX_DEPTH, MAX_DIGITS = 1 << 18, 20_000, 50, 300
# What PyYAML raises, of its own and by accident, where a tag stands before what it cannot be.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


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
            _set(raw, key.split("."), value)
        return Recipe.parse(raw)


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: ``off`` and ``no`` are words, ``3e-4`` is a number (YAML 1.2's core schema)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$|^[-+]?0x[0-9a-fA-F_]+$"), "-+0123456789"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    "-+0123456789.",
)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    if len(text) > MAX_DIGITS:
        raise yaml.MarkedYAMLError(problem=f"a number of {len(text)} digits", problem_mark=node.start_mark)
    return int(text, 16) if "x" in text else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _parse_yaml(text: str) -> tuple[Any, dict[tuple[Any, ...], str | int]]:
    lines = _lines(yaml.compose(text, Loader=_Loader))  # refuses what would grow without end, before it is built
    return yaml.load(text, Loader=_Loader), lines


def _read_yaml(text: str, where: str) -> tuple[Any, dict[tuple[Any, ...], str | int]]:
    """Plain values and the line of every key.

    Raises:
        ConfigErrors: no YAML, a value that does not exist (a 13th month), a key given twice, or aliases that
            make it endless.
    """
    try:
        return _parse_yaml(text)
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        why = " ".join(str(getattr(error, "problem", None) or error).split())
        line = f"{where}:{mark.line + 1}" if mark else where
        raise ConfigErrors([ConfigError(f"{where} cannot be read as YAML: {why}", where=line, fix="mend it")]) from None


def read_mapping(
    name_or_path: str | Path, shown: str = ""
) -> tuple[dict[str, Any], dict[tuple[Any, ...], str | int], str]:
    """A recipe's plain values, the line of every key, and the file's name for errors (``shown`` instead, if given).

    Raises:
        ConfigErrors: it cannot be read, or is no mapping.
    """
    text, where = _read(name_or_path)
    where = shown or where
    raw, lines = _read_yaml(text, where)
    if not isinstance(raw, dict):
        raise ConfigErrors([ConfigError(f"{where} is not a mapping of sections", fix="see `octavo schema`")])
    return raw, lines, where


def names() -> list[str]:
    """The recipes shipped with the package."""
    folder = resources.files("octavo") / "recipes"
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def _read(name_or_path: str | Path) -> tuple[str, str]:
    name = str(name_or_path)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or _is_file(path):
        try:
            if path.exists() and not path.is_file():
                raise ConfigError(f"recipe {name} is not a file", fix="check the path")
            if (size := path.stat().st_size) > MAX_BYTES:
                raise ConfigError(f"recipe {name} has {size:,} bytes, more than {MAX_BYTES:,}", fix="check the path")
            return path.read_text(encoding="utf-8"), name
        except OSError as error:
            raise ConfigError(f"recipe {name} cannot be read: {error.strerror}", fix="check the path") from None
        except UnicodeDecodeError as error:
            byte, at = error.object[error.start], error.start
            line = error.object.count(b"\n", 0, at) + 1
            raise ConfigError(
                f"recipe {name} is not UTF-8 text: byte 0x{byte:02X} at {at:,}", where=f"{name}:{line}",
                fix="save it as UTF-8",
            ) from None  # fmt: skip
        except ValueError as error:  # a name that no file can have
            raise ConfigError(f"recipe {name} cannot be read: {error}", fix="check the path") from None
    if name not in names():
        raise ConfigError(f"there is no recipe `{name}`", fix=did_you_mean(name, names(), thing="recipe"))
    return (resources.files("octavo") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # longer than any file name
        return False


def apply_overrides(
    raw: Mapping[str, Any], overrides: Iterable[str], lines: dict[tuple[Any, ...], str | int] | None = None
) -> dict[str, Any]:
    """``raw`` with ``a.b.c=value`` applied; the value is read as YAML (``3e-4``, ``[a, b]``, ``null``)."""
    result: dict[str, Any] = copy.deepcopy(dict(raw))
    errors = []
    for text in overrides:
        key, equals, value = text.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path) or len(path) > MAX_DEPTH:
            shown = _shown(text)
            errors.append(ConfigError(f"override {shown} is not KEY=VALUE", fix="write it like train.steps=500"))
            continue
        try:
            parsed, _ = _parse_yaml(value)
        except YAML_ERRORS:
            errors.append(ConfigError(f"override {_shown(text)}: the value is not YAML", fix="put quotes around it"))
            continue
        problem = _set(result, path, parsed)
        if problem:
            errors.append(ConfigError(f"override {_shown(text)}: {problem}", fix="check the key with `octavo schema`"))
        elif lines is not None:
            new = [tuple(path[:n]) for n in range(1, len(path) + 1)]
            lines |= {key: "command line" for key in new if key not in lines or key == tuple(path)}
    if errors:
        raise ConfigErrors(errors)
    return result


def _set(raw: Any, path: Sequence[str], value: Any) -> str:
    """Set a dotted path in nested mappings and lists; returns what is wrong, or nothing."""
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(raw, list):
            if not (part.isascii() and part.isdigit() and len(part) < 9 and int(part) < len(raw)):
                return f"{'.'.join(path[:depth])} is a list of {len(raw)}, {part!r} is no index of it"
            if last:
                raw[int(part)] = value
            raw = raw[int(part)]
        elif isinstance(raw, dict):
            if last:
                raw[part] = value
            elif raw.get(part) is None:
                raw[part] = {}
            elif isinstance(raw[part], str):  # a bare kind opens up: `schedule: cosine`, then schedule.warmup=10
                raw[part] = {"kind": raw[part]}
            raw = raw[part]
        else:
            return f"{'.'.join(path[:depth])} is a value, not a section"
    return ""


# ------------------------------------------------------------------------------------------ explaining


def _lines(
    node: yaml.Node | None, path: tuple[Any, ...] = (), found: dict[tuple[Any, ...], str | int] | None = None
) -> dict[tuple[Any, ...], str | int]:
    """The line every key stands on. An alias counts as often as it is used."""
    found = {} if found is None else found
    if len(found) > MAX_ENTRIES or len(path) > MAX_DEPTH:
        raise yaml.MarkedYAMLError(problem="it is too large or contains itself", problem_mark=node and node.start_mark)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value if isinstance(key, yaml.ScalarNode) else id(key))
            if here in found:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            found[here] = key.start_mark.line + 1
            _lines(value, here, found)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found[(*path, index)] = value.start_mark.line + 1
            _lines(value, (*path, index), found)
    return found


def explain(
    root: type[Config],
    raw: Mapping[str, Any],
    error: ValidationError,
    where: str,
    lines: Mapping[tuple[Any, ...], str | int],
) -> list[ConfigError]:
    """One error in our form for every problem pydantic found."""
    found = []
    for problem in error.errors(include_url=False):
        path = _path(raw, problem["loc"])
        dotted = _visible(".".join(map(str, path))) or "the recipe"
        line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
        place = f"{where}:{line}" if isinstance(line, int) else (line or where)
        kind, value = problem["type"], problem.get("input")
        fix = ""
        if kind == "extra_forbidden":
            what = f"{dotted} is not a known key"
            config = owner(root, raw, path[:-1])
            fix = did_you_mean(str(path[-1]), config.model_fields if config else (), thing="key")
            fix = fix.replace("did you mean `", f"did you mean `{'.'.join(map(str, (*path[:-1], '')))}")
        elif kind == "missing":
            missing = problem["loc"][-1]
            what, fix = f"{'.'.join(map(str, (*path, missing)))} is missing", "give it a value"
        elif kind == "union_tag_not_found":
            what = f"{dotted} has no kind"
            choices = _choices(root, raw, path)[0]
            known = {name for config in choices for name in config.model_fields}
            wrong = nearest("kind", [str(name) for name in value if name not in known] if value else ())
            if wrong:
                what, fix = f"{dotted}.{_visible(wrong[0])} is not a known key", f"did you mean `{dotted}.kind`?"
                line = lines.get((*path, wrong[0]), line)
                place = f"{where}:{line}" if isinstance(line, int) else (line or where)
            else:
                kinds = ", ".join(str(config.model_fields["kind"].default) for config in choices)
                fix = f"add {dotted}.kind, one of {kinds}"
        elif kind in ("union_tag_invalid", "literal_error"):
            expected = problem.get("ctx", {}).get("expected_tags") or problem.get("ctx", {}).get("expected", "")
            options = [part.strip(" '") for part in str(expected).replace(" or ", ", ").split(",") if part.strip(" '")]
            given = value.get("kind") if isinstance(value, dict) else value
            what = f"{dotted} = {_shown(given)} is not one of {', '.join(options)}"
            fix = did_you_mean(str(given), options, thing="value")
        elif kind == "value_error":
            what = str(problem.get("ctx", {})["error"])
            what = what if path == () else f"{dotted}: {what}"
            what, _, fix = what.partition("; use ")
            fix = f"use {fix}" if fix else "change what it names"
        else:
            what = f"{dotted} = {_shown(value)}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
            fix = "correct the value"
        found.append(ConfigError(what, where=place, fix=fix))
    return found


def _visible(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _path(raw: Any, loc: Sequence[Any]) -> tuple[Any, ...]:
    """The part of a pydantic location that a reader of the file knows: union tags and validators left out."""
    path: list[Any] = []
    for part in loc:
        if (isinstance(raw, Mapping) and part in raw) or (
            isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw)
        ):
            path.append(part)
            raw = raw[part]
    return tuple(path)


def owner(root: type[Config], raw: Any, path: Sequence[Any]) -> type[Config] | None:
    """The configuration class that the section at ``path`` is read as."""
    return _chosen(*_choices(root, raw, path))


def _choices(root: type[Config], raw: Any, path: Sequence[Any]) -> tuple[list[type[Config]], Any]:
    """The configuration classes that the section at ``path`` may be read as, and what is written there."""
    annotation: Any = root
    for part in path:
        config = _chosen(_configs(annotation), raw)
        raw = raw[part] if isinstance(raw, Mapping | list | tuple) else None
        if config is not None and part in config.model_fields:
            field = config.model_fields[part]
            annotation = (field.annotation, *field.metadata)
        # a key of a dict or an index of a list: the same annotation's inner configs
    return _configs(annotation), raw


def _configs(annotation: Any) -> list[type[Config]]:
    """Every configuration class inside an annotation."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, Config) else []
    parts = annotation if isinstance(annotation, tuple) else typing.get_args(annotation)
    return [config for part in parts for config in _configs(part)]


def _chosen(choices: list[type[Config]], raw: Any) -> type[Config] | None:
    kind = raw.get("kind") if isinstance(raw, Mapping) else raw
    for config in choices:
        field = config.model_fields.get("kind")
        if field is not None and kind in typing.get_args(field.annotation):
            return config
    return choices[0] if choices else None


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
