"""Recipes: every error at once with its line and the nearest name, overrides, and YAML that means harm."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo.cli.main import main
from octavo.config import Recipe, names, schema
from octavo.errors import ConfigError, ConfigErrors
from octavo.schema import Config

BASE = """\
name: x
seed: 3
data: {sources: [a.txt]}
model:
  d_model: 32
  max_seq_len: 64
  blocks: {block: {mixer: {n_heads: 2}}}
train:
  steps: 50
  step_tokens: 512
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(BASE)
    return path


def errors(path: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Recipe.load(path, overrides)
    assert caught.value.exit_code == 2
    lines = str(caught.value).split("\n")
    assert all(line.startswith("error[CONFIG]: ") and ". Fix: " in line for line in lines), lines
    assert all(line.isprintable() for line in lines)
    return lines


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------- errors


def test_everything_wrong_is_said_at_once_with_its_line_and_the_nearest_name(file):
    text = BASE.replace("d_model", "d_modle").replace("n_heads", "n_haeds").replace("steps: 50", "steps: many")
    lines = errors(write(file, text.replace("seed: 3", "sede: 3") + "  optimizer: {kind: adamm}\ntrian: {}\n"))
    expected = {
        "sede is not a known key": ("mine.yaml:2", "did you mean `seed`?"),
        "model.d_modle is not a known key": ("mine.yaml:5", "did you mean `model.d_model`?"),
        "model.blocks.block.mixer.n_haeds is not a known key": (
            "mine.yaml:7",
            "did you mean `model.blocks.block.mixer.n_heads`?",
        ),
        "train.steps = 'many': input should be a valid integer": ("mine.yaml:9", "correct the value."),
        "train.optimizer = 'adamm' is not one of": ("mine.yaml:11", "did you mean `adamw`?"),
        "trian is not a known key": ("mine.yaml:12", "did you mean `train`?"),
    }
    assert len(lines) == len(expected)
    for what, (place, fix) in expected.items():
        (line,) = [line for line in lines if line.startswith(f"error[CONFIG]: {what}")]
        assert place in line and line.endswith(f"Fix: {fix}"), line


def every_key(model: Any = None, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every key of a resolved recipe, with the keys that are the user's own names left out."""
    found = []
    if isinstance(model, Config):
        for name in type(model).model_fields:
            found += [(*path, name), *every_key(getattr(model, name), (*path, name))]
    elif isinstance(model, dict):
        found += [key for name, value in model.items() for key in every_key(value, (*path, name))]
    elif isinstance(model, tuple):
        found += [key for i, value in enumerate(model) for key in every_key(value, (*path, i))]
    return found


def damaged(plain: dict[str, Any], path: tuple[Any, ...], new: str) -> dict[str, Any]:
    """The recipe with the last key of ``path`` renamed."""
    raw = json.loads(json.dumps(plain))
    section = raw
    for part in path[:-1]:
        section = section[part]
    section[new] = section.pop(path[-1])
    return raw


def test_a_misspelt_key_anywhere_is_found_and_the_right_one_suggested():
    found = suggested = 0
    for name in ("quickstart", "sft"):
        recipe = Recipe.load(name)
        plain = recipe.plain()
        for path in every_key(recipe):
            key = str(path[-1])
            if key == "kind" or len(key) < 4:
                continue
            for new in (key[0] + key[2] + key[1] + key[3:], key[:-1], f"{key}x"):
                if new == key:
                    continue
                with pytest.raises(ConfigErrors) as caught:
                    Recipe.parse(damaged(plain, path, new))
                dotted = ".".join(map(str, (*path[:-1], new)))
                (line,) = [e for e in caught.value.errors if e.what.startswith(f"{dotted} is not a known key")]
                found += 1
                suggested += line.fix == f"did you mean `{'.'.join(map(str, path))}`?"
    assert found > 250 and suggested / found >= 0.95, f"{suggested} of {found}"


def test_a_value_of_the_wrong_type_anywhere_is_named():
    recipe = Recipe.load("quickstart")
    for path in every_key(recipe):
        raw = recipe.plain()
        section: Any = raw
        for part in path[:-1]:
            section = section[part]
        section[path[-1]] = {"no": object}
        with pytest.raises(ConfigErrors) as caught:
            Recipe.parse(raw)
        dotted = ".".join(map(str, path[:-1])) if path[-1] == "kind" else ".".join(map(str, path))
        assert any(e.what.startswith(dotted) for e in caught.value.errors), (path, str(caught.value))


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["model.d_model=30", "model.blocks.block.mixer.n_heads=4"], "n_heads = 4 must divide d_model = 30"),
        (["train.step_tokens=100"], "train.step_tokens = 100 must be a multiple of seq_len = 64"),
        (["train.schedule={kind: cosine, warmup: 50}"], "schedule.warmup = 50 must be below steps = 50"),
        (["train.seq_len=128", "model.positions=learned"], "train.seq_len = 128 exceeds model.max_seq_len = 64"),
        (
            ["model.vocab_size=300", "tokenizer={kind: bpe, vocab_size: 512}"],
            "model.vocab_size = 300 is below tokenizer.vocab_size",
        ),
        (["model.pattern=[block, nobody]"], "pattern names unknown blocks ['nobody']"),
        (["train=null"], "nothing to do"),
        (["data=null"], "train needs text"),
        (["train=null", "data=null", "tune={}"], "tune alone needs a trained model"),
        (["model.blocks.block.mixer.head_dim=7"], "head_dim = 7 is odd"),
        (["model.kind=no_such_module:Thing"], "cannot import 'no_such_module:Thing'"),
        (["train.optimizer.lr=.nan"], "train.optimizer.lr = nan"),
        (["train.optimizer.lr=0"], "train.optimizer.lr = 0: input should be greater than 0"),
        (["train.device=gpu"], "train.device = 'gpu'"),
        (["seed=-1"], "seed = -1"),
        (["name=../x"], "name = '../x'"),
        (["train.optimizer={lr: 1, momentum: 0.9, kind: adamw}"], "train.optimizer.momentum is not a known key"),
    ],
)
def test_what_cannot_be_is_refused_before_any_data_is_read(file, overrides, what):
    assert what in "\n".join(errors(file, *overrides))


