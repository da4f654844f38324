"""``octavo serve``: the OpenAI-compatible endpoint and the chat page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.cli.generate import Draft, Dtype, held_in
from octavo.cli.store import looking_up
from octavo.errors import ConfigError

app = typer.Typer(rich_markup_mode="rich")


@app.command()
def serve(
    models: Annotated[
        list[Path] | None,
        typer.Argument(help="Runs, model folders, pulled org/names, GGUF or llama2.c files. One engine each."),
    ] = None,
    named: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME=PATH", help="A model under a name of your own.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8000,
    host: Annotated[str, typer.Option(help="Addresses other than this machine's own need --api-key.")] = "127.0.0.1",
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="OCTAVO_API_KEY", show_envvar=True, help="Required from every client; several: any one."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call a single model. Default: the folder's name.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name under which this machine is reached; may be given several times.")
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests held at once; more must come back.")] = 128,
    max_sequences: Annotated[int, typer.Option(min=1, help="Texts a model decodes together; others wait.")] = 32,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of all texts of a model held in memory. Default: what fits.")
    ] = None,
    draft: Draft = None,
    dtype: Dtype = "auto",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Every answer is bit for bit the one it would be alone.")
    ] = False,
    store: Annotated[
        Path | None,
        typer.Option(help="A store (`octavo store`) whose passages are put before each question."),
    ] = None,
    passages: Annotated[int, typer.Option(min=1, help="Passages of the store for each question.")] = 3,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for answers to finish after a stop signal.")] = 20,
) -> int:
    """Serve models over HTTP: OpenAI-compatible chat, completions and embeddings with streaming, and a chat page.

    Open the printed address in a browser to talk to it. Only this machine can reach it unless --host says otherwise.
    Encoders answer /v1/embeddings only; /metrics is for Prometheus.

    Example: [bold]octavo serve runs/quickstart --port 8000[/bold] · [bold]… --model a=runs/a --model b=runs/b[/bold]
    """
    chosen = _chosen(models or [], named or [], name)
    keys = tuple(api_key or ())
    if not all(key.strip() for key in keys):
        raise ConfigError("the API key is empty", fix="give one with --api-key, or unset OCTAVO_API_KEY")
    from octavo.serve.listen import announce, bind, listen
    from octavo.serve.settings import ServeConfig

    config = ServeConfig(
        host=host,
        port=port,
        api_keys=keys,
        allow_hosts=tuple(allow_host or ()),
        max_requests=max_requests,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
        deterministic=deterministic,
        grace_seconds=grace,
    )
    with bind(config) as sock:
        from octavo.serve.app import serve_all
        from octavo.serve.metrics import Metrics

        metrics, look_up = Metrics(), looking_up(store, passages)
        services = [_service(called, path, config, draft, dtype, look_up, metrics) for called, path in chosen.items()]
        application = serve_all(services, config, metrics)
        announce(list(chosen), sock, config)
        return listen(application, sock, config)


def _chosen(models: list[Path], named: list[str], name: str | None) -> dict[str, Path]:
    """What clients call each model, and where it is; all of them are there.

    Raises:
        ConfigError: none, or two of one name.
    """
    from octavo.run import find_model

    if name is not None and len(models) + len(named) > 1:
        raise ConfigError("--name is for one model", fix="name each with --model NAME=PATH")
    listed = [(name or path.resolve().name, path) for path in models]
    for text in named:
        called, equals, path = text.partition("=")
        if not (called and equals and path):
            raise ConfigError(f"--model {text} is not NAME=PATH", fix="write --model chat=runs/quickstart")
        listed.append((name or called, Path(path)))
    if not listed:
        raise ConfigError("there is no model to serve", fix="name one: octavo serve runs/quickstart")
    for _, path in listed:
        find_model(path, files=True)  # before a port is taken
    chosen = dict(listed)
    if len(chosen) < len(listed):
        raise ConfigError("two models have the same name", fix="give each its own: --model NAME=PATH")
    return chosen


def _service(name: str, path: Path, config: Any, draft: str | None, dtype: str, look_up: Any, metrics: Any) -> Any:
    """A model, loaded.

    Raises:
        ConfigError: it does not continue texts and is no encoder, or ``draft`` does not fit it.
    """
    import octavo
    from octavo.cli.generate import drafter_of
    from octavo.models.encoder_decoder import EncoderDecoder
    from octavo.serve.embeddings import Vectors
    from octavo.serve.service import Service

    lm: Any = octavo.load(path, held_in(dtype))
    if isinstance(lm.model, EncoderDecoder):
        raise ConfigError(
            f"{path} is an encoder-decoder, and what is served are conversations and continued texts",
            fix=f'octavo generate {path} "a source"',
        )
    shape, said, vectors = getattr(lm.model, "config", None), lm.sentences, None
    if hasattr(shape, "d_model") and not (said is not None and said.refusal):
        how = {"pooling": said.pooling, "max_tokens": said.max_tokens} if said is not None else {}
        vectors = Vectors(lm.model, lm.tokenizer, **how)
    return Service(
        lm.model, lm.tokenizer, name, config, look_up,
        drafter=(lambda: drafter_of(lm, draft, config.max_sequences)) if draft else None,
        decodes=getattr(shape, "causal", True), vectors=vectors, metrics=metrics,
    )  # fmt: skip
