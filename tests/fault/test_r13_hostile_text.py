"""R13: whatever bytes a text or chat file holds, reading it gives clean documents or one error with file and line.

Each case is a file of some format, well formed and then mutated, or made to be a burden. No crash, no second of
processor time, no memory beyond a cap, and errors in the one form.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import zstandard
from boxed import SCALE, Box

SECONDS, MEBIBYTES = 1.0, 64
CASES = 3_000 * SCALE
SEED = 13
CORPUS = Path(__file__).parents[1] / "corpus" / "r13"


# ------------------------------------------------------------------------------------------- the child


def read(case: dict[str, Any]) -> str:
    """Read a file as a run does; every document must be text that can be cleaned."""
    if case["chat"]:
        import warnings

        from octavo.data import chat

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told = chat.read(chat.ChatConfig(paths=(case["path"],), on_bad_row=case["on_bad_row"]))
        for conversation in told:
            json.dumps(conversation.messages, ensure_ascii=False).encode()
            assert conversation.line >= 1 and conversation.source == case["path"]
        return f"{len(told)} conversations"
    from octavo.data.clean import CleanConfig, clean_text
    from octavo.data.document import Document
    from octavo.data.sources import SourceConfig, scan

    keys = ("path", "on_bad_row", "encoding_errors", "encoding")
    found = 0
    for _, item in scan([SourceConfig(document_bytes=1024, **{key: case[key] for key in keys})]):
        if isinstance(item, Document):
            assert "\0" not in item.text
            clean_text(item.text, CleanConfig())
            found += 1
        else:
            assert item.source == case["path"] and item.line >= 1 and item.reason
    return f"{found} documents"


# ------------------------------------------------------------------------------------------- the cases

ALPACA = {"instruction": "Say 3.", "input": "", "output": "3", "history": [["a", "b"]], "system": "Be brief."}
TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]
CALL = {"function": {"name": "f", "arguments": {"a": 1}}}
CALLS = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
SHARED = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "tools": '[{"a": 1}]'}
ROWS: list[Any] = [
    {"text": "row 1 第一行"}, {"text": "naïve café"}, ALPACA, {"messages": TURNS}, {"messages": CALLS}, SHARED,
    {"prompt": "a", "completion": "b"}, {"prompt": TURNS[:1], "completion": TURNS[1:]},
]  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, -1, 1e308, 10**400, "", "x", "\0", "\ud800", "\n\r\x1b[2J", [], [[]], {}, {"type": []}, {"role": {}},
    "x" * 3000, "f" * 40 + "\u2028", ["a", 3], {"": ""}, "[" * 200, "NaN", 0.1, [None], {"function": 3}, {"name": None},
]  # fmt: skip
RAW = [
    b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b'{"text": "\\ud800"}', b"\xef\xbb\xbf",
    b"\0", b"\xff\xfe", b'{"text": "a"}{"text": "b"}', b'{"text": "a"', b'"\\u12', b"{'text': 'a'}", b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd", b",", b"]", b"[", b"{}",
]  # fmt: skip
UNITS = [
    b"<", b"<!--", b"<!-- >", b"<![CDATA[", b"<![CDATA[ >", b"<![if >", b"<!doctype", b"<?", b"<? >", b"</", b"</a",
    b"</ >", b"<a ", b"<a x=", b'<a x="', b"<a x='>", b"<a x=\"'>", b"<a/", b"<script>", b"<script></scrip ", b"<svg>",
    b"</script>", b"<style><!--", b"<title>", b"&#", b"&a", b"&", b"&#x", b"<pre> ", b" \n", b"\t", b" ", b"\r",
    b"\x1b[0", b"a-", b"1,", b"\xc3", b"\xe4\xbd", b"\\", b'"', b"[", b"]", b"{", b'{"a":', b"- ", b"\xc3\xa2\xe2\x82",
    "\u0301".encode(), "你".encode(), b"<head>", b"</head>", b"<p", b"--", b"-->", b"]]>", b"<br/><", b"<td>",
]  # fmt: skip
NAMES = (
    "a.txt a.md a.html a.jsonl a.txt.gz a.jsonl.gz a.html.zst a.jsonl.zst c.jsonl c.json c.jsonl.gz c.json.zst"
).split()
ENCODINGS = ("utf-8",) * 6 + ("gb18030", "big5", "shift_jis", "latin-1", "utf-7", "iso2022_jp", "hz", "ascii")


def changed(value: Any, chance: random.Random) -> Any:
    """A row with one value somewhere replaced, removed or renamed."""
    value = json.loads(json.dumps(value))
    place, key = {"": value}, ""
    while isinstance(place[key], dict | list) and place[key] and chance.random() < 0.8:
        place = place[key]
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    action = chance.randrange(4)
    if action == 0 and isinstance(place, dict) and place.get("") is not value:
        place[chance.choice(["", "text\n", "txet", "role", "\0", "k" * 2000])] = place.pop(key)
    elif action == 1:
        del place[key]
    else:
        place[key] = chance.choice(VALUES)
    return place.get("", value) if isinstance(place, dict) and "" in place else value


def rows(chance: random.Random) -> list[bytes]:
    found = []
    for _ in range(chance.randint(1, 6)):
        kind = chance.randrange(10)
        if kind < 1:
            found.append(chance.choice(RAW))
        else:
            row = chance.choice(ROWS) if kind < 5 else changed(chance.choice(ROWS), chance)
            found.append(json.dumps(row, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass"))
    return found


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, cut out, put in or repeated."""
    out = bytearray(data)
    for _ in range(chance.randint(0, 3)):
        at = chance.randrange(len(out) + 1)
        action = chance.randrange(5)
        if action == 0 and at < len(out):
            out[at] ^= chance.randrange(1, 256)
        elif action == 1:
            del out[at : at + chance.randint(1, 12)]
        elif action == 2:
            out[at:at] = chance.choice([chance.randbytes(3), chance.choice(RAW), chance.choice(UNITS)])
        elif action == 3:
            out[at:at] = chance.choice(UNITS) * chance.choice([3, 50, 2000])
        else:
            del out[at:]
    return bytes(out)


