"""``octavo checkpoint check``: each step and file on a line, each bad file named, nothing touched."""

import json
import subprocess
import sys

import pytest
import torch
from saving import damage, save

from octavo.cli.main import main
from octavo.training import checkpoint


@pytest.fixture
def run(tmp_path):
    """A run with two steps of pretraining and one of tuning."""
    for stage, steps in (("pretrain", (350, 400)), ("tune", (20,))):
        for step in steps:
            save(tmp_path / "run" / stage / "checkpoints", step)
    (tmp_path / "run" / "recipe.yaml").write_text("")
    return tmp_path / "run"


def test_a_whole_run_is_0_with_a_line_for_each_step_and_file(run, capsys):
    assert main(["checkpoint", "check", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("  step-")] == [
        [f"step-{step:08d}", "ok"] for step in (400, 350, 20)
    ]
    files = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert [line.split()[0] for line in lines if line.startswith("    ")] == files * 3
    assert lines[-1] == "3 of 3 whole: every byte is as it was saved"
    for part in (run / "tune", run / "tune" / "checkpoints", run / "tune" / "checkpoints" / "step-00000020"):
        assert main(["checkpoint", "check", str(part)]) == 0
        assert capsys.readouterr().out.endswith("1 of 1 whole: every byte is as it was saved\n")


def test_every_bad_file_is_named_with_what_is_used_instead(run, capsys):
    folder = run / "pretrain" / "checkpoints"
    damage(folder / "step-00000400")
    (folder / "step-00000400" / "state.json").unlink()
    (folder / "step-00000450.tmp-dead").mkdir()
    assert main(["checkpoint", "check", str(run)]) == 4
    shown = capsys.readouterr()
    assert "model.safetensors" in (bad := [line for line in shown.out.splitlines() if "BAD" in line])[1]
    assert len(bad) == 3 and "state.json" in bad[2] and "missing" in bad[2]
    assert "step-00000450.tmp-dead: a save that did not finish" in shown.out
    assert shown.err == (
        f"error[CHECKPOINT]: 1 of 3 steps is damaged: {folder}/step-00000400/model.safetensors: sha256 differs; "
        f"{folder}/step-00000400/state.json: missing. Fix: in {folder}: going on uses step-00000350 (50 steps lost). "
        "Kept: nothing was changed.\n"
    )
    damage(folder / "step-00000350")
    assert main(["checkpoint", "check", str(folder)]) == 4
    assert "2 of 2 steps are damaged" in (error := capsys.readouterr().err) and "none is whole" in error
    assert main(["checkpoint", "check", str(folder / "step-00000350")]) == 4
    assert "the step is damaged" in capsys.readouterr().err


def test_json_is_one_object_whatever_is_found(run, capsys):
    assert main(["checkpoint", "check", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and not found["bad"] and len(found["folders"]) == 2
    assert (found["folders"][0]["used"], found["folders"][0]["steps_lost"]) == (400, 0)
    step = run / "pretrain" / "checkpoints" / "step-00000400"
    damage(step)
    assert main(["checkpoint", "check", str(run), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["bad"] == [f"{step}/model.safetensors: sha256 differs"] and not found["ok"]
    assert (found["folders"][0]["used"], found["folders"][0]["steps_lost"]) == (350, 50)
    assert main(["checkpoint", "check", str(step), "--json"]) == 4
    files = json.loads(capsys.readouterr().out)["steps"][0]["files"]
    assert [file["name"] for file in files if file["problem"]] == ["model.safetensors"]
    assert all(file.keys() == {"name", "size", "problem", "seconds"} for file in files)


def test_a_large_file_shows_its_rate(tmp_path, capsys):
    checkpoint.save(tmp_path / "c", 1, {"model/w": torch.zeros(300_000)}, {}, run_id="r")
    assert main(["checkpoint", "check", str(tmp_path / "c")]) == 0
    rates = [line for line in capsys.readouterr().out.splitlines() if line.endswith("iB/s")]
    assert len(rates) == 1 and "model.safetensors" in rates[0]


def test_it_changes_nothing_and_a_wrong_path_is_said(run, tmp_path, capsys):
    damage(run / "tune" / "checkpoints" / "step-00000020")
    (run / "tune" / "checkpoints" / "step-00000010.tmp-dead").mkdir()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["checkpoint", "check", str(run)]) == 4
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    capsys.readouterr()
    for path, said in (
        (tmp_path / "rum", f"does not exist. Fix: did you mean `{run}`?"),
        ("https://example.com/run", "is a web address"),
        (run / "tune" / "checkpoints" / "step-00000020" / "state.json", "is a file"),
    ):
        assert main(["checkpoint", "check", str(path)]) == 4
        assert said in capsys.readouterr().err


def test_looking_needs_no_torch(run):
    code = f"import sys; from octavo.cli.main import main; sys.exit(main(['checkpoint', 'check', {str(run)!r}]) or "
    code += "'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True).returncode == 0
