"""What the trainer itself and the engine say: packed rows, paged memory, each executor, small weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from octavo.certify.judge import Aspect, Check, Finding, Said, judge, judge_scores, same
from octavo.certify.prompts import Prompt
from octavo.certify.reference import Reference
from octavo.errors import DataError
from octavo.eval.runner import Encoded
from octavo.infer import native
from octavo.infer.engine import Engine
from octavo.infer.executors import PlainExecutor
from octavo.infer.request import EngineConfig, Failure, Request
from octavo.infer.sampling import SamplingConfig
from octavo.infer.text import Piece

EXACT = 1e-3
"""Of ln p: sums of the same numbers in fp32, in another order."""
CODES = 0.02
"""Of ln p: the native step rounds activations to 15 bits where weights are whole numbers."""
LEAST = 0.01
"""Of ln p in 16 bits: what is nearer is by chance."""
TOGETHER = 8


class Forced:
    """The continuation of a prompt must be this text."""

    def __init__(self, text: Sequence[int]):
        self.left = list(text)

    def mask(self, logits: Tensor) -> None:
        kept = logits[self.left[0]].clone()
        logits.fill_(-float("inf"))
        logits[self.left[0]] = kept

    def accept(self, token: int) -> bool:
        assert token == self.left.pop(0)
        return not self.left


def engine_of(model: Any, tokenizer: Any, reference: Reference, *, plain: bool) -> Engine:
    """Blocks of 16 tokens, prompts in parts, texts that begin alike share: as a server would, but smaller."""
    longest = max(len(prompt) + reference.n_new for prompt in reference.prompts)
    config = EngineConfig(max_sequences=TOGETHER, max_tokens=TOGETHER * (longest + 16), chunk=32, step_tokens=64)
    return Engine(model, tokenizer, config, executor=PlainExecutor if plain else None)  # type: ignore[arg-type]


def answered(engine: Engine, reference: Reference) -> Said:
    """Its greedy texts, and ln p of the reference's: read off where they are the same, else asked once more."""
    config = SamplingConfig(temperature=0, max_new_tokens=reference.n_new)
    free = _run(engine, [Request(p, config, stop_ids=reference.stop_ids, n_top=0) for p in reference.prompts])
    texts = [[piece.id for piece in pieces] for pieces in free]
    other = [i for i, text in enumerate(texts) if text != reference.texts[i]]
    forced = {
        i: Request(
            reference.prompts[i],
            config,
            n_top=0,
            constraint=lambda _, __, text=reference.texts[i]: Forced(text),
        )
        for i in other
    }
    again = dict(zip(other, _run(engine, list(forced.values())), strict=True))
    scores = [
        np.array([piece.score.logprob for piece in again.get(i, pieces) if piece.score is not None])
        for i, pieces in enumerate(free)
    ]
    return Said(scores=scores, texts=texts)


def _run(engine: Engine, requests: Sequence[Request]) -> list[list[Piece]]:
    found: dict[int, list[Piece]] = {id(request): [] for request in requests}
    for request in requests:
        engine.add(request)
    for request, event in engine.run():
        if isinstance(event, Failure):
            raise event.error
        found[id(request)].append(event)
    return [found[id(request)] for request in requests]


def ask_trainer(reference: Reference, prompts: Sequence[Prompt], tokenizer: Any) -> Finding:
    """Rows as training reads them: several documents in each; conversations with an answer, rendered for training."""
    finding = Finding("trainer, packed rows")
    finding.checks |= _as_trained(prompts, tokenizer)
    packed, loss, mean = reference.packed()
    scores = judge_scores(reference.scores, packed, EXACT)
    scores.values["loss"] = loss
    if not abs(loss - mean) <= EXACT and scores.equal:
        scores = Check(False, scores.figure, f"the objective's loss is {loss:.4f}, its own rows say {mean:.4f}")
    finding.checks["log-probabilities"] = scores
    return finding


