"""Checkpoints: exact round trips, what is said of damage, which steps stay. Faults on purpose are in tests/fault."""

import hashlib
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from saving import assert_holds, content, damage, names, save

from octavo.errors import CheckpointError
from octavo.training import checkpoint, manifest
from octavo.training.checkpoint_path import find_steps
from octavo.training.random_state import capture_random, restore_random

# --------------------------------------------------------------------------------------- round trips


def test_every_dtype_and_layout_round_trips(tmp_path):
    base = torch.randn(6, 8)
    tensors = {
        "fp32": base,
        "view": base[1:3, ::2],
        "transposed": base.T,
        "same_storage": base.view(8, 6),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "bool": torch.tensor([True, False]),
        "odd_bytes": torch.arange(3, dtype=torch.uint8),
        **{str(t): torch.arange(5).to(t) for t in (torch.float64, torch.float16, torch.bfloat16, torch.int64)},
        **{str(t): torch.arange(5).to(t) for t in (torch.int32, torch.int16, torch.int8)},
    }
    path = checkpoint.save(tmp_path / "checkpoints", 3, tensors, {"x": 0.1}, run_id="r")
    assert path.name == "step-00000003"
    assert names(path) == ["manifest.json", "state.json", "training.safetensors"]
    loaded, state = checkpoint.load(path)
    assert state == {"x": 0.1}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (loaded[name], tensor)]
        assert torch.equal(*as_bytes)
    loaded["fp32"].zero_()
    assert loaded["same_storage"].abs().sum() > 0


def test_the_same_state_gives_the_same_bytes(tmp_path):
    first, second = save(tmp_path / "a", 5), save(tmp_path / "b", 5)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names(first))


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw() -> list:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draw()
    path = checkpoint.save(tmp_path, 1, {}, {"random": capture_random()}, run_id="r")
    expected = [draw() for _ in range(3)]
    restore_random(checkpoint.load(path)[1]["random"])
    assert [draw() for _ in range(3)] == expected
    with pytest.raises(CheckpointError, match="random state"):
        restore_random({"python": [3, [1, 2], None]})


# --------------------------------------------------------------------------------------------- damage


def test_a_damaged_newest_step_is_passed_over_with_a_line_that_says_so(tmp_path):
    save(tmp_path, 350)
    damage(save(tmp_path, 400))
    found = checkpoint.newest(tmp_path)
    assert found is not None and (found.step, found.run_id) == (350, "r1")
    assert found.notices == (
        f"warning[CHECKPOINT]: {tmp_path}/step-00000400/model.safetensors: sha256 differs. "
        "Fix: step-00000350 is used instead (50 steps lost). Kept: step-00000350, every byte verified.",
    )
    assert names(tmp_path) == ["step-00000350", "step-00000400"], "a reader changes nothing"

    for notices in (found.notices, ()):
        recovered = checkpoint.recover(tmp_path)
        assert recovered is not None and recovered.notices == notices
    save(tmp_path, 375)
    assert names(tmp_path) == ["step-00000350", "step-00000375"]


def test_no_valid_step_is_an_error_and_never_step_0(tmp_path):
    assert checkpoint.newest(tmp_path / "none") is None
    assert checkpoint.newest(tmp_path) is None
    for step in (100, 200):
        damage(save(tmp_path, step))
    for find in (checkpoint.newest, checkpoint.recover):
        with pytest.raises(CheckpointError, match=r"step-00000200/model\.safetensors") as caught:
            find(tmp_path)
        assert caught.value.exit_code == 4 and "step-00000100/model.safetensors" in str(caught.value)
    assert names(tmp_path) == ["step-00000100", "step-00000200"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "weights.txt").write_text("1 2 3")
    with pytest.raises(CheckpointError, match=r"it holds weights\.txt"):
        checkpoint.newest(foreign)


