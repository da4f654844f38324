"""Chat templates from strangers, run in a box: no way to Python's inside, and bounded work, time and output.

Jinja's immutable sandbox forbids attributes that begin with an underscore and changes to its inputs. On top: only
the filters, tests and methods that chat templates use; every loop round, call and piece of output is paid for from
a budget; nothing grows past it.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from octavo.errors import DataError

MAX_TEMPLATE_CHARS = 200_000
MAX_DEPTH = 100
BASE_STEPS, STEPS_PER_MESSAGE = 100_000, 1_000
BASE_CHARS, CHARS_PER_INPUT_CHAR = 4_000_000, 32
BASE_SECONDS, SECONDS_PER_MESSAGE = 0.4, 0.002
FILTERS = (
    "abs bool capitalize count d default dictsort e escape first float groupby indent int items join last length list"
    " lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum title tojson"
    " trim unique upper"
).split()
METHODS = {
    str: "capitalize count endswith find index isalnum isalpha isdigit islower isnumeric isspace isupper join lower"
    " lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines"
    " startswith strip swapcase title upper".split(),
    dict: "get items keys values copy".split(),
    list: "count index copy".split(),
    tuple: "count index".split(),
}
METHODS_OTHER = ("first", "last", "index", "index0", "revindex", "revindex0", "length", "previtem", "nextitem")


class BudgetError(jinja2.TemplateError):
    """The template did more than any honest one does."""


class _Budget:
    """What one rendering may still spend."""

    def __init__(self, n_messages: int, input_chars: int):
        self.steps = BASE_STEPS + STEPS_PER_MESSAGE * n_messages
        self.chars = self.max_chars = BASE_CHARS + CHARS_PER_INPUT_CHAR * input_chars
        self.seconds = BASE_SECONDS + SECONDS_PER_MESSAGE * n_messages
        self._stop = time.thread_time() + self.seconds

    def step(self, n: int = 1) -> None:
        before, self.steps = self.steps, self.steps - n
        if self.steps < 0:
            raise BudgetError("the template makes too many steps")
        if before >> 7 != self.steps >> 7 and time.thread_time() > self._stop:
            raise BudgetError(f"the template takes longer than {self.seconds:.1f} s")

    def text(self, n: int) -> None:
        self.step()
        self.chars -= n
        if self.chars < 0:
            raise BudgetError(f"the template makes more than {self.max_chars} characters")

    def value(self, value: Any, depth: int = 0) -> int:
        """Pay for writing out ``value`` in full; return its length in characters, roughly."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if value.bit_length() > 512:
                raise BudgetError("a number in the template is too large")
            return 20
        if isinstance(value, (list, tuple, set, frozenset, Mapping)):
            if depth > MAX_DEPTH:
                raise BudgetError("a list in the template is nested too deeply")
            parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            total = 2
            for part in parts:
                self.step()
                total += self.value(part, depth + 1) + 2
                if total > self.max_chars:
                    raise BudgetError(f"the template makes more than {self.max_chars} characters")
            return total
        return 16


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: what the assistant wrote; its place in the text is noted."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        box: _Box = self.environment  # type: ignore[assignment]
        # A character that neither template nor input contains; Template.render takes it out and notes the place.
        return f"{box.mark}{text}{box.mark}"


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")


