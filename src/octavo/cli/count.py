"""``octavo count``: parameters, state and training cost of a published shape, a recipe or a folder."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from octavo.cli.run import Overrides

if TYPE_CHECKING:
    from octavo.count import Count, Training
    from octavo.presets import Preset

app = typer.Typer(add_completion=False)
SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12, "P": 1e15}


@app.command(epilog="Example:  octavo count deepseek-v3     octavo count llama3-8b --tokens 1T --rate 400T")
def count(
    model: Annotated[
        str, typer.Argument(help="A preset, a recipe, a model folder or a run. Default: list presets.")
    ] = "",
    overrides: Overrides = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row. Default: max_seq_len, 4096 at most.")
    ] = None,
    dtype: Annotated[Literal["fp32", "bf16", "fp8"], typer.Option(help="What the decode state is kept in.")] = "bf16",
    tokens: Annotated[str, typer.Option(help="Tokens to train on, such as 14.8T.")] = "",
    rate: Annotated[str, typer.Option(help="FLOP/s that one device keeps up, such as 400T.")] = "",
    hours: Annotated[str, typer.Option(help="Device hours it took, such as 2.788M: the rate is worked out.")] = "",
    peak: Annotated[str, typer.Option(help="Peak FLOP/s of a device, to say what share the rate is.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count a model's total and active parameters, its decode state, and what training it costs.

    Nothing is loaded or allocated: 671 B parameters take seconds. Where a preset's training was published, its
    figures stand in for options that are not given.
    """
    from octavo.count import count as counted
    from octavo.count import shape, training
    from octavo.errors import ConfigError
    from octavo.presets import presets

    if not model:
        for name, preset in presets().items():
            typer.echo(f"{name:18} {preset.title}")
        return
    name, config = shape(model, overrides or [])
    known = presets().get(model)
    said = known.trained if known and not overrides else {}
    asked = {"rate": number(rate), "hours": number(hours), "peak": number(peak)}
    if asked["rate"] and asked["hours"]:
        raise ConfigError("--rate and --hours say the same thing twice", fix="give one of them")
    n = number(tokens) or said.get("tokens")
    if any(asked.values()) and not n:
        raise ConfigError("a training has a number of tokens", fix="give --tokens")
    found = counted(config, name, length or said.get("length"), dtype)
    made = None
    if n:
        if not any(asked.values()) and not tokens:
            asked |= {"hours": said.get("device_hours"), "peak": said.get("peak")}
        made = training(found, n, **asked, device=said.get("device", "device"))
    if as_json:
        typer.echo(json.dumps(_facts(found, made, known), indent=1))
    else:
        typer.echo("\n".join(lines(found, made, known, published=made is not None and not tokens and bool(said))))


def number(text: str) -> float | None:
    """``14.8T`` as a number; None for nothing.

    Raises:
        ConfigError: it is none.
    """
    from octavo.errors import ConfigError

    if not text:
        return None
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)([KMBGTP]?)", text.replace("_", "").replace(",", ""))
    if match is None or not 0 < float(match[1]) < 1e40:
        raise ConfigError(f"{text!r} is no number above zero", fix="write it like 14.8T, 300B, 2.788M or 3e23")
    return float(match[1]) * SCALES[match[2]]


def short(n: float) -> str:
    """With three digits and a unit: 671 B."""
    for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if n >= scale:
            return f"{n / scale:.3g}{unit}" if n < 999.5 * scale else f"{n / scale:,.0f}{unit}"
    return f"{n:,.0f}"


def size(n: float) -> str:
    """Bytes with a unit."""
    return short(n).replace(" B", " GB").replace(" M", " MB").replace(" K", " kB").replace(" T", " TB") + (
        " bytes" if n < 1000 else ""
    )


def lines(found: Count, made: Training | None, known: Preset | None, *, published: bool = False) -> list[str]:
    """The count for people."""
    rows = [("model", known.title if known else found.name), ("parameters", f"{found.parameters:,}")]
    if found.active != found.parameters:
        rows.append(("active", f"{found.active:,}, {found.active / found.parameters:.1%} of them"))
    rows.append(("tables", f"{found.tables:,} of them are looked up"))
    if found.further:
        rows.append(("further", f"{found.further:,} more in the modules for further tokens"))
    if known and known.published:
        said = known.published
        active = f", {short(said['active'])} active" if "active" in said else ""
        rows.append(("published", f"{said['parameters']:,.0f}{active} ({known.source})"))
    grows = f"{found.state_per_token:,} bytes a token" if found.state_per_token else "does not grow"
    constant = f", {found.state_constant:,} whatever the length" if found.state_constant else ""
    rows.append(("state", f"{grows}{constant}; {size(found.state)} at {found.length:,} ({found.dtype})"))
    if found.state_per_token and found.all_heads_per_token > found.state_per_token:
        times = found.all_heads_per_token / found.state_per_token
        rows.append(("", f"{times:.1f} times less than a key and a value for each head"))
    rows.append(
        ("training", f"{found.train_flops:.4g} FLOPs a token in rows of {found.length:,}, all of which each reads")
    )
    if made is not None:
        source = " (published)" if published else ""
        rows.append(("", f"{made.flops:.3g} FLOPs for {short(made.tokens)} tokens{source}"))
        if known and published and "flops" in known.trained:
            rows.append(("published", f"{known.trained['flops']:.3g} FLOPs"))
        if made.hours and made.rate:
            rows.append(("time", f"{short(made.hours)} {made.device} hours at {made.rate / 1e12:,.0f} TFLOP/s each"))
        if made.share and made.peak:
            rows.append(("", f"{made.share:.1%} of a peak of {made.peak / 1e12:,.0f} TFLOP/s"))
    return [f"{name:11}{value}".rstrip() for name, value in rows]


def _facts(found: Count, made: Training | None, known: Preset | None) -> dict[str, Any]:
    facts: dict[str, Any] = asdict(found)
    if made is not None:
        facts["training"] = {**asdict(made), "share": made.share}
    if known is not None:
        facts |= {"source": known.source, "published": dict(known.published)}
    return facts
