"""``octavo verify``: does a component keep every law, and whose numbers does it agree with?"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from octavo.laws.components import Component
    from octavo.laws.examine import Verdict
    from octavo.laws.parity import Parity

app = typer.Typer(add_completion=False)

WIDTHS = (18, 15, 40, 14, 14, 8, 7)


@app.command(
    epilog="Example:  octavo verify     octavo verify attention     octavo verify my_package.mine:MyMixer --slow"
)
def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Components by name, or classes of your own, package.module:Class. Default: all."),
    ] = None,
    slow: Annotated[bool, typer.Option("--slow", help="Also what takes seconds: torch.compile.")] = False,
    parity: Annotated[
        Path | None, typer.Option(help="What your own parity tests wrote (JSON lines), for your own components.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> int:
    """Run every law on components: gradients, causality, padding, packing, prefill + decode = full, determinism.

    Each stands in small models that put it to every use. Beside the laws stands the recorded agreement with an
    independent implementation. `proven` needs both; your own class is `unproven` until its laws pass. Exit code 1 if
    a law is broken.
    """
    from octavo.laws.components import components
    from octavo.laws.examine import HEADINGS, cells
    from octavo.laws.parity import from_lines, recorded

    found = [named(name) for name in names] if names else components()
    records = recorded()
    if parity is not None:
        from octavo.errors import DataError

        try:
            records |= from_lines(parity)
        except ValueError as error:
            raise DataError(str(error), fix="give the file that OCTAVO_PARITY named") from None
    if not as_json:
        typer.echo(_line([*HEADINGS, "standing"]))
    show = None if as_json else lambda one: typer.echo(_line([*cells(one), one.standing]))
    verdicts = examine_all(found, records, slow=slow, each=show)
    broken = [(one, use, result) for one in verdicts for use, result in one.broken]
    if as_json:
        typer.echo(json.dumps([one.plain() for one in verdicts], indent=1))
    else:
        for one, use, result in broken:
            typer.echo(f"{one.component.name}, {use}: {result}")
        proven = sum(one.standing == "proven" for one in verdicts)
        kept = sum(one.standing == "keeps the laws" for one in verdicts)
        typer.echo(f"{proven} proven, {kept} keep the laws, {len(verdicts) - proven - kept} unproven")
    return 1 if broken else 0


def examine_all(
    found: Sequence[Component],
    records: Mapping[str, list[Parity]] | None = None,
    *,
    slow: bool = False,
    each: Callable[[Verdict], None] | None = None,
) -> list[Verdict]:
    """The verdict on each, with progress on the error stream; ``each`` gets every verdict as it is there."""
    from octavo.laws.examine import examine
    from octavo.laws.parity import recorded

    records = recorded() if records is None else records
    verdicts = []
    for number, component in enumerate(found, 1):
        _progress(f"{number} of {len(found)}: {component.name}")
        verdicts.append(examine(component, records.get(component.kind, ()), slow=slow))
        _progress("")
        if each is not None:
            each(verdicts[-1])
    return verdicts


def named(name: str) -> Component:
    """The component of that name; of a user's own the module may stand in the present folder."""
    from octavo.errors import ConfigError
    from octavo.laws.components import find

    if ":" in name and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return find(name)
    except LookupError as error:
        what, _, fix = str(error.args[0]).partition("; ")
        raise ConfigError(what, fix=fix) from None
    except ValueError as error:
        raise ConfigError(str(error), fix="name it package.module:Class, and see CONTRIBUTING.md") from None


def _line(values: list[str]) -> str:
    cut = (value if len(value) <= width else f"{value[: width - 1]}…" for value, width in zip(values, WIDTHS))
    return "  ".join([*(value.ljust(width) for value, width in zip(cut, WIDTHS)), values[-1]]).rstrip()


def _progress(text: str) -> None:
    """One line that is overwritten, for people only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
