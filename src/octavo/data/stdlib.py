"""The built-in corpus: the documentation topics, docstrings and source of the Python that runs us.

Real text on every machine, so nothing has to be downloaded. The same Python build gives the same documents in
the same order. Library modules are read as text and parsed, never imported; only the documentation topics and a
fixed list of modules without side effects are, because a docstring written in C can be had in no other way.

Docstrings appear once: where both parts are asked for, the source is given without them, so that a held-out
function's docstring is not in the training text a second time.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib
import inspect
import os
import re
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from octavo.data.document import Document
from octavo.schema import Config

Part = Literal["topics", "docstrings", "source"]

# Tests, vendored wheels, tables, generated or platform-specific files: text that teaches nothing about the library.
SKIPPED_FOLDERS = frozenset(
    "__pycache__ test tests idle_test idlelib lib2to3 site-packages dist-packages encodings lib-dynload pydoc_data "
    "_bundled msilib turtledemo __phello__".split()
)
SKIPPED_FILES = frozenset(
    "this.py antigravity.py sitecustomize.py usercustomize.py __hello__.py html/entities.py stringprep.py".split()
)
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "__phello__")

# Modules written in C and the public name of what they hold. Importing these, and those below that stand in where
# the library's source is not installed, does nothing but define names.
C_MODULES = {
    name: {"posix": "os"}.get(name, name.lstrip("_"))
    for name in (
        "builtins _collections _csv _functools _io _operator _random _signal _socket _stat _struct _weakref array "
        "atexit binascii cmath errno faulthandler fcntl gc itertools marshal math mmap posix pwd resource select sys "
        "time unicodedata zlib"
    ).split()
}
SAFE_MODULES = tuple(
    "abc argparse ast base64 bisect calendar cmd codecs collections colorsys configparser contextlib copy csv "
    "dataclasses datetime decimal difflib dis email enum fileinput fnmatch fractions functools getopt glob gzip "
    "hashlib heapq hmac html http inspect io ipaddress json keyword linecache locale logging mimetypes operator os "
    "pathlib pickle pprint queue random re sched shelve shlex shutil socket stat statistics string struct subprocess "
    "tempfile textwrap threading timeit token tokenize traceback types unittest urllib.parse uuid warnings weakref "
    "xml.dom zipfile".split()
)

# A literal longer than this at the top of a module is a table, not code.
TABLE_BYTES = 1500


class StdlibConfig(Config):
    """Which parts of the standard library to read, and how much.

    Args:
        parts: ``topics`` (the language reference as ``help()`` shows it), ``docstrings``, ``source``.
        max_bytes: an upper bound on the text (UTF-8) of all parts together; whole documents are chosen evenly.
        document_bytes: documents are cut between entries, paragraphs or definitions near this size.
        min_document_bytes: shorter ones are left out.
    """

    parts: tuple[Part, ...] = Field(default=("topics", "docstrings", "source"), min_length=1)
    max_bytes: int | None = Field(default=None, gt=0)
    document_bytes: int = Field(default=8192, ge=512)
    min_document_bytes: int = Field(default=200, ge=0)


@dataclass(slots=True)
class StdlibReport:
    """What was read: documents and UTF-8 bytes by part, and files or texts left out by reason."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented thing of the library.

    Args:
        module: the dotted name of the module, ``json.decoder``.
        name: the name inside the module, ``JSONDecoder.decode``; empty for the module itself.
        kind: what it is.
        signature: the parameters in parentheses without ``self``; empty where there are none to know.
        doc: the docstring, dedented.
        line: where it is defined; 0 if unknown.
        public: meant for users: no leading underscore anywhere, and in ``__all__`` where the module has one.
    """

    module: str
    name: str
    kind: Literal["module", "class", "function", "method"]
    signature: str
    doc: str
    line: int = 0
    public: bool = True

    @property
    def text(self) -> str:
        """The heading line, an empty line and the docstring."""
        prefix = "" if self.module == "builtins" else f"{self.module}."
        head = f"module {self.module}" if self.kind == "module" else f"{prefix}{self.name}{self.signature}"
        return f"{'class ' if self.kind == 'class' else ''}{head}\n\n{self.doc}"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A module of the library as text and as a syntax tree."""

    module: str
    text: str
    tree: ast.Module


def documents(
    config: StdlibConfig | None = None, report: StdlibReport | None = None, root: Path | None = None
) -> Iterator[Document]:
    """The corpus as documents: ``source`` is ``python-stdlib:MODULE``, ``meta["part"]`` names the part.

    Args:
        config: which parts; all of them by default.
        report: counts are added here as documents are yielded.
        root: the library's folder; where this Python keeps it by default.
    """
    config = config or StdlibConfig()
    report = report if report is not None else StdlibReport()
    kept = _all_documents(config, report, root)
    if config.max_bytes is not None:
        kept = iter(_choose(list(kept), config.max_bytes, report))
    for document in kept:
        report.documents[document.meta["part"]] += 1
        report.bytes[document.meta["part"]] += len(document.text.encode())
        yield document


