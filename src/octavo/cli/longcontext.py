"""``octavo longcontext``: how a trained model reads texts longer than those it was trained on, by every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.errors import ConfigError, did_you_mean

app = typer.Typer(rich_markup_mode="rich")

LENGTHS = "256,512,1024,2048,4096"


@app.command()
def longcontext(
    model: Annotated[Path, typer.Argument(help="A run or a model folder.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Long texts: files, a folder, or shards; repeatable. Default: what the run held out."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens to read, with commas between.")] = LENGTHS,
    methods: Annotated[str, typer.Option(help="Names with commas between. Default: all that there are.")] = "",
    trained: Annotated[
        int | None, typer.Option(min=2, help="Tokens the model was trained on. Default: its max_seq_len.")
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts at each length.")] = 8,
    trials: Annotated[int, typer.Option(min=0, help="Passkey trials at each length; 0 for none.")] = 16,
    choices: Annotated[int, typer.Option(min=2, help="Keys to choose from: chance is 1 / choices.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the passkeys.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write all figures to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw perplexity against length: a .png or .svg file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Read longer texts than a model was trained on, by every method that needs no training, and compare.

    Perplexity is that of the same last tokens at every length: only the text before them grows. Passkey: eight
    tokens of text (the cue) and sixteen from elsewhere (the key) are put somewhere into a text, at whose end the cue
    comes again. Found means that of several such keys it is the one that the text made likelier by most, against the
    cue alone; so any model of text can be asked, and one that remembers nothing finds one in --choices.
    Bytes are those of the decoding state. Weights stay as they are.

    Example: [bold]octavo longcontext runs/mine --lengths 256,1024,4096 --plot long.png[/bold]
    """
    names = known_methods(methods)
    wanted = read_lengths(lengths)
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise ConfigError(f"{plot} ends neither in .png nor in .svg", fix="end it in one of them")

    from octavo.cli.eval import open_documents
    from octavo.eval import long_context
    from octavo.files import make_folder, write_json
    from octavo.language_model import load
    from octavo.predictors.predictor import NGramPredictor
    from octavo.report import long_context as shown
    from octavo.run import find_model
    from octavo.training.progress import Console

    find_model(model, files=True)
    held_out = model / "data" / "valid"
    paths = data or ([held_out] if held_out.is_dir() else [])
    if not paths:
        raise ConfigError(f"{model} holds no text back", fix="give long texts with --data PATH")
    for path in (out, plot):
        if path is not None:
            make_folder(path.parent)
    lm = load(model)
    if isinstance(lm.model, NGramPredictor):
        raise ConfigError(f"{model} was counted: it reads every text in the same way", fix="give a trained model")
    plan = long_context.Plan(
        wanted, trained or lm.max_seq_len, names, texts=texts, trials=trials, choices=choices, seed=seed
    )
    special = lm.tokenizer.special
    documents = Together([open_documents(path, lm.tokenizer) for path in paths])
    console = Console("quiet" if as_json else "auto")
    with console.stage("read", 1, 1, f"{len(names)} methods, {len(wanted)} lengths"):
        bar = console.bar(plan.n_tokens, "token")

        def tick(n: int, method: str) -> None:
            bar.label = method
            bar.update(n)

        result = long_context.measure(
            lm.model, documents, plan, bos=special.bos, eos=special.eos, tick=tick,
            about={"model": str(model), "data": [str(path) for path in paths]},
        )  # fmt: skip
    if out is not None:
        write_json(out, result)
    if plot is not None:
        shown.draw(result, plot)
    typer.echo(json.dumps(result, indent=1) if as_json else "\n".join(shown.lines(result)))


class Together:
    """Several collections of documents as one."""

    def __init__(self, parts: list[Any]):
        self._places = [(part, i) for part in parts for i in range(part.n_documents)]
        self.n_documents = len(self._places)

    def document(self, index: int) -> Any:
        part, i = self._places[index]
        return part.document(i)


def known_methods(text: str) -> tuple[str, ...]:
    """The methods that a list of names with commas means; all of them for an empty one."""
    from octavo.eval.long_context import METHODS

    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"there is no method {name!r}", fix=did_you_mean(name, METHODS, thing="method"))
    return names or tuple(METHODS)


def read_lengths(text: str) -> tuple[int, ...]:
    """Numbers of tokens with commas between, in rising order."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"--lengths {text!r} is not a list of numbers", fix=f"write them like {LENGTHS}") from None
    if found[0] < 1:
        raise ConfigError(f"a length of {found[0]} tokens cannot be read", fix=f"write lengths like {LENGTHS}")
    return tuple(found)
