"""setup.sh: which torch and which extras it asks pip for, when it asks nothing, and what it refuses.

The environment's Python is replaced by a script that writes down what pip is asked for, so nothing is installed.
"""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

PYTHON = """#!/bin/sh
case "$*" in
*"version('torch')"*) cat "{folder}/torch-version" 2>/dev/null; exit $? ;;
"-m pip --version") exit 0 ;;
"-m pip install"*)
    [ ! -e "{folder}/offline" ] || exit 1
    shift 3
    echo "$*" >>"{folder}/asked"
    printf '#!/bin/sh\\necho "octavo: $*"; pwd\\n' >"{folder}/.venv/bin/octavo"
    chmod +x "{folder}/.venv/bin/octavo"
    ;;
"-m pytest"*) echo "pytest: $*"; echo "threads: $OMP_NUM_THREADS"; pwd ;;
*) exec "{python}" "$@" ;;
esac
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Checkout:
    """A copy of the set-up script in a folder with spaces in its path, and a machine made of replaced programs."""

    def __init__(self, folder):
        self.folder = folder / "a b" / "octavo clone"
        self.programs = folder / "programs"
        self.elsewhere = folder / "elsewhere"
        for made in (self.folder, self.programs, self.elsewhere):
            made.mkdir(parents=True)
        shutil.copy(ROOT / "setup.sh", self.folder)
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        executable(self.folder / ".venv/bin/python", PYTHON.format(folder=self.folder, python=sys.executable))
        self.program("uname", "echo Linux")
        self.program("nvidia-smi", "exit 9")

    def program(self, name, body):
        executable(self.programs / name, f"#!/bin/sh\n{body}\n")

    def run(self, *words, path=None, **environment):
        clean = {k: v for k, v in os.environ.items() if k not in ("TORCH_SPEC", "PIP_FIND_LINKS", "PYTHON")}
        clean["PATH"] = path or f"{self.programs}{os.pathsep}{clean['PATH']}"
        return subprocess.run(
            [self.folder / "setup.sh", *words],
            cwd=self.elsewhere,
            env=clean | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def asked(self):
        """What pip was asked to install since the last look, one line a call."""
        log = self.folder / "asked"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line.removeprefix("--quiet ") for line in lines]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def editable(checkout, extras=""):
    return f"--editable {checkout.folder}{extras}"


@pytest.mark.parametrize(
    ("programs", "words", "environment", "torch"),
    [
        ({}, [], {}, f"--no-deps --index-url {CPU_INDEX} torch==2.13.0+cpu"),
        ({}, [], {"PIP_FIND_LINKS": "/wheels"}, "--no-deps torch==2.13.0+cpu"),
        ({}, [], {"TORCH_SPEC": "torch==2.13.1"}, "--no-deps torch==2.13.1"),
        ({}, ["--cuda"], {}, "--no-deps torch==2.13.0"),
        ({"nvidia-smi": "exit 0"}, [], {}, "--no-deps torch==2.13.0"),
        ({"nvidia-smi": "exit 0"}, ["--cpu"], {}, f"--no-deps --index-url {CPU_INDEX} torch==2.13.0+cpu"),
        ({"uname": "echo Darwin"}, [], {}, "--no-deps torch==2.13.0"),
        ({"uname": "echo Darwin"}, ["--cpu"], {}, "--no-deps torch==2.13.0"),
    ],
)
def test_the_build_of_torch_fits_the_machine(programs, words, environment, torch, checkout):
    for name, body in programs.items():
        checkout.program(name, body)
    checkout.program("df", "echo header; echo fs 0 0 99999999 0% /")
    done = checkout.run(*words, **environment)
    assert done.returncode == 0, done.stderr
    assert checkout.asked() == [torch, editable(checkout)]
    assert "extras: none, the core only" in done.stdout
    assert torch.split()[-1] in done.stdout


def test_second_call_asks_for_nothing_until_something_changed(checkout):
    assert checkout.run().returncode == 0
    assert len(checkout.asked()) == 2
    assert checkout.run("chat").returncode == 0
    assert checkout.asked() == []
    with (checkout.folder / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert checkout.run().returncode == 0
    assert len(checkout.asked()) == 2


def test_extras_and_torch_stay_asked_for(checkout):
    assert checkout.run("--extras", "track,data", TORCH_SPEC="torch==2.13.0").returncode == 0
    assert checkout.asked() == ["--no-deps torch==2.13.0", editable(checkout, "[data,track]")]
    assert checkout.run("--extras=data").returncode == 0
    assert checkout.asked() == []
    assert checkout.run("--dev").returncode == 0
    assert checkout.asked() == ["--no-deps torch==2.13.0", editable(checkout, "[data,dev,track]")]


def test_going_from_cpu_to_cuda_replaces_torch(checkout):
    checkout.program("df", "echo header; echo fs 0 0 99999999 0% /")
    (checkout.folder / "torch-version").write_text("2.13.0+cpu\n")
    assert checkout.run("--cuda").returncode == 0
    assert checkout.asked()[0] == "--no-deps --force-reinstall torch==2.13.0"


def test_words_after_the_options_go_to_octavo_in_the_users_folder(checkout):
    done = checkout.run("--cpu", "run", "quickstart", "--no-chat", "name=a b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["octavo: run quickstart --no-chat name=a b", str(checkout.elsewhere)]


def test_test_runs_the_tests_with_one_thread_in_each_of_two_processes(checkout):
    done = checkout.run("test", "-k", "some name")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "pytest: -m pytest -n 2 -k some name",
        "threads: 1",
        str(checkout.folder),
    ]
    assert checkout.asked()[1] == editable(checkout, "[dev]")


def test_an_interrupted_set_up_goes_on(checkout):
    (checkout.folder / "offline").touch()
    done = checkout.run()
    assert done.returncode == 6
    assert "torch==2.13.0+cpu could not be installed" in done.stderr and "Fix: " in done.stderr
    (checkout.folder / "offline").unlink()
    assert checkout.run().returncode == 0
    assert len(checkout.asked()) == 2


def test_a_moved_checkout_is_set_up_again(checkout, tmp_path):
    assert checkout.run().returncode == 0
    checkout.asked()
    moved = tmp_path / "moved"
    shutil.move(checkout.folder, moved)
    checkout.folder = moved
    executable(moved / ".venv/bin/python", PYTHON.format(folder=moved, python=sys.executable))
    assert checkout.run().returncode == 0
    assert checkout.asked()[1] == editable(checkout)


@pytest.mark.parametrize("system", ["MINGW64_NT-10.0-22631", "MSYS_NT-10.0", "CYGWIN_NT-10.0"])
def test_native_windows_is_refused_with_the_way_out(system, checkout):
    checkout.program("uname", f"echo {system}")
    done = checkout.run("run", "quickstart")
    assert done.returncode == 6
    assert done.stderr.startswith("error[RESOURCE]: native Windows is not supported.") and "WSL" in done.stderr
    assert checkout.asked() == []


def test_an_old_python_is_refused_by_its_version(checkout):
    shutil.rmtree(checkout.folder / ".venv")
    for tool in ("sh", "dirname", "sed", "sort", "tr"):
        (checkout.programs / tool).symlink_to(shutil.which(tool))
    checkout.program("python3", '[ "$1" = --version ] && echo Python 3.8.10 || exit 1')
    done = checkout.run(path=str(checkout.programs))
    assert done.returncode == 6
    assert "error[RESOURCE]: Octavo needs Python 3.11 or newer, found: Python 3.8.10." in done.stderr
    (checkout.programs / "python3").unlink()
    done = checkout.run(path=str(checkout.programs))
    assert done.returncode == 6 and "found: no Python at all" in done.stderr


def test_a_newer_python_beside_an_old_one_is_found(checkout):
    shutil.rmtree(checkout.folder / ".venv")
    checkout.program("python3", "exit 1")
    made = checkout.folder / ".venv/bin/python"
    text = PYTHON.format(folder=checkout.folder, python=sys.executable)
    checkout.program(
        "python3.12",
        f'[ "$1 $2" = "-m venv" ] || exec "{sys.executable}" "$@"\n'
        f'mkdir -p "{made.parent}"; cat >"{made}" <<"END"\n{text}END\nchmod +x "{made}"',
    )
    checkout.program("python3.13", "exit 1")
    done = checkout.run()
    assert done.returncode == 0, done.stderr
    assert checkout.asked()[1] == editable(checkout)


def test_no_venv_module_says_what_to_install(checkout):
    shutil.rmtree(checkout.folder / ".venv")
    checkout.program("python3", f'[ "$1 $2" != "-m venv" ] && exec "{sys.executable}" "$@" || exit 1')
    done = checkout.run()
    assert done.returncode == 6 and "python3-venv" in done.stderr


def test_too_little_disk_is_said_before_anything_is_fetched(checkout):
    checkout.program("df", "echo header; echo fs 0 0 2000000 0% /")
    done = checkout.run()
    assert done.returncode == 6 and "1 GB free" in done.stderr and "about 3 GB" in done.stderr
    assert checkout.asked() == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--extra", "data"], "no such option: --extra"),
        (["--extras", "nope"], "there is no extra 'nope'"),
        (["--extras"], "--extras needs names"),
    ],
)
def test_wrong_words_are_usage_errors(words, said, checkout):
    done = checkout.run(*words)
    assert done.returncode == 2 and said in done.stderr and "Fix: " in done.stderr


def test_help_shows_the_usage(checkout):
    done = checkout.run("--help")
    assert done.returncode == 0
    assert "./setup.sh test" in done.stdout and "TORCH_SPEC" in done.stdout and "set -eu" not in done.stdout
