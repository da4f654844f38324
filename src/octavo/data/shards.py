"""Token shards: the token stream of every document, memory-mapped, with a manifest that proves it whole.

The stream of a document is [bos] + tokens + [eos] (each if the tokenizer has it). One part is written for each file
of cleaned documents, by any number of processes; parts are renamed into place when complete, so an interrupted
writing goes on with the parts that are missing and ends in the same bytes.

    folder/tokens-00000.npy       uint16 or uint32, the token streams one after another
    folder/documents-00000.npy    int64 (n, 2): tokens (bos and eos included) and UTF-8 bytes of each document
    folder/manifest.json          written last
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from octavo.data import prepare
from octavo.data.workers import ordered_map
from octavo.errors import DataError
from octavo.files import sha256_file, write_atomic, write_json

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

FORMAT = 1
BATCH_BYTES = 1 << 20

Array = np.ndarray[Any, Any]


def write_shards(
    out: str | Path,
    split: str,
    tokenizer: str | Path,
    *,
    folder: str | Path | None = None,
    workers: int | None = None,
    progress: prepare.Progress | None = None,
) -> Shards:
    """Tokenise the cleaned documents of ``split`` below ``out``, or find that it is done already.

    Args:
        out: the folder given to ``clean_documents``.
        split: ``train`` or ``valid``.
        tokenizer: the tokenizer's folder (each worker loads it from there).
        folder: where the shards go; ``out/split`` by default.
        workers: processes; one for each processor by default.

    Raises:
        DataError: there are no cleaned documents, or none in this split.
    """
    folder = Path(folder) if folder else Path(out) / split
    documents, parts = prepare.segments(out)
    loaded = _tokenizer(str(tokenizer))
    seed = [FORMAT, split, loaded.hash, [f["sha256"] for f in documents["files"]]]
    held = np.concatenate([mask for _, mask in parts])
    fingerprint = hashlib.sha256(json.dumps(seed).encode() + held.tobytes()).hexdigest()
    manifest = prepare.read_json(folder / "manifest.json")
    if manifest is not None and manifest.get("fingerprint") == fingerprint:
        return Shards.open(folder, verify=False)
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder, fingerprint)
    chosen = [(i, path, mask) for i, (path, mask) in enumerate(parts) if (mask == (split == "valid")).any()]
    if not chosen:
        raise DataError(f"no document is in the {split} split", fix="change data.split.held_out")
    tasks = ((path, mask, split, str(tokenizer), str(folder), i, fingerprint) for i, path, mask in chosen)
    described, done = [], 0
    total = documents["report"]["splits"][split]["bytes"]
    for part in ordered_map(encode_part, tasks, workers):
        described.append(part)
        done += part["n_bytes"]
        if progress:
            progress(f"tokenise {split}", done, total)
    special = loaded.special
    kept = np.cumsum([0, *(s["kept_documents"] for s in documents["report"]["by_source"])])
    in_split = held == (split == "valid")
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "dtype": _dtype(loaded.vocab_size),
        "vocab_hash": loaded.hash,
        "vocab_size": loaded.vocab_size,
        "special": {"pad": special.pad, "bos": special.first, "eos": special.last},
        "n_documents": sum(p["n_documents"] for p in described),
        "n_tokens": sum(p["n_tokens"] for p in described),
        "n_bytes": sum(p["n_bytes"] for p in described),
        "max_id": max(p["max_id"] for p in described),
        "sources": [
            {"path": path, "documents": int(in_split[start:stop].sum())}
            for path, start, stop in zip(documents["report"]["sources"], kept[:-1], kept[1:], strict=True)
        ],
        "parts": [{"n_documents": p["n_documents"], "n_tokens": p["n_tokens"]} for p in described],
        "files": [file for p in described for file in p["files"]],
    }
    write_json(folder / "manifest.json", manifest)
    for leftover in folder.glob("part-*.json"):
        leftover.unlink()
    return Shards.open(folder, verify=False)


def _clear(folder: Path, fingerprint: str) -> None:
    """Remove what a preparation with another fingerprint, or a killed one, left half-done."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for leftover in folder.glob("*.tmp-*"):
        leftover.unlink()
    valid = set()
    for path in folder.glob("part-*.json"):
        part = prepare.read_json(path)
        if part is not None and part["fingerprint"] == fingerprint:
            valid |= {path.name, *(file["name"] for file in part["files"])}
    for pattern in ("part-*.json", "tokens-*.npy", "documents-*.npy"):
        for path in folder.glob(pattern):
            if path.name not in valid:
                path.unlink()


