"""A store of passages: a folder that grows and shrinks without any training, and is searched.

    store.json        what kind of search, the number of the next passage, the vector of a text that is always the same
    passages-N.jsonl  {id, text, source}, one a line
    vectors-N.npy     their vectors, of a dense store

Every change writes new files aside and renames them, store.json last: it names the files that belong together.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from octavo.errors import ConfigError, DataError
from octavo.files import make_folder, sha256_file, write_atomic, write_json
from octavo.retrieval.index import Bm25, Dense, Embed, Index, unit
from octavo.schema import Config, one_of

FORMAT = 1
INDEXES: dict[str, type] = {"bm25": Bm25, "dense": Dense}
BATCH = 4096  # texts that are embedded at once
PROBE = "The model that made these vectors is known by that of this sentence; 0123456789."
SAME = 0.999  # the cosine of two vectors of it that one model made, in whatever number format


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text with its number, which is never given twice, and where it comes from."""

    id: int
    text: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found, and how well it fits."""

    passage: Passage
    score: float


class StoreConfig(Config):
    """How a store searches."""

    index: one_of(INDEXES) = Bm25.Config()  # type: ignore[valid-type]


class Store:
    """The passages of a folder.

    Args:
        folder: where it is kept.
        config: how it searches.
        embed: texts to vectors (n, D); needed by a dense store.
    """

    def __init__(self, folder: str | Path, config: StoreConfig, embed: Embed | None = None):
        self.folder, self.config, self.embed = Path(folder), config, embed
        self.passages: list[Passage] = []
        self.vectors = np.zeros((0, 0), np.float32)
        self.probe: list[float] | None = None
        self.next_id = 1
        self._index: Index | None = None
        if self.dense and embed is None:
            raise ConfigError("a dense store needs a model that embeds", fix="give the model, or search by words")

    @property
    def dense(self) -> bool:
        return isinstance(self.config.index, Dense.Config)

    @classmethod
    def create(cls, folder: str | Path, config: StoreConfig, embed: Embed | None = None) -> Store:
        """An empty store in a new folder.

        Raises:
            ConfigError: something is there already.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists and is not empty", fix="give another folder, or `octavo store add`")
        store = cls(folder, config, embed)
        make_folder(folder)
        store._save()
        return store

    @classmethod
    def open(cls, folder: str | Path, embed: Embed | None = None, *, check: bool = True) -> Store:
        """The store in a folder.

        Args:
            check: whether ``embed`` has to be the model that made the vectors; not before ``index_by``.

        Raises:
            ConfigError: there is none, or ``embed`` is another model than that which made its vectors.
            DataError: its files are damaged, or not of one another.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "store.json").read_text(encoding="utf-8"))
            config = StoreConfig.model_validate({"index": about["index"]})
            store = cls(folder, config, embed or (None if check else _nothing))
            store.next_id = int(about["next_id"])
            for name, digest in about["files"].items():
                if sha256_file(folder / Path(name).name) != digest:
                    raise DataError(f"{folder / name} is not what the store wrote", fix="restore it from a copy")
            lines = (folder / about["passages"]).read_text(encoding="utf-8").splitlines()
            store.passages = [Passage(**json.loads(line)) for line in lines]
            if store.dense:
                store.vectors = np.load(folder / about["vectors"], allow_pickle=False)
                store.probe = about.get("probe")
        except FileNotFoundError as error:
            if Path(error.filename or "").name == "store.json":
                raise ConfigError(f"{folder} is no store", fix="make one with `octavo store build`") from None
            raise DataError(f"{error.filename} is missing from the store", fix="restore it from a copy") from None
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            first = str(error).splitlines()[0]
            raise DataError(f"{folder / 'store.json'} does not make sense: {first}", fix="restore it") from None
        if check:
            store._check_probe()
        return store

    def _check_probe(self) -> None:
        """Whether the model at hand makes the vectors that the store's own made: its path alone does not say so."""
        if self.probe is None or self.embed is None:
            return
        now, then = unit(self.embed([PROBE]))[0], np.asarray(self.probe, np.float32)
        if now.shape != then.shape or float(now @ then) < SAME:
            raise ConfigError(
                f"the vectors of {self.folder} are of another model than {model_of(self.folder)} is now",
                fix=f"octavo store index {self.folder} --model MODEL",
            )

    def index_by(self, config: StoreConfig, embed: Embed | None = None) -> None:
        """Search in another way, or by another model: every passage is indexed anew."""
        other = Store(self.folder, config, embed)
        texts = [passage.text for passage in self.passages]
        self.config, self.embed, self.probe = other.config, other.embed, None
        self.vectors = self._embedded(texts) if self.dense else other.vectors
        self._save()

    def _embedded(self, texts: Sequence[str]) -> np.ndarray:
        assert self.embed is not None
        parts = [self.embed(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        return unit(np.concatenate(parts)) if parts else np.zeros((0, 0), np.float32)

    def add(self, texts: Iterable[tuple[str, str]]) -> list[Passage]:
        """Add (text, source) pairs; empty texts are left out. Returns the passages with their numbers."""
        new = [(text.strip(), source) for text, source in texts if text.strip()]
        made = [Passage(self.next_id + i, text, source) for i, (text, source) in enumerate(new)]
        if made and self.dense:
            vectors = self._embedded([passage.text for passage in made])
            if len(self.vectors) and self.vectors.shape[1] != vectors.shape[1]:
                raise ConfigError(
                    f"the store's vectors have {self.vectors.shape[1]} numbers, the model's {vectors.shape[1]}",
                    fix="use the model the store was built with",
                )
            self.vectors = np.concatenate([self.vectors, vectors]) if len(self.vectors) else vectors
        self.passages = [*self.passages, *made]
        self.next_id += len(made)
        self._save()
        return made

    def remove(self, *, ids: Sequence[int] = (), source: str | None = None) -> int:
        """Remove passages by number, or all of a source; returns how many there were."""
        gone = {p.id for p in self.passages if p.id in set(ids) or (source is not None and p.source == source)}
        keep = [i for i, passage in enumerate(self.passages) if passage.id not in gone]
        if self.dense:
            self.vectors = self.vectors[keep]
        self.passages = [self.passages[i] for i in keep]
        if gone:
            self._save()
        return len(gone)

    def search(self, query: str, k: int = 3) -> list[Hit]:
        """The passages that fit ``query`` best, at most ``k``."""
        if self._index is None:
            texts = [passage.text for passage in self.passages]
            if self.dense:
                assert self.embed is not None
                self._index = Dense(self.vectors, self.embed)
            else:
                self._index = Bm25(self.config.index, texts)  # type: ignore[arg-type]
        return [Hit(self.passages[i], score) for i, score in self._index.search(query, k)]

    def _save(self) -> None:
        before = {
            path.name for path in self.folder.glob("*.*") if re.fullmatch(r"(passages|vectors)-\d+\..*", path.name)
        }
        number = 1 + max((int(re.findall(r"\d+", name)[0]) for name in before), default=0)
        names = {"passages": f"passages-{number}.jsonl"}
        rows = (json.dumps(asdict(passage), ensure_ascii=False) for passage in self.passages)
        write_atomic(self.folder / names["passages"], "".join(f"{row}\n" for row in rows))
        if self.dense:
            if self.probe is None and self.embed is not None:
                self.probe = [round(float(x), 6) for x in unit(self.embed([PROBE]))[0]]
            names["vectors"] = f"vectors-{number}.npy"
            held = io.BytesIO()
            np.save(held, self.vectors, allow_pickle=False)
            write_atomic(self.folder / names["vectors"], held.getvalue())
        about: dict[str, Any] = {
            "format": FORMAT,
            "index": self.config.index.model_dump(mode="json"),  # type: ignore[attr-defined]
            "next_id": self.next_id,
            **({"probe": self.probe} if self.dense else {}),
            **names,
            "files": {name: sha256_file(self.folder / name) for name in names.values()},
        }
        write_json(self.folder / "store.json", about)
        for name in before:
            (self.folder / name).unlink(missing_ok=True)
        self._index = None


def model_of(folder: str | Path) -> str | None:
    """The model whose vectors a store compares; None of one that searches by words, or of no store."""
    try:
        index = json.loads((Path(folder) / "store.json").read_text(encoding="utf-8"))["index"]
        model = index["model"] if index["kind"] == "dense" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if model is None:
        return None
    beside = Path(folder) / model
    return os.path.normpath(beside) if beside.exists() or model.startswith(os.pardir) else model


def _nothing(texts: Sequence[str]) -> np.ndarray:
    return np.zeros((len(texts), 0), np.float32)


def named_from(folder: str | Path, model: str) -> str:
    """How a store names a model: by the way from its own folder, so that both may move, or be used from elsewhere."""
    there = Path(model)
    return os.path.relpath(there.resolve(), Path(folder).resolve()) if there.exists() else model


def cut(text: str, size: int = 800) -> Iterator[str]:
    """Passages of at most about ``size`` characters: whole paragraphs together as far as they fit, long ones by line.

    A line that is longer than ``size`` is cut at the last space, or where there is none at ``size``.
    """
    held = ""
    for piece in _pieces(text, size):
        if held and len(held) + len(piece) + 1 > size:
            yield held
            held = ""
        held = f"{held}\n{piece}" if held else piece
    if held:
        yield held


def _pieces(text: str, size: int) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip()
        for line in [paragraph] if len(paragraph) <= size else paragraph.split("\n"):
            while len(line) > size:
                at = line.rfind(" ", 1, size)
                at = at if at > size // 2 else size
                yield line[:at].strip()
                line = line[at:].strip()
            if line:
                yield line
