"""``octavo generate``: continue a text. The sampling options are shared with ``octavo chat``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError

from octavo.errors import ConfigError, ConfigErrors

if TYPE_CHECKING:
    from octavo.infer.sampling import SamplingConfig

Draft = Annotated[
    str | None,
    typer.Option(
        help="Guess ahead: `lookup` (what the text said before), `module` (the model's own module of multi-token"
        " prediction), or a smaller model of the same vocabulary."
    ),
]

Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="What the weights are held in. auto: bf16 as saved where it is fast here, else fp32."),
]

app = typer.Typer(rich_markup_mode="rich")

Model = Annotated[Path, typer.Argument(help="A run, a model folder, a pulled org/name, or a GGUF or llama2.c file.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the most probable token, 1 is the model's own taste.")]
TopK = Annotated[int, typer.Option(help="Choose among the k most probable tokens; 0 among all.")]
TopP = Annotated[float, typer.Option(help="Choose among the most probable tokens that add up to this much.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens below this share of the best one's probability.")]
TypicalP = Annotated[float, typer.Option(help="Choose among tokens whose surprise is usual, up to this probability.")]
TemperatureEnd = Annotated[float | None, typer.Option(help="Anneal: the temperature moves to this one.")]
TemperatureTokens = Annotated[int, typer.Option(help="… over so many tokens.")]
TemperaturePath = Annotated[
    str, typer.Option(help="… in equal steps of it (`linear`) or of its logarithm (`geometric`).")
]
Repetition = Annotated[float, typer.Option(help="Above 1: avoid tokens that were there before.")]
MaxNewTokens = Annotated[int, typer.Option(help="Stop after this many tokens.")]
Seed = Annotated[int | None, typer.Option(help="Makes the same choices every time.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given several times.")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; - or none: standard input.")] = None,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    typical_p: TypicalP = 1.0,
    temperature_end: TemperatureEnd = None,
    temperature_tokens: TemperatureTokens = 64,
    temperature_path: TemperaturePath = "linear",
    repetition_penalty: Repetition = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    n: Annotated[int, typer.Option("--n", min=1, max=64, help="How many continuations.")] = 1,
    best_of: Annotated[
        int, typer.Option(min=1, max=64, help="Draw so many and print the best --n by mean log-probability.")
    ] = 1,
    beams: Annotated[int, typer.Option(min=1, max=64, help="Above 1: follow as many texts, print the best.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of beams: above 0 prefers long texts.")] = 1.0,
    infill: Annotated[str, typer.Option(help="What comes after a gap: write what stands between.")] = "",
    json_schema: Annotated[
        Path | None, typer.Option(help="A file with a JSON Schema: what is written is JSON and valid under it.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="What is written matches this, as a whole.")] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="A file with a Lark grammar (llguidance's dialect): what is written follows it.")
    ] = None,
    draft: Draft = None,
    dtype: Dtype = "auto",
) -> None:
    """Continue a text with a model; the text appears as it is made. An encoder-decoder writes its answer to it.

    With --beams nothing is drawn: the text of the highest probability that the search finds is printed, with --n
    the best n, and the options of drawing do not count. --infill is for models trained with fim. --draft makes the
    same texts in fewer passes; it guesses nothing where --json-schema, --regex or --grammar says what may be written.

    Example: [bold]octavo generate runs/quickstart "The json module"[/bold]   ·   [bold]… MODEL < start.txt[/bold]
    """
    if beams > 1 and (stop or repetition_penalty != 1):
        raise ConfigError("--beams knows neither --stop nor --repetition-penalty", fix="leave them out, or --beams")
    if beams > 1 and (best_of > 1 or json_schema or regex is not None or grammar):
        raise ConfigError("--beams draws nothing and follows no grammar", fix="leave the other options out, or --beams")
    if 1 < best_of < n:
        raise ConfigError(f"--n {n} of --best-of {best_of}", fix="ask for no more texts than are drawn")
    if n > beams > 1:
        raise ConfigError(f"--n {n} of --beams {beams}", fix="ask for no more texts than beams")
    config = sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        temperature_end=temperature_end,
        temperature_tokens=temperature_tokens,
        temperature_path=temperature_path,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    if prompt is None and sys.stdin.isatty():
        raise ConfigError("there is no text to continue", fix='give one: octavo generate MODEL "Once upon a time"')
    text = sys.stdin.read() if prompt in (None, "-") else str(prompt)

    schema = _json_file(json_schema) if json_schema else None
    lark = _text_file(grammar) if grammar else None

    import octavo
    from octavo.infer import constraints
    from octavo.infer import generate as decode
    from octavo.infer.beam import BeamConfig, beam_search
    from octavo.infer.infill import encode_gap
    from octavo.models.encoder_decoder import EncoderDecoder

    lm: Any = octavo.load(model, held_in(dtype))
    ids = encode_gap(lm.tokenizer, text, infill) if infill else lm.prompt_ids(text)
    text = "" if isinstance(lm.model, EncoderDecoder) else text
    if beams > 1:
        found = beam_search(
            lm.model, lm.tokenizer, [ids],
            BeamConfig(n_beams=beams, length_penalty=length_penalty, max_new_tokens=max_new_tokens),
        )[0]  # fmt: skip
        for number, beam in enumerate(found[:n], start=1):
            head = f"--- {number} ({beam.score:.4f})\n" if n > 1 else ""
            sys.stdout.write(f"{head}{text}{beam.text}{infill}\n")
        return
    constraint = constraints.follow(lm.tokenizer, json_schema=schema, regex=regex, grammar=lark)
    n_drawn = max(n, best_of)
    engine = engine_with(lm, draft, decode.room_for(lm.model, [ids] * n_drawn, config))
    if n_drawn == 1:
        sys.stdout.write(text)
        for piece in decode.stream(lm.model, lm.tokenizer, ids, config, constraint=constraint, engine=engine):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write(f"{infill}\n")
        return
    how = {"n_top": 0 if best_of > 1 else None, "constraint": constraint, "engine": engine}
    made = decode.generate(lm.model, lm.tokenizer, [ids] * n_drawn, config, **how)
    for number, completion in enumerate(decode.best(made, n) if best_of > 1 else made, start=1):
        head = f"--- {number}\n" if n > 1 else ""
        sys.stdout.write(f"{head}{text}{completion.text}{infill}\n")


def _text_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", fix="give a text file") from None


def _json_file(path: Path) -> Any:
    try:
        return json.loads(_text_file(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}", fix="give a file with a JSON Schema") from None


def engine_with(lm: Any, draft: str | None, config: Any) -> Any:
    """An engine for a model, with the drafter that ``--draft`` names.

    Raises:
        ConfigError: the draft model has another vocabulary, or the model has no module.
    """
    from octavo.infer.engine import Engine

    return Engine(lm.model, lm.tokenizer, config, drafter=drafter_of(lm, draft, config.max_sequences))


def drafter_of(lm: Any, draft: str | None, n_slots: int) -> Any:
    """What ``--draft`` names: nothing, what the text said before, the model's own module, or a model.

    Raises:
        ConfigError: the model has another vocabulary, or no module.
    """
    from octavo.infer.drafts import ModelDraft, ModuleDraft, PromptLookup

    if draft is None or draft == "lookup":
        return PromptLookup() if draft else None
    if draft == "module":
        return ModuleDraft(lm.model, n_slots=n_slots)
    import octavo

    small: Any = octavo.load(draft, "decode")
    if small.tokenizer.hash != lm.tokenizer.hash:
        raise ConfigError(
            f"--draft {draft} reads another vocabulary than the model", fix="draft with a model of the same tokenizer"
        )
    return ModelDraft(small.model, n_slots=n_slots)


def held_in(dtype: str) -> str:
    """What ``octavo.load`` is asked for where tokens are decoded."""
    return "decode" if dtype == "auto" else dtype


def sampling(**settings: Any) -> SamplingConfig:
    """The sampling settings of a command line.

    Raises:
        ConfigErrors: one line for each option out of its range.
    """
    from octavo.infer.sampling import SamplingConfig

    try:
        return SamplingConfig(**settings)
    except ValidationError as invalid:
        raise ConfigErrors(map(_explain, invalid.errors())) from None


def _explain(error: Mapping[str, Any]) -> ConfigError:
    rule = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if not error["loc"]:  # of several options together
        return ConfigError(rule, fix="choose other values")
    option = "--" + str(error["loc"][0]).replace("_", "-")
    return ConfigError(f"{option} = {error['input']!r}: {rule}", fix="choose another value")
