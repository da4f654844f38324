"""Chat templates from strangers, run in a box: no way to Python's inside, and bounded work, time and output.

Jinja's immutable sandbox forbids attributes that begin with an underscore and changes to its inputs. On top: only
the filters, tests and methods that chat templates use; every loop round, call, comparison, slice and piece of text
is paid for from a budget (see :mod:`octavo.tokenizer.budget`); nothing grows past it.
"""

from __future__ import annotations

import functools
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, ClassVar

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from octavo.errors import DataError
from octavo.tokenizer.budget import LISTS, MAX_DEPTH, Budget, BudgetError

MAX_TEMPLATE_CHARS = 200_000
MAX_TEMPLATE_TOKENS = 12_000  # what compiling costs; the largest templates in use have less than half
MAX_PATTERN_CHARS = 128  # of what is stripped or searched for from the right, for which Python takes n x m
FILTERS = (
    "abs bool capitalize count d default dictsort e escape first float groupby indent int items join last length list"
    " lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum title tojson"
    " trim unique upper"
).split()
WALKING = frozenset(
    "first groupby last list map max min reject rejectattr reverse select selectattr sort sum unique".split()
)
COPYING = frozenset("dictsort groupby max min sort unique".split())  # these make a copy of each text to compare by
WRITING = frozenset("capitalize e escape lower title trim upper".split())  # these make a text of anything
METHODS = {
    str: "capitalize count endswith find index isalnum isalpha isdigit islower isnumeric isspace isupper join lower"
    " lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines"
    " startswith strip swapcase title upper".split(),
    dict: "get items keys values copy".split(),
    list: "count index copy".split(),
    tuple: "count index".split(),
}
METHODS_OTHER = ("first", "last", "index", "index0", "revindex", "revindex0", "length", "previtem", "nextitem")
FROM_THE_RIGHT = frozenset("lstrip rfind rindex rpartition rsplit rstrip strip".split())
# Filters that the box puts into a template itself: no template can write their names.
TOLLS = ("toll: loop", "toll: list", "toll: concat", "toll: slice", "toll: look")


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

    def __repr__(self) -> str:  # its values could hold each other, doubling at every level
        return "namespace"


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
        self.budget = Budget(0, 0)
        self.mark = ""
        self.constant_chars = 0
        own: dict[str, Callable[..., Any]] = {
            "tojson": self._tojson,
            "replace": self._replace,
            "join": self._join,
            "indent": self._indent,
            "string": self._string,
            "round": self._round,
            "bool": bool,
            "safe": lambda value: value,
        }
        known = {name: self._metered(name, self.filters[name]) for name in FILTERS if name in self.filters}
        tolls = (self._loop, self._list, self._concat, self._slice, self._look)
        self.filters = {**known, **own, **dict(zip(TOLLS, tolls, strict=True))}
        self.tests = {name: self._metered(name, test) for name, test in self.tests.items()}
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

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A filter by its name, as ``map`` has it."""
        if name in TOLLS:
            raise jinja2.TemplateError(f"there is no filter {name!r}")
        return super().call_filter(name, *args, **kwargs)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = __self.budget
        budget.step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name == "replace" and len(args) >= 2:
                return __self._replace(owner, *args)
            if name == "join" and len(args) == 1:
                return __self._join(args[0], owner)
            budget.look(owner)
            if name in FROM_THE_RIGHT:
                _check_pattern(name, args)
        if isinstance(owner, (str, *LISTS)) or name == "changed":
            budget.look(args)
        if isinstance(owner, LISTS):
            budget.look(owner)
        if isinstance(__obj, jinja2.runtime.Macro):
            budget.text(__self.constant_chars)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str) and (owner is None or isinstance(owner, str)):
            budget.text(len(result))
        elif isinstance(result, (list, tuple, dict)) and not (name == "get" or result is owner):
            budget.text(budget.size(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        budget.step()
        budget.number(left)
        budget.number(right)
        if operator == "**":
            raise jinja2.exceptions.SecurityError("the operator ** is not allowed in a chat template")
        if operator == "%" and isinstance(left, str):
            if re.search(r"\*|\d{4}", left):
                raise jinja2.exceptions.SecurityError("a width in % formatting is too large")
            # A field may be up to 999 wide, and with a mapping every field may be the whole of it.
            times = left.count("%") if isinstance(right, Mapping) else 1
            budget.text(len(left) + left.count("%") * 999 + times * self._written(right))
        if operator == "*":
            for thing, times in ((left, right), (right, left)):
                if isinstance(thing, (str, list, tuple)) and isinstance(times, int):
                    budget.text((len(thing) + 1) * max(int(times), 0))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str):
            budget.text(len(result))
        elif isinstance(result, (list, tuple)):
            budget.step(len(result))
        budget.number(result)
        return result

    # -- what is paid for

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test of Jinja's that pays for what it walks through and for the text it makes."""
        first = 0 if getattr(function, "jinja_pass_arg", None) is None else 1

        @functools.wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            budget, value = self.budget, args[first]
            budget.step()
            if name in COPYING:
                budget.text(budget.size(value))
            if name in WRITING:
                self._written(value)
            if name in WALKING:
                if hasattr(value, "__len__"):
                    budget.step(len(value))
                else:
                    value = self._loop(value, 0)
            elif not isinstance(value, (Mapping, *LISTS)):
                budget.look(value)
            budget.look(args[first + 1 :])
            if name == "trim" or name in WALKING:  # an attribute may be a path, walked for every element
                _check_pattern(name, (*args[first + 1 :], *kwargs.values()))
            result = function(*args[:first], value, *args[first + 1 :], **kwargs)
            if isinstance(result, str) and result is not value:
                budget.text(len(result))
            return result

        return paid

    def _finalize(self, value: Any) -> Any:
        self.budget.text(self._written(value))
        return value

    def _written(self, value: Any) -> int:
        """The length of ``value`` written out."""
        return self.budget.size(value, written=True)

    def _loop(self, values: Any, cost: int) -> Iterator[Any]:
        for value in values:
            self.budget.text(cost)
            yield value

    def _list(self, value: Any) -> Any:
        self.budget.size(value)
        return value

    def _look(self, value: Any) -> Any:
        if not isinstance(value, Mapping):  # one is only asked for a key
            self.budget.look(value)
        return value

    def _slice(self, value: Any) -> Any:
        if isinstance(value, str):
            self.budget.text(len(value))
        elif isinstance(value, (list, tuple)):
            self.budget.step(len(value))
        return value

    def _concat(self, parts: tuple[Any, ...]) -> str:
        self.budget.text(sum(self._written(part) for part in parts))
        return "".join(map(str, parts))

    def _string(self, value: Any) -> str:
        self.budget.text(self._written(value))
        return str(value)

    def _range(self, *args: int) -> range:
        values = range(*args)
        if len(values) > self.budget.steps:
            raise BudgetError(f"range of {len(values)} in the template is too long")
        return values

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self._string(text), self._string(old), self._string(new)
        limit = -1 if count is None else int(count)
        times = text.count(old) if limit < 0 else min(text.count(old), limit)
        self.budget.text(len(text) + times * len(new))
        return text.replace(old, new, limit)

    def _join(self, values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        if attribute is not None:
            _check_pattern("join", [attribute])
            values = [self.getitem(value, attribute) for value in self._loop(values, 0)]
        parts = []
        for value in values:
            self.budget.text(self._written(value) + len(d))
            parts.append(str(value))
        return d.join(parts)

    def _round(self, value: float, precision: int = 0, method: str = "common") -> float:
        if not 0 <= precision <= 30:
            raise jinja2.TemplateError("round takes 0 to 30 digits")
        if method not in ("common", "ceil", "floor"):
            raise jinja2.TemplateError("round takes common, ceil or floor")
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
        if separators is not None and not (len(separators) == 2 and all(len(mark) <= 16 for mark in separators)):
            raise jinja2.TemplateError("separators of tojson must be two short texts")
        self.budget.text(self.budget.size(value))
        text = []
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, check_circular=False
        )
        for part in encoder.iterencode(value):  # in parts, because deep indentation can be most of the text
            self.budget.text(len(part))
            text.append(part)
        return "".join(text)

    # -- reading the source

    def _parse(self, source: str, name: Any, filename: Any) -> Any:
        count = 0
        for line, kind, _ in self.lexer.tokeniter(source, name, filename):
            count += kind != "whitespace"
            if count > MAX_TEMPLATE_TOKENS:
                raise jinja2.TemplateSyntaxError(f"more than {MAX_TEMPLATE_TOKENS} tokens", line)
        tree = super()._parse(source, name, filename)
        self.constant_chars = _constant_chars(tree)
        return _meter(tree)


