"""``octavo ablate``: one recipe with several values of some keys."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from octavo.cli.compare import Options, with_options

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  octavo ablate shakespeare model.n_layers=2,4,8 --data input.txt --tokens 500000")
@with_options
def ablate(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a YAML file.")],
    fields: Annotated[list[str], typer.Argument(help="key=a,b,c: the values of a key; all combinations are trained.")],
    *,
    options: Options,
) -> None:
    """Train a recipe with every value of some keys, several seeds each, and compare.

    Without a budget each model takes the recipe's own number of steps.
    """
    from octavo.stop import StopSignal

    with StopSignal(options.max_time) as stop:
        from octavo.comparing.settings import ablation
        from octavo.config import Recipe
        from octavo.errors import ConfigError

        loaded = Recipe.load(recipe)
        if loaded.train is None:
            raise ConfigError(f"recipe {recipe} has no train section", fix="give one that pretrains")
        budget = options.budget() or {"tokens": loaded.train.steps * loaded.train.step_tokens}
        plain = loaded.replace({"tune": None})
        made = ablation(plain, [_field(text) for text in fields], budget=budget)
        options.perform(options.onto(made, budget), stop)


def _field(text: str) -> tuple[str, list[Any]]:
    """``key=a,b,c`` as a key and its values, each read as YAML."""
    import yaml

    from octavo.errors import ConfigError

    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise ConfigError(f"{text!r} is not KEY=A,B,C", fix="write it like model.n_layers=2,4,8")
    try:
        read = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        raise ConfigError(f"{text!r}: the values cannot be read", fix="put quotes around each") from None
    if len(read) != len({repr(value) for value in read}):
        raise ConfigError(f"{text!r} has a value twice", fix="give every value once")
    return key.strip(), read
