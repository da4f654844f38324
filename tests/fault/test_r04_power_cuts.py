"""R4: the power goes at any operation of a save, a rotation or a start; what no fsync covered is lost or scrambled.

After each such crash a verified step is found if there ever was one, and it holds one step's numbers, never a mixture.
What ``save`` reported as saved is found however much the file system may lose (tests/crashes.py says how much).
"""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from crashes import Disk, Operation, Tape, Tree, read_tree, write_tree
from saving import damage, save, wrong

from octavo.training import checkpoint


@dataclass
class Recorded:
    """What was done to a folder, and ``saved``: after how many operations which step was reported as saved."""

    before: Tree
    operations: list[Operation]
    saved: list[tuple[int, int | None]]
    damaged: int | None = None
    place: str = ""

    @property
    def disk(self) -> Disk:
        return Disk(self.before, self.operations)

    def allowed(self, k: int) -> set[int | None]:
        """The steps that may be found after k operations: the last saved; while one is being saved, also that."""
        done = [i for i, (at, _) in enumerate(self.saved) if at <= k]
        at, step = self.saved[done[-1]]
        return {step} if at == k or done[-1] + 1 == len(self.saved) else {step, self.saved[done[-1] + 1][1]}


Prepare = Callable[[Path], object]
Act = Callable[[Path], int]
# Scenario: what is there before, its newest sound step, and what is done, each saving the step it returns.
SCENARIOS: dict[str, tuple[Prepare, int | None, list[Act]]] = {
    "the first": (lambda f: None, None, [lambda f: step_of(save(f, 100))]),
    "in new folders": (lambda f: None, None, [lambda f: step_of(save(f, 100))]),
    "the only one is kept": (lambda f: save(f, 100), 100, [lambda f: step_of(save(f, 200, keep=1))]),
    "a line given up": (lambda f: [save(f, s) for s in (100, 200)], 200, [lambda f: step_of(save(f, 150))]),
    "the same again": (lambda f: save(f, 100), 100, [lambda f: step_of(save(f, 100, keep=1))]),
    "past a damaged one": (
        lambda f: [save(f, 100), damage(save(f, 200))],
        100,
        [lambda f: recovered_step(f), lambda f: step_of(save(f, 150, keep=1))],
    ),
    "many": (
        lambda f: save(f, 100),
        100,
        [lambda f, s=s: step_of(save(f, s)) for s in (200, 300, 400, 500)],
    ),
}


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def recovered_step(folder: Path) -> int:
    found = checkpoint.recover(folder)
    assert found is not None
    return found.step


@pytest.fixture
def recorded(tmp_path, request) -> Recorded:
    prepare, newest, acts = SCENARIOS[request.param]
    root, place = tmp_path / "recorded", "stage/checkpoints" if request.param == "in new folders" else ""
    root.mkdir()
    prepare(root / place)
    before, tape, saved = read_tree(root), Tape(root), [(0, newest)]
    with tape.recording():
        for act in acts:
            step = act(root / place)
            saved.append((len(tape.operations), step))
    what = Recorded(before, tape.operations, saved, 200 if "damaged" in request.param else None, place)
    assert what.disk.killed(len(tape.operations)) == read_tree(root), "an operation was not seen"
    return what


@pytest.fixture(autouse=True)
def no_real_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def after_a_crash(folder: Path, what: Recorded, k: int, *, in_order: bool) -> list[str]:
    """What is not as it should be; ``in_order``: names changed in order, so that no step's name is on a half step."""
    failures = []
    if in_order:
        steps = [path for step, path in checkpoint._steps(folder) if step != what.damaged]
        failures += [f"{path.name} is half" for path in steps if checkpoint.verify(path)]
    for find in (checkpoint.newest, checkpoint.recover, checkpoint.newest):
        try:
            found = find(folder)
        except Exception as error:
            failures.append(f"{find.__name__}: {error}")
            continue
        failures += wrong(found.path, found.step) if found else []
        if (found and found.step) not in what.allowed(k):
            failures.append(f"{find.__name__}: {found}, allowed {what.allowed(k)}")
    return failures


class Tried:
    """Distinct states that were tried, and what was wrong in them."""

    def __init__(self, work: Path, what: Recorded):
        self.folder, self.what = work / "crashed", what
        self.seen: set[int] = set()
        self.failures: list[str] = []

    def __call__(self, k: int, tree: Tree, label: str, in_order: bool = True) -> None:
        key = hash((frozenset(self.what.allowed(k)), *sorted((path, data or b"") for path, data in tree.items())))
        if key in self.seen:
            return
        self.seen.add(key)
        write_tree(self.folder, tree)
        found = after_a_crash(self.folder / self.what.place, self.what, k, in_order=in_order)
        self.failures += [f"{label} after {k} of {len(self.what.operations)} operations: {text}" for text in found]
        shutil.rmtree(self.folder)


