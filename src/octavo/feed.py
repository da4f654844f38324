"""What each stage of a training reads: the batch of every step, the held-out rows, and where they come from.

The pipeline trains on exactly these; ``octavo data show`` and ``octavo data check`` look at exactly these.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import compress, islice
from pathlib import Path
from typing import Any

from octavo.config import (
    DENOISING,
    ChatData,
    FactsData,
    LabelledData,
    PairsData,
    Pretrained,
    Recipe,
    TaggedData,
    TuneConfig,
)
from octavo.data import chat, check_chat, check_files, denoising, facts, labelled, pairs, prepare, show, tagged
from octavo.data import check as data_check
from octavo.data.chat import ChatReport, Conversation
from octavo.data.check import Documents, Finding, HeldOut
from octavo.data.fim import FimRows
from octavo.data.loader import Loader, pretraining_loader, sweep
from octavo.data.masking import MaskedRows
from octavo.data.pack import Batch, Packed, StreamRows, WholeRows
from octavo.data.shards import Shards
from octavo.errors import CheckpointError, ConfigError, DataError, UnsupportedError, did_you_mean
from octavo.infer.generate import encode_source
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.predictors.settings import CountedConfig
from octavo.run import RunFolder
from octavo.tokenizer import Tokenizer
from octavo.training.settings import TrainConfig

VALID_ROWS = 32


@dataclass(frozen=True)
class Feed:
    """What one stage of training reads.

    Args:
        source: the batch of every step.
        valid: the held-out rows, None where there are none.
        tokens: trained on in a pass: of all documents in pretraining, of the answers in tuning.
        conversations: in tuning, of the samples in ``source`` by number.
        held_out: the same of ``valid``.
        report: in tuning, what became of the rows.
        notices: what the user should be told.
        pairs, held_pairs: in tuning an encoder-decoder, in the place of conversations.
        classes: of labelled texts, which are the rows of ``source`` and ``valid``.
    """

    source: Loader
    valid: Packed | None
    tokens: int
    conversations: list[Conversation] = field(default_factory=list)
    held_out: list[Conversation] = field(default_factory=list)
    report: ChatReport = field(default_factory=ChatReport)
    notices: list[str] = field(default_factory=list)
    pairs: list[pairs.Pair] = field(default_factory=list)
    held_pairs: list[pairs.Pair] = field(default_factory=list)
    classes: tuple[str, ...] = ()


def stages(recipe: Recipe) -> list[str]:
    """The training stages a recipe has."""
    return [name for name, config in (("pretrain", recipe.train), ("tune", recipe.tune)) if config is not None]


def settings(recipe: Recipe, stage: str) -> TrainConfig:
    """What the recipe says about a training stage.

    Raises:
        ConfigError: it has no such stage.
    """
    found = {"pretrain": recipe.train, "tune": recipe.tune}.get(stage)
    if found is None and isinstance(recipe.model, CountedConfig):
        raise ConfigError(
            f"the recipe has no stage {stage!r}: its model is counted in one pass, without steps",
            fix="look at its text with octavo data check",
        )
    if found is None:
        raise ConfigError(f"the recipe has no stage {stage!r}", fix=did_you_mean(stage, stages(recipe), thing="stage"))
    return found


def of_stage(recipe: Recipe, folder: Path, stage: str) -> Feed:
    """What a training stage reads, from the shards and the tokenizer in a run folder; nothing is written."""
    config = settings(recipe, stage)
    seq_len = config.seq_len or seq_len_of(config, max_seq_len(recipe))
    if stage == "pretrain":
        return pretraining(recipe, folder, seq_len)
    return tuning(recipe, Tokenizer.load(folder / "tokenizer"), seq_len)


@dataclass(frozen=True)
class Look:
    """Rows of one batch to be shown: ``noun`` is what lies in them, ``lead`` says which batch of how many it is."""

    rows: list[show.Row]
    noun: str
    lead: str


def look(recipe: Recipe, folder: Path, stage: str, *, split: str = "train", step: int = 0, n: int = 4) -> Look:
    """The first ``n`` rows of exactly the batch that a step trains on, or that validation looks at.

    Args:
        folder: of a run.
        stage: pretrain or tune.
        split: train or valid.
        step: counted from 0; of ``valid``, the number of the batch.

    Raises:
        ConfigError: there is no such stage, step or split.
        DataError: what it reads is not there.
    """
    config = settings(recipe, stage)
    if isinstance(model_shape(recipe), EncoderDecoder.Config):
        raise UnsupportedError("rows of sources and targets are not shown yet", fix="look at the file of pairs itself")
    found = of_stage(recipe, folder, stage)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    noun = "document" if stage == "pretrain" else "text" if found.classes else "conversation"
    if split == "valid":
        if found.valid is None:
            raise ConfigError(f"{stage} has no held-out rows", fix="look at --split train")
        batches = list(validation_batches(found.valid, found.source, config))
        _check_step(step, len(batches), f"validation of {stage} looks at")
        batch, before = batches[step], sum(len(b["tokens"]) for b in batches[:step])
        in_step, of = len(batch["tokens"]), f"batch {step} of {len(batches)} of every validation"
        places: list[tuple[Packed, int, int]] = [(found.valid, 0, before + i) for i in range(min(n, in_step))]
    else:
        _check_step(step, config.steps, f"{stage} has")
        batch, places = found.source.batch(step), found.source.places(step, n)
        in_step, of = found.source.rows, f"step {step:,} of {config.steps:,} (metrics: step {step + 1:,})"
    tell = _teller(found, folder, tokenizer, split, places, stage)
    shown = min(n, in_step)
    lead = f"{of}, {in_step:,} rows of {found.source.seq_len:,} tokens; the first {shown}" * (shown < in_step) or (
        f"{of}, {in_step:,} rows of {found.source.seq_len:,} tokens"
    )
    return Look(show.rows_of(batch, places, tokenizer, tell), noun, lead)


def _check_step(step: int, n: int, what: str) -> None:
    if not 0 <= step < n:
        raise ConfigError(f"step {step}: {what} {n:,} of them", fix=f"give one from 0 to {n - 1}")


def _teller(
    found: Feed, folder: Path, tokenizer: Tokenizer, split: str, places: list[tuple[Packed, int, int]], stage: str
) -> show.Tell:
    """What is known of the documents or conversations in the rows to be shown."""
    if stage == "pretrain":
        numbers = {piece.number for packed, epoch, row in places for piece in packed.pieces(epoch, row)}
        known = show.origins(folder / "data", split, numbers)
        return lambda number: show.Told(known.get(number, ""))
    if found.classes:
        return _told_of_texts(found, split)
    told = found.conversations if split == "train" else found.held_out

    def tell(number: int) -> show.Told:
        said = told[number]
        where = f"{said.source}:{said.line}" if said.source else ""
        return show.Told(where, tokenizer.render(said.messages, tools=said.tools).ids)

    return tell


def _told_of_texts(found: Feed, split: str) -> show.Tell:
    packed = found.source.datasets[0] if split == "train" else found.valid
    if isinstance(packed, tagged.TaggedRows):
        given = packed.given
        return lambda number: show.Told(
            f"{given[number].source}:{given[number].line}, {tagged.told(given[number].words, given[number].tags)}"
        )
    assert isinstance(packed, labelled.LabelledRows)
    rows = packed.given

    def tell(number: int) -> show.Told:
        label = rows[number].label
        named = label if isinstance(label, str) else ", ".join(map(str, label))
        return show.Told(f"{rows[number].source}:{rows[number].line}, label {named}")

    return tell


def changed(recipe: Recipe, folder: Path) -> list[str]:
    """What is no longer as it was when a run's stages read it, so that looking again may show something else."""
    run = RunFolder(folder)
    before = run.stages().get("tune", {})
    if recipe.tune is None or not before:
        return []
    if isinstance(recipe.tune.data, ChatData):
        try:
            same = chat.fingerprint(recipe.tune.data) == before.get("told")
        except DataError:
            return []
        return [] if same else ["the conversations have changed since this run was tuned on them"]
    made_by = (prepare.read_json(run.environment_path) or {}).get("python")
    here = platform.python_version()
    return [] if made_by in (None, here) else [f"the questions are those of Python {here}, the run's of {made_by}"]