def test_an_unknown_recipe_names_the_nearest():
    assert "did you mean `quickstart`?" in errors("quickstrat")[0]
    assert all(name in errors("???")[0] for name in names())
    for path in ("a" * 300, "/", "no/such.yaml", "", "."):
        errors(path)


# ------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.optimizer={kind: adamw, lr: 3e-4}", "train.optimizer.lr", 3e-4),
        ("train.clip_norm=3e-4", "train.clip_norm", 3e-4),
        ("train.clip_norm=null", "train.clip_norm", None),
        ("train.compile=off", "train.compile", "off"),
        ("train.sample_prompts=[a, 'b = c']", "train.sample_prompts", ("a", "b = c")),
        ("data.sources=[b.txt, c.txt]", "data.sources.1.path", "c.txt"),
        ("data.sources=b.txt", "data.sources.0.path", "b.txt"),
        ('data.sources=["文/*.txt"]', "data.sources.0.path", "文/*.txt"),
        ("model.tie_embeddings=false", "model.tie_embeddings", False),
        ("model.positions=learned", "model.positions.kind", "learned"),
        ("train.optimizer.lr=0.5", "train.optimizer.lr", 0.5),
        ("name=off", "name", "off"),
        (" seed = 9", "seed", 9),
        ("eval=null", "eval", None),
    ],
)
def test_an_override_is_read_as_people_mean_it(file, override, key, value):
    found: Any = Recipe.load(file, ["train.optimizer.kind=adamw", override])
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == value and type(found) is type(value)


def test_a_bare_kind_opens_up(file):
    recipe = Recipe.load(file, ["train.schedule=linear", "train.schedule.warmup=10", "train.schedule.final=0.5"])
    assert recipe.train is not None
    assert recipe.train.schedule.model_dump() == {"kind": "linear", "warmup": 10, "final": 0.5}
    text = BASE + "  schedule: wsd\n"
    recipe = Recipe.load(write(file, text), ["train.schedule.decay=0.2"])
    assert recipe.train is not None and recipe.train.schedule.decay == 0.2


def test_later_overrides_win_and_the_file_is_not_touched(file):
    assert Recipe.load(file, ["seed=5", "seed=6"]).seed == 6
    assert file.read_text() == BASE


def test_overrides_that_cannot_be_applied_are_all_named(file):
    bad = ["=3", "train", "train.=4", "train.steps.x=4", "data.sources.3=x", "data.sources.x=1", "seed=[1",
           "seed=2020-13-01", "seed=" + "9" * 5000]  # fmt: skip
    lines = errors(file, *bad)
    assert len(lines) == len(bad)
    for text, line in zip(bad, lines, strict=True):
        assert text[:40] in line


def test_an_error_in_an_override_says_command_line(file):
    (line,) = errors(file, "train.stepps=4")
    assert "(command line)" in line and "did you mean `train.steps`?" in line
    (line,) = errors(file, "train.steps=none")
    assert "(command line)" in line and "'none'" in line