def _check_pattern(name: str, args: Iterable[Any]) -> None:
    if any(isinstance(arg, str) and len(arg) > MAX_PATTERN_CHARS for arg in args):
        raise BudgetError(f"{name} in the template is given more than {MAX_PATTERN_CHARS} characters")


def _constant_chars(node: Any) -> int:
    return sum(len(data.data) for data in node.find_all(jinja2.nodes.TemplateData))


def _meter(node: Any, depth: int = 0) -> Any:
    """Put a toll on every loop, literal list, comparison, slice and ``~`` below ``node``."""
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

    loop, a_list, concat, a_slice, look = TOLLS
    if isinstance(node, nodes.For):
        node.iter = toll(loop, node.iter, nodes.Const(1 + _constant_chars(node)))
    elif isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return toll(a_list, node)
    elif isinstance(node, nodes.Concat):
        return toll(concat, nodes.Tuple(node.nodes, "load", lineno=node.lineno, environment=node.environment))
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return toll(a_slice, node)
    elif isinstance(node, (nodes.Compare, nodes.Operand)) and not isinstance(node.expr, nodes.Const):
        node.expr = toll(look, node.expr)
    return node


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(message if isinstance(message, str) else f"the message is a {type(message).__name__}")


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
        except Exception as error:  # Jinja and Python's compiler give up in many ways on what no one would write
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
            box.mark, box.budget = mark, Budget(n_messages, len(inputs))
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


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> Template:
    """The compiled template, kept for the next call."""
    return Template(source)
