"""What the READMEs tell people to type: the Python runs, the commands exist, both languages say the same."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.cli.main import VERBS, load_verb

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
SHELL = {"sh", "bash", "shell", "console"}
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, languages: set[str]) -> list[str]:
    """The fenced blocks of ``page`` in these languages, in order."""
    return [code for language, code in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """Every shell command line of ``page`` as words, without prompts and comments."""
    text = "\n".join(blocks(page, SHELL)).replace("\\\n", " ")
    lines = (line.strip().removeprefix("$ ") for line in text.splitlines())
    parts = (part for line in lines for part in re.split(r"\s+(?:&&|\|)\s+", line))
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def without_comments(code: str) -> list[str]:
    """The lines of a Python block with comments taken away: those are translated, the code is not."""
    lines = (re.sub(r"(^|\s)#.*$", "", line).rstrip() for line in code.splitlines())
    return [line for line in lines if line]


def octavo_words(words: list[str]) -> list[str] | None:
    """The words of an octavo command line after the program's name; ``None`` for other programs."""
    program, rest = words[0], words[1:]
    if Path(program).name == "octavo":
        return rest
    if Path(program).name == "setup.sh":
        while rest and rest[0].startswith("-"):
            rest = rest[2:] if rest[0] == "--extras" else rest[1:]
        return rest if rest and rest[0] != "test" else None
    if Path(program).name.startswith("python") and rest[:2] == ["-m", "octavo"]:
        return rest[2:]
    return None


@pytest.mark.timeout(900)
def test_python_blocks_run_in_order_in_one_folder(tmp_path):
    found = blocks(ENGLISH, {"python", "py"})
    assert found, "README.md has no python block"
    for number, code in enumerate(found):
        script = tmp_path / f"block_{number}.py"
        script.write_text(code, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, script.name], cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=800
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_notebook_script_is_a_dozen_lines_marked_in_the_page():
    page = ENGLISH.read_text(encoding="utf-8")
    match = re.search(r"<!-- notebook -->\s*```python\n(.*?)```", page, re.DOTALL)
    assert match, "README.md has no `<!-- notebook -->` before a python block"
    assert len([line for line in match[1].splitlines() if line.strip()]) <= 12
    assert "octavo.train(" in match[1] and "octavo.load(" in match[1] and ".generate(" in match[1]


def test_both_languages_have_the_same_commands_and_code():
    assert commands(ENGLISH) == commands(CHINESE)
    assert commands(ENGLISH), "README.md has no shell block"
    python = {"python", "py"}
    assert [without_comments(code) for code in blocks(ENGLISH, python)] == [
        without_comments(code) for code in blocks(CHINESE, python)
    ]


def test_page_opens_with_the_two_commands():
    first_two = [words for words in commands(ENGLISH) if Path(words[0]).name == "setup.sh"][:2]
    assert first_two == [["./setup.sh", "run", "quickstart"], ["./setup.sh", "test"]]


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_every_octavo_command_in_the_page_exists(page):
    for words in commands(page):
        arguments = octavo_words(words)
        if not arguments or arguments[0].startswith("-"):
            continue
        assert arguments[0] in VERBS, f"{words}: no verb {arguments[0]}"
        command = load_verb(arguments[0])
        below = getattr(command, "commands", {})
        if below:
            assert arguments[1] in below, f"{words}: {arguments[0]} has no command {arguments[1]}"
            command = below[arguments[1]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in arguments:
            if word.startswith("--"):
                option = word.partition("=")[0]
                assert option in known | {"--help", "--debug"}, f"{words}: no option {option}"


def test_links_between_our_files_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"[a-z]+:|#", target):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_extractors_read_what_they_should(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\n# words\n$ ./setup.sh --extras data run quickstart  # go\n"
        "octavo chat \\\n  runs/a && octavo eval 'b c' | less\n```\n"
        "```python\nx = 1  # one\n# two\nprint('#')\n```\n```\nno language\n```\n",
        encoding="utf-8",
    )
    assert commands(page) == [
        ["./setup.sh", "--extras", "data", "run", "quickstart"],
        ["octavo", "chat", "runs/a"],
        ["octavo", "eval", "b c"],
        ["less"],
    ]
    assert octavo_words(commands(page)[0]) == ["run", "quickstart"]
    assert octavo_words(["ls", "octavo"]) is None
    assert octavo_words(["./setup.sh", "test"]) is None
    assert blocks(page, {"python"}) == ["x = 1  # one\n# two\nprint('#')\n"]
    assert without_comments("x = 1  # one\n# two\ny = 2") == ["x = 1", "y = 2"]