def test_each_passed_over_step_is_said_with_what_it_costs(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step, keep=3)
    (tmp_path / "step-00000300" / "state.json").unlink()
    damage(tmp_path / "step-00000200", "optimizer.safetensors")
    (tmp_path / "step-00000200" / "x").mkdir()
    found = checkpoint.newest(tmp_path)
    assert found is not None and [path.name for path in found.damaged] == ["step-00000300", "step-00000200"]
    first, second = found.notices
    assert "step-00000300/state.json: missing. Fix: step-00000100 is used instead (200 steps lost)" in first
    assert "optimizer.safetensors: sha256 differs; x: extra file" in second and "(100 steps lost)" in second


def test_the_manifest_of_older_versions_still_reads(tmp_path):
    expected = (
        b'{\n "format": 1,\n "step": 7,\n "run_id": "r",\n "files": {\n  "state.json": {\n   "size": 3,\n'
        b'   "sha256": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"\n  }\n },\n'
        b' "sha256": "SELF"\n}\n'
    )
    data = manifest.build(7, "r", {"state.json": (3, hashlib.sha256(b"{}\n").hexdigest())})
    own = json.loads(data)["sha256"]
    assert data == expected.replace(b"SELF", own.encode())
    body = json.dumps({name: value for name, value in json.loads(data).items() if name != "sha256"}, indent=1)
    assert own == hashlib.sha256(body.encode()).hexdigest()
    step = tmp_path / "step-00000007"
    step.mkdir()
    (step / "manifest.json").write_bytes(data)
    (step / "state.json").write_bytes(b"{}\n")
    assert checkpoint.verify(step) == [] and checkpoint.load(step) == ({}, {})
    newer = json.dumps({**json.loads(data), "format": 2}).encode()
    (step / "manifest.json").write_bytes(newer)
    assert checkpoint.verify(step) == ["manifest.json: format 2 where this Octavo reads 1: newer, or damaged"]


def test_what_is_no_step_is_named_for_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "runs" / "quick" / "pretrain" / "checkpoints", 100)
    save(tmp_path / "runs" / "quick" / "tune" / "checkpoints", 300)
    (tmp_path / "runs" / "quick" / "recipe.yaml").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("hello")
    folder = "runs/quick/pretrain/checkpoints"
    for path, what, fix in (
        (f"{folder}/step-0000100", "does not exist", f"did you mean `{folder}/step-00000100`?"),
        ("runs/quik", "does not exist", "did you mean `runs/quick`?"),
        ("empty", "is an empty folder", "did you mean `runs/quick`?"),
        (f"{folder}/step-00000100/state.json", "is a file", f"give its folder: {folder}/step-00000100"),
        ("notes/a.txt", "is a file", "did you mean"),
        ("https://example.com/step-00000100", "https://example.com/step-00000100 is a web address", "download it"),
    ):
        for refuse in (checkpoint.load, find_steps):
            with pytest.raises(CheckpointError) as caught:
                refuse(path)
            assert what in caught.value.what and fix in caught.value.fix, str(caught.value)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_steps("notes")
    step, stages = f"{folder}/step-00000100", [folder, "runs/quick/tune/checkpoints"]
    assert [[str(path) for path in paths] for paths in find_steps(step)] == [[step], []]
    assert [[str(path) for path in paths] for paths in find_steps(folder)] == [[], [folder]]
    assert [[str(path) for path in paths] for paths in find_steps("runs/quick/tune")] == [[], stages[1:]]
    assert [[str(path) for path in paths] for paths in find_steps("runs/quick")] == [[], stages]


def test_pickles_are_never_opened(tmp_path):
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("model.pt", "no_suffix"):
        torch.save({"w": Bomb()}, folder / name)
        for path in (folder, folder / name) if name == "model.pt" else (folder / name,):
            with pytest.raises(CheckpointError, match="pickle") as caught:
                checkpoint.load(path)
            assert "safetensors" in caught.value.fix
    with pytest.raises(CheckpointError, match="pickle"):
        checkpoint.newest(folder)
    assert not marker.exists()


# ------------------------------------------------------------------------------------------- rotation


def test_rotation_keeps_the_newest_and_drops_a_line_of_training_that_was_given_up(tmp_path):
    for step in (100, 200, 300, 400):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000300", "step-00000400"]
    save(tmp_path, 350, keep=2)
    assert names(tmp_path) == ["step-00000300", "step-00000350"]
    save(tmp_path, 360, keep=1)
    assert names(tmp_path) == ["step-00000360"]
    assert_holds(tmp_path / "step-00000360", 360)


