"""The stages before any training: documents, tokenizer and shards, and models that are counted."""

from __future__ import annotations

from typing import Any

from octavo import feed
from octavo.config import DENOISING, Pretrained, Recipe
from octavo.data import prepare
from octavo.data.shards import Shards, write_shards
from octavo.data.vocabulary import learn
from octavo.language_model import LanguageModel
from octavo.pipeline import origins
from octavo.pipeline.job import Job, sized
from octavo.predictors.folder import array_bytes
from octavo.predictors.kinds import count, facts
from octavo.predictors.settings import CountedConfig
from octavo.run import find_model
from octavo.tokenizer import Tokenizer
from octavo.tokenizer import train as train_tokenizer


def read_documents(job: Job) -> dict[str, Any]:
    """Stage ``data``: read, clean and split the documents."""
    config = job.recipe.data
    if config is None:
        return {}
    with job.bytes_bar() as progress:
        report = prepare.clean_documents(config, job.folder.path / "data", workers=job.workers, progress=progress)
    for line in str(report).splitlines()[:12]:
        job.console.note(line)
    return {"documents": report.kept_documents, "bytes": report.kept_bytes, "source": config.fingerprint()}


def tokenise(job: Job) -> dict[str, Any]:
    """Stage ``tokenizer``: train or load it, then turn the documents into shards."""
    target, data = job.folder.path / "tokenizer", job.folder.path / "data"
    recipe = job.recipe
    pretrained = isinstance(recipe.model, Pretrained.Config)
    if isinstance(recipe.model, Pretrained.Config):
        tokenizer = Tokenizer.load(find_model(recipe.model.path))
        tokenizer.save(target)
    elif recipe.data is None:
        tokenizer = train_tokenizer(recipe.tokenizer, ())
        tokenizer.save(target)
    else:
        learnt = learn(recipe.tokenizer, data, target, lambda: job.stop.check("while training the tokenizer"))
        tokenizer = _with_tokens(learnt, asked_of_tokenizer(recipe))
        if tokenizer is not learnt:
            tokenizer.save(target)
    kind = "the model's own" if pretrained else recipe.tokenizer.kind
    job.console.note(f"{kind}, {tokenizer.vocab_size:,} entries")
    told: dict[str, Any] = {"brought": origins.of_model(job)} if pretrained else {}
    told["vocab_size"] = tokenizer.vocab_size
    if recipe.data is None:
        return told
    for split in ("train", "valid") if feed.has_held_out(job.folder.path) else ("train",):
        with job.bytes_bar() as progress:
            shards = write_shards(data, split, target, workers=job.workers, progress=progress)
        told[f"{split}_tokens"] = shards.n_tokens
        job.console.note(
            f"{split}: {shards.n_documents:,} documents, {shards.n_tokens:,} tokens, "
            f"{shards.n_bytes / max(1, shards.n_tokens - 2 * shards.n_documents):.2f} bytes a token"
        )
    return told


def asked_of_tokenizer(recipe: Recipe) -> list[str]:
    """What the objective needs tokens of its own for; part of the tokenizer's fingerprint."""
    if recipe.train is None:
        return []
    objective = recipe.train.objective
    found = ["masked"] if objective.kind == "masked" else []
    found += ["fim"] if getattr(objective, "fim", None) is not None else []
    return found + ([objective.kind] if objective.kind in DENOISING else [])


def _with_tokens(tokenizer: Tokenizer, asked: list[str]) -> Tokenizer:
    if {"masked", "infilling"} & set(asked) and tokenizer.special.mask is None:
        tokenizer = tokenizer.with_mask()
    if "spans" in asked:
        tokenizer = tokenizer.with_sentinels()
    if "fim" in asked and tokenizer.fim is None:
        tokenizer = tokenizer.with_fim()
    return tokenizer


def count_shards(job: Job) -> dict[str, Any]:
    """Stage ``count``: count the shards in one pass; the result is model/."""
    config, tokenizer = job.recipe.model, job.tokenizer()
    assert isinstance(config, CountedConfig)
    shards = Shards.open(job.folder.path / "data" / "train")
    shards.require(tokenizer)
    job.console.note(f"{shards.n_documents:,} documents, {shards.n_tokens:,} tokens")
    documents = (shards.document(i) for i in range(shards.n_documents))
    made = count(
        sized(config, tokenizer),
        job.stoppable(documents, "while counting"),
        bos=tokenizer.special.bos,
        eos=tokenizer.special.eos,
        scratch_folder=job.folder.path,
    )
    LanguageModel(made, tokenizer).save(job.folder.model_path)
    told = {"tokens": shards.n_tokens, "bytes": array_bytes(job.folder.model_path), **facts(made)}
    job.console.note(f"{told['entries']:,} n-grams, {told['bytes']:,} bytes")
    return told