def content(name: str, chance: random.Random) -> bytes:
    """The bytes of a file called ``name``, sound or not."""
    plain = name.removesuffix(".gz").removesuffix(".zst")
    kind = chance.randrange(10)
    if kind == 0:
        data = chance.randbytes(chance.randrange(300))
    elif kind == 1:  # one or two things many times: what an algorithm of n^2 would not survive
        data = b"".join(chance.choice(UNITS) for _ in range(2)) * chance.choice([100, 5000, 30_000])
    elif plain.endswith(".json"):
        data = b"[" + b",\n".join(rows(chance)) + chance.choice([b"]", b"", b"]]", b"] x", b",]"])
    elif plain.endswith(".jsonl"):
        data = chance.choice([b"\n", b"\r\n", b"\r", b""]).join(rows(chance))
    elif plain.endswith(".html"):
        data = b"".join(chance.choice([*UNITS, b"<p>text</p>", b"<body>", b"</svg>"]) for _ in range(40))
    else:
        data = "".join(
            chance.choice(["The cat. ", "\n\n", "你好。", "é", "\r\n", "x" * 50]) for _ in range(60)
        ).encode()
    data = mutated(data, chance)
    packed = data
    if name.endswith(".gz"):
        packed = gzip.compress(data, 1, mtime=0)
    elif name.endswith(".zst"):
        packed = zstandard.ZstdCompressor().compress(data)
    return mutated(packed, chance) if packed is not data and chance.random() < 0.3 else packed


def case_of(path: Path, chance: random.Random) -> dict[str, Any]:
    return {
        "path": str(path),
        "chat": path.name.startswith("c."),
        "on_bad_row": chance.choice(["error", "skip"]),
        "encoding_errors": chance.choice(["error", "replace", "skip"]),
        "encoding": chance.choice(ENCODINGS),
    }


def trouble(case: dict[str, Any], outcome: Any) -> str:
    """What is wrong with the outcome of a case."""
    found = outcome.trouble(SECONDS, MEBIBYTES)
    if not found and outcome.error:
        nothing = "no conversation" in outcome.error  # said of a file as a whole
        place = rf"\({re.escape(case['path'])}:\d+\)\. Fix: "
        if outcome.exit_code != 3 or not (re.search(place, outcome.error) or nothing) or len(outcome.error) > 2000:
            found = f"exit code {outcome.exit_code}, {outcome.error[:300]}"
    return found


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    harmless = []
    for name in NAMES:
        row = json.dumps({"text": "a", "prompt": "a", "completion": "b"}).encode()
        data = row if ".json" in name else b"<p>The cat</p>\n"
        packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(Path(name).suffix, bytes)(data)
        (folder / name).write_bytes(packed)
        sound = case_of(folder / name, random.Random(0)) | {"encoding": "utf-8"}
        harmless.append(sound)
    (folder / "ugly.txt").write_text("cafÃ© â€œquotedâ€\x9d " * 9, encoding="utf-8")  # what loads the repair of text
    harmless.append({**harmless[0], "path": str(folder / "ugly.txt")})
    with Box("test_r13_hostile_text:read", memory_bytes=512 << 20, seconds=20, first=harmless) as one:
        yield one