@functools.lru_cache(maxsize=2)
def _load_tokenizer(folder: str, stamp: tuple[Any, ...]) -> Tokenizer:
    from octavo.tokenizer import Tokenizer

    return Tokenizer.load(folder)


def _tokenizer(folder: str) -> Tokenizer:
    path = Path(folder)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return _load_tokenizer(folder, tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files))


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def encode_part(
    documents: Path, held: Array, split: str, tokenizer: str, folder: str, number: int, fingerprint: str
) -> dict[str, Any]:
    """Write one part and its description, unless they are there: the unit of work of a worker process."""
    record = Path(folder) / f"part-{number:05d}.json"
    if (part := prepare.read_json(record)) is not None and part["fingerprint"] == fingerprint:
        return part
    loaded = _tokenizer(tokenizer)
    dtype = np.dtype(_dtype(loaded.vocab_size))
    head = [np.array([i], np.int32) for i in (loaded.special.first,) if i is not None]
    tail = [np.array([i], np.int32) for i in (loaded.special.last,) if i is not None]
    pieces: list[Array] = [np.zeros(0, np.int32)]
    sizes: list[tuple[int, int]] = []
    for texts in _text_batches(prepare.part_documents(documents, held, split)):
        for text, ids in zip(texts, loaded.encode_batch(texts), strict=True):
            pieces += (*head, ids, *tail)
            sizes.append((len(head) + len(ids) + len(tail), len(text.encode())))
    tokens = _checked(np.concatenate(pieces), loaded.vocab_size).astype(dtype)
    table = np.array(sizes, dtype=np.int64)
    files = []
    for kind, array in (("tokens", tokens), ("documents", table)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        data = buffer.getvalue()
        name = f"{kind}-{number:05d}.npy"
        write_atomic(Path(folder) / name, data)
        files.append({"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    part = {
        "fingerprint": fingerprint,
        "n_documents": len(table),
        "n_tokens": len(tokens),
        "n_bytes": int(table[:, 1].sum()),
        "max_id": int(tokens.max(initial=0)),
        "files": files,
    }
    write_json(record, part)
    return part


def _text_batches(documents: Iterator[Any]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _checked(tokens: Array, vocab_size: int) -> Array:
    if tokens.max(initial=0) >= vocab_size:
        raise DataError(
            f"the tokenizer gave id {tokens.max()}, its vocabulary ends at {vocab_size - 1}",
            fix="use a tokenizer whose files belong together",
        )
    return tokens


class Shards:
    """The documents of a split as tokens.

    Args:
        offsets: int64 (n_documents + 1): where each document starts in the token stream, and its end.
        document_bytes: int64 (n_documents): UTF-8 bytes of each document's text.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], tables: list[Array]):
        self.folder, self.manifest = folder, manifest
        self.n_documents: int = manifest["n_documents"]
        self.n_tokens: int = manifest["n_tokens"]
        self.n_bytes: int = manifest["n_bytes"]
        self.vocab_size: int = manifest["vocab_size"]
        self.vocab_hash: str = manifest["vocab_hash"]
        self.special: dict[str, int | None] = manifest["special"]
        self.fingerprint: str = manifest["fingerprint"]
        table = np.concatenate(tables)
        self.offsets: Array = np.concatenate([[0], np.cumsum(table[:, 0])]).astype(np.int64)
        self.document_bytes: Array = np.ascontiguousarray(table[:, 1])
        self._part_starts = np.cumsum([0, *(p["n_tokens"] for p in manifest["parts"])])
        self._maps: list[Array | None] = [None] * len(manifest["parts"])
        self._opened: list[tuple[BinaryIO, int] | None] = [None] * len(manifest["parts"])

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Shards:
        """Open a folder of shards.

        Args:
            folder: what ``write_shards`` wrote.
            verify: hash every file and look at every token (about one second per GiB); without it only
                the manifest, the sizes and the headers are checked.

        Raises:
            DataError: the folder is not whole; the message names the file.
        """
        folder = Path(folder)
        manifest = prepare.read_json(folder / "manifest.json")
        if manifest is None or manifest.get("format") != FORMAT or "vocab_hash" not in manifest:
            raise DataError(f"no token shards in {folder}", fix="prepare the data again (octavo data prepare)")
        try:
            shards = cls._open(folder, manifest, verify)
            shards.source_ranges()
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise _damaged(folder / "manifest.json", f"does not describe shards ({error!r})") from error
        return shards

    @classmethod
    def _open(cls, folder: Path, manifest: dict[str, Any], verify: bool) -> Shards:
        for file in manifest["files"]:
            if Path(file["name"]).name != file["name"]:
                raise _damaged(folder, f"names a file outside itself: {file['name']}")
            path = folder / file["name"]
            size = path.stat().st_size if path.is_file() else -1
            if size != file["size"]:
                found = "is missing" if size < 0 else f"has {size:,} bytes, not {file['size']:,}"
                raise _damaged(path, found)
            if verify and sha256_file(path) != file["sha256"]:
                raise _damaged(path, "does not have the bytes that were written (SHA-256 differs)")
        if manifest["max_id"] >= manifest["vocab_size"]:
            raise _damaged(folder, f"holds id {manifest['max_id']} of a vocabulary of {manifest['vocab_size']}")
        tables = [_load(path, "int64", None) for path in cls._files(folder, manifest, "documents")]
        shards = cls(folder, manifest, tables)
        if shards.offsets[-1] != shards.n_tokens or len(shards.offsets) != shards.n_documents + 1:
            raise _damaged(folder, "has documents that do not add up to its tokens")
        for number in range(len(manifest["parts"])):
            part = shards._part(number)
            if verify and part.max(initial=0) >= shards.vocab_size:
                raise _damaged(folder, f"holds id {part.max()} of a vocabulary of {shards.vocab_size}")
        return shards

    @staticmethod
    def _files(folder: Path, manifest: dict[str, Any], kind: str) -> list[Path]:
        return [folder / f["name"] for f in manifest["files"] if f["name"].startswith(f"{kind}-")]

    def _part(self, number: int) -> Array:
        tokens = self._maps[number]
        if tokens is None:
            path = self._files(self.folder, self.manifest, "tokens")[number]
            tokens = _load(path, self.manifest["dtype"], self.manifest["parts"][number]["n_tokens"])
            file = open(path, "rb")  # noqa: SIM115 - as long as the map
            self._maps[number], self._opened[number] = tokens, (file, os.fstat(file.fileno()).st_size)
        self._check_whole(number)
        return tokens

    def _check_whole(self, number: int) -> None:
        """Say so where a file was cut: reading mapped bytes that are gone would kill the process without a word."""
        opened = self._opened[number]
        if opened is not None and (size := os.fstat(opened[0].fileno()).st_size) < opened[1]:
            path = self._files(self.folder, self.manifest, "tokens")[number]
            raise _damaged(path, f"was cut from {opened[1]:,} to {size:,} bytes while it was being read")

    def require(self, tokenizer: Tokenizer) -> None:
        """Refuse shards of another tokenizer, whose ids would mean other text.

        Raises:
            DataError: the hashes of the vocabularies differ.
        """
        if self.vocab_hash != tokenizer.hash:
            raise DataError(
                f"{self.folder} was written with tokenizer {self.vocab_hash[:12]} of {self.vocab_size:,} ids, "
                f"not with {tokenizer.hash[:12]} of {tokenizer.vocab_size:,}",
                fix=f"delete {self.folder} and prepare the data again, or put its tokenizer back",
            )

    def stream(self, start: int, stop: int) -> Array:
        """Tokens ``start`` to ``stop`` of all documents one after another; a view where they lie in one file."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.n_tokens}")
        number = int(np.searchsorted(self._part_starts, start, side="right")) - 1
        pieces = []
        while start < stop:
            first, end = int(self._part_starts[number]), int(self._part_starts[number + 1])
            pieces.append(self._part(number)[start - first : min(stop, end) - first])
            start, number = min(stop, end), number + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, self.manifest["dtype"])

    def document(self, i: int) -> Array:
        """The token stream of document ``i``, bos and eos included."""
        if not 0 <= i < self.n_documents:
            raise IndexError(f"document {i} of {self.n_documents}")
        return self.stream(int(self.offsets[i]), int(self.offsets[i + 1]))

    def source_ranges(self) -> list[tuple[str, range]]:
        """Each source's path and which documents came from it."""
        bounds = np.cumsum([0, *(s["documents"] for s in self.manifest["sources"])]).tolist()
        paths = [s["path"] for s in self.manifest["sources"]]
        return [(path, range(a, b)) for path, a, b in zip(paths, bounds[:-1], bounds[1:], strict=True)]


def _damaged(path: Path, what: str) -> DataError:
    folder = path if path.is_dir() else path.parent
    return DataError(f"{path} {what}", fix=f"delete {folder} and prepare the data again", kept="the source texts")


def _load(path: Path, dtype: str, length: int | None) -> Array:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise _damaged(path, f"is not an array file ({error})") from error
    shape_fits = array.ndim == 2 if length is None else array.shape == (length,)
    if array.dtype != np.dtype(dtype) or not shape_fits:
        raise _damaged(path, f"holds {array.dtype} {array.shape}, not what the manifest says")
    return array
