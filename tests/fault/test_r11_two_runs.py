"""Two runs in one folder: one owner, the others leave at once and touch nothing; who only reads never waits."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipes import tiny_recipe

from octavo.cli.main import main
from octavo.errors import LockedError
from octavo.run import RunFolder

RACING = Path(__file__).parents[1] / "racing.py"
HOLD = """
import sys, time
from octavo.run import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.timeout(300)
def test_of_runs_that_race_exactly_one_owns_the_folder(tmp_path, record):
    done = subprocess.run([sys.executable, str(RACING), "20", "11", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    record("R11", result["races"], result["failures"], seed=11)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run whose folder another process owns."""
    folder = tmp_path_factory.mktemp("held")
    raw = tiny_recipe(folder)
    raw["tune"] = None
    (folder / "recipe.yaml").write_text(json.dumps(raw))
    run = folder / "run"
    assert main(["run", str(folder / "recipe.yaml"), "--out", str(run), "--no-chat", "--quiet"]) == 0
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    try:
        with pytest.raises(LockedError), RunFolder(run).lock():
            pass
        yield run
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


@pytest.mark.parametrize(
    "words",
    [
        ["report", "RUN"],
        ["eval", "RUN"],
        ["generate", "RUN", "the", "--max-new-tokens", "3"],
        ["data", "show", "RUN"],
        ["resume", "RUN", "--prove"],
        ["replay", "RUN", "5", "--stage", "pretrain"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_who_only_reads_does_not_wait(held, words, capsys):
    assert main([str(held) if word == "RUN" else word for word in words]) == 0, capsys.readouterr().err
    assert "LOCKED" not in capsys.readouterr().err


def test_a_server_starts_on_a_folder_that_is_owned(held):
    command = [sys.executable, "-m", "octavo", "serve", str(held), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        assert any(re.search(r"http://127\.0\.0\.1:\d+", line) for line in server.stdout)
    finally:
        server.terminate()
        server.wait(30)
        server.stdout.close()


def test_a_second_run_is_told_who_owns_the_folder(held, capsys):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in held.rglob("*") if p.is_file()}
    for verb in (["run", str(held / "recipe.yaml"), "--out", str(held), "--no-chat"], ["resume", str(held)]):
        assert main([*verb, "--quiet"]) == 2
        shown = capsys.readouterr().err
        assert re.search(r"is in use by process \d+ on \S+ since \d{4}-\d\d-\d\dT", shown) and "Kept: nothing" in shown
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in held.rglob("*") if p.is_file()} == before