@pytest.mark.timeout(300 * SCALE)
def test_no_bytes_break_a_reader(box, tmp_path, record):
    chance = random.Random(SEED)
    failures, refused = [], 0
    for i in range(CASES):
        path = tmp_path / NAMES[i % len(NAMES)]
        path.write_bytes(content(path.name, chance))
        case = case_of(path, chance)
        outcome = box.ask(case)
        refused += bool(outcome.error)
        if found := trouble(case, outcome):
            path.rename(tmp_path / f"failed-{i}-{path.name}")
            failures.append(f"{i}, {path.name} {case['encoding']}: {found}")
    record("R13", CASES, failures, seed=SEED, refused=refused)


def test_what_once_went_wrong(box, tmp_path, record):
    failures = []
    files = [path for path in sorted(CORPUS.iterdir()) if path.suffix != ".encoding"]
    for path in files:
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        encoding = path.with_name(f"{path.name}.encoding")
        for on_bad_row in ("error", "skip"):
            case = case_of(copy, random.Random(0)) | {"on_bad_row": on_bad_row, "chat": path.name.startswith("chat")}
            case["encoding"] = encoding.read_text().strip() if encoding.exists() else "utf-8"
            if found := trouble(case, box.ask(case)):
                failures.append(f"{path.name}: {found}")
    record("R13", 2 * len(files), failures, attacks="corpus")


def test_nothing_many_times_is_a_burden(box, tmp_path, record):
    """One thing 30,000 times, alone or before one that closes nothing: what takes n^2 takes minutes."""
    behind = [b"", b"</script>", b">", b" x"]
    cases = [(unit, behind[i % 4]) for i, unit in enumerate(UNITS)]
    cases += [(b"<svg>", b"</script>"), (b"<object>", b"</head>"), (b"<pre>", b" "), (b"<!-- >", b"<![CDATA[ >")]
    failures, n = [], 0
    for i, (first, last) in enumerate(cases):
        for name in ("a.html", ("a.txt", "a.jsonl", "c.json")[i % 3]):
            path = tmp_path / name
            path.write_bytes((b"[" if name == "c.json" else b"") + first * 30_000 + last * 30_000)
            case = case_of(path, random.Random(0)) | {"encoding": "utf-8", "on_bad_row": "skip"}
            n += 1
            if found := trouble(case, box.ask(case)):
                failures.append(f"{name}, {first!r} and {last!r}: {found}")
        if len(failures) > 2:  # each may have taken as long as it could
            break
    record("R13", n, failures, attacks="repetition")


def test_what_is_no_file_in_a_folder_is_passed_over(box, tmp_path, record):
    """A pipe would be read for ever."""
    (tmp_path / "a.txt").write_text("The cat sat on the mat and was content with it.")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").mkdir()
    outcome = box.ask(case_of(tmp_path, random.Random(0)) | {"chat": False, "encoding": "utf-8"})
    found = outcome.crash or outcome.error or "" if outcome.result != "1 documents" else ""
    record("R13", 1, [found] if found else 0, attacks="pipes")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.html.gz", "c.json.gz", "c.jsonl.zst", "a.txt.zst"])
def test_a_small_file_that_unpacks_to_much_stays_small(name, box, tmp_path, record):
    """Megabytes in one line or one value: bounded memory, and an error or the documents of it."""
    data = b'[{"prompt": "' if name == "c.json.gz" else b""
    data += b"a" * (8_000_000 if ".txt" in name else 150_000_000)
    packed = gzip.compress(data, 1) if name.endswith(".gz") else zstandard.ZstdCompressor().compress(data)
    (tmp_path / name).write_bytes(packed)
    case = case_of(tmp_path / name, random.Random(0)) | {"encoding": "utf-8", "on_bad_row": "error"}
    outcome = box.ask(case)
    found = outcome.trouble(20.0, 32 if ".txt" in name else 256)
    if not found and not outcome.error and ".txt" not in name:
        found = f"was read: {outcome.result}"
    record("R13", 1, [found] if found else 0, attacks="bombs")
