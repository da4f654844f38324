"""R15: whatever is written in a recipe, it is a recipe or refused: exit code 2, every fault on a line that names its
place, the right suggestion for a misspelling, never a traceback, no file written."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from boxed import SCALE, Box
from recipe_keys import Key, keys, misspelt, out_of_range, wrong_types

from octavo.cli.main import main

SEED = 15
SECONDS, MEBIBYTES = 4.0, 64
RIGHT = 0.95
ONE_FORM = re.compile(r"error\[\w+\]: .+\. Fix: .+")


def write(path: Path, raw: Any) -> None:
    """JSON is YAML; the numbers that JSON has no word for are."""
    text = json.dumps(raw)
    path.write_text(text.replace("NaN", ".nan").replace("Infinity", ".inf"), encoding="utf-8")


class Tried:
    """Runs recipes through the command line in an empty folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys = folder, capsys
        self.n = 0
        self.failures: list[str] = []

    def refused(self, key: Key, raw: dict[str, Any], what: str) -> str:
        """The line about ``what``; anything that is not as it should be is a failure."""
        self.n += 1
        write(self.folder / "mine.yaml", raw)
        try:
            code = main(["run", "mine.yaml", "--no-chat"])
        except BaseException as error:
            self.failures.append(f"{what}: {type(error).__name__} got out: {error}")
            return ""
        said = self.capsys.readouterr()
        lines = said.err.splitlines()
        found = next((line for line in lines if line.startswith(f"error[CONFIG]: {what}")), "")
        left = sorted(path.name for path in self.folder.iterdir())
        if code != 2 or said.out or left != ["mine.yaml"] or not found:
            self.failures.append(f"{what}: exit code {code}, files {left}, said {said.err[:300]}{said.out[:100]}")
        elif not all(line.startswith("error[CONFIG]: ") and ". Fix: " in line for line in lines):
            self.failures.append(f"{what}: not in the one form: {said.err[:300]}")
        elif "(mine.yaml:1)" not in found:
            self.failures.append(f"{what}: no file and line in {found[:300]}")
        return found


@pytest.fixture
def tried(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return Tried(tmp_path, capsys)


def value_for(key: Key) -> Any:
    """A value that may stand there."""
    if not key.field.is_required():
        default = key.field.get_default(call_default_factory=True)
        return json.loads(json.dumps(default, default=lambda thing: thing.model_dump(mode="json")))
    return next((value for value in ("x", ["x"], 3) if key.accepts(value)), {})


def test_the_walk_finds_the_keys_of_every_section():
    found = {key.dotted for key in keys()}
    assert len(found) > 150 and len({key.owner for key in keys()}) > 40
    expected = (
        "seed data.sources.0.stdlib.parts model.blocks.block.mixer.n_heads train.optimizer.weight_decay "
        "tune.data.columns tokenizer.keep eval.orders data.clean.filters.banned_phrases"
    )
    for dotted in expected.split():
        assert dotted in found, dotted


@pytest.mark.timeout(300)
def test_each_key_misspelt(tried, record):
    chance = random.Random(SEED)
    suggested = 0
    for key in keys() * SCALE:
        new = misspelt(key.name, key.owner.model_fields, chance)
        *outer, _ = key.path
        wrong = ".".join(map(str, (*outer, new)))
        line = tried.refused(key, key.with_value(value_for(key), new), f"{wrong} is not a known key")
        suggested += f"Fix: did you mean `{key.dotted}`?" in line
    if suggested < RIGHT * tried.n:
        tried.failures.append(f"the right key was suggested {suggested} times of {tried.n}")
    record("R15", tried.n, tried.failures, seed=SEED, keys="misspelt", suggested=round(suggested / tried.n, 4))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["of the wrong type", "out of range"])
def test_each_value(kind, tried, record):
    chance = random.Random(SEED)
    for key in keys():
        values = wrong_types(key) if kind == "of the wrong type" else out_of_range(key)
        assert values or kind != "of the wrong type", f"nothing is wrong for {key.dotted}"
        for value in chance.sample(values, min(len(values), SCALE)):
            # A kind that is none is said of the section that has it.
            *outer, last = key.path
            what = ".".join(map(str, outer if last == "kind" else key.path)) or "the recipe"
            tried.refused(key, key.with_value(value), what)
    record("R15", tried.n, tried.failures, seed=SEED, values=kind)


# --------------------------------------------------------------------------------------- hostile YAML


def load(case: dict[str, Any]) -> str:
    """The child: read a recipe as every verb does."""
    from octavo.config import Recipe

    return Recipe.load(case["path"], case["overrides"]).name


def bomb(levels: int, joint: str) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]")
    return joint.join(lines)


