"""Run folders: one owner, comparison with what was asked before, and files that go on where they were."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from octavo import run as run_module
from octavo.errors import CheckpointError, ConfigError, ConfigErrors, LockedError, ResourceError
from octavo.metrics_file import MetricsFile, read_metrics
from octavo.run import RunFolder, find_model, fingerprint

# ------------------------------------------------------------------------------------------------ lock


def contend(path: Path, go: int, report: int) -> None:
    """In a child: wait for the start, try for the lock, report the outcome, hold it until killed."""
    real = run_module._owner

    def owner(descriptor: int) -> str:
        """However long a busy machine takes from the owner's lock to its name in it."""
        while (found := real(descriptor)) == "another process":
            pass
        return found

    run_module._owner = owner
    os.read(go, 1)
    try:
        with RunFolder(path).lock():
            os.write(report, f"owner {os.getpid()}\n".encode())
            time.sleep(60)
    except LockedError as error:
        os.write(report, f"refused {error}\n".encode())
        os._exit(error.exit_code)


def test_of_processes_that_race_exactly_one_owns_the_folder(tmp_path):
    for race in range(5):
        path = tmp_path / str(race)
        go, start = os.pipe()
        reader, report = os.pipe()
        children = []
        for _ in range(4):
            children.append(os.fork())
            if children[-1] == 0:
                try:
                    os.close(start)
                    contend(path, go, report)
                finally:
                    os._exit(99)
        os.close(start), os.close(report), os.close(go)
        text = ""
        while text.count("\n") < 4:
            text += os.read(reader, 65536).decode()
        os.close(reader)
        lines = text.splitlines()
        owners = [line.split()[1] for line in lines if line.startswith("owner")]
        refusals = [line for line in lines if line.startswith("refused")]
        assert len(owners) == 1 and len(refusals) == 3
        assert all(f"process {owners[0]} on " in line and "Fix: wait for it" in line for line in refusals)
        os.kill(int(owners[0]), signal.SIGKILL)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert codes == [-signal.SIGKILL, 2, 2, 2]
        assert os.listdir(path) == ["lock"]
        with RunFolder(path).lock():
            pass


def test_a_surviving_worker_does_not_keep_the_lock_of_a_killed_owner(tmp_path):
    reader, report = os.pipe()
    owner = os.fork()
    if owner == 0:
        with RunFolder(tmp_path).lock():
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
            os.write(report, worker.to_bytes(8, "little"))
            time.sleep(60)
        os._exit(99)
    worker = int.from_bytes(os.read(reader, 8), "little")
    os.close(reader), os.close(report)
    with pytest.raises(LockedError, match=f"process {owner}"), RunFolder(tmp_path).lock():
        pass
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    try:
        with RunFolder(tmp_path).lock():
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_lock_is_free_after_an_error_and_two_in_one_process_are_refused(tmp_path):
    run = RunFolder(tmp_path / "new" / "run")
    with pytest.raises(KeyError), run.lock():
        with pytest.raises(LockedError), RunFolder(run.path).lock():
            pytest.fail("it was locked twice")
        assert json.loads((run.path / "lock").read_text())["pid"] == os.getpid()
        raise KeyError
    with run.lock():
        pass


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "file")
    with pytest.raises(ResourceError, match="cannot be written"), RunFolder(tmp_path / "file" / "run").lock():
        pass


# ---------------------------------------------------------------------------------------------- recipe

