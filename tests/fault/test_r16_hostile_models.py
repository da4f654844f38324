"""R16: whatever lies in a model folder, opening it gives a model or a typed error, soon, small, and runs nothing."""

import json
import random
import shutil
from pathlib import Path

import pytest
from boxed import SCALE, Box
from hostile_files import (
    CHECKPOINT,
    CONFIG,
    INDEX,
    MARKER,
    PICKLES,
    SAFETENSORS,
    TOKENIZER,
    mutate_bytes,
    mutate_json,
    write_checkpoint,
    write_model,
)

SECONDS, MEBIBYTES = 1.0, 64
MUTATIONS = 2_000 * SCALE
SEED = 16
FIXED = {
    "safetensors": SAFETENSORS, "pickles": PICKLES, "config.json": CONFIG, "index.json": INDEX,
    "tokenizer.json": TOKENIZER, "checkpoint": CHECKPOINT,
}  # fmt: skip
BENIGN = {  # what may be in a folder without making it another model
    "code by auto_map", "training_args.bin beside", "optimizer.pt beside", "endless ends", "dtype of another kind",
    "strip 10^12 times", "a template that never ends", "templates without names", "infinite theta",
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One sound folder of each sort."""
    folder = tmp_path_factory.mktemp("sound")
    write_model(folder / "plain")
    write_model(folder / "sharded", sharded=True)
    write_checkpoint(folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def box(sound):
    harmless = [{"folder": str(sound / name), "kind": sort_of(name)} for name in ("plain", "sharded", "checkpoint")]
    with Box("hostile_files:open_folder", memory_bytes=2 << 30, seconds=10, first=harmless) as one:
        yield one


def sort_of(name):
    return "checkpoint" if name == "checkpoint" else "model"


def kind_of(group):
    return {"index.json": "sharded", "checkpoint": "checkpoint"}.get(group, "plain")


def test_what_once_went_wrong(sound, box, tmp_path, record):
    """Each file of the corpus says what to put where in a sound folder."""
    files = sorted((Path(__file__).parents[1] / "corpus" / "r16").glob("*.json"))
    failures = []
    for path in files:
        hostile = json.loads(path.read_text())
        folder = tmp_path / path.stem
        shutil.copytree(sound / hostile["sort"], folder)
        target, value = folder / hostile["file"], hostile["value"]
        if hostile["path"]:
            whole = json.loads(target.read_text())
            *outer, last = hostile["path"]
            place = whole
            for part in outer:
                place = place[part]
            place[last] = value
            value = whole
        target.write_text(json.dumps(value))
        outcome = box.ask({"folder": str(folder), "kind": sort_of(hostile["sort"])})
        problem = outcome.trouble(SECONDS, MEBIBYTES)
        if problem or outcome.exit_code not in (0, 2, 4):
            failures.append(f"{path.name}: {problem or outcome.error}")
    record("R16", len(files), failures, attacks="corpus")


@pytest.mark.timeout(300)
def test_every_fixed_attack_is_refused(sound, box, tmp_path, record):
    failures, n = [], 0
    for group, attacks in FIXED.items():
        for name, attack in attacks.items():
            folder = tmp_path / f"{n}"
            shutil.copytree(sound / kind_of(group), folder)
            attack(folder)
            outcome = box.ask({"folder": str(folder), "kind": sort_of(group)})
            problem = outcome.trouble(SECONDS, MEBIBYTES)
            if not problem and not outcome.error and name not in BENIGN:
                problem = f"was opened: {outcome.result}"
            if not problem and outcome.error and outcome.exit_code not in (2, 4):
                problem = f"exit code {outcome.exit_code}: {outcome.error}"
            if (folder / MARKER).exists():
                problem = "its code ran"
            if problem:
                failures.append(f"{group}, {name}: {problem}")
            shutil.rmtree(folder)
            n += 1
    record("R16", n, failures, attacks="fixed")


@pytest.mark.timeout(300 * SCALE)
def test_mutated_files_are_read_or_refused(sound, box, tmp_path, record):
    chance = random.Random(SEED)
    failures, refused = [], 0
    targets = [
        (name, path.relative_to(sound / name))
        for name in ("plain", "sharded", "checkpoint")
        for path in sorted((sound / name).rglob("*"))
        if path.is_file()
    ]
    for name in ("plain", "sharded", "checkpoint"):
        shutil.copytree(sound / name, tmp_path / name)
    for i in range(MUTATIONS):
        name, inside = targets[i % len(targets)]
        path = tmp_path / name / inside
        whole = path.read_bytes()
        structured = path.suffix == ".json" and chance.random() < 0.7
        hostile = mutate_json(whole, chance) if structured else mutate_bytes(whole, chance)
        path.write_bytes(hostile)
        outcome = box.ask({"folder": str(tmp_path / name), "kind": sort_of(name)})
        problem = outcome.trouble(SECONDS, MEBIBYTES)
        if not problem and outcome.error and outcome.exit_code not in (2, 4):
            problem = f"exit code {outcome.exit_code}: {outcome.error}"
        if problem:
            failures.append(f"{i}, {name}/{inside}: {problem}")
        refused += bool(outcome.error)
        path.write_bytes(whole)
    assert not list(tmp_path.rglob(MARKER))
    record("R16", MUTATIONS, failures, seed=SEED, refused=refused)