def check(recipe: Recipe, folder: Path, *, limit: int = 20_000) -> Iterator[tuple[str, Finding]]:
    """Findings about all that a run reads, each with the part of the data it is about; nothing is written.

    Args:
        folder: of a run.
        limit: documents and conversations that are looked at.
    """
    found: list[tuple[str, Callable[[], Iterator[Finding]]]] = []
    if recipe.data is not None:
        found += [("text", lambda: _check_text(folder, limit)), ("tokens", lambda: _check_tokens(recipe, folder))]
    if recipe.tune is not None:
        found.append(("conversations", lambda: _check_tuning(recipe, folder, limit)))
    for part, look_at in found:
        try:
            for finding in look_at():
                yield part, finding
        except (DataError, CheckpointError) as error:
            yield part, check_files.refusal(part, error)


def _check_text(folder: Path, limit: int) -> Iterator[Finding]:
    data, held = folder / "data", None
    report = prepare.read_json(data / "report.json") or {}
    removed = {name: entry["documents"] for name, entry in report.get("removed", {}).items()}
    told = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in removed.items()) or "nothing"
    read = report.get("documents", 0)
    yield Finding("left out", "ok", f"of {read:,} documents read, cleaning left out {told}", figures=removed)
    if has_held_out(folder):
        held = HeldOut(islice(prepare.iter_texts(data, "valid"), limit))
    documents = Documents(limit, held)
    for document in prepare.iter_documents(data, "train"):
        documents.add(document)
    yield from documents.findings(cleaned=True)


