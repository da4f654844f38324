"""Which command a run's model is tried with: what it was taught decides."""

from __future__ import annotations

import shlex
from pathlib import Path

from octavo.report.folder import LABELLED, Run, dig, objects

LONGEST = 80  # characters of a source that is shown as an example


def try_command(run: Run, where: str | Path | None = None) -> str:
    """The command that shows what the run's model does; ``where`` is the run as the reader writes it."""
    place = shlex.quote(str(run.path if where is None else where))
    if run.writes_for_sources:
        return f"octavo generate {place} {shlex.quote(a_source(run))} --temperature 0"
    if run.told in LABELLED:
        texts = "Anna lives in Oslo" if run.told == "tagged" else "a text"
        return f'echo "{texts}" | octavo classify {place}'
    if run.reads_both_ways:
        return f'echo "a text" | octavo embed {place}'
    return f"octavo chat {place}" if "tune" in run.stages else f'octavo generate {place} "Once"'


def a_source(run: Run) -> str:
    """A text that the run's encoder-decoder can be given: the first short one of its held-out pairs."""
    found = (str(example.get("source") or "") for example in objects(dig(run.scores, "pairs", "examples")))
    return next((source for source in found if 0 < len(source) <= LONGEST and source.isprintable()), "a source")