GOOD = "name: x\ndata: {sources: [a.txt]}\ntrain: {steps: 50}\n"
TEXTS: dict[str, str | bytes] = {
    "a bomb of aliases": bomb(12, "\n"),
    "a bomb in a known key": GOOD + bomb(12, "\n") + "\nmodel: {pattern: *a11}",
    "a bomb of merges": "a: &a {x: 1}\n" + "\n".join(
        f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}], k{i}: 1}}" for i in range(12)),
    "a list that holds itself": "data: &a [*a]",
    "a map that holds itself": "data: &a {sources: *a}",
    "a map that is its own key": "? &a {*a : 1}\n: 2",
    "a merge with itself": "data: &a {<<: *a}",
    "a merge of a number": "data: {<<: 3}",
    "an alias to nothing": "data: *nothing",
    "an object of Python": GOOD + "x: !!python/object/apply:os.system ['touch marker']",
    "a module of Python": GOOD + "x: !!python/module:os",
    "a name of Python": GOOD + "x: !!python/name:os.system",
    "a tag of ours": GOOD + "x: !octavo {a: 1}",
    "a tag without an end": "x: !<tag:yaml",
    "binary that is none": "name: !!binary '!!!'",
    "a set": "!!set {data, train}",
    "an ordered map": "!!omap [data: 1, data: 2]",
    "pairs": "data: !!pairs [a: 1, a: 2]",
    "an int that is none": "seed: !!int many",
    "a float that is none": "train: {clip_norm: !!float x}",
    "a bool that is none": "train: {tensorboard: !!bool many}",
    "a timestamp that is none": "name: !!timestamp yesterday",
    "a 13th month": GOOD + "seed: 2001-13-40",
    "a date": GOOD + "seed: 2001-12-14",
    "a key twice": GOOD + "name: y\n",
    "an inner key twice": "data: {sources: [a], sources: [b]}\ntrain: {}",
    "a key twice by another spelling": "'name': x\nname: y\n" + GOOD,
    "5,000 digits": GOOD + f"seed: {'9' * 5000}",
    "400 digits": GOOD + f"seed: {'9' * 299}",
    "5,000 hex digits": GOOD + f"seed: 0x{'f' * 5000}",
    "4,000 parts to the base of 60": GOOD + "seed: 1" + ":59" * 4000,
    "5,000 binary digits": GOOD + f"seed: 0b{'1' * 5000}",
    "a float beyond all": GOOD + "model: {d_model: 1e999}",
    "5,000 digits in quotes": GOOD + f"seed: '{'9' * 5000}'",
    "no number": GOOD + "seed: .nan",
    "half a character": GOOD + 'tokenizer: {kind: existing, path: "\\ud800"}\nseed: "\\ud800"',
    "a NUL": GOOD + "name: 'a\0b'",
    "a NUL by its escape": GOOD.replace("name: x", 'name: "a\\0b"'),
    "colours and line ends in a key": GOOD + '"a\\n\\e[31merror[BUG]: x": 1',
    "colours and line ends in a value": GOOD + 'eval: {orders: "a\\n\\e[31merror[BUG]: x"}',
    "lists in lists": "data: " + "[" * 5000 + "]" * 5000,
    "maps in maps": "data: " + "{a: " * 5000 + "}" * 5000,
    "blocks in blocks": "\n".join(" " * i + f"a{i}:" for i in range(2000)),
    "60 maps in maps": "data: " + "{a: " * 60 + "1" + "}" * 60,
    "an open bracket": "data: [a",
    "an open quote": "name: 'x\n" + GOOD,
    "a tab": "data:\n\tsources: [a]",
    "two documents": GOOD + "---\n" + GOOD,
    "a directive of the future": "%YAML 9.9\n---\n" + GOOD,
    "a directive of no one": "%TAG ! tag:evil,2000:\n---\nx: !a 1",
    "nothing": "",
    "a comment": "# nothing\n",
    "a number": "3",
    "a text": "data",
    "a list": "[data, train]",
    "null": "null",
    "number keys": GOOD + "1: 2\n0x10: 3\n",
    "null and true keys": GOOD + "null: 1\ntrue: 2\n~: 3\n",
    "a list as a key": GOOD + "? [a, b]\n: 1\n",
    "a date as a key": GOOD + "2001-12-14: 1",
    "a map as a key": GOOD + "? {a: 1}\n: 1\n",
    "a key of 100,000": GOOD + f"{'k' * 100_000}: 1",
    "a value of 500,000": GOOD + f"seed: {'v' * 500_000}",
    "30,000 keys": GOOD + "\n".join(f"key{i}: 1" for i in range(30_000)),
    "5,000 wrong keys": GOOD + "\n".join(f"key{i}: 1" for i in range(5_000)),
    "a list of 20,000": GOOD + "eval: {orders: [" + "1, " * 19_000 + "x]}",
    "a module that is not there": GOOD + "model: {kind: 'no.such:Thing'}",
    "a module above": GOOD + "model: {kind: '..evil:Thing'}",
    "a module without a name": GOOD + "model: {kind: ':'}",
    "a class without a configuration": GOOD + "model: {kind: 'os:system'}",
    "a kind of another sort": GOOD + "model: {kind: [decoder]}",
    "not UTF-8": b"name: caf\xe9\n",
    "UTF-16": GOOD.encode("utf-16"),
    "pickled": b"\x80\x04\x95",
    "3 MB": "# " + "x" * 3_000_000,
}  # fmt: skip
OVERRIDES = {
    "a bomb": ["seed={" + bomb(12, ", ") + "}"],
    "a cycle": ["data=&a [*a]"],
    "5,000 digits": ["seed=" + "9" * 5000],
    "hex": ["seed=0x" + "f" * 5000],
    "nothing": ["", "=", "=3", "a.=3", ".a=3", "train.."],
    "deep": ["a" + ".a" * 5000 + "=1"],
    "an index that is none": ["data.sources.9999999999999999999=1", "data.sources.-1=1", "data.sources.²=1"],
    "an object of Python": ["seed=!!python/object/apply:os.system ['touch marker']"],
    "a value as a section": ["seed.a=1", "name.x.y=2"],
    "line ends": ["na\nme=1", "name=a\n\x1b[31mb", "seed='\\ud800'"],
}  # fmt: skip


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "good.yaml"
    path.write_text(GOOD)
    harmless = [{"path": str(path), "overrides": []}]
    with Box("test_r15_hostile_recipes:load", memory_bytes=1 << 30, seconds=10, first=harmless) as one:
        yield one


