"""The bench: the same text for all, every model trained to the budget, results kept so that none is made twice."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo import feed, pipeline
from octavo.comparing.result import Result, Row
from octavo.comparing.settings import Budget, Comparison
from octavo.config import Recipe
from octavo.data.prepare import read_json
from octavo.data.shards import Shards
from octavo.data.workers import ordered_map
from octavo.errors import ConfigError, DataError
from octavo.eval import metrics, minimal_pairs
from octavo.eval.runner import take
from octavo.files import make_folder, write_json
from octavo.language_model import LanguageModel, load
from octavo.launch import freeze
from octavo.models.cost import cost, state_bytes
from octavo.models.decoder import Decoder
from octavo.pipeline import Job
from octavo.predictors.kinds import count, facts
from octavo.run import RunFolder, fingerprint
from octavo.stop import StopSignal
from octavo.tokenizer import Tokenizer
from octavo.training.machine import set_threads, tune_allocator
from octavo.training.progress import Console

WARM_STEPS, PACE_STEPS, PACE_SECONDS = 2, 3, 3.0
MIN_STEPS = 2
CONTEXT = 256  # tokens whose state is counted, for models without a longest text


@dataclass
class Bench:
    """A comparison in a folder: ``prepared/`` the text and tokenizer, ``models/NAME/seed-N/`` what each came to."""

    comparison: Comparison
    folder: Path
    console: Console
    stop: StopSignal
    jobs: int = 1
    only: tuple[str, ...] = ()

    def run(self) -> list[Row]:
        """Train what is not there yet; every model's results, the best first.

        Raises:
            StopRequested: with every finished training kept, and the one under way at its last checkpoint.
        """
        recipes = self._wanted()
        make_folder(self.folder)
        write_json(self.folder / "comparison.json", self.comparison.model_dump(mode="json"))
        made: dict[str, Path] = {}
        places = {name: self._prepared(recipe, made) for name, recipe in recipes.items()}
        tasks = [
            (self.comparison.model_dump(mode="json"), name, seed, str(places[name]), str(self.folder))
            for name, recipe in recipes.items()
            for seed in (self.comparison.seeds if recipe.train is not None else self.comparison.seeds[:1])
        ]
        missing = [task for task in tasks if self._known(recipes[task[1]], task) is None]
        self.console.note(f"{len(recipes)} models, {len(tasks)} trainings, {len(tasks) - len(missing)} known")
        for done, name, seed, bits, seconds in self._made(missing):
            left = f", {len(missing) - done} to go" if done < len(missing) else ""
            self.console.note(f"{name}, seed {seed}: {bits:.4f} bits per byte, {seconds:.0f} s{left}")
        found = [(task[1], self._known(recipes[task[1]], task)) for task in tasks]
        rows = [
            Row(name, tuple(result for other, result in found if other == name and result is not None))
            for name in recipes
        ]
        return sorted(rows, key=lambda row: row.bits.mean)

    def _wanted(self) -> dict[str, Recipe]:
        recipes = self.comparison.recipes()
        if unknown := [name for name in self.only if name not in recipes]:
            raise ConfigError(f"the comparison has no model {unknown[0]!r}", fix=f"it has {', '.join(recipes)}")
        recipes = {name: recipe for name, recipe in recipes.items() if not self.only or name in self.only}
        for name, recipe in recipes.items():
            if recipe.data is None or recipe.tune is not None:
                raise ConfigError(f"models.{name} cannot be compared", fix="it needs data, and no tune section")
        return recipes

    def _prepared(self, recipe: Recipe, made: dict[str, Path]) -> Path:
        """The run folder that holds the text and the tokenizer of ``recipe``; one for all that share them."""
        common = recipe.replace({"seed": 1})
        assert common.data is not None
        key = fingerprint(common.data.model_dump(mode="json"), common.tokenizer.model_dump(mode="json"))
        if key in made:
            return made[key]
        place = made[key] = self.folder / "prepared" / key[:12]
        with RunFolder(place).lock() as folder:
            if not folder.recipe_path.is_file():
                folder.write_recipe(common.plain())
            pipeline.run(Job(common, folder, self.console, self.stop), until="tokenizer")
        if not feed.has_held_out(place):
            raise DataError("no documents are held out, and models are compared on them", fix="set data.split.held_out")
        return place

    def _known(self, recipe: Recipe, task: tuple[Any, ...]) -> Result | None:
        _, name, seed, prepared, _ = task
        path = place_of(self.folder, name, seed) / "result.json"
        return Result.load(path, identity(recipe, seed, Path(prepared), self.comparison))

    def _made(self, tasks: list[tuple[Any, ...]]) -> Iterator[tuple[int, str, int, float, float]]:
        """Number, name, seed, bits per byte and seconds of every training, as they are done."""
        if self.jobs > 1:
            with self.stop.at_once():  # the trainings save as they go
                for i, (name, seed, bits, seconds) in enumerate(ordered_map(_elsewhere, tasks, self.jobs), 1):
                    yield i, name, seed, bits, seconds
            return
        for i, task in enumerate(tasks, 1):
            yield i, *_here(*task, stop=self.stop, console=Console("quiet"))


def place_of(folder: Path, name: str, seed: int) -> Path:
    """Where a training writes."""
    return folder / "models" / name.replace(" ", "_") / f"seed-{seed}"


def identity(recipe: Recipe, seed: int, prepared: Path, comparison: Comparison) -> str:
    """The fingerprint of all that decides a result."""
    stages = RunFolder(prepared).stages()
    made_of = [stages.get(name, {}).get("fingerprint") for name in ("data", "tokenizer")]
    plain = {key: value for key, value in recipe.plain().items() if key not in ("name", "seed")}
    pairs = comparison.pairs.model_dump(mode="json") if comparison.pairs else None
    return fingerprint(plain, seed, made_of, comparison.budget.model_dump(mode="json"), comparison.looks, pairs)


def _elsewhere(*task: Any) -> tuple[str, int, float, float]:
    """A training in a worker process."""
    return _here(*task, stop=StopSignal(), console=Console("quiet"))


def _here(
    plain: dict[str, Any], name: str, seed: int, prepared: str, folder: str, *, stop: StopSignal, console: Console
) -> tuple[str, int, float, float]:
    comparison = Comparison.model_validate(plain)
    recipe = comparison.recipes()[name]
    place = place_of(Path(folder), name, seed)
    make_folder(place)
    known = identity(recipe, seed, Path(prepared), comparison)
    work = _trained if recipe.train is not None else _counted
    result = work(recipe.replace({"seed": seed}), name, Path(prepared), place, comparison, known, stop, console)
    result.save(place / "result.json")
    return name, seed, result.bits_per_byte, result.seconds


def _trained(
    recipe: Recipe,
    name: str,
    prepared: Path,
    place: Path,
    comparison: Comparison,
    known: str,
    stop: StopSignal,
    console: Console,
) -> Result:
    tune_allocator()
    recipe, _ = freeze(recipe.replace({"train.threads": 1} if recipe.train and not recipe.train.threads else {}), None)
    assert recipe.train is not None
    set_threads(recipe.train.threads or 1)
    # The number of steps is settled once for a model: all its seeds see as many tokens, resumed trainings too.
    steps = _steps(recipe, prepared, place.parent / "pace.json", comparison.budget, stop)
    warmup = min(recipe.train.schedule.warmup, max(0, steps // 10))
    settled = recipe.replace(
        {
            "train.steps": steps,
            "train.schedule.warmup": warmup,
            "train.valid_every": max(1, -(-steps // comparison.looks)),
            "train.save_every": max(50, steps // 4),
            "train.keep_checkpoints": 1,
            "train.sample_prompts": [],
            "train.log_every": max(1, steps // 50),
        }
    )
    begun = read_json(place / "begun.json") if (place / "begun.json").is_file() else None
    if begun != {"fingerprint": known, "steps": steps}:  # what lies there is of another comparison
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
        write_json(place / "begun.json", {"fingerprint": known, "steps": steps})
    ready = pipeline.ready(Job(settled, RunFolder(prepared), console, stop), "pretrain", place)
    pace = _pace_of(place.parent / "pace.json")
    ready.trainer.fit()
    ready.lm.save(place / "model")
    shutil.rmtree(place / "checkpoints", ignore_errors=True)
    (place / "begun.json").unlink()
    step_tokens = ready.rows.source.rows * ready.seq_len
    model = ready.trainer.model
    assert isinstance(model, Decoder)
    return Result(
        fingerprint=known,
        model=name,
        seed=recipe.seed,
        tokens=steps * step_tokens,
        entries=cost(model).parameters,
        state_bytes=state_bytes(model.state_specs(), model.max_seq_len, model.embed.weight.dtype),
        train_flops=float(ready.trainer.held.train_flops_per_token * steps * step_tokens),
        seconds=pace * steps,
        steps=steps,
        curve=tuple(_curve(place / "metrics.jsonl", step_tokens)),
        **_scored(recipe, prepared, place / "model", comparison, stop),
    )


def _counted(
    recipe: Recipe,
    name: str,
    prepared: Path,
    place: Path,
    comparison: Comparison,
    known: str,
    stop: StopSignal,
    console: Console,
) -> Result:
    tokenizer, shards = Tokenizer.load(prepared / "tokenizer"), Shards.open(prepared / "data" / "train")
    config = recipe.model.model_copy(update={"vocab_size": recipe.model.vocab_size or tokenizer.vocab_size})
    began = time.process_time()
    with stop.at_once():
        documents = (shards.document(i) for i in range(shards.n_documents))
        special = tokenizer.special
        model = count(config, documents, bos=special.bos, eos=special.eos, scratch_folder=place)
    seconds = time.process_time() - began
    LanguageModel(model, tokenizer).save(place / "model")
    return Result(
        fingerprint=known,
        model=name,
        seed=recipe.seed,
        tokens=shards.n_tokens,
        entries=int(facts(model)["entries"]),
        state_bytes=state_bytes(model.state_specs(), CONTEXT, torch.float32),
        train_flops=0.0,
        seconds=seconds,
        trained=False,
        **_scored(recipe, prepared, place / "model", comparison, stop),
    )


def _scored(recipe: Recipe, prepared: Path, folder: Path, comparison: Comparison, stop: StopSignal) -> dict[str, Any]:
    """Bits per byte on the held-out documents, and the minimal pairs."""
    lm, config = load(folder), recipe.eval
    lengths = metrics.token_byte_lengths(lm.tokenizer)
    limits = (config.max_documents, config.max_bytes) if config else (None, 1_000_000)
    documents = list(take(Shards.open(prepared / "data" / "valid"), lengths, *limits))
    stride = config.stride if config else None
    scorer = metrics.own_scorer(lm.model) or metrics.neural_scorer(
        lm.logits, lm.max_seq_len, stride, vocab_size=lm.model.vocab_size
    )
    eos = lm.tokenizer.special.eos
    with stop.at_once() if not comparison.pairs else nullcontext():
        scores = metrics.score_documents(scorer, documents, lengths, -1 if eos is None else eos)
        found: dict[str, Any] = {"bits_per_byte": scores.bits_per_byte, "bytes": scores.n_bytes}
    if comparison.pairs:
        pairs = minimal_pairs.read(comparison.pairs.paths, comparison.pairs.at_most)
        asked = minimal_pairs.score(scorer, lm.tokenizer, pairs)
        found["pairs"] = (asked.right, asked.n)
    return found


def _steps(recipe: Recipe, prepared: Path, kept: Path, budget: Budget, stop: StopSignal) -> int:
    """How many steps the budget pays for; the pace is measured once for a model and kept beside it."""
    train = recipe.train
    assert train is not None
    key = fingerprint({k: v for k, v in recipe.plain().items() if k not in ("name", "seed", "eval")})
    before = read_json(kept) if kept.is_file() else None
    if before is None or before.get("fingerprint") != key:
        before = {"fingerprint": key, **_measured(recipe, prepared, stop)}
        make_folder(kept.parent)
        write_json(kept, before)
    if budget.seconds is not None:
        steps = budget.seconds / before["seconds"]
    elif budget.tokens is not None:
        steps = budget.tokens / before["tokens"]
    else:
        steps = (budget.flops or 0.0) / before["flops"]
    return max(MIN_STEPS, int(steps))


def _pace_of(kept: Path) -> float:
    return float(json.loads(kept.read_text(encoding="utf-8"))["seconds"])


def _measured(recipe: Recipe, prepared: Path, stop: StopSignal) -> dict[str, float]:
    """Processor seconds, tokens and FLOPs of a step, by doing some."""
    with tempfile.TemporaryDirectory() as scratch:
        quiet = recipe.replace({"train.steps": 1_000_000, "train.sample_prompts": []})
        job = Job(quiet, RunFolder(prepared), Console("quiet"), stop)
        ready = pipeline.ready(job, "pretrain", Path(scratch))
        trainer, times = ready.trainer, list[float]()
        trainer.model.train()
        for _ in range(WARM_STEPS):
            trainer.train_step()
        while len(times) < PACE_STEPS or sum(times) < PACE_SECONDS:
            stop.check("while measuring the pace")
            times.append(_timed(trainer.train_step))
        tokens = ready.rows.source.rows * ready.seq_len
        flops = trainer.held.train_flops_per_token * tokens
        return {"seconds": statistics.median(times), "tokens": tokens, "flops": flops}


def _timed(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _curve(path: Path, step_tokens: int) -> Iterator[tuple[int, float]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "valid" and "bits_per_byte" in row:
            yield row["step"] * step_tokens, row["bits_per_byte"]
