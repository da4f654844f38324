"""Numbers as people read them, and text that cannot act."""

import math

import pytest

from octavo.report import words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (7, "7"), (0.25, "0.25"), (12.34, "12.3"), (950, "950"), (999.4, "999"), (999.6, "1.00k"),
        (12_345, "12.3k"), (999_949, "1.00M"), (8_450_000, "8.45M"), (123_456_789, "123M"), (2.5e9, "2.50G"),
        (-1500, "-1.50k"), (math.nan, "-"), (math.inf, "-"),
    ],
)  # fmt: skip
def test_count(value, text):
    assert words.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (-1, "0.0 s"), (0.44, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1m 00s"),
        (151, "2m 31s"), (3599.6, "1h 00m"), (3900, "1h 05m"), (86_400 * 3, "3d 00h"), (math.inf, "-"),
    ],
)  # fmt: skip
def test_duration(seconds, text):
    assert words.duration(seconds) == text


def test_size_percent_exact():
    assert [words.size(n) for n in (0, 1023, 1536, 5 << 20, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 GiB",
    ]
    assert words.percent(0.7125, 1) == "71.2%" and words.percent(math.nan) == "-"
    assert words.exact(1_234_567) == "1,234,567"


def test_printable_leaves_text_alone_and_disarms_the_rest():
    plain = "naïve 春 🙂 שלום\tx\ny 👩‍🚀"
    assert words.printable(plain) == plain
    assert words.printable("\x1b[31m\r\x00\x7f") == "␛[31m␍␀␡"
    assert words.printable("a\u202eb\ud800c\x9bd") == "a\ufffdb\ufffdc\ufffdd"
