"""``octavo eval``: score a run or a model folder on held-out text, and on questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.data.shards import Shards
    from octavo.eval.answers import Question
    from octavo.eval.runner import Encoded

app = typer.Typer(rich_markup_mode="rich")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run or a model folder.")],
    data: Annotated[
        Path | None, typer.Option(help="Held-out text: files, a folder, or shards. Default: what the run held out.")
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="Text the n-gram baseline learns from. Default: what the run trained on.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSON lines of `messages` and `answer`, asked of a chat model.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="A .jsonl or .tsv of sources and targets, for an encoder-decoder. Default: what was kept."),
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Score documents until this many bytes.")] = 1_000_000,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens a window advances by on long documents. Default: half a context.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write all figures to this JSON file.")] = None,
) -> None:
    """Score a model on held-out text: bits per byte, perplexity and accuracy, next to Kneser-Ney n-grams.

    An encoder-decoder is scored by what it writes for sources: exact match and chrF.

    Example: [bold]octavo eval runs/quickstart[/bold]   ·   [bold]octavo eval my-model --data book.txt[/bold]
    """
    from octavo.eval import answers, metrics, runner
    from octavo.feed.sources import HELD_PAIRS
    from octavo.files import make_folder
    from octavo.language_model import load
    from octavo.models.encoder_decoder import EncoderDecoder
    from octavo.run import RunFolder, find_model
    from octavo.training.progress import Console

    find_model(model, files=True)
    kept = RunFolder(model).tuning_data_path / HELD_PAIRS
    if pairs is not None or (data is None and kept.is_file()):
        score_pairs(model, pairs or kept, out)
        return
    shards = model / "data"
    held_out = data or (shards / "valid" if (shards / "valid").is_dir() else None)
    counted = train or (shards / "train" if (shards / "train").is_dir() else None)
    if held_out is None:
        raise ConfigError(f"{model} holds no text back", fix="give some with --data PATH")
    config = runner.EvalConfig(max_bytes=max_bytes, stride=stride)
    asked = read_questions(questions) if questions else []
    if out is not None:
        make_folder(out.parent)
    lm = load(model)
    if isinstance(lm.model, EncoderDecoder):
        raise ConfigError(f"{model} is an encoder-decoder: it is scored on pairs", fix="give some with --pairs PATH")
    console = Console()
    documents = open_documents(held_out, lm.tokenizer)
    result = runner.evaluate(
        logits_fn=lm.logits,
        scorer=metrics.own_scorer(lm.model),
        max_seq_len=lm.max_seq_len,
        vocab_size=lm.model.vocab_size,
        tokenizer=lm.tokenizer,
        held_out=documents,
        n_bytes=documents.n_bytes,
        trained_on=None if counted is None else open_documents(counted, lm.tokenizer),
        config=config,
        questions=asked,
        generate_fn=answers.greedy(lm.model, lm.tokenizer) if asked else None,
        about={"model": str(model), "held_out": str(held_out), "trained_on": counted and str(counted)},
        out=out,
    )
    console.summary(runner.summary(result))


def score_pairs(model: Path, file: Path, out: Path | None) -> None:
    """What an encoder-decoder writes for the sources in a file, against the targets.

    Raises:
        ConfigError: another kind of model. DataError: a file that holds no pairs.
    """
    from octavo.data.pairs import PairsConfig, read
    from octavo.eval import runner
    from octavo.eval.pairs import judge_pairs
    from octavo.files import make_folder, write_json
    from octavo.language_model import load
    from octavo.models.encoder_decoder import EncoderDecoder
    from octavo.training.progress import Console

    held = read(PairsConfig(files=(str(file),)))
    if out is not None:
        make_folder(out.parent)
    lm = load(model)
    if not isinstance(lm.model, EncoderDecoder):
        raise ConfigError(f"{model} is no encoder-decoder: pairs say nothing of it", fix="give text with --data PATH")
    result = {"pairs": judge_pairs(lm, [pair.source for pair in held], [pair.target for pair in held])}
    if out is not None:
        write_json(out, {"about": {"model": str(model), "pairs": str(file)}, **result})
    Console().summary(runner.summary(result))


def open_documents(path: Path, tokenizer: Any) -> Shards | Encoded:
    """Shards as they are; anything else is read as text and encoded."""
    from octavo.eval.runner import Encoded

    if (path / "manifest.json").is_file():
        from octavo.data.shards import Shards

        shards = Shards.open(path)
        if shards.vocab_hash != tokenizer.hash:
            raise ConfigError(
                f"{path} was encoded with another tokenizer than the model's", fix="give the text itself with --data"
            )
        return shards
    from octavo.data import sources

    return Encoded((document.text for document in sources.read([str(path)])), tokenizer)


def read_questions(path: Path) -> list[Question]:
    """One question a line: ``{"messages": [...], "answer": "...", "kind": "..."}``."""
    import json

    from octavo.errors import DataError
    from octavo.eval.answers import Question

    if not path.is_file():
        raise ConfigError(f"{path} does not exist", fix="give a file of JSON lines with --questions")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"not JSON: {error}", fix="write one object a line", where=f"{path}:{number}") from None
        found.append(Question.read(row, f"{path}:{number}"))
    return found
