"""Folders of counted models: config.json, the arrays, and beside them the tokenizer, as every model has it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from octavo.errors import CheckpointError
from octavo.files import fsync_path, make_folder, write_json
from octavo.predictors.kinds import PREDICTORS, predictor
from octavo.predictors.predictor import NGramPredictor
from octavo.schema import no_imports

NATIVE = "octavo"
ARRAYS = "counts"


def is_counted(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a counted model."""
    model = hf.get("model")
    return hf.get("model_type") == NATIVE and isinstance(model, Mapping) and model.get("kind") in PREDICTORS


def load(folder: str | Path, hf: Mapping[str, Any]) -> NGramPredictor:
    """The predictor of a folder and its config.json.

    Raises:
        CheckpointError: the settings make no sense, or an array is missing or damaged.
    """
    folder, values = Path(folder), dict(hf["model"])
    kind = PREDICTORS[values["kind"]]
    try:
        with no_imports():
            config = kind.Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "model"
        raise CheckpointError(
            f"{folder / 'config.json'} does not make sense: {where}: {first['msg']}", fix="restore the file"
        ) from None
    if config.vocab_size is None:
        raise CheckpointError(f"{folder / 'config.json'} has no model.vocab_size", fix="restore the file")
    counted = kind.load(folder / ARRAYS, config)
    if counted.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{folder}: the arrays are of {counted.vocab_size:,} token ids, config.json says {config.vocab_size:,}",
            fix="restore the files that belong together",
        )
    bos = hf.get("bos_token_id")
    only_begins = isinstance(bos, int) and bos != hf.get("eos_token_id")
    return predictor(config, counted, bos if only_begins else None)


def save(model: NGramPredictor, folder: str | Path, extra: Mapping[str, Any], add: Callable[[Path], None]) -> None:
    """Write config.json and the arrays; ``add`` puts further files into the folder it is given.

    The folder is made aside and renamed: a reader, or a run that is killed, never leaves half a model. Files in
    ``folder`` that no model brought stay.
    """
    folder = Path(folder)
    make_folder(folder.absolute().parent)
    aside, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    (aside / ARRAYS).mkdir()
    model.counted.save(aside / ARRAYS)
    add(aside)
    settings = model.config.model_dump(mode="json") | {"vocab_size": model.vocab_size}
    hf = {"model_type": NATIVE, "architectures": ["NGramPredictor"], "model": settings, **extra}
    write_json(aside / "config.json", hf)
    for path in (*(aside / ARRAYS).iterdir(), *aside.iterdir(), aside):
        fsync_path(path)
    if folder.exists():
        ours = {"config.json", "model.safetensors.index.json", ARRAYS}
        for path in folder.iterdir():
            if path.name not in ours and path.suffix != ".safetensors" and not (aside / path.name).exists():
                path.rename(aside / path.name)
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        aside.rename(folder)
    fsync_path(folder.absolute().parent)


def array_bytes(folder: str | Path) -> int:
    """Bytes of the arrays in a folder."""
    return sum(path.stat().st_size for path in (Path(folder) / ARRAYS).iterdir())
