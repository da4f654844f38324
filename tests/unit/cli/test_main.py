"""The command itself: its table of verbs, its speed, and how every failure is shown."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import types

import pytest
import typer

from octavo import errors
from octavo.cli import main as cli
from octavo.cli.main import VERBS, Verb, main


def octavo(*words, **options):
    options = {"capture_output": True, "text": True, "timeout": 60} | options
    return subprocess.run([sys.executable, "-m", "octavo", *words], **options)


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture
def verb(monkeypatch, tmp_path):
    """A verb named ``try`` that runs the given function, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def install(function):
        module = types.ModuleType("octavo_trial_verb")
        module.app = typer.Typer()
        module.app.command()(function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(VERBS, "try", Verb(module.__name__, "Trial", "Try it."))

    return install


def raising(error):
    def run() -> None:
        raise error

    return run


def commands(name):
    """A verb and the commands below it, as words."""
    below = getattr(cli.load_verb(name), "commands", {})
    return [[name], *([name, child] for child in below)]


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_imports_and_shows_an_example(name, capsys):
    for words in commands(name):
        assert main([*words, "--help"]) == 0
        text = plain(capsys.readouterr().out)
        assert "Example" in text, f"octavo {' '.join(words)} --help has no Example"
        assert f"octavo {words[0]}" in text


def test_help_lists_every_verb_in_its_group(capsys):
    assert main(["--help"]) == 0
    text = plain(capsys.readouterr().out)
    for name, verb in VERBS.items():
        assert re.search(rf"│ {name} ", text)
        assert verb.group in text


def test_help_imports_nothing_heavy_and_is_there_at_once():
    code = (
        "import sys; from octavo.cli.main import main; main(['--help']);"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'jinja2', 'matplotlib', 'tokenizers'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1.0  # processor time, so that a busy machine does not matter


def test_importing_the_library_is_quick_and_without_torch():
    code = "import sys, octavo; sys.exit('torch' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_version_and_module_entry():
    import octavo as package

    done = octavo("--version")
    assert (done.returncode, done.stdout) == (0, f"octavo {package.__version__}\n")


@pytest.mark.parametrize("moment", ["the last line is written", "all is done"])
def test_a_ctrl_c_at_the_very_end_shows_no_traceback(moment):
    late = "os.kill(os.getpid(), signal.SIGINT)"
    code = f"""
import os, signal, sys
from octavo.cli import main
from octavo.errors import StopRequested
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where this runs in the background of a script
def stopped(words):
    raise StopRequested("SIGTERM, saved at step 1")
def refuse(error, cause, debug):
    {late if moment == "the last line is written" else "return error.exit_code"}
main._call, main._refuse = stopped, refuse
code = main.entry_point()
{late if moment == "all is done" else "sys.exit(code)"}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    wanted = 130 if moment == "the last line is written" else -signal.SIGINT  # a shell says 130 of both
    assert (done.returncode, done.stdout, done.stderr) == (wanted, "", "")


def test_no_words_show_the_help_and_fail(capsys):
    assert main([]) == 2
    assert "Usage: octavo" in plain(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], ["there is no verb 'trian'", "did you mean `train`?"]),
        (["zzzz"], ["there is no verb 'zzzz'", "quickstart, replay, report, resume, run"]),
        (["--verson"], ["no such option: --verson", "`--version`", "octavo --help"]),
        (["try", "--couunt", "3"], ["no such option: --couunt", "`--count`", "octavo try --help"]),
        (["try", "--count", "many", "x"], ["'--count'", "'many'", "octavo try --help"]),
        (["try"], ["missing argument", "name", "octavo try --help"]),
        (["try", "x", "y"], ["unexpected extra argument", "octavo try --help"]),
    ],
)
def test_usage_errors_are_one_line_name_the_nearest_and_exit_2(words, expected, verb, capsys):
    def run(name: str, count: int = 1) -> None: ...

    verb(run)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error[CONFIG]: ") and captured.err.count("\n") == 1
    for part in expected:
        assert part.lower() in captured.err.lower()


def test_unknown_command_below_a_verb_is_suggested(verb, monkeypatch, capsys):
    verb(lambda: None)
    app = sys.modules["octavo_trial_verb"].app
    app.command("encode")(lambda: None)
    assert main(["try", "encod"]) == 2
    err = capsys.readouterr().err
    assert "no such command 'encod'" in err and "Fix: did you mean 'encode'" in err


@pytest.mark.parametrize(
    "kind",
    [
        errors.ConfigError,
        errors.LockedError,
        errors.DataError,
        errors.CheckpointError,
        errors.NumericError,
        errors.ResourceError,
        errors.StopRequested,
    ],
)
def test_our_refusals_print_one_line_and_their_exit_code(kind, verb, capsys, tmp_path):
    error = kind("a = 1 is wrong", fix="use 2")
    verb(raising(error))
    assert main(["try"]) == kind.exit_code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"{error}\n")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(verb, capsys):
    verb(raising(errors.DataError("bad line")))
    for words in (["--debug", "try"], ["try", "--debug"]):
        assert main(words) == 3
        err = capsys.readouterr().err
        assert "Traceback (most recent call last)" in err and err.endswith("error[DATA]: bad line.\n")


def test_debug_after_two_dashes_belongs_to_the_verb(verb, capsys):
    seen = []

    def run(text: list[str]) -> None:
        seen.extend(text)

    verb(run)
    assert main(["try", "--", "--debug"]) == 0
    assert seen == ["--debug"]


def test_a_bug_is_one_line_and_its_traceback_is_in_a_file(verb, capsys, tmp_path):
    verb(raising(KeyError("gone\nnext line")))
    assert main(["try"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error[BUG]: KeyError: ") and err.count("\n") == 1
    assert "octavo-error.log" in err and "Fix: " in err
    log = (tmp_path / "octavo-error.log").read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in log and "KeyError" in log


def test_once_a_run_is_open_tracebacks_go_to_its_log(verb, capsys, tmp_path):
    def run(bug: bool = False) -> None:
        cli.log_to(tmp_path / "log")
        raise ValueError("ours") if bug else errors.DataError("theirs")

    verb(run)
    assert main(["try", "--bug"]) == 1
    assert str(tmp_path / "log") in capsys.readouterr().err
    assert main(["try", "--no-bug"]) == 3
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert log.count("Traceback (most recent call last)") == 2
    assert not (tmp_path / "octavo-error.log").exists()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 6, "error[RESOURCE]: not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 6, "error[RESOURCE]: the disk is full (/x/y)"),
        (OSError(errno.EIO, "Input/output error"), 1, "error[BUG]: OSError"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
        (typer.Exit(5), 5, ""),
    ],
)
def test_what_the_system_raises_has_its_exit_code(error, code, said, verb, capfd):
    verb(raising(error))
    saved = os.dup(1)
    try:
        assert main(["try"]) == code
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert said in capfd.readouterr().err


def test_a_verb_may_return_its_exit_code(verb):
    def run(code: int) -> int:
        return code

    verb(run)
    assert main(["try", "7"]) == 7


def test_a_closed_pipe_is_quiet():
    writer = subprocess.Popen(
        [sys.executable, "-m", "octavo", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    writer.stdout.close()
    assert writer.wait(60) == cli.BROKEN_PIPE
    assert writer.stderr.read() == ""
    writer.stderr.close()


def test_native_windows_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["--version"]) == 6
    err = capsys.readouterr().err
    assert err.startswith("error[RESOURCE]: native Windows is not supported") and "WSL" in err


def test_quickstart_is_run_with_a_recipe(monkeypatch):
    seen = []

    def run(recipe: str, no_chat: bool = False) -> None:
        seen.append((recipe, no_chat))

    module = types.ModuleType("trial_run")
    module.app = typer.Typer()
    module.app.command()(run)
    monkeypatch.setitem(sys.modules, VERBS["quickstart"].module, module)
    assert VERBS["quickstart"].module == VERBS["run"].module
    assert main(["quickstart", "--no-chat"]) == 0
    assert main(["run", "other"]) == 0
    assert seen == [("quickstart", True), ("other", False)]


@pytest.mark.parametrize(
    ("typed", "expected"), [("tok", "tokenizer"), ("--ver", "--version"), ("qui", "quickstart"), ("s", "serve")]
)
def test_shell_completion_knows_the_verbs(typed, expected):
    environment = os.environ | {
        "_OCTAVO_COMPLETE": "complete_bash",
        "COMP_WORDS": f"octavo {typed}",
        "COMP_CWORD": "1",
    }
    done = octavo(env=environment)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout.split()