class _Box(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%", "//", "/", "-"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # folding constants would do work before there is a budget
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=self._finalize,
            cache_size=0,
        )
        self.budget = _Budget(0, 0)
        self.mark = ""
        self.constant_chars = 0
        known = dict(self.filters)
        self.filters = {name: known[name] for name in FILTERS if name in known}
        self.filters |= {"tojson": self._tojson, "replace": self._replace, "join": self._join, "indent": self._indent}
        self.filters |= {"octavo_loop": self._loop, "octavo_pay": self._pay, "octavo_concat": self._concat}
        self.filters |= {"string": self._string, "bool": bool, "safe": lambda value: value}
        self.filters |= {"round": self._round}
        names = {"range": self._range, "dict": lambda *a, **k: dict(*a, **k), "namespace": _Namespace}
        self.globals = {**names, "raise_exception": _raise, "strftime_now": _strftime_now}

    # -- what may be reached

    def wrap_str_format(self, value: Any) -> None:
        """``str.format`` is not offered at all: its widths are a way to any amount of memory."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, names in METHODS.items():
            if isinstance(obj, kind):
                return attr in names or (kind is dict and not callable(value))
        return not callable(value) or attr in ("cycle", "changed", *METHODS_OTHER)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = __self.budget
        budget.step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "replace" and len(args) >= 2:
            return __self._replace(owner, *args)
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            return __self._join(args[0], owner)
        if isinstance(__obj, jinja2.runtime.Macro):
            budget.text(__self.constant_chars)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            budget.text(len(result))
        elif isinstance(result, (list, dict)):
            budget.value(result)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        if operator == "**":
            raise jinja2.exceptions.SecurityError("the operator ** is not allowed in a chat template")
        if operator == "%" and isinstance(left, str):
            if re.search(r"\*|\d{4}", left):
                raise jinja2.exceptions.SecurityError("a width in % formatting is too large")
            self.budget.value(right)
        if operator == "*":
            for thing, times in ((left, right), (right, left)):
                if isinstance(thing, (str, list, tuple)) and isinstance(times, int):
                    self.budget.text((len(thing) + 1) * max(int(times), 0))
        self.budget.value(left) if not isinstance(left, str) else None
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str):
            self.budget.text(len(result))
        else:
            self.budget.value(result)
        return result

    # -- what is paid for

    def _finalize(self, value: Any) -> Any:
        self.budget.text(self.budget.value(value))
        return value

    def _loop(self, values: Any, cost: int) -> Iterator[Any]:
        for value in values:
            self.budget.text(cost)
            yield value

    def _pay(self, value: Any) -> Any:
        self.budget.value(value)
        return value

    def _concat(self, parts: tuple[Any, ...]) -> str:
        self.budget.text(sum(self.budget.value(part) for part in parts))
        return "".join(map(str, parts))

    def _string(self, value: Any) -> str:
        self.budget.text(self.budget.value(value))
        return str(value)

    def _range(self, *args: int) -> range:
        values = range(*args)
        if len(values) > self.budget.steps:
            raise BudgetError(f"range of {len(values)} in the template is too long")
        return values

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self._string(text), str(old), str(new)
        limit = -1 if count is None else int(count)
        times = text.count(old) if limit < 0 else min(text.count(old), limit)
        self.budget.text(len(text) + times * len(new))
        return text.replace(old, new, limit)

    def _join(self, values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        if attribute is not None:
            values = [self.getitem(value, attribute) for value in values]
        parts = []
        for value in values:
            self.budget.text(self.budget.value(value) + len(d))
            parts.append(str(value))
        return d.join(parts)

    def _round(self, value: float, precision: int = 0, method: str = "common") -> float:
        if not 0 <= precision <= 30:
            raise jinja2.TemplateError("round takes 0 to 30 digits")
        scale = 10**precision
        return round(value, precision) if method == "common" else getattr(math, method)(value * scale) / scale

    def _indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        fill = width if isinstance(width, str) else " " * min(int(width), 1000)
        lines = self._string(text).splitlines() or [""]
        self.budget.text(sum(map(len, lines)) + (len(fill) + 1) * len(lines))
        out = [line if not (blank or line) else fill + line for line in lines]
        return "\n".join(out if first else [lines[0], *out[1:]])

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
            raise jinja2.TemplateError("indent of tojson must be a number from 0 to 16")
        self.budget.text(self.budget.value(value))
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        self.budget.text(len(text))
        return text

    # -- reading the source

    def _parse(self, source: str, name: Any, filename: Any) -> Any:
        tree = super()._parse(source, name, filename)
        self.constant_chars = _constant_chars(tree)
        return _meter(tree)


def _constant_chars(node: Any) -> int:
    return sum(len(data.data) for data in node.find_all(jinja2.nodes.TemplateData))


def _meter(node: Any, depth: int = 0) -> Any:
    """Put a toll on every loop, every literal list and every ``~`` below ``node``."""
    if depth > 4 * MAX_DEPTH:
        raise jinja2.TemplateSyntaxError("the template is nested too deeply", 1)
    nodes = jinja2.nodes
    for field, value in list(node.iter_fields()):
        if isinstance(value, list):
            setattr(node, field, [_meter(v, depth + 1) if isinstance(v, nodes.Node) else v for v in value])
        elif isinstance(value, nodes.Node):
            setattr(node, field, _meter(value, depth + 1))

    def toll(name: str, inner: Any, *args: Any) -> Any:
        return nodes.Filter(inner, name, list(args), [], None, None, lineno=node.lineno, environment=node.environment)

    if isinstance(node, nodes.For):
        node.iter = toll("octavo_loop", node.iter, nodes.Const(1 + _constant_chars(node)))
    elif isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return toll("octavo_pay", node)
    elif isinstance(node, nodes.Concat):
        return toll("octavo_concat", nodes.Tuple(node.nodes, "load", lineno=node.lineno, environment=node.environment))
    return node


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 100 or re.search(r"%[^a-zA-Z%]*\d", format):
        raise jinja2.exceptions.SecurityError("strftime_now takes a plain format")
    return datetime.now().strftime(format)


class Template:
    """A compiled chat template.

    Raises:
        DataError: the source is too long or not Jinja.
    """

    def __init__(self, source: str):
        if len(source) > MAX_TEMPLATE_CHARS:
            raise DataError(
                f"the chat template has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}",
                fix="replace chat_template.jinja",
            )
        self._box = _Box()
        self.marks_generation = re.search(r"\{%-?\s*generation\b", source) is not None
        self._source, self._lock = source, threading.Lock()
        try:
            self._template = self._box.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"chat template line {error.lineno}: {error.message}", fix="repair the template") from None
        except (RecursionError, MemoryError, SyntaxError, OverflowError, jinja2.TemplateError) as error:
            raise DataError(f"the chat template does not compile: {type(error).__name__}", fix="simplify it") from None

    def render(self, n_messages: int, inputs: str, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the (start, stop) character spans of its generation blocks.

        Args:
            n_messages: number of messages, and ``inputs``, all text in them: they widen the budget.
            variables: the names the template sees, of exact JSON types.

        Raises:
            jinja2.TemplateError: the template refuses its input, breaks a rule of the box or its budget.
        """
        box, out = self._box, []
        mark = next(m for m in map(chr, range(0x10FFFD, 0x100000, -1)) if m not in inputs and m not in self._source)
        with self._lock:
            box.mark, box.budget = mark, _Budget(n_messages, len(inputs))
            try:
                for piece in self._template.generate(**variables):
                    box.budget.text(len(piece))
                    out.append(piece)
            except (RecursionError, MemoryError) as error:
                raise BudgetError(f"the template needs too much ({type(error).__name__})") from None
            except jinja2.TemplateError:
                raise
            except Exception as error:
                raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from None
        parts = "".join(out).split(mark)
        spans, at = [], 0
        for i, part in enumerate(parts):
            if i % 2:
                spans.append((at, at + len(part)))
            at += len(part)
        return "".join(parts), spans


@lru_cache(maxsize=16)
def compile_template(source: str) -> Template:
    """The compiled template, kept for the next call."""
    return Template(source)
