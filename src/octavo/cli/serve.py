"""``octavo serve``: the OpenAI-compatible endpoint and the chat page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.cli.generate import Model
from octavo.cli.store import looking_up
from octavo.errors import ConfigError

app = typer.Typer(rich_markup_mode="rich")


@app.command()
def serve(
    model: Model,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8000,
    host: Annotated[str, typer.Option(help="Addresses other than this machine's own need --api-key.")] = "127.0.0.1",
    api_key: Annotated[
        str | None, typer.Option(envvar="OCTAVO_API_KEY", show_envvar=True, help="Required from every client.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: the folder's name.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name under which this machine is reached; may be given several times.")
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests held at once; more must come back.")] = 128,
    max_sequences: Annotated[int, typer.Option(min=1, help="Texts decoded together; others wait.")] = 32,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of all texts held in memory. Default: what fits.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="A store (`octavo store`) whose passages are put before each question."),
    ] = None,
    passages: Annotated[int, typer.Option(min=1, help="Passages of the store for each question.")] = 3,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for answers to finish after a stop signal.")] = 20,
) -> int:
    """Serve a model over HTTP: OpenAI-compatible chat and completions with streaming, and a chat page.

    Open the printed address in a browser to talk to it. Only this machine can reach it unless --host says otherwise.

    Example: [bold]octavo serve runs/quickstart --port 8000[/bold]
    """
    from octavo.run import find_model

    find_model(model, files=True)  # before a port is taken
    if api_key is not None and not api_key.strip():
        raise ConfigError("the API key is empty", fix="give one with --api-key, or unset OCTAVO_API_KEY")
    from octavo.serve.listen import announce, bind, listen
    from octavo.serve.settings import ServeConfig

    config = ServeConfig(
        host=host,
        port=port,
        api_key=api_key,
        allow_hosts=tuple(allow_host or ()),
        max_requests=max_requests,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
        grace_seconds=grace,
    )
    with bind(config) as sock:
        import octavo
        from octavo.models.encoder_decoder import EncoderDecoder
        from octavo.serve.app import create_app

        lm: Any = octavo.load(model)
        if isinstance(lm.model, EncoderDecoder):
            raise ConfigError(
                f"{model} is an encoder-decoder, and what is served are conversations and continued texts",
                fix=f'octavo generate {model} "a source"',
            )
        served = name or model.resolve().name
        application = create_app(lm.model, lm.tokenizer, served, config, looking_up(store, passages))
        announce(served, sock, config)
        return listen(application, sock, config)
