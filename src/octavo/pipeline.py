"""A recipe made real, stage by stage: data, tokenizer, pretrain (or count), tune, eval, report.

Each stage leaves its result in the run folder and an entry in stages.json with a fingerprint of everything
it was made from. Run again, finished stages are kept and an interrupted one goes on where it was.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from octavo import feed
from octavo.batch import Batch
from octavo.config import DENOISING, ChatData, LabelledData, PairsData, Pretrained, Recipe, TaggedData, TuneConfig
from octavo.data import chat, labelled, pairs, prepare, tagged
from octavo.data.loader import sweep
from octavo.data.pack import StreamRows
from octavo.data.shards import Shards, write_shards
from octavo.data.vocabulary import learn
from octavo.errors import CheckpointError, ConfigError, DataError, StopRequested
from octavo.eval.answers import Question, greedy
from octavo.eval.classes import judge, judge_masked
from octavo.eval.encoders import class_scores, hidden_right, tags_said
from octavo.eval.metrics import own_scorer
from octavo.eval.pairs import judge_pairs
from octavo.eval.runner import evaluate, summary
from octavo.eval.tags import judge_tags
from octavo.files import make_folder, sha256_file, write_json
from octavo.infer.sampling import SamplingConfig
from octavo.language_model import LanguageModel, load
from octavo.models.cost import cost
from octavo.models.decoder import Decoder, build
from octavo.models.override import carried_over, head_for, with_classes
from octavo.objectives.tables import OBJECTIVES
from octavo.predictors.folder import array_bytes
from octavo.predictors.kinds import count, facts
from octavo.predictors.predictor import NGramPredictor
from octavo.predictors.settings import CountedConfig
from octavo.run import FREE_TRAIN_KEYS, RunFolder, find_model, fingerprint
from octavo.stop import StopSignal
from octavo.tokenizer import Tokenizer
from octavo.tokenizer import train as train_tokenizer
from octavo.training.loop import Held, Trainer
from octavo.training.memory import require
from octavo.training.progress import Console
from octavo.training.room import told_when_it_runs_out
from octavo.training.settings import TrainConfig
from octavo.training.tracking import tensorboard
from octavo.vectors import embedding

A = TypeVar("A")
T = TypeVar("T")
SCORED_ROWS = 50
# What is read from files that a finished stage needs no longer.
ON_DISK = (ChatData, PairsData, LabelledData, TaggedData)


@dataclass
class Ready:
    """A stage of training about to begin: the loop, what it reads, the model with its tokenizer."""

    trainer: Trainer
    rows: feed.Feed
    lm: LanguageModel
    seq_len: int


@dataclass
class Pipeline:
    """One run of a recipe in a folder."""

    recipe: Recipe
    folder: RunFolder
    console: Console
    stop: StopSignal
    workers: int | None = None
    redo_data: bool = False

    def run(self, until: str | None = None) -> dict[str, str]:
        """Go through all stages, or those up to ``until``; returns the closing figures.

        Raises:
            StopRequested: on a signal or time limit, with everything saved.
        """
        recipe, stages = self.recipe, self._stages()
        if until is not None:
            stages = stages[: 1 + [name for name, _, _ in stages].index(until)]
        previous = fingerprint(recipe.seed)
        for i, (name, stage, settings) in enumerate(stages, 1):
            previous = fingerprint(previous, name, settings)
            if self.folder.is_finished(name, previous):
                self.console.kept(name, i, len(stages))
                continue
            with self.console.stage(name, i, len(stages)):
                began = self.console.clock()
                result = self._went_through(name, stage)
                seconds = round(self.console.clock() - began, 3)
                self.folder.finish(name, previous, seconds=seconds, peak_memory_bytes=_peak_memory(), **(result or {}))
        scores = self.folder.path / "scores.json"
        return summary(json.loads(scores.read_text(encoding="utf-8"))) if scores.is_file() and recipe.eval else {}

    def _went_through(self, name: str, stage: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """A stage's facts; what ends it early in words of the user's."""
        try:
            self.stop.check(f"before stage {name}")
            # Counts, scores and the page are written in one step at the end: nothing is spoiled by breaking them off.
            with (
                told_when_it_runs_out(f"in stage {name}", "close other programs, or use fewer workers"),
                self.stop.at_once() if name in ("count", "eval", "report") else nullcontext(),
            ):
                return stage()
        except StopRequested as error:
            if error.fix:
                raise
            what = error.what if error.what != self.stop.reason else f"{error.what}, in stage {name}"
            raise StopRequested(what, fix=f"go on with {self.resume_command}", kept="all finished stages") from None

    def _stages(self) -> list[tuple[str, Callable[[], dict[str, Any] | None], Any]]:
        """Name, work and what decides its result, in order."""
        r = self.recipe
        found: list[tuple[str, Callable[[], dict[str, Any] | None], Any]] = []
        if r.data is not None:
            found.append(("data", self.data, self._data_fingerprint(r.data)))
        brought = self._brought(r.model.path) if isinstance(r.model, Pretrained.Config) else None
        more = [*(["masked"] if self._masked else []), *(["fim"] if self._fim else [])]
        more += [r.train.objective.kind] if r.train is not None and r.train.objective.kind in DENOISING else []
        found.append(("tokenizer", self.tokenizer, [r.tokenizer.model_dump(mode="json"), brought, *more]))
        if isinstance(r.model, CountedConfig):
            found.append(("count", self.count, r.model.model_dump(mode="json")))
        if r.train is not None:
            deciding = [r.model.model_dump(mode="json"), _deciding(r.train), r.tune is not None, *self._vectors()]
            found.append(("pretrain", self.pretrain, deciding))
        if r.tune is not None:
            told = self._told(r.tune.data) if isinstance(r.tune.data, ON_DISK) else None
            found.append(("tune", self.tune, [r.model.model_dump(mode="json"), _deciding(r.tune), told]))
        if r.eval is not None and (r.data is not None or self._labelled or self._paired):
            found.append(("eval", self.evaluate, r.eval.model_dump(mode="json")))
        found.append(("report", self.report, None))
        return found

    def _data_fingerprint(self, config: prepare.DataConfig) -> str:
        """Of the settings and the files; a finished stage needs its files no longer."""
        before = self.folder.stages().get("data", {}).get("source")
        try:
            now = config.fingerprint()
        except DataError as error:
            if before is None:
                raise
            self.console.warn(f"{error.what}; the documents prepared before are used")
            return before
        if before not in (None, now) and self.folder.checkpoints_path("pretrain").is_dir() and not self.redo_data:
            raise CheckpointError(
                "the files of data.sources changed since this run began to train on them",
                fix="use a new run folder, or restore the files",
                kept="the run is as it was",
            )
        return now

    def _told(self, config: ChatData | PairsData | LabelledData | TaggedData) -> str:
        """Of the conversations' or pairs' files; a finished stage needs them no longer."""
        try:
            if isinstance(config, PairsData):
                return config.fingerprint()
            if isinstance(config, LabelledData):
                return labelled.fingerprint(config)
            if isinstance(config, TaggedData):
                return tagged.fingerprint(config)
            return chat.fingerprint(config)
        except DataError as error:
            before = self.folder.stages().get("tune", {}).get("told")
            if before is None:
                raise
            self.console.warn(f"{error.what}; the model tuned before is kept")
            return before

    def _brought(self, path: str) -> str:
        """Of a pretrained model's files; a finished stage needs them no longer."""
        try:
            files = sorted(find_model(path).glob("*.safetensors"))
        except ConfigError:
            before = self.folder.stages().get("tokenizer", {}).get("brought")
            if before is None:
                raise
            return before
        return fingerprint(path, [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])

    def _vectors(self) -> list[Any]:
        """Of the word vectors that the embedding starts from; a finished stage needs their file no longer."""
        config = self.recipe.vectors
        if config is None:
            return []
        try:
            return [config.scale, sha256_file(config.path)]
        except OSError:
            before = self.folder.stages().get("pretrain", {}).get("vectors")
            if before is None:
                raise DataError(f"vectors.path {config.path} cannot be read", fix="check the path") from None
            return [config.scale, before]

    @property
    def resume_command(self) -> str:
        return f"octavo resume {self.folder.path}"

    def data(self) -> dict[str, Any]:
        """Read, clean and split the documents."""
        config = self.recipe.data
        if config is None:
            return {}
        with self._bytes_bar() as progress:
            report = prepare.clean_documents(config, self.folder.path / "data", workers=self.workers, progress=progress)
        for line in str(report).splitlines()[:12]:
            self.console.note(line)
        return {"documents": report.kept_documents, "bytes": report.kept_bytes, "source": config.fingerprint()}

    def tokenizer(self) -> dict[str, Any]:
        """Train or load the tokenizer, then turn the documents into shards."""
        target = self.folder.path / "tokenizer"
        recipe, data = self.recipe, self.folder.path / "data"
        if isinstance(recipe.model, Pretrained.Config):
            tokenizer = Tokenizer.load(find_model(recipe.model.path))
            tokenizer.save(target)
        elif recipe.data is None:
            tokenizer = train_tokenizer(recipe.tokenizer, ())
            tokenizer.save(target)
        else:
            tokenizer = learn(recipe.tokenizer, data, target, lambda: self.stop.check("while training the tokenizer"))
            kind = recipe.train.objective.kind if recipe.train is not None else ""
            if (self._masked or kind == "infilling") and tokenizer.special.mask is None:
                tokenizer = tokenizer.with_mask()
                tokenizer.save(target)
            if kind == "spans":
                tokenizer = tokenizer.with_sentinels()
                tokenizer.save(target)
            if self._fim and tokenizer.fim is None:
                tokenizer = tokenizer.with_fim()
                tokenizer.save(target)
        pretrained = isinstance(recipe.model, Pretrained.Config)
        kind = "the model's own" if pretrained else recipe.tokenizer.kind
        self.console.note(f"{kind}, {tokenizer.vocab_size:,} entries")
        tokens: dict[str, Any] = {"brought": self._brought(recipe.model.path)} if pretrained else {}
        if recipe.data is None:
            return {"vocab_size": tokenizer.vocab_size, **tokens}
        for split in ("train", "valid") if feed.has_held_out(self.folder.path) else ("train",):
            with self._bytes_bar() as progress:
                shards = write_shards(data, split, target, workers=self.workers, progress=progress)
            tokens[f"{split}_tokens"] = shards.n_tokens
            self.console.note(
                f"{split}: {shards.n_documents:,} documents, {shards.n_tokens:,} tokens, "
                f"{shards.n_bytes / max(1, shards.n_tokens - 2 * shards.n_documents):.2f} bytes a token"
            )
        return {"vocab_size": tokenizer.vocab_size, **tokens}

    def count(self) -> dict[str, Any]:
        """Count the shards in one pass; the result is model/."""
        config, tokenizer = self.recipe.model, self._tokenizer()
        assert isinstance(config, CountedConfig)
        shards = Shards.open(self.folder.path / "data" / "train")
        shards.require(tokenizer)
        self.console.note(f"{shards.n_documents:,} documents, {shards.n_tokens:,} tokens")
        documents = (shards.document(i) for i in range(shards.n_documents))
        made = count(
            _sized(config, tokenizer),
            self._stoppable(documents, "while counting"),
            bos=tokenizer.special.bos,
            eos=tokenizer.special.eos,
            scratch_folder=self.folder.path,
        )
        LanguageModel(made, tokenizer).save(self.folder.model_path)
        told = {"tokens": shards.n_tokens, "bytes": array_bytes(self.folder.model_path), **facts(made)}
        self.console.note(f"{told['entries']:,} n-grams, {told['bytes']:,} bytes")
        return told

    def pretrain(self) -> dict[str, Any]:
        """Train on the shards; the result is base/ (or model/ when nothing follows)."""
        recipe, ready = self.recipe, self.ready("pretrain")
        config, source, seq_len = ready.trainer.config, ready.rows.source, ready.seq_len
        epochs = config.steps / source.steps_per_epoch
        self.console.note(
            f"{cost(ready.lm.network).parameters:,} parameters; {config.steps:,} steps of {source.rows * seq_len:,} "
            f"tokens, {epochs:.2f} passes over {ready.rows.tokens:,} tokens; {config.precision}, "
            f"{'compiled' if config.compile == 'step' else 'not compiled'}, {config.threads} threads"
        )
        figures = ready.trainer.fit()
        ready.lm.save(self.folder.base_path if recipe.tune else self.folder.model_path)
        vectors = {"vectors": self._vectors()[1]} if recipe.vectors else {}
        return {
            **vectors,
            "train_flops_per_token": ready.trainer.held.train_flops_per_token,
            "epochs": round(epochs, 4),
            "tokens": config.steps * source.rows * seq_len,
            **_finite(figures),
        }

    def tune(self) -> dict[str, Any]:
        """Instruction tuning: conversations through the one renderer, loss on the assistant's words."""
        ready = self.ready("tune")
        rows, steps = ready.rows, ready.trainer.config.steps
        n, noun = (len(rows.pairs), "pairs") if rows.pairs else (len(rows.conversations), "conversations")
        if rows.classes:
            of_words = isinstance(rows.source.datasets[0], tagged.TaggedRows)
            n, noun = rows.source.n_rows, "rows of tagged words" if of_words else "labelled texts"
        self.console.note(
            f"{n:,} {noun}, {rows.tokens:,} trained tokens; {steps:,} steps, "
            f"{steps / rows.source.steps_per_epoch:.2f} passes"
        )
        for line in rows.notices:
            self.console.warn(line)
        figures = ready.trainer.fit()
        ready.lm.save(self.folder.model_path)
        if rows.held_pairs:
            pairs.write(self._held_pairs, rows.held_pairs)
        data = self.recipe.tune.data if self.recipe.tune else None
        told = {"told": self._told(data)} if isinstance(data, ON_DISK) else {}
        read = {"pairs": len(rows.pairs)} if rows.pairs else {"conversations": len(rows.conversations)}
        return {**told, **read, "trained_tokens": rows.tokens, **_finite(figures)}

    def ready(self, stage: str, folder: Path | None = None) -> Ready:
        """All that the pretraining or the tuning needs, from the files of the run.

        Args:
            folder: where metrics and checkpoints are written instead of the run, which then is only read.
        """
        recipe = self.recipe
        config = recipe.train if stage == "pretrain" else recipe.tune
        if config is None:
            raise ConfigError(f"the recipe has no stage {stage}", fix="add its section, or name another stage")
        tokenizer = self._tokenizer()
        shape, start = self._start(tokenizer, stage)
        seq_len = feed.seq_len_of(config, shape.max_seq_len)
        scale = None
        if stage == "pretrain":
            rows = feed.pretraining(recipe, self.folder.path, seq_len)
            if isinstance(rows.valid, StreamRows):
                held_out = rows.valid.shards
                scale = (held_out.n_tokens - held_out.n_documents) / max(1, held_out.n_bytes) / math.log(2)
        else:
            keep = self.folder.path / "tune" / "data" if folder is None else None
            rows = feed.tuning(recipe, tokenizer, seq_len, keep=keep)
        section = "train" if stage == "pretrain" else "tune"
        if rows.classes:
            data = recipe.tune.data if recipe.tune else None
            if isinstance(data, TaggedData):
                head = head_for(shape, rows.classes, data.problem, over="token")
            else:
                assert isinstance(data, LabelledData)
                head = head_for(shape, rows.classes, data.problem, data.pooling)
            shape = with_classes(shape, head)
        if tight := require(shape, config, config.precision, rows.source.rows, section):
            self.console.warn(tight)
        model = start()
        if rows.classes:
            base = load(self.folder.base_path).network if recipe.train else model
            model = carried_over(base, shape, seed=recipe.seed)
        elif stage == "tune" and recipe.train:  # base/ has the weights; what only matters in training is the recipe's
            base = load(self.folder.base_path)
            if base.tokenizer.hash != tokenizer.hash:  # ids mean nothing under another one, also if it has as many
                raise ConfigError(
                    f"{self.folder.base_path} has another tokenizer ({base.tokenizer.vocab_size} ids) than the run "
                    f"({tokenizer.vocab_size})",
                    fix="restore both, or use a new run folder",
                )
            model.load_state_dict(base.network.state_dict())
        own = folder or self.folder.path / stage
        make_folder(own)
        lm = LanguageModel(model, tokenizer)
        looked_at = feed.validation_batches(rows.valid, rows.source, config) if rows.valid is not None else ()
        held = Held(
            folder=own,
            run_id=self.folder.id,
            console=self.console,
            stop=self.stop,
            resume_command=self.resume_command,
            valid=[Batch.from_numpy(arrays, config.device) for arrays in looked_at],
            valid_nats_per_bit_byte=scale,
            sample=self._sampler(lm, config) if config.sample_prompts else None,
            train_flops_per_token=cost(model, seq_len).train_flops // seq_len,
            started_from=self._started_from(stage),
            tensorboard=tensorboard(own) if config.tensorboard and folder is None else None,
        )
        objective = OBJECTIVES[config.objective.kind](config.objective)
        return Ready(Trainer(model, rows.source, objective, config, held, recipe.seed), rows, lm, seq_len)

    def _sampler(self, lm: LanguageModel, config: TrainConfig) -> Callable[[], list[dict[str, str]]]:
        """What writes a few texts now and then; asked to stop, it stops between two tokens."""
        questions = [[{"role": "user", "content": prompt}] for prompt in config.sample_prompts]
        asked = isinstance(config, TuneConfig) and not self._paired  # a source is a text as it stands
        prompts = questions if asked else list(config.sample_prompts)
        how = SamplingConfig(
            max_new_tokens=config.sample_tokens, temperature=config.sample_temperature, seed=self.recipe.seed
        )

        def sample() -> list[dict[str, str]]:
            return [
                {"prompt": text, "text": "".join(self._stoppable(lm.stream(prompt, how), "while sampling"))}
                for text, prompt in zip(config.sample_prompts, prompts, strict=True)
            ]

        return sample

    @property
    def _fim(self) -> bool:
        return self.recipe.train is not None and getattr(self.recipe.train.objective, "fim", None) is not None

    @property
    def _masked(self) -> bool:
        return self.recipe.train is not None and self.recipe.train.objective.kind == "masked"

    @property
    def _mended(self) -> bool:
        return self.recipe.train is not None and self.recipe.train.objective.kind in DENOISING

    @property
    def _paired(self) -> bool:
        return self.recipe.tune is not None and isinstance(self.recipe.tune.data, PairsData)

    @property
    def _held_pairs(self) -> Path:
        return self.folder.path / "tune" / "data" / "held_pairs.jsonl"

    @property
    def _labelled(self) -> bool:
        return self.recipe.tune is not None and isinstance(self.recipe.tune.data, LabelledData | TaggedData)

    def _judged(self, stage: str) -> dict[str, Any]:
        """Figures of held-out rows by the model of a stage: classes said, or hidden or damaged tokens foretold."""
        folder = self.folder.model_path if stage == "tune" or not self.recipe.tune else self.folder.base_path
        final, found = load(folder), feed.of_stage(self.recipe, self.folder.path, stage)
        if found.valid is None:
            return {}
        batches = (Batch.from_numpy(part) for part in self._stoppable(sweep(found.valid, SCORED_ROWS), "in stage eval"))
        if stage == "pretrain":
            right = judge_masked(hidden_right(final.model, batch) for batch in batches)
            return {"masked" if self._masked else "mended": right}
        if isinstance(found.valid, tagged.TaggedRows):
            said = [row for batch in batches for row in tags_said(final.model, batch)]
            return {"tags": judge_tags(*found.valid.joined(said), found.classes)}
        parts = [(batch.extra["labels"], class_scores(final.model, batch)) for batch in batches]
        given, scores = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        head = final.network.config.classes
        assert head is not None
        return {"classes": judge(given, scores, found.classes, head.problem)}

    def _judged_pairs(self) -> dict[str, Any]:
        """Figures of what the model writes for the sources that were held out."""
        if not self._held_pairs.is_file():
            return {}
        held = pairs.read(pairs.PairsConfig(files=(str(self._held_pairs),)))
        sources, targets = [pair.source for pair in held], [pair.target for pair in held]
        return {
            "pairs": judge_pairs(load(self.folder.path), sources, targets, lambda: self.stop.check("in stage eval"))
        }

    def evaluate(self) -> dict[str, Any]:
        """Bits per byte next to n-grams, and answers to held-out questions; hidden tokens; classes; pairs."""
        recipe, config = self.recipe, self.recipe.eval
        if config is None:
            return {}
        judged = self._judged("pretrain") if self._masked or self._mended else {}
        judged |= self._judged("tune") if self._labelled else {}
        judged |= self._judged_pairs() if self._paired else {}
        if self._masked or self._mended or self._paired or (self._labelled and recipe.data is None):
            about = {"parameters": cost(load(self.folder.path).network).parameters, "run": recipe.name}
            result = {"about": about, **judged, "config": config.model_dump(mode="json")}
            write_json(self.folder.path / "scores.json", result)
            for name, line in summary(result).items():
                self.console.note(f"{name}: {line}")
            return {}
        final = load(self.folder.path)
        base = load(self.folder.base_path) if recipe.tune and recipe.train else final
        data = self.folder.path / "data"
        questions = self._questions()
        counted = isinstance(final.model, NGramPredictor)
        facts_ = {"parameters": None if counted else cost(final.network).parameters, "run": recipe.name}
        if recipe.data is not None and feed.has_held_out(self.folder.path):
            held_out = Shards.open(data / "valid")
            result = evaluate(
                logits_fn=self._polled(base.logits),
                scorer=own_scorer(base.model),
                max_seq_len=base.max_seq_len,
                tokenizer=base.tokenizer,
                held_out=held_out,
                trained_on=Shards.open(data / "train") if recipe.train or counted else None,
                config=config,
                questions=questions,
                generate_fn=self._polled(greedy(final.model, final.tokenizer)),
                vocab_size=base.model.vocab_size,
                n_bytes=held_out.n_bytes,
                about=facts_,
                out=self.folder.path / "scores.json",
                on_progress=self.console.note,
            )
            if judged:
                result |= judged
                write_json(self.folder.path / "scores.json", result)
            for name, line in summary(result).items():
                self.console.note(f"{name}: {line}")
        return {}

    def report(self) -> dict[str, Any]:
        """The page."""
        from octavo.report.page import build as build_report  # matplotlib takes a second to import

        page = build_report(self.folder.path)
        self.console.note(str(page))
        return {}

    def _started_from(self, stage: str) -> str:
        """The hash of the weights a stage begins with; empty for fresh ones, which the seed decides."""
        if stage == "tune" and self.recipe.train:
            folder = self.folder.base_path
        elif isinstance(self.recipe.model, Pretrained.Config):
            folder = find_model(self.recipe.model.path)
        else:
            return fingerprint(self._vectors()) if self.recipe.vectors else ""
        return fingerprint([(file.name, sha256_file(file)) for file in sorted(folder.glob("*.safetensors"))])

    def _start(self, tokenizer: Tokenizer, stage: str) -> tuple[Decoder.Config, Callable[[], Decoder]]:
        """The model before training, and how it is made: fresh, or the pretrained one a recipe names."""
        config = self.recipe.model
        if isinstance(config, Pretrained.Config):
            model = load(config.path).network
            return model.config, lambda: model
        config = _sized(config, tokenizer)
        vectors = self.recipe.vectors if stage == "pretrain" else None
        if vectors is not None:
            embedding.check_width(vectors, config.d_model)

        def fresh() -> Decoder:
            model = build(config, seed=self.recipe.seed)
            if vectors is not None:
                self.console.note(str(embedding.fill(model, tokenizer, vectors)))
            return model

        return config, fresh

    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder.path / "tokenizer")

    def _questions(self) -> Sequence[Question]:
        path = self.folder.path / "tune" / "data" / "held_out.jsonl"
        if self.recipe.tune is None or not path.is_file():
            return ()
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [Question.read(row, str(path)) for row in rows]

    def _stoppable(self, items: Iterable[T], where: str) -> Iterator[T]:
        for item in items:
            self.stop.check(where)
            yield item

    def _polled(self, work: Callable[[A], T]) -> Callable[[A], T]:
        def polled(argument: A) -> T:
            self.stop.check("in stage eval")  # the time limit; a signal comes by itself
            return work(argument)

        return polled

    @contextmanager
    def _bytes_bar(self) -> Iterator[Callable[[str, int, int], None]]:
        """A progress line for work counted in bytes; asked to stop, it stops between two pieces."""
        done = 0
        bar = None

        def progress(what: str, now: int, total: int) -> None:
            nonlocal done, bar
            if bar is None:
                bar = self.console.bar(total or None, "byte", what)
            bar.update(now - done)
            done = now
            self.stop.check("while preparing")

        try:
            yield progress
        finally:
            if bar is not None:
                bar.close()


def _sized(config: Any, tokenizer: Tokenizer) -> Any:
    """A model's settings with the vocabulary's size in them."""
    if config.vocab_size is None:
        config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {config.vocab_size}",
            fix="leave model.vocab_size out",
        )
    return config


def _peak_memory() -> int:
    """The most memory this process has held so far, in bytes."""
    import resource  # not on native Windows, which is refused earlier

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _deciding(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the weights: what is only looked at in between is left out."""
    plain = config.model_dump(mode="json", exclude={"optimizer": {"lr", "weight_decay"}})
    return {key: value for key, value in plain.items() if key not in FREE_TRAIN_KEYS}


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 6) for key, value in figures.items() if math.isfinite(value)}
