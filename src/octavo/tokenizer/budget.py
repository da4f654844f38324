"""What one rendering of a chat template may still spend: steps, characters and seconds.

One step stands for about a microsecond of work. Whatever makes text pays its characters; whatever looks at text or
walks through a list pays steps for its length, so that no single expression does much between two looks at the clock.
"""

from __future__ import annotations

import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any

import jinja2

MAX_DEPTH = 100
BASE_STEPS, STEPS_PER_MESSAGE, INPUT_CHARS_PER_STEP = 100_000, 1_000, 16
BASE_CHARS, CHARS_PER_INPUT_CHAR = 4_000_000, 16
BASE_SECONDS, SECONDS_PER_MESSAGE = 0.25, 0.002
CHARS_LOOKED_AT_PER_STEP = 256
STEPS_BETWEEN_CLOCKS = 128
NUMBER_BITS = 512

VIEWS = (KeysView, ValuesView, ItemsView)
LISTS = (list, tuple, set, frozenset)
# What may be written out beside text, whole numbers, lists and mappings.
PLAIN = (bool, float, type(None), range, jinja2.Undefined, jinja2.utils.Namespace)


class BudgetError(jinja2.TemplateError):
    """The template did more than any honest one does."""


class Budget:
    """The account of one rendering.

    Args:
        n_messages: messages of the conversation.
        input_chars: characters of all text in it.
    """

    def __init__(self, n_messages: int, input_chars: int):
        self.steps = BASE_STEPS + STEPS_PER_MESSAGE * n_messages + input_chars // INPUT_CHARS_PER_STEP
        self.chars = self.max_chars = BASE_CHARS + CHARS_PER_INPUT_CHAR * input_chars
        self.seconds = BASE_SECONDS + SECONDS_PER_MESSAGE * n_messages
        self._clock = self.steps
        self._stop = time.thread_time() + self.seconds

    def step(self, n: int = 1) -> None:
        """Pay ``n`` steps of work."""
        self.steps -= n
        if self.steps < 0:
            raise BudgetError("the template makes too many steps")
        if self._clock - self.steps >= STEPS_BETWEEN_CLOCKS:
            self._clock = self.steps
            if time.thread_time() > self._stop:
                raise BudgetError(f"the template takes longer than {self.seconds:.2f} s")

    def text(self, n: int) -> None:
        """Pay for ``n`` new characters."""
        self.step()
        self.chars -= n
        if self.chars < 0:
            raise BudgetError(f"the template makes more than {self.max_chars} characters")

    def look(self, value: Any, depth: int = 0) -> None:
        """Pay for comparing or searching through ``value``."""
        if isinstance(value, str):
            self.step(1 + len(value) // CHARS_LOOKED_AT_PER_STEP)
        elif isinstance(value, (*LISTS, Mapping, *VIEWS)):
            self._check_depth(depth)
            for part in _parts(value):
                self.look(part, depth + 1)
        elif isinstance(value, range):
            self.step(1 + len(value) // CHARS_LOOKED_AT_PER_STEP)
        else:
            self.step()

    def size(self, value: Any, depth: int = 0, *, written: bool = False) -> int:
        """Length in characters, roughly, of ``value`` written out; walking through it is paid for.

        Args:
            value: what a template holds.
            depth: how deep in another value it stands.
            written: it is going to be: then what has no text of its own (a function, a generator) is refused.
        """
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int) and not isinstance(value, bool):
            self.number(value)
            return NUMBER_BITS // 3
        if isinstance(value, (*LISTS, Mapping, *VIEWS)):
            self._check_depth(depth)
            total = 2
            for part in _parts(value):
                self.step()
                total += self.size(part, depth + 1, written=written) + 4
                if total > self.max_chars:
                    raise BudgetError(f"the template makes more than {self.max_chars} characters")
            return total
        if written and not isinstance(value, PLAIN):
            raise jinja2.TemplateError(f"a {type(value).__name__} cannot be written out")
        return 32

    @staticmethod
    def number(value: Any) -> None:
        """Refuse a whole number that is expensive to work with or to write."""
        if isinstance(value, int) and value.bit_length() > NUMBER_BITS:
            raise BudgetError("a number in the template is too large")

    @staticmethod
    def _check_depth(depth: int) -> None:
        if depth > MAX_DEPTH:
            raise BudgetError("a list in the template is nested too deeply")


def _parts(value: Any) -> Any:
    return [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
