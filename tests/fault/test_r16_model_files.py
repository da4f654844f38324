"""R16 for model files of other programs, llama2.c, GGUF and pickles, cut off and mutated.

Each is either still a model or refused in one line that names the file, soon, and without memory that its size does
not explain.
"""

from __future__ import annotations

import importlib.util
import random
import struct

import pytest
from boxed import SCALE, Box
from model_files import gguf_attacks, mutants, write

SECONDS, MEBIBYTES = 1.0, 64
SEED = 16
KINDS = {  # how many, and how many bytes at the start hold sizes and types
    "llama2.c 0": (100, 60),
    "llama2.c 1": (100, 300),
    "llama2.c words": (100, 10**6),
    "gguf": (200, 14_000),
    "gguf int4": (100, 14_000),
    "gguf written here": (100, 14_000),
    "pickle": (100, 6_000),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """By kind: the file to attack, and the case that opens it."""
    found = {}
    for kind in KINDS:
        if not kind.startswith("gguf") or importlib.util.find_spec("gguf"):
            path = write(kind, tmp_path_factory.mktemp("sound"))
            given = path.with_name("model.bin") if kind == "llama2.c words" else path
            found[kind] = path, {"path": str(given), "kind": kind.split()[0]}
    return found


@pytest.fixture(scope="module")
def box(sound):
    harmless = [case for _, case in sound.values()]
    with Box("model_files:open_file", memory_bytes=1 << 30, seconds=40, first=harmless) as one:
        one.ask(harmless[0])  # now, while every file is still sound
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


BENIGN = {"the type 2", "the type 8", "the type 39"}  # in a smaller type of the same shape the bytes are numbers too


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("gguf")])
def test_claims_that_cannot_be_are_refused(kind, sound, box, tmp_path, record):
    """Counts, lengths, sizes, types, offsets and names, each absurd in its own way: no memory is made for a claim."""
    if kind not in sound:
        pytest.skip("the optional package gguf is not installed, so nothing here was tested")
    whole, failures, n = sound[kind][0].read_bytes(), [], 0
    path = tmp_path / "m.gguf"
    for name, raw in gguf_attacks(whole):
        path.write_bytes(raw)
        outcome = box.ask({"path": str(path), "kind": "gguf"})
        problem = outcome.trouble(SECONDS, 16)
        if not problem and not outcome.error and name not in BENIGN:
            problem = f"was opened: {outcome.result}"
        if not problem and outcome.error and (outcome.exit_code not in (2, 4) or str(path) not in outcome.error):
            problem = f"exit code {outcome.exit_code}: {outcome.error}"
        if problem:
            failures.append(f"{name}: {problem}")
        n += 1
    record("R16", n, failures, attacks="claims", kind=kind)


@pytest.mark.timeout(120)
def test_a_tensor_that_nobody_asked_for_is_not_read(sound, box, tmp_path, record):
    """A file with holes is long and takes no room on a disk: what lies in it is read once its shapes are right."""
    if "gguf" not in sound:
        pytest.skip("the optional package gguf is not installed, so nothing here was tested")
    path, failures = tmp_path / "m.gguf", []
    for name, shape in {"more.weight": (2**12, 2**13), "blk.1.ffn_up.weight": (2**13, 2**12)}.items():
        raw = sound["gguf"][0].read_bytes()
        at = raw.index(b"blk.1.ffn_up.weight")
        entry = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I2QIQ", 2, *shape[::-1], 0, 2**20)
        if name in raw.decode("latin-1"):
            raw = raw[: at - 8] + entry + raw[at + len(name) + 32 :]
        else:
            raw = raw[: at - 8] + entry + raw[at - 8 :]
            raw = raw[:8] + struct.pack("<Q", struct.unpack_from("<Q", raw, 8)[0] + 1) + raw[16:]
        with open(path, "wb") as file:
            file.write(raw)
            file.truncate(2**27 + 2**21)
        outcome = box.ask({"path": str(path), "kind": "gguf"})
        problem = outcome.trouble(SECONDS, 16) or ("" if outcome.error else "was opened")
        failures += [f"{name}: {problem}"] if problem else []
        if not outcome.error or "the tensors do not match" not in outcome.error:
            failures.append(f"{name}: {outcome.error}")
    record("R16", 2, failures, attacks="holes")
