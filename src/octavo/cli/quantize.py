"""``octavo quantize``: a model with small weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.errors import ConfigError

app = typer.Typer(rich_markup_mode="rich")


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="A run, a model folder, or a file that octavo reads.")],
    out: Annotated[Path, typer.Option(help="The folder to make, or the file with --to gguf; it must not exist.")],
    scheme: Annotated[
        str, typer.Option(help="int8, int4, int8-dynamic, fp8, fp8-e5m2 or fp8-blocks; see docs/quantize.md.")
    ] = "int8",
    group: Annotated[
        int | None, typer.Option(help="Inputs that share a scale: 32, 64, 128, or 0 for whole rows.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="The head: same (like the other products), int8, or kept (as it is).")
    ] = None,
    to: Annotated[
        str, typer.Option(help="octavo (a folder), or gguf (a file for llama.cpp): int8 and int4.")
    ] = "octavo",
    calibrate: Annotated[
        list[Path] | None, typer.Option(help="Text that weights are solved against (GPTQ); may be given again.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of calibration text that are read.")] = 8192,
    eval_text: Annotated[
        Path | None, typer.Option("--eval", help="Text to score before and after; not the calibration text.")
    ] = None,
    eval_bytes: Annotated[int, typer.Option(min=1, help="Score this many bytes of it.")] = 20_000,
) -> None:
    """Store a model's weight products in 8 or 4 bits. What is made is read by generate, chat, eval and octavo.load.

    Example: [bold]octavo quantize runs/quickstart --scheme int4 --calibrate book.txt --eval other.txt --out
    my-int4[/bold]   ·   [bold]octavo quantize MODEL --scheme int4 --to gguf --out my.gguf[/bold]
    """
    from octavo import language_model
    from octavo.cli.convert import write_aside
    from octavo.quantize.model import quantize as quantized
    from octavo.quantize.scheme import scheme_of
    from octavo.quantize.text import ROW_TOKENS, calibration_rows
    from octavo.training.progress import Console

    chosen = scheme_of(scheme, group=group, head=head)
    if to not in ("octavo", "gguf"):
        raise ConfigError(f"--to {to} is not known", fix="give octavo or gguf")
    if to == "gguf" and scheme not in ("int8", "int4"):
        raise ConfigError(f"GGUF has no words for {scheme}", fix="give --scheme int8 or int4, or leave --to out")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists, and nothing is overwritten", fix="give another name")
    for path in (*(calibrate or ()), *([eval_text] if eval_text else ())):
        if not path.exists():
            raise ConfigError(f"{path} does not exist", fix="give a text file or a folder of them")
    lm = language_model.load(model, "saved", codes=False)
    network, console = lm.network, Console()
    rows = None
    if calibrate:
        length = min(ROW_TOKENS, lm.max_seq_len)
        rows = calibration_rows(_texts(calibrate), lm.tokenizer, max(tokens, length), length)
    figures = {"scheme": f"{scheme}{f', {len(rows) * len(rows[0]):,} tokens of calibration' if rows else ''}"}
    before = _score(lm, eval_text, eval_bytes) if eval_text else None
    with console.bar(None, "product", "quantize") as bar:
        lm.model = quantized(network, chosen, rows, on_progress=lambda done, _: bar.update(1))
    after = _score(lm, eval_text, eval_bytes) if eval_text else None
    if to == "gguf":
        from octavo.hub import gguf_write

        gguf_write.write(lm.model, lm.tokenizer, out)
    else:
        write_aside(lm, out, "octavo")
    figures["size"] = f"{_megabytes(network):,.1f} MB to {_megabytes(lm.model):,.1f} MB"
    if before is not None and after is not None:
        change = after["bits_per_byte"] / before["bits_per_byte"] - 1
        figures["bits per byte"] = f"{before['bits_per_byte']:.4f} to {after['bits_per_byte']:.4f} ({change:+.2%})"
        figures["scored"] = f"{after['tokens']:,} tokens of {eval_text}"
    console.summary(figures, title=str(out))


def _texts(paths: list[Path]) -> list[str]:
    from octavo.data import sources

    return [document.text for document in sources.read([str(path) for path in paths])]


def _score(lm: Any, path: Path, n_bytes: int) -> dict[str, Any]:
    """Figures of the first ``n_bytes`` of a text."""
    text = "\n\n".join(_texts([path])).encode()[:n_bytes].decode(errors="ignore")
    return lm.score(text)


def _megabytes(model: Any) -> float:
    from octavo.hub.small_weights import stored_tensors

    tensors = [*model.parameters(), *stored_tensors(model).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