# ---------------------------------------------------------------------------------------- hostile YAML

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "x: &a [*a]\n",
        "x: &a {y: *a}\n",
        "x: " + "[" * 5000 + "]" * 5000,
        "x: " + "{a: " * 1000 + "1" + "}" * 1000,
        "x: " + "9" * 5000,
        "x: 2020-99-99\n",
        "x: !!python/object/apply:os.system [touch pwned]\n",
        "x: !!python/name:os.system\n",
        "x: !!binary '???'\n",
        "x: !unknown 1\n",
        "? [a, b]\n: 1\n",
        "? {a: b}\n: 1\n",
        "1: 2\nnull: 3\n",
        '"a\\nb": 1\n',
        '"\\e[31m": 1\n',
        'name: "\\e]0;title\\a"\n',
        "name: x\x00y\n",
        "seed: 4\nseed: 5\n",
        "train: {steps: 1, steps: 2}\n",
        "name: [\n",
        "name: 'x\n",
        "\tname: x\n",
        "a: b: c\n",
        "--- {}\n--- {}\n",
        "- 1\n- 2\n",
        "just text\n",
        "",
        "null\n",
        "name: " + "x" * 10**6 + "é!\n",
        "seed: 1e309\n",
        "<<: [1]\n",
        "x: *nothing\n",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_yaml_that_means_harm_is_refused_in_one_line(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    lines = errors(write(tmp_path / "hostile.yaml", text))
    assert all(len(line) < 600 for line in lines)
    assert os.listdir(tmp_path) == ["hostile.yaml"]


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\xfe\n")
    assert "is not UTF-8" in errors(tmp_path / "x.yaml")[0]


def test_anchors_and_merge_keys_still_work(file):
    text = BASE + "  optimizer: &o {kind: adamw, lr: 1e-2}\ntune:\n  steps: 9\n  step_tokens: 64\n  optimizer: *o\n"
    recipe = Recipe.load(write(file, text))
    assert recipe.tune is not None and recipe.tune.optimizer.lr == 1e-2
    merged = BASE.replace("train:\n", "train: &t\n") + "tune:\n  <<: *t\n  steps: 9\n"
    recipe = Recipe.load(write(file, merged))
    assert recipe.tune is not None and (recipe.tune.steps, recipe.tune.step_tokens) == (9, 512)


# ----------------------------------------------------------------------------- shipped recipes and schema


@pytest.mark.parametrize("name", names())
def test_a_shipped_recipe_is_resolved_saved_and_read_again_unchanged(name, tmp_path):
    recipe = Recipe.load(name)
    assert recipe.name == name
    saved = tmp_path / "recipe.yaml"
    saved.write_text(yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True))
    again = Recipe.load(saved)
    assert again == recipe and again.plain() == recipe.plain()
    assert json.loads(json.dumps(recipe.plain())) == recipe.plain()


def resolve(part: Any, root: dict[str, Any]) -> Any:
    while isinstance(part, dict) and "$ref" in part:
        part = root["$defs"][part["$ref"].rpartition("/")[2]]
    return part


def fits(value: Any, part: Any, root: dict[str, Any]) -> bool:
    """Whether ``value`` is what a JSON Schema allows; as much of the standard as the schema of recipes uses."""
    part = resolve(part, root)
    for options in (part.get("anyOf"), part.get("oneOf")):
        if options is not None and not any(fits(value, option, root) for option in options):
            return False
    if ("const" in part and value != part["const"]) or ("enum" in part and value not in part["enum"]):
        return False
    kinds = {
        "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
        "null": type(None),
    }  # fmt: skip
    if "type" in part:
        if not isinstance(value, kinds[part["type"]]) or (isinstance(value, bool) and part["type"] != "boolean"):
            return False
    if isinstance(value, dict):
        known, more = part.get("properties", {}), part.get("additionalProperties", True)
        missing = [key for key in part.get("required", ()) if key not in value]
        extra = [key for key in value if key not in known]
        if missing or (extra and more is False):
            return False
        inside = [fits(value[key], known[key], root) for key in value if key in known]
        return all(inside) and all(fits(value[key], more, root) for key in extra if isinstance(more, dict))
    if isinstance(value, list) and "items" in part:
        return all(fits(item, part["items"], root) for item in value)
    return True


@pytest.mark.parametrize("name", names())
def test_the_schema_allows_the_shipped_recipes_and_not_their_misspellings(name):
    root = schema()
    plain = Recipe.load(name).plain()
    assert fits(plain, root, root)
    for path in every_key(Recipe.load(name)):
        if path[-1] != "kind":
            assert not fits(damaged(plain, path, f"{path[-1]}_"), root, root), path


def test_replace_is_validated_anew(file):
    recipe = Recipe.load(file)
    assert recipe.replace({"train.steps": 7, "model.n_layers": 2}).plain()["train"]["steps"] == 7
    with pytest.raises(ConfigErrors, match="must be a multiple"):
        recipe.replace({"train.step_tokens": 7})
    assert recipe.plain()["train"]["steps"] == 50
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 2  # type: ignore[misc]


# ------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize("verb", ["run", "train"])
def test_a_refused_recipe_ends_with_2_and_leaves_no_file(verb, file, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main([verb, str(file), "train.stepps=4", "model.d_modle=4"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 2 and "Traceback" not in shown.err
    assert os.listdir(folder) == []


def test_the_schema_is_printed_as_json(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