RECIPE = {
    "name": "quick 中",
    "seed": 1,
    "data": {"sources": [{"kind": "folder", "path": "a"}], "dedup": True},
    "train": {"optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]}, "steps": 100, "log_every": 10},
}


def changed(**sections) -> dict:
    recipe = json.loads(json.dumps(RECIPE))
    for section, values in sections.items():
        if isinstance(values, dict):
            recipe[section] = {**recipe.get(section, {}), **values}
        else:
            recipe[section] = values
    return recipe


def test_the_same_recipe_again_changes_nothing(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_recipe() is None
    assert run.write_recipe(RECIPE) == []
    assert run.read_recipe() == RECIPE
    before = run.recipe_path.stat().st_mtime_ns
    assert run.write_recipe(RECIPE) == []
    assert run.recipe_path.stat().st_mtime_ns == before


def test_differences_are_listed_and_those_that_change_the_run_are_refused(tmp_path):
    run = RunFolder(tmp_path)
    run.write_recipe(RECIPE)
    other = changed(
        seed=True,
        train={"log_every": 5, "steps": 200, "optimizer": {"lr": 3e-4, "betas": [0.9, 0.99]}},
        data={"sources": [{"kind": "folder", "path": "b"}, {"kind": "folder", "path": "c"}]},
        model={"d_model": 8},
    )
    with pytest.raises(ConfigErrors) as caught:
        run.write_recipe(other)
    text = str(caught.value)
    assert caught.value.exit_code == 2 and len(caught.value.errors) == 6
    for line in (
        "seed: 1 -> true",
        "train.steps: 100 -> 200",
        "train.optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]",
        'data.sources.0.path: "a" -> "b"',
        'data.sources.1: (absent) -> {"kind": "folder", "path": "c"}',
        'model: (absent) -> {"d_model": 8}',
    ):
        assert line in text
    assert "Fix: add --allow-change train.steps, or use a new folder" in text
    assert "log_every" not in text
    assert run.read_recipe() == RECIPE


def test_a_key_that_was_not_known_then_and_is_not_set_now_is_no_difference(tmp_path):
    run = RunFolder(tmp_path)
    run.write_recipe(RECIPE)
    assert run.write_recipe(changed(train={"average": None}, vectors=None)) == []
    with pytest.raises(ConfigErrors, match=r"vectors: \(absent\) -> "):
        run.write_recipe(changed(vectors={"path": "a.vec"}))


def test_free_and_allowed_differences_are_noted_and_recorded(tmp_path):
    run = RunFolder(tmp_path)
    run.write_recipe(RECIPE)
    other = changed(train={"log_every": 5, "steps": 200}, data={"dedup": False}, eval={"tasks": ["a"]})
    with pytest.raises(ConfigErrors) as caught:
        run.write_recipe(other, allow=["train.step", "data.de"])
    assert [error.what.partition(":")[0] for error in caught.value.errors] == ["data.dedup", "train.steps"]
    notes = run.write_recipe(changed(train={"log_every": 5, "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}}))
    assert notes == ["train.optimizer.lr: 0.0003 -> 0.001", "train.log_every: 10 -> 5"]
    run.write_recipe(changed(train={"log_every": 5}))
    notes = run.write_recipe(other, allow=["train.steps", "data"])
    assert notes == [
        "data.dedup: true -> false",
        "train.steps: 100 -> 200",
        'eval: (absent) -> {"tasks": ["a"]}',
    ]
    assert run.read_recipe() == other


def test_a_damaged_recipe_is_refused_not_replaced(tmp_path):
    run = RunFolder(tmp_path)
    for damaged in (b"{", b"- 1\n", b"\xff\xfe\x00"):
        run.recipe_path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="cannot be read as a recipe"):
            run.write_recipe(RECIPE)
        assert run.recipe_path.read_bytes() == damaged


# ------------------------------------------------------------------------------- environment and stages


def test_another_machine_gives_one_warning(tmp_path):
    run = RunFolder(tmp_path)
    assert run.write_environment(threads=2) == []
    assert run.write_environment(threads=2) == []
    recorded = json.loads(run.environment_path.read_text())
    assert {"octavo", "python", "torch", "cpu", "threads", "platform"} <= recorded.keys() and recorded["cpu"]
    run.environment_path.write_text(json.dumps({**recorded, "torch": "1.0"}))
    (warning,) = run.write_environment(threads=1)
    assert warning == (
        f"warning[ENVIRONMENT]: bit-identical resume not promised (torch 1.0 -> {recorded['torch']}, threads 2 -> 1)."
    )
    assert run.write_environment(threads=1) == []


def test_stages_are_finished_for_the_inputs_they_had(tmp_path):
    run = RunFolder(tmp_path)
    data = fingerprint({"b": 1, "a": [1, 2]})
    assert data == fingerprint({"a": [1, 2], "b": 1}) != fingerprint({"a": [2, 1], "b": 1})
    assert not run.is_finished("data", data)
    run.finish("data", data, documents=12)
    run.finish("tokenizer", fingerprint(data, 512))
    again = RunFolder(tmp_path)
    assert again.is_finished("data", data) and again.stages()["data"]["documents"] == 12
    assert again.is_finished("tokenizer", fingerprint(data, 512))
    assert not again.is_finished("tokenizer", fingerprint(data, 1024))
    with pytest.raises(ValueError, match="not one of the stages"):
        run.finish("pretrian", data)
    run.stages_path.write_text("[1")
    with pytest.raises(CheckpointError, match="damaged"):
        run.is_finished("data", data)


def test_the_log_has_the_whole_traceback(tmp_path):
    run = RunFolder(tmp_path)
    run.log("began \udc80 中")
    try:
        raise KeyError("deep")
    except KeyError as error:
        run.log_error(error)
    text = run.log_path.read_text(encoding="utf-8")
    assert "began ? 中" in text and "Traceback" in text and "KeyError: 'deep'" in text and __file__ in text


# --------------------------------------------------------------------------------------------- metrics


def line(step: int) -> dict:
    return {"step": step, "loss": 1 / step, "kind": "train"}


def test_an_interrupted_metrics_file_ends_up_as_the_uninterrupted_one(tmp_path):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "pretrain" / "metrics.jsonl"
    with MetricsFile(whole) as metrics:
        for step in range(1, 10):
            metrics.write(line(step))
    with MetricsFile(broken) as metrics:
        for step in range(1, 5):
            metrics.write(line(step))
        position = json.loads(json.dumps(metrics.position()))
        for step in range(5, 8):
            metrics.write(line(step))
    with open(broken, "a") as file:
        file.write('{"step": 8, "lo')
    assert [record["step"] for record in read_metrics(broken)] == list(range(1, 8))
    for _ in range(2):  # twice from the same checkpoint
        with MetricsFile(broken, position) as metrics:
            assert metrics.position() == position and not metrics.notices
            for step in range(5, 10):
                metrics.write(line(step))
    assert broken.read_bytes() == whole.read_bytes()


def test_lines_survive_a_kill_and_step_0_empties_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    pid = os.fork()
    if pid == 0:
        MetricsFile(path).write(line(1))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert read_metrics(path) == [line(1)]
    with MetricsFile(path) as metrics:
        assert path.read_bytes() == b"" and metrics.position()["bytes"] == 0
        metrics.write({"step": 1, "loss": float("nan"), "norm": float("inf"), "kind": "中"})
    assert read_metrics(path) == [{"step": 1, "loss": None, "norm": None, "kind": "中"}]
    assert read_metrics(tmp_path / "none") == []


def test_lines_wait_for_a_full_disk_and_a_checkpoint_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def work() -> None:
        with MetricsFile(path) as metrics:
            metrics.write(line(1))
            size = path.stat().st_size + 5
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            metrics.write(line(2))
            assert path.read_bytes().endswith(b"\n"), "half a line"
            metrics.write(line(3))
            with pytest.raises(ResourceError, match="could not be written") as caught:
                metrics.position()
            assert caught.value.exit_code == 6 and read_metrics(path) == [line(1)]
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            metrics.write(line(4))
            (tmp_path / "position").write_text(json.dumps(metrics.position()))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            metrics.write(line(5))

    pid = os.fork()
    if pid == 0:
        try:
            work()
        except ResourceError as error:
            os._exit(error.exit_code)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6, "closing with a line that waits is an error"
    assert read_metrics(path) == [line(n) for n in (1, 2, 3, 4)]
    with MetricsFile(path, json.loads((tmp_path / "position").read_text())) as metrics:
        metrics.write(line(5))
    assert read_metrics(path) == [line(n) for n in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize("damaged", ["shorter", "other"])
def test_a_changed_metrics_file_is_refused_untouched_and_a_lost_one_said(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(line(1))
        position = metrics.position()
    content = path.read_bytes()
    content = content[:-3] if damaged == "shorter" else content.replace(b"1.0", b"2.0")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not those its checkpoint was saved with"):
        MetricsFile(path, position)
    assert path.read_bytes() == content
    path.unlink()
    with MetricsFile(path, position) as metrics:
        assert len(metrics.notices) == 1 and "is missing" in metrics.notices[0]
        metrics.write(line(2))
    assert read_metrics(path) == [line(2)]


# ------------------------------------------------------------------------------------------ find_model


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_run_or_a_model_folder_is_found(tmp_path):
    base = make_model(tmp_path / "run" / "base")
    assert find_model(tmp_path / "run") == base
    model = make_model(tmp_path / "run" / "model")
    assert find_model(tmp_path / "run") == model
    assert find_model(str(model)) == model
    assert find_model(base) == base


def test_what_is_no_model_is_named_for_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart-zh", "shakespeare", "sft"):
        make_model(tmp_path / "runs" / name / "model")
        (tmp_path / "runs" / name / "recipe.yaml").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text("")
    weights = make_model(tmp_path / "m") / "model.safetensors"
    weights.write_bytes(b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    for path, what, fix in (
        ("runs/quikstart", "does not exist", "did you mean `runs/quickstart`, `runs/quickstart-zh`"),
        ("shakspeare", "does not exist", "`runs/shakespeare`"),
        ("empty", "is an empty folder", "did you mean"),
        ("begun", "is a run that has no model yet", "run its recipe again"),
        (str(weights), "is a file", f"give its folder: {tmp_path / 'm'}"),
        ("begun/recipe.yaml", "is a file", "did you mean"),
        ("other", "has no config.json", "did you mean"),
        ("https://huggingface.co/x/y", "is a web address", "download it"),
    ):
        with pytest.raises(ConfigError) as caught:
            find_model(path)
        assert what in caught.value.what and fix in caught.value.fix, str(caught.value)
        assert caught.value.fix.count("`runs/") <= 3


def test_the_run_module_does_not_import_torch():
    import subprocess
    import sys

    code = "import octavo.run, octavo.stop, octavo.files, octavo.metrics_file, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert run_module.STAGES[0] == "data"
