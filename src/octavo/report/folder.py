"""A run folder as the report sees it: whatever is there, and None for whatever is not (yet)."""

from __future__ import annotations

import json
import struct
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.report import metrics
from octavo.report.metrics import Metrics, number

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

TRAINING = ("pretrain", "tune")
SCORED = ("pairs", "labelled", "tagged")  # kinds of tuning data that are scored by themselves, without held-out text
MENDING = ("spans", "infilling")
LABELLED = ("labelled", "tagged")


def dig(value: Any, *path: str | int) -> Any:
    """``value[path[0]][path[1]]...``, None as soon as there is no such entry."""
    for key in path:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and -len(value) <= key < len(value):
            value = value[key]
        else:
            return None
    return value


def objects(value: Any) -> list[dict[str, Any]]:
    """The dictionaries in a list; [] for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


class Run:
    """What one run left behind; a file that is missing or damaged counts as not there.

    Args:
        path: the run folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = self._yaml("recipe.yaml")
        self.environment = self._json("environment.json")
        self.stages: dict[str, dict[str, Any]] = {
            name: entry for name, entry in self._json("stages.json").items() if isinstance(entry, dict)
        }
        self.scores = self._json("scores.json")
        self.data = self._json("data/report.json")
        self.shards = {split: self._json(f"data/{split}/manifest.json") for split in ("train", "valid")}
        self.training: dict[str, Metrics] = {stage: metrics.read(path / stage / "metrics.jsonl") for stage in TRAINING}

    @property
    def name(self) -> str:
        """The recipe's name, else the folder's."""
        return str(self.recipe.get("name") or self.path.resolve().name)

    def planned(self) -> list[str]:
        """The stages that the recipe asks for, in order, without the report itself."""
        sections = (("data", "data"), ("train", "pretrain"), ("tune", "tune"), ("eval", "eval"))
        names = [stage for section, stage in sections if self.recipe.get(section)]
        if not self.recipe.get("data") and self.told not in SCORED:
            names = [name for name in names if name != "eval"]
        names.insert(1 if "data" in names else 0, "tokenizer")
        if self.counted:
            names.insert(names.index("tokenizer") + 1, "count")
        return names if self.recipe else [name for name in self.stages if name != "report"]

    @property
    def told(self) -> str | None:
        """The kind of data that the model is tuned on."""
        kind = dig(self.recipe, "tune", "data", "kind")
        return kind if isinstance(kind, str) else None

    @property
    def writes_for_sources(self) -> bool:
        """Whether the model is an encoder-decoder, which writes a text for a text and continues none."""
        return self.told == "pairs" or dig(self.recipe, "train", "objective", "kind") in MENDING

    @cached_property
    def reads_both_ways(self) -> bool:
        """Whether the model is an encoder, which continues no text."""
        if not self.writes_for_sources and (causal := dig(self.recipe, "model", "causal")) is not None:
            return causal is False
        if self.model_path is None or self.writes_for_sources or self.counted:
            return False
        from octavo.errors import OctavoError
        from octavo.hub.folder import model_config, read_config  # torch takes a second to import

        try:
            return getattr(model_config(read_config(self.model_path)), "causal", True) is False
        except (OctavoError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    @property
    def counted(self) -> bool:
        """Whether the model is made by counting: a recipe that trains nothing has no other."""
        return bool(self.recipe) and not any(self.recipe.get(section) for section in ("train", "tune"))

    def seconds(self, stage: str) -> float | None:
        """How long a stage took; training counts the time before an interruption too."""
        known = [number(dig(self.stages, stage, "seconds"))]
        if stage in self.training:
            known.append(self.training[stage].seconds)
        return max((value for value in known if value is not None), default=None)

    @property
    def peak_memory(self) -> int | None:
        """The most bytes that the process held which finished the last stage; None if it was not noted."""
        peaks = [number(entry.get("peak_memory_bytes")) for entry in self.stages.values()]
        return max((int(peak) for peak in peaks if peak), default=None)

    @property
    def model_path(self) -> Path | None:
        """The final model's folder, else the pretrained one's."""
        return next((self.path / n for n in ("model", "base") if (self.path / n / "config.json").is_file()), None)

    @cached_property
    def parameters(self) -> int | None:
        """The exact number of parameters: the sizes of all tensors in the model's files, tied ones once."""
        if self.model_path is None:
            return None
        files = sorted(self.model_path.glob("*.safetensors"))
        try:
            return sum(map(_count_parameters, files)) if files else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
            return None

    @cached_property
    def state_bytes(self) -> int | None:
        """What one conversation of full length keeps in memory while it is decoded, in fp32."""
        if self.model_path is None:
            return None
        from octavo.errors import OctavoError
        from octavo.hub.folder import model_config, read_config  # torch takes a second to import
        from octavo.models.cost import cost
        from octavo.models.decoder import build

        try:
            return cost(build(model_config(read_config(self.model_path)), device="meta")).state_bytes
        except (OctavoError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            return None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The run's tokenizer."""
        from octavo.errors import OctavoError
        from octavo.tokenizer import load

        try:
            return load(self.path / "tokenizer")
        except (OctavoError, OSError, ValueError):
            return None

    def bits_per_byte(self) -> float | None:
        """The score on held-out text, else the last validation of the pretraining."""
        scored = number(dig(self.scores, "model", "bits_per_byte"))
        return scored if scored is not None else number(dig(self.training["pretrain"].valid, -1, "bits_per_byte"))

    def orders(self) -> dict[int, dict[str, Any]]:
        """The figures of the Kneser-Ney baseline by order."""
        found = dig(self.scores, "baseline", "orders")
        found = found if isinstance(found, dict) else {}
        usable = {k: v for k, v in found.items() if str(k).isdigit() and number(dig(v, "bits_per_byte")) is not None}
        return {int(order): usable[order] for order in sorted(usable, key=int)}

    def baselines(self) -> dict[str, float]:
        """Bits per byte of the trigram and of the best order, by the names they have in plots."""
        orders = {order: float(figures["bits_per_byte"]) for order, figures in self.orders().items()}
        if not orders:
            return {}
        best = min(orders, key=orders.__getitem__)
        named = {"trigram": orders[3]} if 3 in orders else {}
        return named if best == 3 else {**named, f"{best}-gram": orders[best]}

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def _yaml(self, name: str) -> dict[str, Any]:
        import yaml

        try:
            value = yaml.safe_load((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return value if isinstance(value, dict) else {}


def _count_parameters(path: Path) -> int:
    # The header of a safetensors file: its length in 8 bytes, then JSON with the shape of every tensor.
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"{path} is damaged")
        header = json.loads(file.read(length))
    return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
