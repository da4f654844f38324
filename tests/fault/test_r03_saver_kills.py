"""R3: SIGKILL, an error or a bug at every named moment of a save, of the rotation after it and of a start.

After each the newest verified step loads, there is one if there ever was one, and training that goes on ends
with the same bits. The moments are those of ``octavo.failpoint.NAMES``: a new one is tried without a change here.
"""

import ast
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes import tiny_recipe
from saving import damage, in_child, names, save, wrong
from training import log_of, trainer, weights_hash

import octavo
from octavo import failpoint
from octavo.errors import CheckpointError, ConfigError
from octavo.training import checkpoint

SAVER = [name for name in failpoint.NAMES if name.startswith(("save.", "rotate.", "remove.", "recover."))]


@pytest.fixture(autouse=True)
def disarmed(monkeypatch):
    """A kill loses nothing that was written, so forcing it to disk would only take time here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield
    failpoint.arm("")


# ---------------------------------------------------------------------------------------- one save


def plant_leftovers(folder: Path) -> None:
    """A whole leftover, a half one, a removal that was interrupted, and a newest step that is damaged."""
    save(folder, 100)
    for step in (200, 300):
        save(folder / "elsewhere", step).rename(folder / f"step-{step:08d}.tmp-dead")
    save(folder / "elsewhere", 50).rename(folder / "drop.tmp-step-00000050-ab")
    (folder / "elsewhere").rmdir()
    (folder / "step-00000300.tmp-dead" / "manifest.json").unlink()
    damage(save(folder / "elsewhere", 400))
    (folder / "elsewhere" / "step-00000400").rename(folder / "step-00000400")
    (folder / "elsewhere").rmdir()


def go_on(folder: Path) -> None:
    found = checkpoint.recover(folder)
    save(folder, (found.step if found else 0) + 10, run_id="again")


# Scenario: what is there before, what is killed, the newest sound step before, the steps that may be there after.
Scenario = tuple[Callable[[Path], object], Callable[[Path], object], int | None, set[int]]
SCENARIOS: dict[str, Scenario] = {
    "the first": (lambda f: f.mkdir(), lambda f: save(f, 100), None, {100}),
    "the only one is kept": (lambda f: save(f, 100), lambda f: save(f, 200, keep=1), 100, {100, 200}),
    "two are kept": (
        lambda f: [save(f, step, keep=3) for step in (100, 200, 300)],
        lambda f: save(f, 400, keep=2),
        300,
        {300, 400},
    ),
    "a line given up": (
        lambda f: [save(f, step, keep=3) for step in (100, 200)],
        lambda f: save(f, 150, keep=2),
        200,
        {150, 200},
    ),
    "the same again": (lambda f: save(f, 100), lambda f: save(f, 100, keep=1), 100, {100}),
    "a start": (plant_leftovers, go_on, 100, {100, 200, 210}),
}


def after_a_kill(folder: Path, before: int | None, allowed: set[int], half_is_new: bool) -> list[str]:
    """What is not as it should be in a folder whose owner was killed."""
    there = sorted(folder.rglob("*"))
    found = checkpoint.newest(folder)
    failures = [] if sorted(folder.rglob("*")) == there else ["a reader changed something"]
    if half_is_new:
        failures += [f"{path.name} is half" for _, path in checkpoint._steps(folder) if checkpoint.verify(path)]
    if before is not None and (found is None or wrong(found.path, found.step)):
        failures.append(f"a reader finds {found}")
    recovered = checkpoint.recover(folder)
    if recovered is None:
        return failures + (["no step is left"] if before is not None else [])
    if recovered.step not in allowed or recovered.step < (found.step if found else 0):
        failures.append(f"step {recovered.step} is gone on from, a reader found {found}")
    failures += wrong(recovered.path, recovered.step)
    failures += [f"{name} is left" for name in names(folder) if ".tmp-" in name]
    try:
        save(folder, recovered.step + 1000, run_id="next")
        again = checkpoint.recover(folder)
        assert again is not None and again.step == recovered.step + 1000
    except Exception as error:
        failures.append(f"the next save: {error}")
    return failures


def kill_one_save(work: Path, scenario: str, name: str, nth: int) -> tuple[bool, list[str]]:
    """Whether the moment was reached, and what was wrong after it."""
    prepare, act, before, allowed = SCENARIOS[scenario]
    folder = work / scenario / f"{name}-{nth}"
    folder.parent.mkdir(exist_ok=True)
    prepare(folder)

    def killed() -> None:
        failpoint.arm(f"{name}:{nth}:kill")
        act(folder)

    code = in_child(killed)
    assert code in (0, -signal.SIGKILL)
    wrongs = after_a_kill(folder, before, allowed, half_is_new=scenario != "a start") if code else []
    return code != 0, [f"{scenario}, {name}:{nth}: {text}" for text in wrongs]


def test_a_kill_at_each_moment_of_one_save_leaves_a_verified_step(tmp_path, record):
    n, failures, reached = 0, [], set()
    for scenario in SCENARIOS:
        for name in SAVER:
            nth = 0
            while True:
                nth += 1
                was_reached, wrongs = kill_one_save(tmp_path, scenario, name, nth)
                failures += wrongs
                if not was_reached:
                    break
                n += 1
                reached.add(name)
    assert sorted(reached) == sorted(SAVER), "a moment that no scenario reaches proves nothing"
    record("R3", n, failures, what="saves killed")


@pytest.mark.parametrize("n", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_a_kill_at_a_random_moment_loses_at_most_the_step_being_saved(tmp_path, record, n):
    def work(report: int) -> None:
        found = checkpoint.recover(tmp_path)
        step = found.step if found else 0
        while True:
            step += 1
            save(tmp_path, step, run_id=f"p{os.getpid()}")
            os.write(report, step.to_bytes(8, "little"))

    chance, failures = random.Random(7), []
    last = 0
    for _ in range(n):
        reader, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                work(report)
            finally:
                os._exit(99)
        os.close(report)
        os.read(reader, 8)  # the first save is done: from here any moment is as likely as another
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        reported = b""
        while block := os.read(reader, 65536):
            reported += block
        os.close(reader)
        saved = int.from_bytes(reported[-8:], "little") if reported else last + 1
        found = checkpoint.newest(tmp_path)
        assert found is not None
        if not found.step >= saved > last or found.notices or wrong(found.path, found.step):
            failures.append(f"step {saved} was saved, {found} is found")
        last = found.step
    record("R3", n, failures, seed=7, what="saves killed at random moments")


# ---------------------------------------------------------------------------------------- training


STEPS, EVERY = 8, 2


def train(folder: Path) -> str:
    made = trainer(folder, steps=STEPS, save_every=EVERY, valid_every=100, keep_checkpoints=2)
    made.fit()
    return weights_hash(made.model)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    """The log and the weights of a run that nothing happens to, and how often each moment comes in it."""
    folder = tmp_path_factory.mktemp("unharmed") / "run"
    failpoint.arm("save.begin:1000000:kill")
    weights = train(folder)
    counts = dict(failpoint.reached)
    failpoint.arm("")
    return log_of(folder), weights, counts


def train_through(folder: Path, armed: list[str]) -> int:
    """Start the same training until it comes to its end, armed with one after the other; the number of kills."""
    kills = 0
    for spec in [*armed, ""]:

        def work(spec=spec) -> None:
            failpoint.arm(spec)
            (folder / "weights").write_text(train(folder))

        code = in_child(work)
        assert code == (-signal.SIGKILL if spec else 0), f"{spec} was not reached, or training failed: {code}"
        kills += bool(code)
    return kills


def outcome(folder: Path) -> list[str]:
    """What is wrong with the steps left: a rotation cut short may leave one more, until the next save."""
    left = names(folder / "checkpoints")
    whole = all(not checkpoint.verify(folder / "checkpoints" / name) for name in left)
    expected = [f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]
    return [] if left[-2:] == expected and len(left) <= 3 and whole else [f"left: {left}"]


def kill_training(tmp_path: Path, unharmed, plan: list[list[str]]) -> tuple[int, list[str]]:
    log, weights, _ = unharmed
    n, failures = 0, []
    for armed in plan:
        folder = tmp_path / "-".join(armed).replace(":", "-")
        folder.mkdir()
        n += train_through(folder, armed)
        failures += [f"{armed}: {text}" for text in outcome(folder)]
        if (folder / "weights").read_text() != weights:
            failures.append(f"{armed}: other weights")
        if log_of(folder) != log:
            failures.append(f"{armed}: another log")
    return n, failures


# A start after a kill just before the rename finds a whole leftover: the moments of finishing it.
STARTS = ["recover.leftover", "recover.fsync", "recover.rename"]


def test_training_killed_at_each_moment_of_its_saves_ends_with_the_same_bits(tmp_path, unharmed, record):
    counts = unharmed[2]
    plan = [[f"{name}:{nth}:kill"] for name in SAVER if name in counts for nth in {1, counts[name]}]
    plan += [["save.rename:2:kill", f"{name}:1:kill"] for name in STARTS]
    n, failures = kill_training(tmp_path, unharmed, plan)
    assert n >= 28
    record("R3", n, failures, what="trainings killed in a save")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_killed_at_every_moment_of_every_save_ends_with_the_same_bits(tmp_path, unharmed, record):
    counts = unharmed[2]
    plan = [[f"{name}:{nth}:kill"] for name in SAVER for nth in range(1, counts.get(name, 0) + 1)]
    plan += [[f"save.rename:{n}:kill", f"{name}:1:kill"] for name in STARTS for n in range(1, STEPS // EVERY + 1)]
    n, failures = kill_training(tmp_path, unharmed, plan)
    assert n > 100
    record("R3", n, failures, what="trainings killed in a save")


@pytest.mark.parametrize("action", ["eio", "enospc"])
def test_an_error_of_the_disk_at_each_moment_is_said_and_training_goes_on(tmp_path, unharmed, record, action, capsys):
    log, weights, counts = unharmed
    n, failures = 0, []
    for name in (name for name in SAVER if name in counts):
        nth = max(1, counts[name] // 2)  # an early save: later ones put things right
        folder = tmp_path / name
        failpoint.arm(f"{name}:{nth}:{action}")
        found = train(folder)
        failpoint.arm("")
        n += 1
        failures += [f"{name}: {text}" for text in outcome(folder)]
        if found != weights or log_of(folder) != log:
            failures.append(f"{name}: other weights or another log")
        said = capsys.readouterr().err.count("error[RESOURCE]")
        if said != name.startswith("save."):
            failures.append(f"{name}: said {said} times")
    record("R3", n, failures, what=f"{action} in a save of a training")


def test_a_bug_at_each_moment_leaves_a_run_that_goes_on_with_the_same_bits(tmp_path, unharmed, record):
    log, weights, counts = unharmed
    n, failures = 0, []
    for name in (name for name in SAVER if name in counts):
        folder = tmp_path / name
        failpoint.arm(f"{name}:{counts[name]}:raise")
        with pytest.raises(RuntimeError, match=name):
            train(folder)
        failpoint.arm("")
        if left := [path for path in (folder / "checkpoints").glob("step-*.tmp-*") if "replaced" not in path.name]:
            failures.append(f"{name}: left {left}")
        n += 1
        if train(folder) != weights or log_of(folder) != log:
            failures.append(f"{name}: other weights or another log")
        failures += [f"{name}: {text}" for text in outcome(folder)]
    record("R3", n, failures, what="bugs in a save of a training")


def test_steps_given_up_go_one_by_one_as_a_whole(tmp_path, record):
    n, failures = 0, []
    while True:
        folder = tmp_path / str(n)
        for step in (100, 200, 300):
            save(folder, step, keep=3)

        def work(folder=folder, nth=n + 1) -> None:
            failpoint.arm(",".join(f"{name}:{nth}:kill" for name in ("rotate.rename", "remove.file")))
            checkpoint.remove_all(folder)

        code = in_child(work)
        try:
            checkpoint.recover(folder)
        except CheckpointError as error:
            failures.append(str(error))
        if code == 0:
            break
        n += 1
    assert names(folder) == []
    record("R3", n, failures, what="removals killed")


# ---------------------------------------------------------------------------------------- the hook itself


def test_every_name_is_a_moment_in_the_code_and_every_moment_has_a_name():
    called: list[str] = []
    for path in Path(octavo.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "failpoint":
                assert isinstance(node.args[0], ast.Constant), path
                called.append(str(node.args[0].value))
    assert sorted(called) == sorted(failpoint.NAMES)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("save.renam:1:kill", "did you mean `save.rename`"),
        ("save.rename", "not name:nth:action"),
        ("save.rename:0:kill", "not name:nth:action"),
        ("save.rename:1:explode", "kill, raise, eio, enospc"),
        ("save.rename:1:kill:2", "not name:nth:action"),
    ],
)
def test_a_failpoint_that_cannot_be_is_refused(text, says):
    with pytest.raises(ConfigError) as caught:
        failpoint.arm(text)
    assert says in str(caught.value) and text in str(caught.value)


def test_the_environment_variable_arms_a_new_process(tmp_path):
    code = "import octavo.failpoint as f; f.failpoint('save.rename'); f.failpoint('save.rename'); print('alive')"
    for spec, expected in (("", 0), ("save.rename:2:kill", -signal.SIGKILL), ("save.rename:3:kill", 0)):
        environment = os.environ | {"OCTAVO_FAILPOINT": spec}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
        assert done.returncode == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("spec", ["save.bytes:40:kill", "save.rename:2:kill", "rotate.rename:1:kill"])
def test_the_command_killed_in_a_save_checks_whole_and_resumes_to_the_same_weights(tmp_path, record, spec):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny_recipe(tmp_path, tune=None, train={"steps": 9, "save_every": 2})))

    def octavo_command(*words: str, armed: str = "") -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OCTAVO_FAILPOINT": armed}
        command = [sys.executable, "-m", "octavo", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)

    def weights(run: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / run / "model").glob("*.safetensors")}

    assert octavo_command("run", str(recipe), "--out", "whole", "--quiet", "--no-chat").returncode == 0
    killed = octavo_command("run", str(recipe), "--out", "killed", "--quiet", "--no-chat", armed=spec)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checked = octavo_command("checkpoint", "check", "killed")
    assert (checked.returncode, "whole" in checked.stdout) == (0, True), checked.stderr
    resumed = octavo_command("resume", "killed", "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    assert weights("whole") and weights("killed") == weights("whole")
    record("R3", 1, 0, what="the command killed in a save")
