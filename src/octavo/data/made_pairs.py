"""Tasks that make their own pairs: small enough to be learnt in a minute, exact enough to be scored by equality.

The same seed and number give the same pairs on every machine; no pair comes twice, so what is held out was not seen.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable

TextPair = tuple[str, str]

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FIRST_YEAR, LAST_YEAR = 1950, 2049


def dates(seed: int, n: int) -> list[TextPair]:
    """A date as people write it, in one of five ways, and in the form of ISO 8601."""
    rng = random.Random(f"dates {seed}")
    first, last = (datetime.date(year, month, day).toordinal() for year, month, day in
                   ((FIRST_YEAR, 1, 1), (LAST_YEAR, 12, 31)))  # fmt: skip
    found: dict[str, str] = {}
    while len(found) < n:
        day = datetime.date.fromordinal(rng.randint(first, last))
        month = MONTHS[day.month - 1]
        written = rng.choice(
            (
                f"{day.day} {month} {day.year}",
                f"{month} {day.day}, {day.year}",
                f"{DAYS[day.weekday()]}, {day.day} {month} {day.year}",
                f"{day.day}. {month[:3]} {day.year}",
                f"the {_nth(day.day)} of {month} {day.year}",
            )
        )
        found[written] = day.isoformat()
    return list(found.items())


def _nth(n: int) -> str:
    return f"{n}{'th' if 11 <= n % 100 <= 13 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


CITIES = ("Berlin", "Cairo", "Lima", "Oslo", "Paris", "Quito", "Rome", "Seoul", "Tokyo", "Vienna")
SKIES = ("clear", "cloudy", "foggy", "rainy", "snowy", "windy")


def tables(seed: int, n: int) -> list[TextPair]:
    """A weather report as a table, its lines in any order, and the sentences that say what is in it."""
    rng = random.Random(f"tables {seed}")
    found: dict[str, str] = {}
    while len(found) < n:
        city, sky, low = rng.choice(CITIES), rng.choice(SKIES), rng.randint(-9, 25)
        high, wind = low + rng.randint(1, 12), rng.randint(0, 60)
        cells = [f"city={city}", f"sky={sky}", f"low={low}", f"high={high}", f"wind={wind}"]
        rng.shuffle(cells)
        said = f"It is {sky} in {city}, between {low} and {high} degrees."
        said += " There is no wind." if not wind else f" The wind blows at {wind} km/h." if wind >= 20 else ""
        found[" | ".join(cells)] = said
    return list(found.items())


def reverse(seed: int, n: int, low: int = 2, high: int = 12) -> list[TextPair]:
    """A word of random letters, and the same backwards."""
    rng = random.Random(f"reverse {seed}")
    found: dict[str, str] = {}
    while len(found) < n:
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(low, high)))
        found[word] = word[::-1]
    return list(found.items())


MADE: dict[str, Callable[[int, int], list[TextPair]]] = {"dates": dates, "tables": tables, "reverse": reverse}
