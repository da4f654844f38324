"""Whether text is fit to be trained on: duplicates, encoding, scripts, tokens, and what leaks into the held-out part.

Every check is a `Finding` with one line for people and its figures. Nothing is repaired or written here: the
measures are those of the preparation (`clean`, `duplicates`), applied to look only.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from octavo.data.clean import repair, text_hash
from octavo.data.document import Document
from octavo.data.duplicates import NearDuplicatesConfig, NearIndex, shingles, signature, unit_ids
from octavo.data.readers import Rejected, excerpt
from octavo.report import words

if TYPE_CHECKING:
    from octavo.data.shards import Shards
    from octavo.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]
Verdict = Literal["ok", "warn", "fail"]

VERDICTS: tuple[Verdict, ...] = ("ok", "warn", "fail")
EXAMPLES = 3
GRAM = 13
COPIED_SHARE = 0.8  # of its 13-grams: then a held-out text counts as a copy
FIRST_ROWS = 64

# From which share of the texts on a finding is a warning, and from which it spoils the training.
LIMITS: dict[str, tuple[float, float]] = {
    "exact duplicates": (0.01, 0.5),
    "near duplicates": (0.05, 0.5),
    "empty": (0.01, 0.5),
    "replacement characters": (0.001, 0.5),
    "repairable": (0.01, 1.1),
    "copies in the held-out part": (0.01, 0.5),
    "unknown tokens": (0.001, 0.1),
    "bad rows": (0.0, 1.1),
    "dropped rows": (0.01, 0.5),
    "out of turn": (0.01, 1.1),
    "empty turns": (0.01, 0.5),
    "equal conversations": (0.05, 0.5),
    "held out and trained": (0.001, 0.5),
    "no trained token": (0.01, 0.5),
    "answers cut off": (0.5, 1.1),
    "prompts that differ": (0.0, 0.1),
    "bos twice": (0.0, 0.0),
}


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        name: what was looked at.
        verdict: ``fail`` where it would spoil the training.
        text: the finding in one line.
        fix: one action, where something is wrong.
        figures: the numbers behind it.
        examples: places where it was seen.
    """

    name: str
    verdict: Verdict
    text: str
    fix: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The verdict over several findings."""
    return VERDICTS[max((VERDICTS.index(finding.verdict) for finding in findings), default=0)]


def of_share(name: str, n: int, of: int, fix: str = "", examples: Sequence[str] = (), what: str = "") -> Finding:
    """A finding about ``n`` of so many texts, judged by ``LIMITS``."""
    share = n / max(of, 1)
    warned, failed = LIMITS[name]
    verdict: Verdict = "fail" if n and share >= failed else "warn" if n and share >= warned else "ok"
    text = f"none of {of:,}" if not n else f"{n:,} of {of:,} ({words.percent(share, 1)})"
    fix = fix if verdict != "ok" else ""
    return Finding(name, verdict, f"{text}{what}", fix, {"count": n, "of": of, "share": share}, list(examples))


# ---- scripts ----

SCRIPTS = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HANGUL": "Hangul", "HIRAGANA": "Kana", "KATAKANA": "Kana"}


@cache
def script_of(char: str) -> str:
    """The script of a letter, "" for anything else.

    Read off the first word of its Unicode name, which is the script for nearly all letters. It says nothing about
    languages that share a script: English, French and Vietnamese are all Latin.
    """
    if not char.isalpha():
        return ""
    name = unicodedata.name(char, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    first = name.partition(" ")[0].partition("-")[0]
    return SCRIPTS.get(first, first.capitalize()) or "other"


def scripts(text: str) -> Counter[str]:
    """Letters of each script in a text."""
    found: Counter[str] = Counter()
    for char, n in Counter(text).items():
        if script := script_of(char):
            found[script] += n
    return found


# ---- documents ----


class HeldOut:
    """13-grams of held-out texts, and which of them are seen elsewhere.

    A gram is 13 words, or Chinese, Japanese and Korean characters, as the search for near duplicates counts them.
    Texts with fewer cannot be judged.
    """

    def __init__(self, texts: Iterable[str]):
        self.grams = [np.unique(grams(text)) for text in texts]
        self.known = np.unique(np.concatenate(self.grams)) if self.grams else np.zeros(0, np.uint64)
        self.seen = np.zeros(len(self.known), bool)

    def see(self, text: str) -> None:
        """Note the 13-grams of a text that is trained on."""
        found = grams(text)
        if len(self.known) and len(found):
            at = np.searchsorted(self.known, found).clip(max=len(self.known) - 1)
            self.seen[at[self.known[at] == found]] = True

    def finding(self) -> Finding:
        """How much of the held-out part stands in what is trained on."""
        judged = [found for found in self.grams if len(found)]
        shares = [float(self.seen[np.searchsorted(self.known, found)].mean()) for found in judged]
        copies = sum(share >= COPIED_SHARE for share in shares)
        share = float(self.seen.mean()) if len(self.seen) else 0.0
        what = f" texts stand in the training text; of all 13-grams {words.percent(share, 1)}"
        if short := len(self.grams) - len(judged):
            what += f"; {short:,} are too short to judge"
        fix = "switch data.clean.near_duplicates on, or hold out whole sources"
        finding = of_share("copies in the held-out part", copies, len(judged), fix, what=what)
        return Finding(**{**finding.__dict__, "figures": {**finding.figures, "gram_share": share, "too_short": short}})


def grams(text: str) -> Array:
    """The hashes of all runs of 13 units, in order; none for a shorter text."""
    ids = unit_ids(text)
    return shingles(ids, GRAM) if len(ids) >= GRAM else np.zeros(0, np.uint64)


class Documents:
    """Looks at documents one after another.

    Args:
        limit: look at so many; the others are only counted.
        held_out: in which of these they stand.
    """

    def __init__(self, limit: int, held_out: HeldOut | None = None):
        self.limit, self.held_out = limit, held_out
        self.n = self.bytes = self.longest = self.looked = self.empty = self.replaced = self.repairable = 0
        self.exact: dict[bytes, int] = {}
        self.near = NearIndex(NearDuplicatesConfig())
        self.places: list[str] = []
        self.near_places: list[str] = []  # of the documents in the index of near duplicates
        self.copies = self.nearly = 0
        self.examples: dict[str, list[str]] = {}
        self.letters: Counter[str] = Counter()
        self.main: Counter[str] = Counter()
        self.rejected: list[Rejected] = []
        self.n_rejected = 0

    def _example(self, name: str, text: str) -> None:
        known = self.examples.setdefault(name, [])
        if len(known) < EXAMPLES:
            known.append(words.printable(text))

    def add(self, item: Document | Rejected) -> None:
        """Look at the next one."""
        if isinstance(item, Rejected):
            self.n_rejected += 1
            self._example("unreadable", f"{item.source}:{item.line}: {item.reason}")
            return
        text, place = item.text, f"{item.source}:{item.line}" if item.line else item.source
        size = len(text.encode("utf-8", "surrogatepass"))
        self.n, self.bytes, self.longest = self.n + 1, self.bytes + size, max(self.longest, size)
        if self.looked >= self.limit:
            return
        self.looked += 1
        if not text.strip():
            self.empty += 1
            self._example("empty", place)
            return
        if "\ufffd" in text:
            self.replaced += 1
            self._example("replacement characters", f"{place}: {excerpt(text, text.index(chr(0xFFFD)) + 1)}")
        if repair(text) != text:
            self.repairable += 1
            self._example("repairable", place)
        found = scripts(text)
        self.letters.update(found)
        self.main[max(found, key=lambda name: (found[name], name)) if found else "no letters"] += 1
        if self.held_out is not None:
            self.held_out.see(text)
        self._duplicate(text, place)

    def _duplicate(self, text: str, place: str) -> None:
        key = text_hash(text)
        if key in self.exact:
            self.copies += 1
            self._example("exact duplicates", f"{place} equals {self.places[self.exact[key]]}")
            return
        self.exact[key] = len(self.places)
        self.places.append(place)
        marks = signature(text, self.near.config)
        twin = self.near.find(marks)
        if twin is not None:
            self.nearly += 1
            self._example("near duplicates", f"{place} is {twin[1]:.2f} like {self.near_places[twin[0]]}")
            return
        self.near.add(marks)
        self.near_places.append(place)

    def findings(self, *, cleaned: bool) -> Iterator[Finding]:
        """What was found; ``cleaned`` where the preparation has been over the texts and removed what it removes."""
        part = "" if self.looked == self.n else f"; the first {self.looked:,} are looked at"
        figures = {"documents": self.n, "looked_at": self.looked, "bytes": self.bytes, "longest_bytes": self.longest}
        text = f"{self.n:,} ({words.size(self.bytes)}), the longest {words.size(self.longest)}{part}"
        yield Finding("documents", "ok" if self.n else "fail", text, "" if self.n else "give more text", figures)
        if self.n_rejected:
            text = f"{self.n_rejected:,} rows or pieces cannot be read; training would stop at the first"
            fix = "correct them, set `encoding` of the source, or `on_bad_row: skip`"
            shown = self.examples.get("unreadable", [])
            yield Finding("unreadable", "fail", text, fix, {"count": self.n_rejected}, shown)
        by_cleaning = "" if cleaned else " (data.clean does it)"
        fixes = {
            "exact duplicates": f"remove them{by_cleaning}",
            "near duplicates": f"remove them{by_cleaning}",
            "empty": f"remove them{by_cleaning}",
            "replacement characters": "read the files in their own encoding (`encoding: gb18030` of the source)",
            "repairable": f"repair wrong decodings, control characters and Unicode forms{by_cleaning}",
        }
        counts = (self.copies, self.nearly, self.empty, self.replaced, self.repairable)
        for (name, fix), n in zip(fixes.items(), counts, strict=True):
            yield of_share(name, n, self.looked, fix, self.examples.get(name, []))
        yield self._scripts()
        if self.held_out is not None:
            yield self.held_out.finding()

    def _scripts(self) -> Finding:
        letters = sum(self.letters.values())
        shares = {name: n / letters for name, n in self.letters.most_common()} if letters else {}
        told = ", ".join(f"{name} {words.percent(share, 1)}" for name, share in list(shares.items())[:5])
        main = ", ".join(f"{name} {n:,}" for name, n in self.main.most_common(4))
        text = f"letters: {told or 'none'}; texts by their main script: {main or 'none'} (says no language)"
        return Finding("scripts", "ok", text, figures={"letters": shares, "documents": dict(self.main.most_common())})


# ---- tokens ----


def tokens(shards: Shards, tokenizer: Tokenizer, seq_len: int | None = None) -> Iterator[Finding]:
    """What the shards of a split hold, against the tokenizer that should have made them."""
    if shards.vocab_hash != tokenizer.hash:
        text = f"the shards were made by another tokenizer ({shards.vocab_hash[:12]}, not {tokenizer.hash[:12]})"
        yield Finding("ids", "fail", text, "prepare the data again")
        return
    counts = np.zeros(shards.vocab_size, np.int64)
    for start in range(0, shards.n_tokens, 1 << 22):
        part = shards.stream(start, min(start + (1 << 22), shards.n_tokens))
        counts += np.bincount(part, minlength=len(counts))[: len(counts)]
    yield Finding("ids", "ok", f"all {shards.n_tokens:,} below {shards.vocab_size:,}", figures={"ids": shards.n_tokens})
    yield from token_counts(counts, shards.n_bytes, np.diff(shards.offsets), tokenizer, seq_len)
    yield document_ends((shards.document(i) for i in range(min(FIRST_ROWS, shards.n_documents))), tokenizer)


def token_counts(
    counts: Array, n_bytes: int, lengths: Array, tokenizer: Tokenizer, seq_len: int | None
) -> Iterator[Finding]:
    """Figures of tokens.

    Args:
        counts: (V,) how often each id occurs.
        n_bytes: of the text.
        lengths: (documents,) in tokens.
    """
    special = np.array(sorted(tokenizer.special_ids), dtype=np.int64)
    text_tokens = int(counts.sum() - counts[special].sum())
    per_byte = text_tokens / max(n_bytes, 1)
    unused = int((counts == 0).sum())
    text = (
        f"{per_byte:.3f} a byte ({1 / per_byte if per_byte else 0:.2f} bytes each); "
        f"{unused:,} of {len(counts):,} ids never occur"
    )
    figures = {"tokens": int(counts.sum()), "tokens_per_byte": per_byte, "unused_ids": unused}
    poor = per_byte > 0.75 and len(counts) > 300  # a vocabulary of bytes has one for each
    fix = "train the tokenizer on this text" if poor else ""
    yield Finding("tokens", "warn" if poor else "ok", text, fix, figures)
    longest = int(lengths.max(initial=0))
    text = f"median {int(np.median(lengths)) if len(lengths) else 0:,} tokens, the longest {longest:,}"
    if seq_len is not None and len(lengths):
        text += f"; {words.percent(float((lengths > seq_len).mean()), 1)} are longer than a row of {seq_len:,}"
    mean = float(lengths.mean()) if len(lengths) else 0.0
    yield Finding("lengths", "ok", text, figures={"longest": longest, "mean": mean})
    if tokenizer.special.unk is not None:
        fix = "use a tokenizer that falls back to bytes (byte_bpe), or train it on this text"
        unknown = int(counts[tokenizer.special.unk])
        yield of_share("unknown tokens", unknown, text_tokens + unknown, fix)


def document_ends(documents: Iterable[Array], tokenizer: Tokenizer) -> Finding:
    """Whether documents begin with one bos and end with eos, so that the end of a text is learnt."""
    bos, eos = tokenizer.special.bos, tokenizer.special.eos
    streams = [np.asarray(document) for document in documents]
    doubled = [i for i, ids in enumerate(streams) if bos is not None and int((ids == bos).sum()) > 1]
    open_ = [i for i, ids in enumerate(streams) if eos is not None and (len(ids) == 0 or int(ids[-1]) != eos)]
    name, of = "stop token", f"the first {len(streams):,} documents"
    if doubled:
        text = f"bos stands twice in {len(doubled):,} of {of}"
        places = [f"document {i}" for i in doubled[:EXAMPLES]]
        return Finding(name, "fail", text, "prepare the data again", {"doubled": len(doubled)}, places)
    if eos is None:
        text = "the tokenizer has no end of text: the model will not learn where a text ends"
        return Finding(name, "warn", text, "use a tokenizer with eos")
    if open_:
        text = f"{len(open_):,} of {of} do not end with it"
        places = [f"document {i}" for i in open_[:EXAMPLES]]
        return Finding(name, "fail", text, "prepare the data again", {"open": len(open_)}, places)
    return Finding(name, "ok", f"{tokenizer.tokens[eos]} ends each of {of} and is trained")
