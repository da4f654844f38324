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
    Bug(
        "reader lambda: first tokens at their distance in the text, not in the cache", "nn/reader_lambda.py",
        "turn(q, p.clamp(max=end), rotation)", "turn(q, p, rotation)",
        ("tests/unit/nn/test_long_readers.py::test_lambda_reads_first_and_last_tokens_at_places_of_the_cache",),
    ),
    Bug(
        "reader lambda: the first tokens of the document before", "nn/reader_lambda.py",
        'allowed = (slots >= 0) & (sinks["begins"][:, None] == begin)', "allowed = (slots >= 0)",
        ("tests/laws/test_long_reader_laws.py::test_every_law_on_a_reader_for_long_texts[cache]",),
    ),
    Bug(
        "reader external_memory: local tokens take the memory's places", "nn/reader_memory.py",
        'best = scores.masked_fill(~outside, float("-inf"))', "best = scores",
        ("tests/unit/nn/test_long_readers.py::test_external_memory_merges_the_nearest_keys_before_the_softmax",),
    ),
    Bug(
        "reader longheads: a chunk too far back", "nn/reader_blocks.py",
        "cumsum(-1).flip(-1) - chosen.long()", "cumsum(-1).flip(-1)",
        ("tests/unit/nn/test_long_readers.py::test_longheads_chooses_chunks_per_head_and_counts_positions_along_them",),
    ),
    Bug(
        "reader parallel_windows: the task's positions count on", "nn/reader_parallel.py",
        "min(self.length, self.task) + index - self.task", "index",
        ("tests/unit/nn/test_long_readers.py::test_parallel_windows_have_the_published_positions"
         "_and_do_not_see_each_other",),
    ),
]  # fmt: skip
