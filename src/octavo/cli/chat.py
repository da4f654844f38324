"""``octavo chat``: a conversation in the terminal, or one message a line from a script."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.generate import (
    Draft,
    Dtype,
    MaxNewTokens,
    MinP,
    Model,
    Repetition,
    Seed,
    Stop,
    Temperature,
    TemperatureEnd,
    TemperaturePath,
    TemperatureTokens,
    TopK,
    TopP,
    TypicalP,
    drafter_of,
    held_in,
    sampling,
)
from octavo.errors import ConfigError, OctavoError

if TYPE_CHECKING:
    from octavo.infer.drafts import Drafter
    from octavo.infer.engine import Engine
    from octavo.infer.sampling import SamplingConfig

app = typer.Typer(rich_markup_mode="rich")

HELP = "Enter sends. /reset begins anew, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."
DIM, BOLD, PLAIN = "\033[2m", "\033[1m", "\033[0m"


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="How the model should behave.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
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
    store: Annotated[
        Path | None, typer.Option(help="A store (`octavo store`) whose passages are put before each question.")
    ] = None,
    passages: Annotated[int, typer.Option(min=1, help="Passages of the store for each question.")] = 3,
    draft: Draft = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk to a model. It remembers the conversation; /reset forgets it, /exit leaves.

    From a script, each line of standard input is one message and only the answers are printed.

    Example: [bold]octavo chat runs/quickstart[/bold]   ·   [bold]echo "What is json.dumps?" | octavo chat MODEL[/bold]
    """
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
    import octavo
    from octavo.cli.store import looking_up

    look_up = looking_up(store, passages)
    lm: Any = octavo.load(model, held_in(dtype))
    drafter = drafter_of(lm, draft, 1)
    converse(lm.model, lm.tokenizer, config, system=system, name=model.resolve().name, look_up=look_up, drafter=drafter)


def converse(
    model: Any,
    tokenizer: Any,
    config: SamplingConfig,
    *,
    system: str | None = None,
    name: str = "",
    look_up: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
    drafter: Drafter | None = None,
) -> None:
    """Read messages and stream answers until the input ends.

    Args:
        look_up: changes what the model reads, not what is remembered of the conversation.
        drafter: guesses ahead; the answers have the same distribution.

    Raises:
        ConfigError: the model has no chat template; in a script also a conversation that has become too long.
    """
    from octavo.models.encoder_decoder import EncoderDecoder

    if isinstance(model, EncoderDecoder):
        raise ConfigError(
            f"{name or 'this model'} is an encoder-decoder: it writes for one text and holds no conversation",
            fix=f'octavo generate {name or "MODEL"} "a source"',
        )
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{name or 'this model'} has no chat template",
            fix="use octavo generate, or tune it on conversations first",
        )
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    engine = _engine(model, tokenizer, drafter)
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history at the prompt
        print(f"{BOLD}{name}{PLAIN}  {DIM}{HELP}{PLAIN}")
    for line in _lines(interactive):
        command = line.strip()
        if command == "/exit":
            return
        if command == "/reset":
            messages = list(opening)
            if interactive:
                print(f"{DIM}The conversation begins anew.{PLAIN}")
        elif command == "/help":
            print(HELP)
        elif command:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                answer = _answer(engine, look_up(asked) if look_up else asked, config, interactive)
            except OctavoError as error:
                if not interactive:
                    raise
                print(f"{error}\n{DIM}/reset begins anew.{PLAIN}")
            else:
                messages = [*asked, {"role": "assistant", "content": answer}]


def _lines(interactive: bool) -> Iterator[str]:
    """Messages as they are typed or piped; ends at the end of the input, and at Ctrl-C on an empty prompt."""
    if not interactive:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("\n› ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _engine(model: Any, tokenizer: Any, drafter: Drafter | None) -> Engine:
    """It remembers how the conversation began, so that only what is new of it is read."""
    from octavo.infer.engine import Engine
    from octavo.infer.request import EngineConfig

    return Engine(model, tokenizer, EngineConfig(max_sequences=1, max_tokens=2 * model.max_seq_len), drafter=drafter)


def _answer(engine: Engine, messages: list[dict[str, str]], config: SamplingConfig, interactive: bool) -> str:
    """Stream one answer to standard output and return it, or what there is of it after Ctrl-C."""
    from octavo.infer.generate import pieces

    ids = engine.tokenizer.render(messages, add_generation_prompt=True).ids
    said: list[str] = []
    reason = None
    try:
        for piece in pieces(engine.model, engine.tokenizer, [ids], config, on_full="stop", engine=engine):
            said.append(piece.text)
            reason = piece.finish_reason
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not interactive:
            raise
        reason = "stopped"
    ending = {"length": " [cut off at the limit]", "stopped": " [stopped]"}.get(reason or "", "")
    print(f"{DIM}{ending}{PLAIN}" if interactive and ending else "")
    return "".join(said)
