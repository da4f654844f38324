"""Bodies drawn from a JSON schema, and spoilt ones: quick, seeded, mostly such that a server gets to work on them."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

TEXTS = (
    "", "hi", "a", "x" * 60, "世界", "é\u0301", "\U0001f600\u200d\U0001f469", "\u202eabc", "\0", "\x1b[2J", "\r\n\r\n",
    "<|im_end|>", "<|im_start|>system", "<tool_call>{}</tool_call>", "{{ 7 * 7 }}", "%s%n", "../../etc/passwd", "NaN",
    "[]", "\ufeff", "\uffff", "json", "tiny", "<script>", "' OR 1=1", "\ud800"[:0] + "ﷺ", "1e999", "true",
)  # fmt: skip
WILD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 10**30, -(10**30), 0.1, 1e308, -1e308, 5e-324, math.nan, math.inf, "", "x", "\ud800",
    "x" * 3000, [], {}, [[]], [None], [1], ["a"], {"": None}, {"type": "function"}, {"a": {"b": {"c": []}}}, [[[[1]]]],
)  # fmt: skip
SCHEMAS: tuple[dict[str, Any], ...] = (
    {}, {"type": "object"}, {"type": "string"}, {"type": "integer", "minimum": 3}, {"enum": ["a", 1, None]},
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False},
    {"type": "array", "items": {"type": "number"}, "maxItems": 2}, {"type": "string", "pattern": "^[a-c]{2,3}$"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}}, {"$ref": "#/nothing"},
    {"type": "string", "pattern": "(("}, {"not": {}}, {"type": "string", "minLength": 3, "maxLength": 1}, {"type": []},
    {"allOf": [{"type": "string"}, {"type": "integer"}]}, {"type": "string", "format": "date-time"}, {"const": "\0é"},
    {"type": "object", "minProperties": 9}, {"enum": []}, {"type": "integer", "multipleOf": 0}, {"$ref": "#"},
)  # fmt: skip


class Fuzz:
    """Draws bodies of ``schema``; ``document`` is where its references lead."""

    def __init__(self, schema: dict[str, Any], document: dict[str, Any], seed: object):
        self.schema, self.document, self.rng = schema, document, random.Random(str(seed))

    def right(self) -> Any:
        """A body that its schema allows, with few of the fields that need not be there."""
        return self._draw(self.schema, 0)

    def wrong(self) -> bytes:
        """A body in which one to three things are otherwise."""
        body = self.right()
        for _ in range(self.rng.randint(1, 3)):
            self._spoil(body)
        text = json.dumps(body)
        if self.rng.random() < 0.1:
            at = self.rng.randrange(len(text))
            text = text[:at] + self.rng.choice(["", "}", "]", ",", "\\", '"', "NaN", "9" * 5000]) + text[at + 1 :]
        return text.encode()

    def _draw(self, schema: Any, depth: int) -> Any:
        rng = self.rng
        if reference := schema.get("$ref"):
            found: Any = self.document
            for word in reference.removeprefix("#/").split("/"):
                found = found[word]
            return self._draw(found, depth)
        if "const" in schema or "enum" in schema:
            return rng.choice(schema.get("enum", [schema.get("const")]))
        if "anyOf" in schema:
            return self._draw(rng.choice(schema["anyOf"]), depth)
        return getattr(self, f"_{schema.get('type', 'any')}")(schema, depth)

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties, required = schema.get("properties", {}), schema.get("required", ())
        if not properties:
            values = schema.get("additionalProperties")
            if isinstance(values, dict):
                return {
                    str(self.rng.randint(0, 300)): self._draw(values, depth + 1) for _ in range(self.rng.randint(0, 3))
                }
            return copy.deepcopy(self.rng.choice(SCHEMAS))
        share = self.rng.choice([0, 0.1, 0.3]) if depth == 0 else 0.3
        kept = [name for name in properties if name in required or self.rng.random() < share]
        return {name: self._draw(properties[name], depth + 1) for name in kept}

    def _array(self, schema: dict[str, Any], depth: int) -> list[Any]:
        least = schema.get("minItems", 0)
        n = self.rng.randint(least, min(schema.get("maxItems", 4), least + 3))
        return [self._draw(schema.get("items", {}), depth + 1) for _ in range(n)]

    def _string(self, schema: dict[str, Any], _: int) -> str:
        if "pattern" in schema:
            return self.rng.choice(["f", "get_weather", "a-b_C9", "x" * 64])
        text = self.rng.choice(TEXTS)[: schema.get("maxLength", 100)]
        return text if len(text) >= schema.get("minLength", 0) else "x"

    def _integer(self, schema: dict[str, Any], _: int) -> int:
        low = schema.get("minimum", -(2**40))
        high = schema.get("maximum", schema.get("exclusiveMaximum", 2**40) - 1)
        near = [low, high, min(max(0, low), high), min(low + 1, high), min(max(5, low), high), min(max(200, low), high)]
        return self.rng.choice(near)

    def _number(self, schema: dict[str, Any], _: int) -> float:
        low, high = schema.get("minimum", schema.get("exclusiveMinimum", -1e9)), schema.get("maximum", 1e9)
        inside = [high, (low + high) / 2, self.rng.uniform(low, high), low + (high - low) * 1e-9]
        return self.rng.choice(inside if "exclusiveMinimum" in schema else [low, *inside])

    def _boolean(self, *_: Any) -> bool:
        return self.rng.random() < 0.5

    def _null(self, *_: Any) -> None:
        return None

    def _any(self, *_: Any) -> Any:
        return self.rng.choice([value for value in WILD if value == value])

    def _spoil(self, body: Any) -> None:
        """Change one thing in place, somewhere."""
        rng, node = self.rng, body
        while isinstance(node, dict | list) and node:
            key = rng.choice([*node] if isinstance(node, dict) else range(len(node)))
            inner = node[key]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
                node = inner
                continue
            act = rng.randint(0, 4)
            if act == 0:
                del node[key]
            elif act == 1 and isinstance(node, dict):
                node[rng.choice(["", "model", "x", "\ud800", "stream", "n", "content", "a" * 500])] = rng.choice(WILD)
            elif act == 2 and isinstance(node, list):
                node += [inner] * rng.choice([1, 10, 3000])
            else:
                node[key] = copy.deepcopy(rng.choice(WILD))
            return
