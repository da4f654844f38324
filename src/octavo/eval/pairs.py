"""What an encoder-decoder writes for sources, against the targets: exact match and chrF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from octavo.eval.answers import normalise
from octavo.eval.overlap import overlap
from octavo.infer.generate import generate
from octavo.infer.sampling import SamplingConfig

SCORED_PAIRS, SCORED_ROWS, EXAMPLES = 500, 50, 20
ROOM = 8  # tokens beyond the longest target, after which a text that does not end is cut


def judge_pairs(
    lm: Any, sources: Sequence[str], targets: Sequence[str], poll: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Figures of what ``lm`` writes greedily for the first ``SCORED_PAIRS`` sources, and the first ``examples``.

    Args:
        lm: a ``LanguageModel`` whose model is an encoder-decoder.
        poll: called before each batch; what it raises ends the scoring.

    Raises:
        DataError: there is no pair.
    """
    sources, targets = sources[:SCORED_PAIRS], targets[:SCORED_PAIRS]
    longest = max((len(lm.tokenizer.encode(target)) for target in targets), default=0) + ROOM
    how, texts = SamplingConfig(temperature=0, max_new_tokens=longest), list[str]()
    for start in range(0, len(sources), SCORED_ROWS):
        poll()
        part = [lm.prompt_ids(source) for source in sources[start : start + SCORED_ROWS]]
        texts += [completion.text for completion in generate(lm.model, lm.tokenizer, part, how)]
    shown = list(zip(sources, targets, texts, strict=True))[:EXAMPLES]
    examples = [
        {"source": source, "target": target, "given": text, "right": normalise(text) == normalise(target)}
        for source, target, text in shown
    ]
    return {**overlap(texts, targets), "examples": examples}