def _as_trained(prompts: Sequence[Prompt], tokenizer: Any) -> dict[Aspect, Check]:
    """A prompt is how a training text begins, and what ends an answer there ends it here."""
    texts, ids, ends = list[str | None](), list[list[int] | None](), set[int]()
    for prompt in prompts:
        text, own = None, None
        if prompt.messages is not None:
            try:
                whole = tokenizer.render([*prompt.messages, {"role": "assistant", "content": "Yes."}])
            except DataError:  # nothing here can be tuned on
                whole = None
            if whole is not None:
                text, own = whole.text[: len(prompt.rendered or "")], whole.ids[: _first(whole.loss_mask)]
                last = max((i for i, counts in enumerate(whole.loss_mask) if counts), default=None)
                ends |= set() if last is None else {whole.ids[last]}
        elif prompt.text is not None:
            document = Encoded([prompt.text], tokenizer).document(0).tolist()
            own = document[: len(document) - (tokenizer.special.eos is not None)]
            ends |= set() if tokenizer.special.eos is None else {document[-1]}
        texts.append(text)
        ids.append(own)
    checks: dict[Aspect, Check] = {}
    if any(text is not None for text in texts):
        asked = [p.rendered if text is not None else None for p, text in zip(prompts, texts, strict=True)]
        checks["template"] = same(asked, texts, "trained on as")
    if any(own is not None for own in ids):
        wanted = [p.ids if own is not None else None for p, own in zip(prompts, ids, strict=True)]
        checks["ids"] = same(wanted, ids, "trained on as")
    if ends:
        checks["stop"] = _ends(ends, tokenizer.stop_ids)
    return checks


def _first(mask: Sequence[int]) -> int:
    return next((i for i, counts in enumerate(mask) if counts), len(mask))


def _ends(taught: set[int], stop_ids: Collection[int]) -> Check:
    missing = sorted(taught - set(stop_ids))
    difference = f"training ends answers with {missing}, which ends none here: {sorted(stop_ids)} do"
    return Check(not missing, "learned" if not missing else "other ids", difference if missing else "",
                 {"taught": sorted(taught), "stop_ids": sorted(stop_ids)})  # fmt: skip


def ask_engine(
    name: str,
    model: Any,
    tokenizer: Any,
    reference: Reference,
    prompts: Sequence[Prompt],
    *,
    plain: bool,
    within: float,
) -> Finding:
    """The engine with one executor; skipped where the native one does not serve the model."""
    finding = Finding(name)
    if not plain and (why := native.unsuitable(model) or native.library()[1]):
        finding.skipped = f"no native step: {why}"
        return finding
    engine = engine_of(model, tokenizer, reference, plain=plain)
    finding.checks = judge(reference, prompts, answered(engine, reference), within)
    return finding


def within_sixteen(model: Any, reference: Reference, prompts: Sequence[Prompt]) -> float:
    """How near ln p in 16 bits has to be: twice as far as the forward pass in 16 bits is from that in fp32."""
    rounded = judge_scores(reference.scores, _forced(model, reference, prompts).scores, float("inf"))
    return max(2 * rounded.values["largest"], LEAST)


def _forced(model: Any, reference: Reference, prompts: Sequence[Prompt]) -> Reference:
    """The same texts, scored by other weights."""
    return Reference(
        model, prompts, n_tokens=reference.n_tokens, stop_ids=reference.stop_ids, n_new=0, texts=reference.texts
    )


def ask_small(name: str, model: Any, tokenizer: Any, reference: Reference, prompts: Sequence[Prompt]) -> Finding:
    """The engine on quantised weights against the forward pass on the same ones; what they cost is said beside it."""
    own = Reference(model, prompts, n_tokens=reference.n_tokens, stop_ids=reference.stop_ids, n_new=reference.n_new)
    plain = bool(native.unsuitable(model) or native.library()[1])
    finding = ask_engine(name, model, tokenizer, own, prompts, plain=plain, within=EXACT if plain else CODES)
    cost = judge_scores(reference.scores, _forced(model, reference, prompts).scores, float("inf")).values
    finding.figures = {
        "mean_change": cost["mean"],
        "largest_change": cost["largest"],
        "same_texts": sum(a == b for a, b in zip(own.texts, reference.texts, strict=True)),
    }
    return finding