def test_a_step_saved_again_is_replaced(tmp_path):
    save(tmp_path, 100)
    tensors, state = content(100)
    checkpoint.save(tmp_path, 100, tensors, {**state, "again": True}, run_id="r2")
    assert names(tmp_path) == ["step-00000100"]
    assert checkpoint.load(tmp_path / "step-00000100")[1]["again"] is True
    damage(tmp_path / "step-00000100")
    save(tmp_path, 100)
    assert_holds(tmp_path / "step-00000100", 100)


def test_a_step_without_all_its_files_is_not_counted_as_kept(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step, keep=3)
    with open(tmp_path / "step-00000300" / "model.safetensors", "ab") as file:
        file.truncate(10)
    save(tmp_path, 400, keep=2)
    assert names(tmp_path) == ["step-00000200", "step-00000400"]
    (tmp_path / "step-00000200" / "state.json").unlink()
    save(tmp_path, 500, keep=3)
    assert names(tmp_path) == ["step-00000200", "step-00000400", "step-00000500"], "too few are whole for any to go"


def test_the_step_before_stays_when_it_is_the_only_whole_one(tmp_path):
    save(tmp_path, 100)
    damage(save(tmp_path, 200))
    found = checkpoint.recover(tmp_path)
    assert found is not None and found.step == 100
    assert [name.partition("-step-")[0] for name in names(tmp_path)] == ["damaged", "step-00000100"]
    save(tmp_path, 150, keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00000150"]


def test_a_save_leaves_the_unfinished_folders_of_others(tmp_path):
    (tmp_path / "step-00000100.tmp-other").mkdir(parents=True)
    (tmp_path / "step-00000050.tmp-r1").mkdir()
    (tmp_path / "drop.tmp-step-00000010-ab").mkdir()
    save(tmp_path, 100)
    assert names(tmp_path) == ["step-00000100", "step-00000100.tmp-other"]


def test_readers_change_nothing(tmp_path):
    save(tmp_path, 100)
    damage(save(tmp_path, 200))
    for name in ("step-00000300.tmp-dead", "drop.tmp-step-00000050-ab", "damaged-step-00000070-ab"):
        shutil.copytree(tmp_path / "step-00000100", tmp_path / name)

    def everything() -> dict[str, tuple[int, bytes]]:
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in tmp_path.rglob("*")}

    before = everything()
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 100
    checkpoint.load(found.path)
    checkpoint.verify(tmp_path / "step-00000200")
    find_steps(tmp_path)
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "step-00000200")
    assert everything() == before


def test_a_reader_looks_again_when_a_rotation_takes_what_it_was_reading(tmp_path, monkeypatch):
    save(tmp_path, 100, keep=1)
    real, raced = manifest.read, []

    def slow(path):
        if not raced:
            raced.append(path)
            save(tmp_path, 200, keep=1)
        return real(path)

    monkeypatch.setattr(manifest, "read", slow)
    found = checkpoint.newest(tmp_path)
    assert found is not None and (found.step, found.notices) == (200, ())
    assert raced[0].name == "step-00000100"


def test_leftovers_go_but_a_whole_one_is_finished(tmp_path):
    save(tmp_path, 100)
    whole = save(tmp_path / "elsewhere", 200)
    whole.rename(tmp_path / "step-00000200.tmp-dead")
    shutil.rmtree(tmp_path / "elsewhere")
    (tmp_path / "step-00000300.tmp-dead").mkdir()
    (tmp_path / "step-00000300.tmp-dead" / "model.safetensors").write_bytes(b"half")
    shutil.copytree(tmp_path / "step-00000100", tmp_path / "drop.tmp-step-00000050-ab")
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 100
    assert len(names(tmp_path)) == 4, "a reader removes nothing"
    found = checkpoint.recover(tmp_path)
    assert found is not None and found.step == 200
    assert names(tmp_path) == ["step-00000100", "step-00000200"]
    assert_holds(tmp_path / "step-00000200", 200)
