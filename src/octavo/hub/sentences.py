"""How the tokens of a text become its one vector, as the makers of an encoder say it beside its weights.

The layout is that of sentence-transformers: modules.json lists steps, 1_Pooling/config.json says which tokens count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError
from octavo.files import make_folder, write_json
from octavo.hub.limits import read_json
from octavo.models.heads import Pooling

MODULES, POOLING = "modules.json", "1_Pooling/config.json"
OURS: dict[str, Pooling] = {"mean": "mean", "cls": "first", "lasttoken": "last"}
OLD_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True)
class Sentences:
    """What stands in such a folder; ``refusal`` is why its vectors cannot be made here."""

    pooling: Pooling = "mean"
    normalise: bool = False
    max_tokens: int | None = None
    refusal: str = ""

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of ``octavo.infer.embed.embed``: those given, the others as the folder says.

        Raises:
            CheckpointError: the folder asks for what is not built here, and no pooling is given in its place.
        """
        if self.refusal and given.get("pooling") is None:
            raise CheckpointError(self.refusal, fix="choose with --pooling mean, first or last yourself")
        said = {"pooling": self.pooling, "normalise": self.normalise, "max_tokens": self.max_tokens}
        return said | {key: value for key, value in given.items() if value is not None}


def read(folder: Path) -> Sentences | None:
    """What a model folder says of texts as vectors; None if it says nothing.

    Raises:
        CheckpointError: a damaged file.
    """
    if not (folder / MODULES).is_file():
        return None
    try:
        listed = [(str(module["type"]), Path(module["path"]).name) for module in read_json(folder / MODULES)]
        steps = {kind.rpartition(".")[2]: folder / place for kind, place in listed}
        if set(steps) - {"Transformer", "Pooling", "Normalize"} or "Pooling" not in steps:
            return Sentences(refusal=f"{folder / MODULES} makes vectors by the steps {', '.join(steps)}")
        said = read_json(steps["Pooling"] / "config.json")
        modes = said.get("pooling_mode", [mode for key, mode in OLD_KEYS.items() if said.get(key)])
        modes = [modes] if isinstance(modes, str) else list(modes)
        if len(modes) != 1 or modes[0] not in OURS:
            return Sentences(refusal=f"{steps['Pooling']} asks for the pooling {', '.join(map(str, modes))}")
        text, more = _beside(folder, "sentence_bert_config.json"), _beside(folder, "config_sentence_transformers.json")
        if text.get("do_lower_case") or more.get("default_prompt_name"):
            return Sentences(refusal=f"{folder} changes texts before they are read (a prompt, or lower case)")
        limits = (text.get("max_seq_length"), _beside(folder, "tokenizer_config.json").get("model_max_length"))
        known = [limit for limit in limits if type(limit) is int and 0 < limit < 1 << 26]
        return Sentences(OURS[modes[0]], "Normalize" in steps, min(known, default=None))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder / MODULES} does not make sense: {error!r}", fix="restore the file") from None


def write(sentences: Sentences, folder: Path, width: int) -> None:
    """Say the same in another folder, for sentence-transformers too; what is refused here stays refused.

    Args:
        width: of the vectors.
    """
    steps = ["Transformer", "Pooling", *(["Normalize"] if sentences.normalise else [])]
    if sentences.refusal:
        write_json(folder / MODULES, [{"idx": 0, "name": "0", "path": "", "type": "another"}])
        return
    places = ["", *(f"{i}_{step}" for i, step in enumerate(steps) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{step}"}
        for i, (step, place) in enumerate(zip(steps, places, strict=True))
    ]
    make_folder(folder / "1_Pooling")
    mode = next(theirs for theirs, ours in OURS.items() if ours == sentences.pooling)
    write_json(
        folder / POOLING, {"word_embedding_dimension": width} | {k: mode == other for k, other in OLD_KEYS.items()}
    )
    if sentences.max_tokens is not None:
        limit = {"max_seq_length": sentences.max_tokens, "do_lower_case": False}
        write_json(folder / "sentence_bert_config.json", limit)
    write_json(folder / MODULES, modules)


def _beside(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).is_file() else {}
