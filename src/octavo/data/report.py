"""What a preparation read, kept and left out, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from octavo.report import words

EXAMPLES = 3


@dataclass
class Report:
    """Counts of documents and of UTF-8 bytes.

    Args:
        sources: the paths of the sources.
        documents, bytes: what was read.
        kept_documents, kept_bytes: what stays, after repair.
        repaired: documents whose text was changed by the Unicode repair.
        removed: per rule ``documents``, ``bytes`` and up to three ``examples``.
        by_source: per source the same counts.
        splits: per split its counts.
    """

    sources: list[str]
    documents: int = 0
    bytes: int = 0
    kept_documents: int = 0
    kept_bytes: int = 0
    repaired: int = 0
    removed: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_source: list[dict[str, int]] = field(default_factory=list)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = ("documents", "bytes", "kept_documents", "kept_bytes")
        self.by_source = self.by_source or [dict.fromkeys(names, 0) for _ in self.sources]

    def read(self, source: int, size: int, repaired: bool) -> None:
        """Count a document that was read."""
        self.documents += 1
        self.bytes += size
        self.repaired += repaired
        self.by_source[source]["documents"] += 1
        self.by_source[source]["bytes"] += size

    def keep(self, source: int, size: int) -> None:
        """Count a document that stays."""
        self.kept_documents += 1
        self.kept_bytes += size
        self.by_source[source]["kept_documents"] += 1
        self.by_source[source]["kept_bytes"] += size

    def wants_example(self, reason: str) -> bool:
        """Whether the rule has fewer examples than are shown."""
        return len(self.removed.get(reason, {}).get("examples", ())) < EXAMPLES

    def reject(self, reason: str, size: int, source: str, line: int, excerpt: str, detail: str) -> None:
        """Count a document that goes, and remember the first few of each rule."""
        entry = self.removed.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        entry["documents"] += 1
        entry["bytes"] += size
        if self.wants_example(reason):
            entry["examples"].append({"source": source, "line": line, "excerpt": excerpt, "detail": detail})

    def split(self, held_out: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> None:
        """Note the splits, from which documents are held out and how long each is."""
        for name, chosen in (("train", ~held_out), ("valid", held_out)):
            self.splits[name] = {"documents": int(chosen.sum()), "bytes": int(sizes[chosen].sum())}

    def to_dict(self) -> dict[str, Any]:
        """As written to ``report.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The inverse of ``to_dict``."""
        return cls(**values)

    def __str__(self) -> str:
        out = [f"read  {self.documents:>10,} documents {words.size(self.bytes):>10}"]
        out.append(f"kept  {self.kept_documents:>10,} documents {words.size(self.kept_bytes):>10}")
        for name, counts in self.splits.items():
            out.append(f"  {name:<6}{counts['documents']:>8,} documents {words.size(counts['bytes']):>10}")
        if self.repaired:
            out.append(f"Unicode repaired in {self.repaired:,} documents")
        for reason, entry in sorted(self.removed.items(), key=lambda item: -item[1]["documents"]):
            out.append(f"left out: {reason}  {entry['documents']:,} documents, {words.size(entry['bytes'])}")
            for example in entry["examples"]:
                place = f"{example['source']}:{example['line']}" if example["line"] else example["source"]
                why = f" ({example['detail']})" if example["detail"] else ""
                out.append(f"    {place}{why}  {words.printable(example['excerpt'])}".rstrip())
        return "\n".join(out)
