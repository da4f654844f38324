"""``octavo convert``: a model of another program as a folder of safetensors, or a model from here as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.errors import CheckpointError, ConfigError

app = typer.Typer(rich_markup_mode="rich")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A GGUF, llama2.c or .pt file, a run, or a model folder.")],
    target: Annotated[Path, typer.Argument(help="The folder to make, or the file with --to gguf; it must not exist.")],
    to: Annotated[
        str | None,
        typer.Option(help="hf (a Hugging Face family), octavo, or gguf; default: hf if it can say the model."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder or file of the tokenizer, where the source comes without one.")
    ] = None,
    family: Annotated[str, typer.Option(help="Layout to write: llama, qwen2 ... or octavo.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or as in the source.")] = "saved",
    from_pickle: Annotated[
        bool, typer.Option("--from-pickle", help="Read a pickle (.pt, .bin), in a process of its own with limits.")
    ] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write what the codes of a quantised model stand for.")
    ] = False,
) -> None:
    """Write a model as a Hugging Face folder (safetensors), which everything here and elsewhere reads, or as GGUF.

    Example: [bold]octavo convert model.gguf my-model[/bold]   ·   [bold]octavo convert --from-pickle ckpt.pt gpt[/bold]
    ·   [bold]octavo convert runs/quickstart my-model.gguf --to gguf[/bold]
    """
    from octavo.hub import vocabulary
    from octavo.nn.quantized import quantized_modules
    from octavo.predictors.predictor import NGramPredictor

    if to not in (None, "hf", "octavo", "gguf"):
        raise ConfigError(f"--to {to} is not known", fix="give hf, octavo or gguf")
    if family != "auto" and to in ("octavo", "gguf"):
        raise ConfigError(f"--family {family} says nothing together with --to {to}", fix="leave one of them out")
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists, and nothing is overwritten", fix="give another name")
    given = None if tokenizer is None else vocabulary.load(tokenizer, {"bos": "<|bos|>"})
    # A Hugging Face folder, which is what is made by default, has no words for codes: those of a file become plain.
    lm = _open(source, given, dtype, from_pickle, codes=to in ("octavo", "gguf") and not dequantize)
    _settle_quantized(lm, to, dequantize and not lm.read_as)
    name = _write(lm, target, to, family)
    if isinstance(lm.model, NGramPredictor):
        typer.echo(f"{target}: {name}, counted, {lm.tokenizer.vocab_size:,} token ids")
        return
    n = sum(parameter.numel() for parameter in lm.model.parameters())
    n += sum(codes.d_in * codes.d_out * getattr(codes, "n", 1) for codes in quantized_modules(lm.model).values())
    kind = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
    typer.echo(f"{target}: {name}, {n:,} parameters in {kind}, {lm.tokenizer.vocab_size:,} token ids")
    if lm.read_as:
        typer.echo(f"{source}: {lm.read_as}")


def _settle_quantized(lm: Any, to: str | None, dequantize: bool) -> None:
    """Make the weights of a quantised model plain, if that is wanted; refuse what has no words for them."""
    from octavo.hub.small_weights import refuse
    from octavo.nn.quantized import quantized_modules
    from octavo.predictors.predictor import NGramPredictor
    from octavo.quantize.model import dequantized

    small = {} if isinstance(lm.model, NGramPredictor) else quantized_modules(lm.model)
    if dequantize and not small:
        raise ConfigError("the model is not quantised", fix="leave --dequantize out")
    if dequantize:
        lm.model = dequantized(lm.model)
    elif small and to == "hf":
        raise refuse("a Hugging Face family")


def _write(lm: Any, target: Path, to: str | None, family: str) -> str:
    if to == "gguf":
        from octavo.hub import gguf_write

        return f"GGUF, {gguf_write.write(lm.model, lm.tokenizer, target)}"
    if to == "hf" and family == "auto":
        from octavo.hub.folder import NATIVE, choose_family

        family = choose_family(lm.model.config)
        if family == NATIVE:
            raise ConfigError("no Hugging Face family can say this model", fix="give --to octavo")
    return write_aside(lm, target, "octavo" if to == "octavo" else family)


def _open(source: Path, tokenizer: Any, dtype: str, from_pickle: bool, codes: bool) -> Any:
    from octavo import language_model

    if not from_pickle:
        return language_model.load(source, dtype, tokenizer=tokenizer, codes=codes)
    from octavo.hub import formats, pickled

    if not source.exists():
        raise ConfigError(f"{source} does not exist", fix="give the checkpoint or its folder")
    if source.is_file() and formats.recognise(source) != formats.PICKLE:
        raise CheckpointError(f"{source} is no pickle", fix=f"octavo convert {source} TARGET")
    return language_model.from_foreign(pickled.read(source, tokenizer), source, dtype)


def write_aside(lm: Any, target: Path, family: str) -> str:
    """Save a model as ``target``, which appears whole or not at all; returns its family.

    Raises:
        ConfigError: ``target`` has come to exist meanwhile.
    """
    import os
    import secrets
    import shutil

    from octavo.files import fsync_path, make_folder

    make_folder(target.absolute().parent)
    aside = target.absolute().with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        name = lm.save(aside, family=family)
        try:
            os.rename(aside, target)  # an empty folder is replaced, anything else refuses
        except OSError:
            raise ConfigError(f"{target} exists, and nothing is overwritten", fix="give another name") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    fsync_path(target.absolute().parent)
    return name