def entries(root: Path | None = None, report: StdlibReport | None = None) -> Iterator[Entry]:
    """Every docstring of the library: Python modules in path order, then the modules written in C."""
    found = False
    for source in source_files(root, report):
        found = True
        yield from file_entries(source)
    for name in (*C_MODULES, *(() if found else SAFE_MODULES)):
        yield from live_entries(name)


def source_files(root: Path | None = None, report: StdlibReport | None = None) -> Iterator[SourceFile]:
    """The library's modules below ``root`` (where this Python keeps them) in path order, parsed."""
    root = root or Path(sysconfig.get_path("stdlib"))
    for path in _paths(root):
        name = path.relative_to(root).as_posix()
        try:
            with tokenize.open(path) as stream:
                text = stream.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            if report is not None:
                report.skipped["unreadable file"] += 1
            continue
        yield SourceFile(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."), text, tree)


def file_entries(source: SourceFile) -> Iterator[Entry]:
    """The docstrings of one parsed module: its own, its classes', functions' and methods'."""
    if doc := ast.get_docstring(source.tree):
        yield Entry(source.module, "", "module", "", doc.strip(), 1)
    yield from _tree_entries(source.module, source.tree, "", _exported(source.tree))


def live_entries(module_name: str) -> Iterator[Entry]:
    """The docstrings of an imported module: what is defined in it, one level into its classes."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return
    public = C_MODULES.get(module_name, module_name)
    if doc := inspect.getdoc(module):
        yield Entry(public, "", "module", "", doc)
    for name in sorted(vars(module)):
        thing = vars(module)[name]
        owner = getattr(thing, "__module__", None)
        if name.startswith("_") or owner not in (module_name, public) or not (callable(thing)):
            continue
        # `site` adds `exit`, `help` and the like to builtins; debuggers and test runners replace the hooks of sys.
        if (module is builtins and not isinstance(thing, type | type(len))) or name.endswith("hook"):
            continue
        is_class = inspect.isclass(thing)
        if doc := inspect.getdoc(thing):
            yield Entry(public, name, "class" if is_class else "function", _live_signature(thing), doc)
        for member in sorted(vars(thing)) if is_class else ():
            method = vars(thing)[member]
            doc = getattr(method, "__doc__", None)
            if not member.startswith("_") and inspect.isroutine(method) and isinstance(doc, str):
                yield Entry(public, f"{name}.{member}", "method", _live_signature(method), inspect.cleandoc(doc))


def _paths(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        return
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith(SKIPPED_PREFIXES))
        for file in sorted(files):
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if file.endswith(".py") and name not in SKIPPED_FILES and not file.startswith(SKIPPED_PREFIXES):
                yield path


def _exported(tree: ast.Module) -> set[str] | None:
    """The names in ``__all__`` where it is written out, else None."""
    names: set[str] = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            names |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return names or None


def _tree_entries(module: str, tree: ast.AST, prefix: str, exported: set[str] | None) -> Iterator[Entry]:
    hidden = module.startswith("_") or "._" in module
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If | ast.Try):
            yield from _tree_entries(module, node, prefix, exported)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = prefix + node.name
        is_class = isinstance(node, ast.ClassDef)
        doc = (ast.get_docstring(node) or "").strip()
        if doc:
            kind = "class" if is_class else "method" if prefix else "function"
            private = hidden or name.startswith("_") or "._" in name
            public = not private and (exported is None or name.partition(".")[0] in exported)
            yield Entry(module, name, kind, _signature(node, bool(prefix)), doc, node.lineno, public)
        if is_class:
            yield from _tree_entries(module, node, f"{name}.", exported)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> str:
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return _signature(inits[0], True) if inits else ""
    text = ast.unparse(node.args)
    if is_method:
        text = re.sub(r"^(self|cls)(, /)?(, |$)", "", text)
    return f"({text})"


def _live_signature(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except (ValueError, TypeError):
        return ""
    # A default that prints an address differs from run to run.
    if " at 0x" in text:
        return ""
    return re.sub(r"^\((self|cls|\$self|\$type)(, /)?(, |(?=\)))", "(", text)


def _all_documents(config: StdlibConfig, report: StdlibReport, root: Path | None) -> Iterator[Document]:
    def pieces(
        texts: Sequence[tuple[str, int]], name: str, part: Part, joint: str, head: str = ""
    ) -> Iterator[Document]:
        for text, line in _group(texts, config.document_bytes, joint):
            if len(text.encode()) < config.min_document_bytes:
                report.skipped[f"short {part}"] += 1
            else:
                yield Document(head + text, f"python-stdlib:{name}", line, {"part": part})

    if "topics" in config.parts:
        for name, text in _topics():
            yield from pieces([(p, 0) for p in text], name, "topics", "\n\n")
    wants_docstrings, wants_source = "docstrings" in config.parts, "source" in config.parts
    if not (wants_docstrings or wants_source):
        return
    found = False
    for package, files in groupby(source_files(root, report), key=lambda file: file.module.partition(".")[0]):
        found = True
        sources = list(files)
        if wants_docstrings:
            texts = [(entry.text, entry.line) for source in sources for entry in file_entries(source)]
            yield from pieces(texts, package, "docstrings", "\n\n\n")
        for source in sources if wants_source else ():
            blocks = _code_blocks(source, config.document_bytes, wants_docstrings)
            yield from pieces(blocks, source.module, "source", "\n\n\n", f"# {source.module}\n\n")
    if wants_docstrings:
        for name in (*C_MODULES, *(() if found else SAFE_MODULES)):
            texts = [(entry.text, 0) for entry in live_entries(name)]
            yield from pieces(texts, C_MODULES.get(name, name), "docstrings", "\n\n\n")
    if wants_source and not found:
        report.skipped["source not installed"] += 1


def _topics() -> Iterator[tuple[str, list[str]]]:
    """Each topic's paragraphs, short topics first: a long one is given without the sections it shares with them.

    A paragraph counts as shared together with a neighbour, so that short ones ("Note:") stay where they belong.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    seen: set[tuple[str, str]] = set()
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        text = [p.rstrip() for p in re.split(r"\n\s*\n", topics[name].strip("\n").expandtabs())]
        pairs = list(zip(text, text[1:], strict=False))
        shared = [pair in seen for pair in pairs]
        seen.update(pairs)
        yield (
            name,
            [
                p
                for p, before, after in zip(text, [False, *shared], [*shared, False], strict=True)
                if not (before or after)
            ],
        )


def _group(texts: Sequence[tuple[str, int]], size: int, joint: str) -> list[tuple[str, int]]:
    """Join neighbours up to ``size`` bytes; a short last group goes to the one before it."""
    groups: list[tuple[list[str], int]] = []
    held = 0
    for text, line in texts:
        n = len(text.encode())
        if not groups or held + n > size:
            groups.append(([], line))
            held = 0
        groups[-1][0].append(text)
        held += n + len(joint)
    if len(groups) > 1 and held < size // 8:
        groups[-2][0].extend(groups.pop()[0])
    return [(joint.join(parts) + "\n", line) for parts, line in groups]


def _code_blocks(source: SourceFile, size: int, without_docstrings: bool) -> list[tuple[str, int]]:
    """The source in its definitions, each with the comments and decorators above it; long classes by method."""
    lines = source.text.expandtabs().split("\n")
    cut = list(_table_lines(source.tree))
    if without_docstrings:
        cut += _docstring_lines(source.tree)
    for first, last, filler in cut:
        lines[first - 1 : last] = [filler] + [""] * (last - first)
    cuts = [*sorted({0} | _definition_lines(source.tree, lines, size)), len(lines)]
    blocks = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        text = "\n".join(line.rstrip() for line in lines[start:stop])
        # What the docstrings leave behind: no empty line after a colon, at most two anywhere.
        text = re.sub(r"\n{4,}", "\n\n\n", re.sub(r":\n\n+(?=[ ])", ":\n", text)).strip("\n")
        if text.strip():
            blocks.append((text, start + 1))
    return blocks


def _definition_lines(tree: ast.AST, lines: list[str], size: int) -> set[int]:
    """The 0-based lines at which definitions begin, those inside classes longer than ``size`` bytes too."""
    starts = set()
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        start = min([node.lineno] + [d.lineno for d in node.decorator_list]) - 1
        while start > 0 and lines[start - 1].lstrip().startswith("#"):
            start -= 1
        starts.add(start)
        if isinstance(node, ast.ClassDef) and sum(map(len, lines[node.lineno - 1 : node.end_lineno])) > size:
            starts |= _definition_lines(node, lines, size)
    return starts


def _table_lines(tree: ast.Module) -> Iterator[tuple[int, int, str]]:
    """First and last line of the long literals at the top of a module, and what to write instead."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict | ast.List | ast.Tuple | ast.Set):
            if len(ast.unparse(node)) > TABLE_BYTES:
                names = " = ".join(ast.unparse(target) for target in node.targets)
                yield node.lineno, node.end_lineno or node.lineno, f"{names} = ..."


def _docstring_lines(tree: ast.Module) -> Iterator[tuple[int, int, str]]:
    """First and last line of each docstring that stands on lines of its own, and what to write instead."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
            continue
        if isinstance(first.value.value, str) and first.lineno > getattr(node, "lineno", 0):
            alone = len(node.body) == 1 and not isinstance(node, ast.Module)
            yield first.lineno, first.end_lineno or first.lineno, " " * first.col_offset + "pass" if alone else ""


def _choose(found: list[Document], max_bytes: int, report: StdlibReport) -> list[Document]:
    """As many whole documents as fit, taken in the order of their hash, given back in their own order."""
    order = sorted(range(len(found)), key=lambda i: hashlib.sha256(found[i].text.encode()).digest())
    kept, total = set(), 0
    for i in order:
        n = len(found[i].text.encode())
        if total + n <= max_bytes:
            kept.add(i)
            total += n
    report.skipped["over max_bytes"] += len(found) - len(kept)
    return [found[i] for i in sorted(kept)]
