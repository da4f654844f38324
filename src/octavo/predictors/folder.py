"""Folders of counted models: config.json, the arrays, and beside them the tokenizer, as every model has it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from octavo.errors import CheckpointError
from octavo.files import fsync_path, make_folder, write_json
from octavo.predictors.kinds import PREDICTORS
from octavo.predictors.predictor import NGramPredictor
from octavo.schema import no_imports

NATIVE = "octavo"


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
    listed = hf.get("files")
    for name, size in (listed if isinstance(listed, Mapping) else {}).items():
        path = folder / Path(str(name)).name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            said = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
            raise CheckpointError(f"{path} {said}", fix="count again, or restore the file")
    counted = kind.load(folder, config)
    if counted.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{folder}: the arrays are of {counted.vocab_size:,} token ids, config.json says {config.vocab_size:,}",
            fix="restore the files that belong together",
        )
    bos = hf.get("bos_token_id")
    return NGramPredictor(
        counted, max_seq_len=config.max_seq_len, bos=bos if isinstance(bos, int) else None, config=config
    )


def save(predictor: NGramPredictor, folder: str | Path, extra: Mapping[str, Any], add: Callable[[Path], None]) -> None:
    """Write config.json and the arrays; ``add`` puts further files into the folder it is given.

    The folder is made aside and renamed: a reader, or a run that is killed, never leaves half a model. Files in
    ``folder`` that no model brought stay.
    """
    folder = Path(folder)
    make_folder(folder.absolute().parent)
    aside, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    predictor.counted.save(aside)
    arrays = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
    add(aside)
    model = predictor.config.model_dump(mode="json") | {"vocab_size": predictor.vocab_size}
    hf = {"model_type": NATIVE, "architectures": ["NGramPredictor"], "model": model, "files": arrays, **extra}
    write_json(aside / "config.json", hf)
    for path in aside.iterdir():
        fsync_path(path)
    fsync_path(aside)
    if folder.exists():
        ours = {"config.json", "model.safetensors.index.json", *_listed(folder)}
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
    return sum((Path(folder) / name).stat().st_size for name in _listed(Path(folder)))


def _listed(folder: Path) -> set[str]:
    """The names of the arrays of the counted model in ``folder``; none where there is no such model."""
    try:
        return set(json.loads((folder / "config.json").read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()