def test_hostile_yaml(box, tmp_path, monkeypatch, record):
    monkeypatch.chdir(tmp_path)
    cases: list[tuple[str, str, list[str]]] = []
    for i, (name, text) in enumerate(TEXTS.items()):
        path = tmp_path / f"{i}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        cases.append((name, str(path), []))
    (tmp_path / "good.yaml").write_text(GOOD)
    cases += [(f"override, {name}", str(tmp_path / "good.yaml"), words) for name, words in OVERRIDES.items()]
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "folder.yaml").mkdir()
    paths = ["pipe.yaml", "zero.yaml", "loop.yaml", "folder.yaml", "none.yaml", "n" * 5000, "a\0b", "a\0b.yaml", "/"]
    for name in [*paths, "\ud800"]:
        cases.append((f"path {name[:20]!r}", str(tmp_path / name) if name.endswith(".yaml") else name, []))
    before = sorted(path.name for path in tmp_path.iterdir())
    failures = []
    for name, path, words in cases:
        outcome = box.ask({"path": path, "overrides": words})
        found = ""
        lines = outcome.error.split("\n")
        if outcome.crash or outcome.seconds > SECONDS or outcome.mebibytes > MEBIBYTES:
            found = outcome.crash or f"took {outcome.seconds:.1f} s and {outcome.mebibytes:.0f} MiB"
        elif not outcome.error:
            found = f"was read as {outcome.result!r}"
        elif outcome.exit_code != 2 or not all(ONE_FORM.fullmatch(line) and line.isprintable() for line in lines):
            found = f"exit code {outcome.exit_code}: {outcome.error[:300]!r}"
        if found:
            failures.append(f"{name}: {found}")
    if sorted(path.name for path in tmp_path.iterdir()) != before:
        failures.append("a file was written")
    record("R15", len(cases), failures, values="hostile YAML")


def test_what_once_went_wrong(box, record):
    files = sorted((Path(__file__).parents[1] / "corpus" / "r15").glob("*.yaml"))
    failures = []
    for path in files:
        outcome = box.ask({"path": str(path), "overrides": []})
        lines = outcome.error.split("\n")
        if outcome.crash or outcome.exit_code != 2 or not all(ONE_FORM.fullmatch(line) for line in lines):
            failures.append(f"{path.name}: {outcome.crash or outcome.error or outcome.result}")
    record("R15", len(files), failures, values="corpus")


@pytest.mark.parametrize("name", ["train", "run", "data prepare"])
def test_no_verb_writes_before_the_recipe_is_understood(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": {"sources": ["a.txt"]}, "trian": {}}))
    assert main([*name.split(), "mine.yaml"]) == 2
    assert "did you mean `train`?" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
