"""The stages of a run, in order; those that are finished, and made from the same, are kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from octavo.errors import StopRequested
from octavo.eval.runner import summary
from octavo.pipeline import judging, origins, text, training
from octavo.pipeline.job import Job
from octavo.predictors.settings import CountedConfig
from octavo.run import FREE_TRAIN_KEYS, fingerprint
from octavo.training.room import told_when_it_runs_out
from octavo.training.settings import TrainConfig


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        name: as it stands in stages.json.
        work: goes through it, and returns its facts.
        deciding: what decides its result, beside the stages before it; ready for JSON.
        at_once: whether a signal may break it off where it is: its result is written in one step at the end.
    """

    name: str
    work: Callable[[Job], dict[str, Any]]
    deciding: Any
    at_once: bool = False


def stages(job: Job) -> list[Stage]:
    """Those that the recipe of ``job`` has."""
    r = job.recipe
    found: list[Stage] = []
    if r.data is not None:
        found.append(Stage("data", text.read_documents, origins.of_documents(job)))
    made_of = [r.tokenizer.model_dump(mode="json"), origins.of_model(job), *text.asked_of_tokenizer(r)]
    found.append(Stage("tokenizer", text.tokenise, made_of))
    model = r.model.model_dump(mode="json")
    if isinstance(r.model, CountedConfig):
        found.append(Stage("count", text.count_shards, model, at_once=True))
    if r.train is not None:
        deciding = [model, _deciding(r.train), r.tune is not None, *origins.of_vectors(job)]
        found.append(Stage("pretrain", training.pretrain, deciding))
    if r.tune is not None:
        found.append(Stage("tune", training.tune, [model, _deciding(r.tune), origins.of_tuning(job)]))
    if r.eval is not None and judging.is_judged(r):
        found.append(Stage("eval", judging.score, r.eval.model_dump(mode="json"), at_once=True))
    return [*found, Stage("report", judging.report, None, at_once=True)]


def run(job: Job, until: str | None = None) -> dict[str, str]:
    """Go through all stages, or those up to ``until``; returns the closing figures.

    Raises:
        StopRequested: on a signal or time limit, with everything saved.
    """
    every = stages(job)
    if until is not None:
        every = every[: 1 + [stage.name for stage in every].index(until)]
    previous = fingerprint(job.recipe.seed)
    for i, stage in enumerate(every, 1):
        previous = fingerprint(previous, stage.name, stage.deciding)
        if job.folder.is_finished(stage.name, previous):
            job.console.kept(stage.name, i, len(every))
            continue
        with job.console.stage(stage.name, i, len(every)):
            began = job.console.clock()
            result = _went_through(job, stage)
            seconds = round(job.console.clock() - began, 3)
            job.folder.finish(stage.name, previous, seconds=seconds, peak_memory_bytes=_peak_memory(), **result)
    scores = job.folder.path / "scores.json"
    return summary(json.loads(scores.read_text(encoding="utf-8"))) if scores.is_file() and job.recipe.eval else {}


def _went_through(job: Job, stage: Stage) -> dict[str, Any]:
    """A stage's facts; what ends it early in words of the user's."""
    try:
        job.stop.check(f"before stage {stage.name}")
        with (
            told_when_it_runs_out(f"in stage {stage.name}", "close other programs, or use fewer workers"),
            job.stop.at_once() if stage.at_once else nullcontext(),
        ):
            return stage.work(job)
    except StopRequested as error:
        if error.fix:
            raise
        what = error.what if error.what != job.stop.reason else f"{error.what}, in stage {stage.name}"
        raise StopRequested(what, fix=f"go on with {job.resume_command}", kept="all finished stages") from None


def _peak_memory() -> int:
    """The most memory this process has held so far, in bytes."""
    import resource  # not on native Windows, which is refused earlier

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _deciding(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the weights: what is only looked at in between is left out."""
    plain = config.model_dump(mode="json", exclude={"optimizer": {"lr", "weight_decay"}})
    return {key: value for key, value in plain.items() if key not in FREE_TRAIN_KEYS}