def try_all(work: Path, what: Recorded, n_random: int, seed: int) -> Tried:
    tried, disk, chance = Tried(work, what), what.disk, random.Random(seed)
    for k in range(disk.n + 1):
        tried(k, disk.killed(k), "kill")
    for k, tree in disk.each_journalled():
        tried(k, tree, "power cut")
    for k, tree in disk.each_reordered(chance):
        tried(k, tree, "power cut, reordered", in_order=False)
    for _ in range(n_random):
        k = chance.randint(0, disk.n)
        tried(k, disk.loose(k, lambda i: chance.random() < 0.5, chance), "power cut, reordered", in_order=False)
    return tried


@pytest.mark.parametrize("recorded", SCENARIOS, indirect=True)
@pytest.mark.parametrize("n_random", [30, pytest.param(4000, marks=pytest.mark.slow)])
def test_a_power_cut_at_any_operation_leaves_a_verified_step(tmp_path, recorded, record, n_random):
    tried = try_all(tmp_path, recorded, n_random, seed=4)
    assert len(tried.seen) > 25
    record("R4", len(tried.seen), tried.failures, seed=4, what="crash states")


def kill_and_start(tmp_path: Path, what: Recorded, k: int) -> Recorded:
    """Killed after k operations, started again: what both processes did, for the power to go at the end."""
    root = tmp_path / f"killed-{k}"
    write_tree(root, what.disk.killed(k))
    tape = Tape(root)
    with tape.recording():
        step = recovered_step(root)
    shutil.rmtree(root)
    operations = what.operations[:k] + tape.operations
    return Recorded(what.before, operations, [what.saved[0], (len(operations), step)])


@pytest.mark.parametrize("recorded", ["the only one is kept", "the same again"], indirect=True)
@pytest.mark.parametrize("n_random", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_start_after_a_kill_survives_a_power_cut(tmp_path, recorded, record, n_random):
    n, failures, chance = 0, [], random.Random(5)
    for k in range(recorded.disk.n + 1):
        both = kill_and_start(tmp_path, recorded, k)
        tried = Tried(tmp_path, both)
        for _ in range(n_random):
            at = chance.randint(k, both.disk.n)
            tree = both.disk.loose(at, lambda i: chance.random() < 0.5, chance)
            tried(at, tree, f"killed at {k}, power cut", in_order=False)
            tried(at, both.disk.journalled(at, both.disk.barrier(at), "zeros"), f"killed at {k}, power cut")
        n += len(tried.seen)
        failures += tried.failures
    record("R4", n, failures, seed=5, what="kill, start, power cut")


@pytest.mark.parametrize("recorded", ["the only one is kept"], indirect=True)
def test_the_manifest_is_written_last_and_nothing_old_goes_before_the_new_is_on_disk(recorded):
    order = [(op.kind, op.path.rpartition("/")[2], op.goal) for op in recorded.operations]
    aside = "step-00000200.tmp-r1"
    manifest = order.index(("create", "manifest.json", ""))
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert order.index(("create", name, "")) < order.index(("fsync", name, "")) < manifest
    assert manifest < order.index(("fsync", "manifest.json", "")) < order.index(("fsync", aside, ""))
    renamed = order.index(("rename", aside, "step-00000200"))
    first_removal = next(i for i, (kind, name, _) in enumerate(order) if kind == "rename" and name == "step-00000100")
    assert order.index(("fsync", aside, "")) < renamed < order.index(("fsync", "", ""), renamed) < first_removal
    assert all(kind != "remove" for kind, _, _ in order[:first_removal])


# A saver that forgets one fsync, as the recording without it: the crashes above must find that.
FORGOTTEN: dict[str, Callable[[Operation], bool]] = {
    "of the tensors": lambda op: op.path.endswith(".safetensors"),
    "of the state": lambda op: op.path.endswith("state.json"),
    "of the manifest": lambda op: op.path.endswith("manifest.json"),
    "of the step's folder": lambda op: op.path.endswith("tmp-r1"),
    "of the folder above": lambda op: op.path == "",
}


@pytest.mark.parametrize("recorded", ["the only one is kept"], indirect=True)
@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_a_saver_that_forgets_an_fsync_is_found(tmp_path, recorded, forgotten):
    kept = [op for op in recorded.operations if op.kind != "fsync" or not FORGOTTEN[forgotten](op)]
    assert len(kept) < len(recorded.operations)
    recorded.operations = kept
    assert try_all(tmp_path, recorded, 60, seed=4).failures
