"""R16 for model files of other programs, llama2.c, GGUF and pickles, cut off and mutated.

Each is either still a model or refused in one line that names the file, soon, and without memory that its size does
not explain.
"""

from __future__ import annotations

import importlib.util
import random

import pytest
from boxed import SCALE, Box
from model_files import mutants, write

SECONDS, MEBIBYTES = 1.0, 64
SEED = 16
KINDS = {  # how many, and how many bytes at the start hold sizes and types
    "llama2.c 0": (100, 60),
    "llama2.c 1": (100, 300),
    "llama2.c words": (100, 10**6),
    "gguf": (200, 14_000),
    "pickle": (100, 6_000),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """By kind: the file to attack, and the case that opens it."""
    found = {}
    for kind in KINDS:
        if kind != "gguf" or importlib.util.find_spec("gguf"):
            path = write(kind, tmp_path_factory.mktemp("sound"))
            given = path.with_name("model.bin") if kind == "llama2.c words" else path
            found[kind] = path, {"path": str(given), "kind": kind.split()[0]}
    return found


@pytest.fixture(scope="module")
def box(sound):
    harmless = [case for _, case in sound.values()]
    with Box("model_files:open_file", memory_bytes=1 << 30, seconds=40, first=harmless) as one:
        yield one


@pytest.mark.timeout(300 * SCALE)
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_models_or_refused(kind, sound, box, record):
    if kind not in sound:
        pytest.skip("the optional package gguf is not installed, so nothing here was tested")
    (n, head), (path, case) = KINDS[kind], sound[kind]
    whole, failures, refused = path.read_bytes(), [], 0
    for change, raw in mutants(whole, n * SCALE, head, random.Random(SEED)):
        path.write_bytes(raw)
        outcome = box.ask(case)
        problem = outcome.trouble(SECONDS, MEBIBYTES)
        if not problem and outcome.error and outcome.exit_code not in (2, 4):
            problem = f"exit code {outcome.exit_code}: {outcome.error}"
        if not problem and outcome.error and str(path.parent) not in outcome.error:
            problem = f"does not name the file: {outcome.error}"
        if problem:
            failures.append(f"{change}: {problem}")
        refused += bool(outcome.error)
    path.write_bytes(whole)
    assert refused > n / 4
    record("R16", n * SCALE, failures, seed=SEED, refused=refused, kind=kind)
