"""Mistakes in components, for test_planted_components.py: one entry each, seen red when it was written.

``Bug(name, file below src/octavo, text that occurs there once, text put in its place, tests)``: of the tests, or of the
laws that a test runs, at least one must fail. Keep the tests of an entry few and quick: each is run twice.
"""

from __future__ import annotations

from planted import Bug


def laws_of(kind: str) -> str:
    """The test that runs every law on a mixer of the tables, in every use."""
    return f"tests/laws/test_models.py::test_every_mixer_in_every_use[{kind}]"


BUGS = [
    Bug(
        "reader: a flag for the mask of packed rows", "nn/reader.py",
        "flag = self.reads_all(ctx) and ctx.causal", "flag = ctx.causal",
        (laws_of("attention"),),
    ),
    Bug(
        "window: one token too many under the mask", "nn/contracts.py",
        "allowed = allowed & (key > query - window)", "allowed = allowed & (key >= query - window)",
        ("tests/laws/test_component_laws.py::test_every_part_that_is_no_mixer_keeps_every_law[window]",),
    ),
    Bug(
        "shift: the first token of a document sees the document before", "nn/shift.py",
        "return moved * (~ctx.starts)[..., None].to(x.dtype) if ctx.restarts else moved", "return moved",
        ("tests/unit/nn/test_shift.py::test_shift",),
    ),
    Bug(
        "padding: outputs are not moved back", "nn/contracts.py",
        'padding="end"), order.argsort(1)', 'padding="end"), order',
        (laws_of("attention"),),
    ),
]  # fmt: skip
