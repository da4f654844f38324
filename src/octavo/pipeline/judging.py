"""The last stages: scores on what was held out, and the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from octavo import feed
from octavo.batch import Batch
from octavo.config import DENOISING, Recipe
from octavo.data import pairs
from octavo.data.loader import sweep
from octavo.data.shards import Shards
from octavo.data.tagged import TaggedRows
from octavo.eval.answers import Question, greedy
from octavo.eval.classes import judge, judge_masked
from octavo.eval.encoders import class_scores, hidden_right, tags_said
from octavo.eval.metrics import own_scorer
from octavo.eval.pairs import judge_pairs
from octavo.eval.runner import evaluate, summary
from octavo.eval.tags import judge_tags
from octavo.feed.sources import HELD_PAIRS
from octavo.files import write_json
from octavo.language_model import LanguageModel, load
from octavo.models.cost import cost
from octavo.pipeline.job import Job
from octavo.predictors.predictor import NGramPredictor

SCORED_ROWS = 50
WHERE = "in stage eval"


def judges(recipe: Recipe) -> list[Callable[[Job], dict[str, Any]]]:
    """What else than bits per byte the held-out part of a recipe is judged by."""
    found: list[Callable[[Job], dict[str, Any]]] = []
    if _hides(recipe):
        found.append(_hidden_tokens)
    if recipe.tune is not None and recipe.tune.data.kind in TUNED:
        found.append(TUNED[recipe.tune.data.kind])
    return found


def is_judged(recipe: Recipe) -> bool:
    """Whether there is anything to score."""
    return recipe.eval is not None and (recipe.data is not None or bool(judges(recipe)))


def score(job: Job) -> dict[str, Any]:
    """Stage ``eval``: bits per byte beside n-grams, answers to held-out questions; hidden tokens, classes, pairs."""
    recipe, config = job.recipe, job.recipe.eval
    if config is None:
        return {}
    judged: dict[str, Any] = {}
    for figures in judges(recipe):
        judged |= figures(job)
    foretells = not _hides(recipe) and (recipe.tune is None or not feed.KINDS[recipe.tune.data.kind].of_pairs)
    if not foretells or recipe.data is None:
        about = {"parameters": cost(load(job.folder.path).network).parameters, "run": recipe.name}
        _tell(job, {"about": about, **judged, "config": config.model_dump(mode="json")})
    elif feed.has_held_out(job.folder.path):
        _tell(job, _of_text(job) | judged)
    return {}


def report(job: Job) -> dict[str, Any]:
    """Stage ``report``: the page."""
    from octavo.report.page import build as build_report  # matplotlib takes a second to import

    page = build_report(job.folder.path)
    job.console.note(str(page))
    return {}


def _hides(recipe: Recipe) -> bool:
    """Whether the pretraining asks for hidden or damaged tokens, not for the next one."""
    return recipe.train is not None and recipe.train.objective.kind in ("masked", *DENOISING)


def _tell(job: Job, result: dict[str, Any]) -> None:
    write_json(job.folder.path / "scores.json", result)
    for name, line in summary(result).items():
        job.console.note(f"{name}: {line}")


def _of_text(job: Job) -> dict[str, Any]:
    """Bits per byte of held-out documents, and answers to held-out questions."""
    recipe, config, data = job.recipe, job.recipe.eval, job.folder.path / "data"
    assert config is not None
    final = load(job.folder.path)
    base = load(job.folder.base_path) if recipe.tune and recipe.train else final
    counted = isinstance(final.model, NGramPredictor)
    held_out = Shards.open(data / "valid")
    return evaluate(
        logits_fn=job.polled(base.logits, WHERE),
        scorer=own_scorer(base.model),
        max_seq_len=base.max_seq_len,
        tokenizer=base.tokenizer,
        held_out=held_out,
        trained_on=Shards.open(data / "train") if recipe.train or counted else None,
        config=config,
        questions=_questions(job),
        generate_fn=job.polled(greedy(final.model, final.tokenizer), WHERE),
        vocab_size=base.model.vocab_size,
        n_bytes=held_out.n_bytes,
        about={"parameters": None if counted else cost(final.network).parameters, "run": recipe.name},
        on_progress=job.console.note,
    )


def _questions(job: Job) -> Sequence[Question]:
    path = job.folder.tuning_data_path / "held_out.jsonl"
    if job.recipe.tune is None or not path.is_file():
        return ()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Question.read(row, str(path)) for row in rows]


def _held(job: Job, stage: str) -> tuple[LanguageModel, feed.Feed]:
    """The model of a stage, and what that stage held out."""
    folder = job.folder.model_path if stage == "tune" or not job.recipe.tune else job.folder.base_path
    return load(folder), feed.of_stage(job.recipe, job.folder.path, stage)


def _batches(job: Job, found: feed.Feed) -> Iterator[Batch]:
    if found.valid is not None:
        for part in job.stoppable(sweep(found.valid, SCORED_ROWS), WHERE):
            yield Batch.from_numpy(part)


def _hidden_tokens(job: Job) -> dict[str, Any]:
    """How many hidden or damaged tokens of held-out documents are foretold."""
    final, found = _held(job, "pretrain")
    if found.valid is None:
        return {}
    assert job.recipe.train is not None
    name = "masked" if job.recipe.train.objective.kind == "masked" else "mended"
    return {name: judge_masked(hidden_right(final.model, batch) for batch in _batches(job, found))}


def _classes(job: Job) -> dict[str, Any]:
    final, found = _held(job, "tune")
    parts = [(batch.extra["labels"], class_scores(final.model, batch)) for batch in _batches(job, found)]
    if not parts:
        return {}
    given, scores = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    head = final.network.config.classes
    assert head is not None
    return {"classes": judge(given, scores, found.classes, head.problem)}


def _tags(job: Job) -> dict[str, Any]:
    final, found = _held(job, "tune")
    if found.valid is None:
        return {}
    assert isinstance(found.valid, TaggedRows)
    said = [row for batch in _batches(job, found) for row in tags_said(final.model, batch)]
    return {"tags": judge_tags(*found.valid.joined(said), found.classes)}


def _pairs(job: Job) -> dict[str, Any]:
    """What the model writes for the sources that were held out."""
    path = job.folder.tuning_data_path / HELD_PAIRS
    if not path.is_file():
        return {}
    held = pairs.read(pairs.PairsConfig(files=(str(path),)))
    sources, targets = [pair.source for pair in held], [pair.target for pair in held]
    return {"pairs": judge_pairs(load(job.folder.path), sources, targets, lambda: job.stop.check(WHERE))}


TUNED: dict[str, Callable[[Job], dict[str, Any]]] = {"pairs": _pairs, "labelled": _classes, "tagged": _tags}
