"""The verdict on a component: its laws in every use, and its recorded parity."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from octavo.laws.components import Component
from octavo.laws.model import check
from octavo.laws.parity import Parity
from octavo.laws.result import LawResult

Standing = Literal["proven", "keeps the laws", "unproven"]


@dataclass(frozen=True)
class Verdict:
    """What was found of one component: the laws by use, what its parity tests recorded, how long it took."""

    component: Component
    results: Mapping[str, Sequence[LawResult]]
    parity: Sequence[Parity]
    seconds: float

    @property
    def asked(self) -> list[str]:
        """The laws that were asked in at least one use."""
        return list(
            dict.fromkeys(r.law for results in self.results.values() for r in results if r.status != "not asked")
        )

    @property
    def broken(self) -> list[tuple[str, LawResult]]:
        """Use and law of everything that is broken."""
        return [(use, result) for use, results in self.results.items() for result in results if not result.ok]

    @property
    def kept(self) -> list[str]:
        """The laws that hold in every use in which they were asked."""
        broken = {result.law for _, result in self.broken}
        return [law for law in self.asked if law not in broken]

    @property
    def standing(self) -> Standing:
        """``proven``: every law and agreement with somebody else's numbers; ``keeps the laws``: without the latter."""
        if self.broken or not self.asked:
            return "unproven"
        return "proven" if self.parity else "keeps the laws"

    def error(self, dtype: str) -> float | None:
        """The largest error over all references in one precision."""
        found = [getattr(one, dtype) for one in self.parity]
        return max((error for error in found if error is not None), default=None)

    def plain(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "component": self.component.name,
            "table": list(self.component.tables),
            "standing": self.standing,
            "references": [one.reference for one in self.parity],
            "max_error": {dtype: self.error(dtype) for dtype in ("fp32", "bf16", "fp64")},
            "laws_passed": len(self.kept),
            "laws_asked": len(self.asked),
            "broken": [{"use": use, "law": result.law, "detail": result.detail} for use, result in self.broken],
            "seconds": round(self.seconds, 2),
        }


def examine(component: Component, parity: Sequence[Parity] = (), *, slow: bool = False) -> Verdict:
    """Every law on each small model around ``component``; ``slow``: also compilation.

    A model that cannot be built breaks the law ``build``.
    """
    begun = time.perf_counter()
    results: dict[str, Sequence[LawResult]] = {}
    for seed, (use, model) in enumerate(component.models().items()):
        try:
            results[use] = check(model, seed=seed, slow=slow)
        except Exception as error:  # whatever a stranger's class comes to
            said = " ".join(str(error).split())[:300]
            results[use] = [LawResult("build", "broken", f"{type(error).__name__}: {said}")]
    return Verdict(component, results, parity, time.perf_counter() - begun)


HEADINGS = ("component", "kind of part", "reference", "max error fp32", "max error bf16", "laws", "seconds")


def cells(verdict: Verdict) -> list[str]:
    """One row of the table, as HEADINGS says."""

    def shown(dtype: str) -> str:
        error = verdict.error(dtype)
        if error is None and dtype == "fp32" and (error := verdict.error("fp64")) is not None:
            return f"{error:.0e} (fp64)"
        return "" if error is None else "0" if error == 0 else f"{error:.0e}"

    return [
        verdict.component.name,
        verdict.component.title,
        ", ".join(one.reference for one in verdict.parity),
        shown("fp32"),
        shown("bf16"),
        f"{len(verdict.kept)} of {len(verdict.asked)}",
        f"{verdict.seconds:.1f}",
    ]