def _check_tokens(recipe: Recipe, folder: Path) -> Iterator[Finding]:
    tokenizer, seq_len = Tokenizer.load(folder / "tokenizer"), None
    model_ids = None if isinstance(recipe.model, Pretrained.Config) else recipe.model.vocab_size
    if model_ids is not None and model_ids < tokenizer.vocab_size:
        text = f"the tokenizer has {tokenizer.vocab_size:,} ids, the model {model_ids:,}"
        yield Finding("model", "fail", text, "leave model.vocab_size out")
    if recipe.train is not None:
        seq_len = recipe.train.seq_len or seq_len_of(recipe.train, max_seq_len(recipe))
    yield from data_check.tokens(Shards.open(folder / "data" / "train"), tokenizer, seq_len)
    if has_held_out(folder):
        for finding in data_check.tokens(Shards.open(folder / "data" / "valid"), tokenizer, seq_len):
            if finding.verdict != "ok":
                yield replace(finding, name=f"held-out {finding.name}")


def _check_tuning(recipe: Recipe, folder: Path, limit: int) -> Iterator[Finding]:
    config = recipe.tune
    if config is None or isinstance(config.data, PairsData | LabelledData | TaggedData):
        return
    report = ChatReport()
    trained, held_out = conversations(config, recipe.seed, report=report)
    yield from check_chat.rows(trained, report)
    if held_out:
        yield from check_chat.overlap(trained, held_out)
    seq_len = config.seq_len or seq_len_of(config, max_seq_len(recipe))
    yield from check_chat.rendering(trained, Tokenizer.load(folder / "tokenizer"), seq_len, limit)


def pretraining(recipe: Recipe, folder: Path, seq_len: int) -> Feed:
    """Rows of ``seq_len`` tokens from the shards in a run folder.

    Raises:
        DataError: there are no shards, or they are damaged.
    """
    if recipe.train is None:
        raise ConfigError("the recipe has no train section", fix="look at another stage")
    _check_seq_len(recipe, "train", seq_len)
    shards = Shards.open(folder / "data" / "train")
    shards.require(Tokenizer.load(folder / "tokenizer"))
    weights = [source.weight for source in recipe.data.sources] if recipe.data else None
    n_rows = rows_of_step(recipe.train, seq_len)
    objective: Any = recipe.train.objective

    def masked(packed: Packed, **changes: Any) -> Packed:
        shares = objective.model_dump(include={"probability", "mask", "random", "static", "whole_words"})
        return MaskedRows(packed, Tokenizer.load(folder / "tokenizer"), seed=recipe.seed, **shares | changes)

    asked: dict[str, Any] = {"changed": masked} if objective.kind == "masked" else {}
    if objective.kind == "prefix":
        asked = {"changed": lambda packed: denoising.PrefixRows(packed, seed=recipe.seed)}
    if objective.kind in DENOISING:
        asked = {"changed": _damaged(recipe, Tokenizer.load(folder / "tokenizer"))}
    told = {"changed": _middle_last(recipe, folder)} if getattr(objective, "fim", None) else asked
    source = pretraining_loader(shards, seq_len, n_rows, seed=recipe.seed, weights=weights, **told)
    valid: Packed | None = None
    if has_held_out(folder):
        valid = StreamRows(Shards.open(folder / "data" / "valid"), seq_len, shuffle=False)
        valid = asked["changed"](valid, **{"static": True} if objective.kind == "masked" else {}) if asked else valid
    return Feed(source, valid, shards.n_tokens)


