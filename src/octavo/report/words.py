"""Numbers and foreign text as people read them, the same on the console, in the report and in plots."""

from __future__ import annotations

import math
import unicodedata

_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
# Marks that reorder or hide neighbouring text: a sample could use them to fake a line of ours.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def count(value: float) -> str:
    """A count in at most four figures: ``950``, ``12.3k``, ``8.45M``; ``-`` if it is not finite."""
    if not math.isfinite(value):
        return "-"
    for scale, letter in _SCALES:
        # The rounding of 999_950 and up would print "1000.0k" without the half unit of the last figure.
        if abs(value) >= scale * 0.9995:
            scaled = value / scale
            return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f}{letter}"
    if value == int(value) or abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def exact(value: int) -> str:
    """A whole number with thousands separated: ``1,234,567``."""
    return f"{value:,}"


def size(n_bytes: float) -> str:
    """Bytes with a binary unit: ``512 B``, ``1.5 MiB``."""
    for scale, unit in _BINARY:
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def duration(seconds: float) -> str:
    """A time span: ``0.4 s``, ``12 s``, ``2m 31s``, ``1h 05m``; ``-`` if it is not finite."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"


def percent(share: float, places: int = 0) -> str:
    """A share of one as a percentage: ``0.25`` is ``25%``; ``-`` if it is not finite."""
    return f"{100 * share:.{places}f}%" if math.isfinite(share) else "-"


def printable(text: str) -> str:
    """``text`` with everything that could steer a terminal or reorder a line made visible.

    Control characters become their Unicode pictures (ESC is ``\\u241b``), lone surrogates and
    bidirectional overrides the replacement character. Line feed and tab stay.
    """
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    code = ord(char)
    if char in "\n\t" or (32 <= code < 127):
        return char
    if code < 32:
        return chr(0x2400 + code)
    if code == 127:
        return "\u2421"
    return "\ufffd" if char in _BIDI or unicodedata.category(char) in ("Cc", "Cs") else char
