"""The tokenizer of a run, trained on its documents, so that a stop is heard while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.data.prepare import iter_texts, read_json
from octavo.data.workers import cpu_count, elsewhere
from octavo.tokenizer import Tokenizer, train

SOON_BYTES = 8 << 20  # of text: trained on in a second or two


def learn(config: Any, data: Path, target: Path, check: Callable[[], None]) -> Tokenizer:
    """Train on the documents in ``data`` and save to ``target``.

    Args:
        config: of the tokenizer.
        check: asked again and again; what it raises ends the training.
    """
    report = read_json(data / "report.json") or {}
    if config.kind not in ("existing", "byte") and report.get("kept_bytes", 0) > SOON_BYTES:
        # The trainer is one call into a library: it hears no signal before it is done.
        elsewhere(_learn, config, data, target, check=check, threads=cpu_count())
        return Tokenizer.load(target)

    def checked():
        for text in iter_texts(data, "train"):
            check()
            yield text

    tokenizer = train(config, checked())
    tokenizer.save(target)
    return tokenizer


def _learn(config: Any, data: Path, target: Path) -> None:
    train(config, iter_texts(data, "train")).save(target)