def _middle_last(recipe: Recipe, folder: Path) -> Callable[[Packed], Packed]:
    """What `fim` makes of the rows of documents.

    Raises:
        ConfigError: the tokenizer has no tokens for it.
    """
    objective: Any = recipe.train.objective if recipe.train else None
    markers = Tokenizer.load(folder / "tokenizer").fim
    if markers is None:
        raise ConfigError(
            "fim needs three tokens that mark prefix, suffix and middle, and this tokenizer has none",
            fix="train a tokenizer, or start from a model that has them",
        )

    def made(packed: Packed) -> Packed:
        assert isinstance(packed, StreamRows)
        return FimRows(packed, markers, rate=objective.fim.rate, spm=objective.fim.spm)

    return made


def _damaged(recipe: Recipe, tokenizer: Tokenizer) -> Callable[[Packed], Packed]:
    """What an objective that mends text makes of the rows of documents."""
    objective: Any = recipe.train.objective if recipe.train else None
    shape = model_shape(recipe)
    start, vocab_size = shape.first_token(tokenizer.special), shape.vocab_size or tokenizer.vocab_size
    share = {"probability": objective.probability, "mean_span": objective.mean_span, "seed": recipe.seed}
    if objective.kind == "spans":
        return lambda packed: denoising.SpanRows(packed, tokenizer, start, vocab_size, **share)
    return lambda packed: denoising.InfilledRows(packed, tokenizer, start, permute=objective.permute, **share)


def tuning(recipe: Recipe, tokenizer: Tokenizer, seq_len: int, *, keep: Path | None = None) -> Feed:
    """Conversations through the one renderer, packed whole into rows of ``seq_len`` tokens.

    Args:
        keep: a folder in which questions that are built, not read, are written for the scores.

    Raises:
        DataError: nothing can be read, or nothing in it can be trained on.
    """
    config = recipe.tune
    if config is None:
        raise ConfigError("the recipe has no tune section", fix="look at another stage")
    _check_seq_len(recipe, "tune", seq_len)
    if isinstance(config.data, PairsData):
        return _pairs(recipe, config, config.data, tokenizer, seq_len)
    if isinstance(model_shape(recipe), EncoderDecoder.Config):
        raise ConfigError(
            f"an encoder-decoder is tuned on pairs, not on data of kind {config.data.kind}",
            fix="tune.data={kind: pairs, files: [pairs.jsonl]}",
        )
    if isinstance(config.data, LabelledData):
        typed = (getattr(model_shape(recipe), "n_token_types", None) or 0) > 1
        rows, kept, names = labelled.prepare(
            config.data, tokenizer, seq_len, held_out=config.held_out, seed=recipe.seed, typed=typed
        )
        told = [f"{rows.cut:,} of {rows.n_rows:,} texts are longer than {seq_len} tokens, and cut"] * bool(rows.cut)
        loader = Loader(rows, rows_of_step(config, seq_len), seed=recipe.seed)
        return Feed(loader, kept, rows.n_tokens, notices=told, classes=names)
    if isinstance(config.data, TaggedData):
        words, held_words, names = tagged.prepare(
            config.data, tokenizer, seq_len, held_out=config.held_out, seed=recipe.seed
        )
        told = [f"{words.n_split:,} rows go on with a sentence longer than {seq_len} tokens"] * bool(words.n_split)
        loader = Loader(words, rows_of_step(config, seq_len), seed=recipe.seed)
        return Feed(loader, held_words, words.n_trained, notices=told, classes=names)
    report, notices = ChatReport(), list[str]()
    told, kept_back = conversations(config, recipe.seed, keep=keep, report=report)
    samples = chat.tokenise(told, tokenizer, seq_len + 1, report)
    pad = tokenizer.special.pad if tokenizer.special.pad is not None else 0
    source = WholeRows([(s.ids, s.loss_mask) for s in samples], seq_len, pad=pad)
    valid, held = None, list[chat.Sample]()
    if kept_back:
        try:
            held = chat.tokenise(kept_back, tokenizer, seq_len + 1)
            valid = WholeRows([(s.ids, s.loss_mask) for s in held], seq_len, pad=pad)
        except DataError as error:
            notices.append(f"no validation: {error.what}")
    return Feed(
        Loader(source, rows_of_step(config, seq_len), seed=recipe.seed),
        valid,
        report.trained_tokens,
        [told[sample.number] for sample in samples],
        [kept_back[sample.number] for sample in held],
        report,
        notices,
    )


