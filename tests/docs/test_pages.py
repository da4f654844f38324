"""Code in the pages that is not a script of its own: the mixer of CONTRIBUTING.md, the recipe of the READMEs."""

import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import yaml

from octavo.config import Recipe
from octavo.models.decoder import Decoder, build

ROOT = Path(__file__).resolve().parents[2]


def marked(page: str, mark: str) -> str:
    """The fenced block after ``<!-- mark -->``."""
    match = re.search(rf"<!-- {mark} -->\s*```\w*\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    assert match, f"{page} has no block marked {mark}"
    return match[1]


def test_the_mixer_keeps_every_law(tmp_path):
    (tmp_path / "fade.py").write_text(marked("CONTRIBUTING.md", "mixer: fade.py"), encoding="utf-8")
    (tmp_path / "check.py").write_text(marked("CONTRIBUTING.md", "laws"), encoding="utf-8")
    done = subprocess.run([sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 4
    assert all(line.endswith("keeps every law") for line in lines), done.stdout


def is_part(part, whole) -> bool:
    """Whether every key and value of ``part`` stands in ``whole``."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and is_part(part[key], whole[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and len(part) == len(whole) and all(map(is_part, part, whole))
    return part == whole


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_recipes_shown_are_the_one_shipped_and_one_that_builds(page):
    shown, hybrid = re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    shipped = (resources.files("octavo") / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    assert is_part(yaml.safe_load(shown), yaml.safe_load(shipped))
    assert not is_part({"seed": 2}, yaml.safe_load(shipped))
    model = build(Decoder.Config.model_validate(yaml.safe_load(hybrid)["model"] | {"vocab_size": 32}))
    kinds = [type(mixer).__name__ for name, mixer in model.mixers().items() if name.endswith(".mixer")]
    assert kinds == ["Mamba2"] * 3 + ["Attention"]


def test_the_kinds_listed_are_the_kinds_there_are():
    from octavo.models.tables import MODELS
    from octavo.nn import tables
    from octavo.objectives.tables import OBJECTIVES
    from octavo.predictors.kinds import PREDICTORS
    from octavo.tokenizer.config import CONFIGS
    from octavo.training.optimizers import OPTIMIZERS
    from octavo.training.schedule import SCHEDULES

    there = {
        "tokenizer": set(CONFIGS),
        "model": {*MODELS, *PREDICTORS, "pretrained"},
        "model.blocks.NAME.mixer": set(tables.TOKEN_MIXERS),
        "model.blocks.NAME.channel": set(tables.CHANNEL_MIXERS),
        "model.norm": set(tables.NORMS),
        "model.positions": set(tables.POSITIONS),
        "train.optimizer": set(OPTIMIZERS),
        "train.schedule": set(SCHEDULES),
        "train.objective": set(OBJECTIVES),
        "tune.data": {"python-stdlib", "chat", "pairs", "labelled", "tagged"},
    }
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (`.*) \|$", page.partition("## A recipe of your own")[2], re.M)
    listed = {key: set(re.findall(r"`([\w-]+)`", kinds)) for key, kinds in rows}
    assert listed == there


@pytest.mark.parametrize(
    "name",
    ["quickstart", "pretrain", "sft", "shakespeare", "quickstart-zh", "ngram", "code", "translation", "table-to-text"],
)
def test_every_recipe_has_a_section(name):
    assert Recipe.load(name).name == name
    assert f"\n## {name}\n" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
