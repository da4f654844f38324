"""docs/vectors.md: its Python runs, its recipe builds, its commands and options exist."""

import re
from pathlib import Path

import pytest
import typer
import yaml

from octavo.config import Recipe
from octavo.vectors import StartVectors, VectorsConfig

PAGE = (Path(__file__).parents[2] / "docs" / "vectors.md").read_text(encoding="utf-8")


@pytest.mark.rows("N7")
def test_the_python_of_the_page_runs_and_its_recipe_is_one(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
    names: dict = {}
    exec(code, names)
    assert len(names["vectors"]) == 7 and names["vectors"].dim == 16
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.S | re.M)
    raw = yaml.safe_load(text) | {"data": {"sources": ["x.txt"]}, "train": {}}
    assert Recipe.parse(raw).vectors == StartVectors(path="words.vec")


def test_the_options_of_the_page_are_those_of_the_command():
    from octavo.cli.vectors import app

    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {o for verb in verbs.values() for p in verb.params for o in p.opts}
    shown = set(re.findall(r"(--[a-z][a-z-]*)", PAGE)) - {"--vocab-size", "--gensim"}
    assert shown <= options
    assert set(re.findall(r"octavo vectors (\w+)", PAGE)) == set(verbs)
    defaults = VectorsConfig()
    train = {p.name: p.default for p in verbs["train"].params}
    for name in set(train) & set(VectorsConfig.model_fields):
        assert train[name] == getattr(defaults, name), name