def _pairs(recipe: Recipe, config: TuneConfig, data: PairsData, tokenizer: Tokenizer, seq_len: int) -> Feed:
    """Sources and targets, one pair a row; the share that is held out is spread over them."""
    shape = model_shape(recipe)
    if not isinstance(shape, EncoderDecoder.Config):
        raise ConfigError("pairs are for an encoder-decoder", fix="set model.kind to encoder_decoder")
    eos, pad = tokenizer.special.eos, tokenizer.special.pad or 0
    if eos is None:
        raise ConfigError("the tokenizer has no token that ends a text", fix="use one that has")
    all_of = pairs.read(data, recipe.seed)
    out = [int((i + 1) * config.held_out) > int(i * config.held_out) for i in range(len(all_of))]
    split = list(compress(all_of, (not held for held in out))), list(compress(all_of, out))
    longest, start = data.max_source or shape.encoder.max_seq_len, shape.first_token(tokenizer.special)

    def rows(some: list[pairs.Pair]) -> pairs.PairRows:
        ids = [(encode_source(tokenizer, p.source), [*tokenizer.encode(p.target), eos]) for p in some]
        return pairs.PairRows(ids, start, seq_len, longest, pad=pad)

    source = rows(split[0])
    valid = rows(split[1]) if split[1] else None
    notices = [f"{source.dropped:,} pairs are longer than the model reads, and left out"] if source.dropped else []
    loader = Loader(source, rows_of_step(config, source.seq_len), seed=recipe.seed)
    read = [split[0][i] for i in source.numbers]
    held = [split[1][i] for i in valid.numbers] if valid is not None else []
    return Feed(loader, valid, source.report().targets, notices=notices, pairs=read, held_pairs=held)


def conversations(
    config: TuneConfig, seed: int, *, keep: Path | None = None, report: ChatReport | None = None
) -> tuple[list[Conversation], list[Conversation]]:
    """What is trained on, and what is kept for validation."""
    if not isinstance(config.data, ChatData):
        assert isinstance(config.data, FactsData)  # pairs and labels are read elsewhere
        built = facts.build(seed, config.data.facts)
        if keep is not None:
            built.write(keep)
        return built.train, [
            Conversation([*q.messages, {"role": "assistant", "content": q.answer}]) for q in built.held_out
        ]
    rows = chat.read(config.data, report)
    # Spread over the file, so that a file sorted by topic is not split by topic.
    held = [int((i + 1) * config.held_out) > int(i * config.held_out) for i in range(len(rows))]
    return list(compress(rows, (not out for out in held))), list(compress(rows, held))


def validation_batches(valid: Packed, source: Loader, config: TrainConfig) -> Iterator[Batch]:
    """The rows that every validation looks at."""
    # No more rows at once than in training: that much memory is there.
    rows = min(VALID_ROWS, config.micro_batch_rows or source.rows)
    return islice(sweep(valid, rows), -(-config.valid_batches * VALID_ROWS // rows))


def has_held_out(folder: Path) -> bool:
    """Whether documents of a run are held out."""
    report = prepare.read_json(folder / "data" / "report.json") or {}
    return bool(report.get("splits", {}).get("valid", {}).get("documents"))


def seq_len_of(config: TrainConfig, max_seq_len: int) -> int:
    """Tokens a row: as asked, else the model's whole context, of which a pretrained one may have too much."""
    return config.seq_len or min(max_seq_len, config.step_tokens)


def _check_seq_len(recipe: Recipe, stage: str, seq_len: int) -> None:
    """Refuse rows longer than a pretrained model's table of positions; of a fresh one the recipe knows it itself."""
    if not isinstance(recipe.model, Pretrained.Config):
        return
    from octavo.hub.folder import model_config, read_config
    from octavo.run import find_model

    place = find_model(recipe.model.path)
    shape = model_config(read_config(place)) if (place / "config.json").is_file() else None
    if shape is not None and shape.positions.kind == "learned" and seq_len > shape.max_seq_len:
        raise ConfigError(
            f"{stage}.seq_len = {seq_len} exceeds the {shape.max_seq_len} positions of {recipe.model.path}",
            fix=f"use {stage}.seq_len={shape.max_seq_len}",
        )


def max_seq_len(recipe: Recipe) -> int:
    """The longest context of a recipe's model, whose weights are not read for it."""
    return model_shape(recipe).max_seq_len


def model_shape(recipe: Recipe) -> Any:
    """The configuration of a recipe's model, or of the pretrained one it names, whose weights are not read for it."""
    if not isinstance(recipe.model, Pretrained.Config):
        return recipe.model
    from octavo.hub.folder import model_config, read_config
    from octavo.run import find_model

    return model_config(read_config(find_model(recipe.model.path)))


def rows_of_step(config: TrainConfig, seq_len: int) -> int | None:
    """Rows of an optimizer step; None means all."""
    return {"per_sample": 1, "full_batch": None}.get(config.update, max(1, config.step_tokens // seq_len))
