"""``octavo schema``: what a recipe may say, for editors."""

from __future__ import annotations

import json

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  octavo schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON Schema of recipes.

    An editor completes and checks a recipe whose first line is
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from octavo.config import schema as recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=1))
