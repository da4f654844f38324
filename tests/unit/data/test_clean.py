import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.data.clean import MEASURES, CleanConfig, FilterConfig, clean_text, repair, text_hash, why_not

PROSE = "The quick brown fox jumps over the lazy dog while seven cats look on. " * 3
CHINESE = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
CODE = "def add(a, b):\n    return a + b\n\n\nclass A:\n    x = {'a': [1, 2, (3, 4)], \"b\": None}\n"


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("cafÃ© sera fermÃ©", "café sera fermé"),
        ("cafÃ© &amp; “thÃ©” ﬁn！", "café &amp; “thé” ﬁn！"),
        ("你好，世界！这是一个测试。".encode().decode("latin-1"), "你好，世界！这是一个测试。"),
        ("e\u0301", "é"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("\x1b[33mred\x1b[m \x07bell\x00", "red bell"),
        ("\ufeffmark", "mark"),
    ],
)
def test_repair(broken, whole):
    assert repair(broken) == whole


@pytest.mark.parametrize("text", [PROSE, CHINESE, CODE, "“quoted” — ﬁne, Ａｂｃ！ &amp; <b>", "naïve Ü ß 🙂"])
def test_what_is_not_broken_stays_as_it_is(text):
    assert repair(text) == text


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_repair_is_done_once_for_ascii_and_always_gives_nfc(text):
    once = repair(text)
    assert unicodedata.is_normalized("NFC", once)
    assert "\r" not in once and "\0" not in once


@pytest.mark.parametrize("text", [PROSE, CHINESE, CODE])
def test_ordinary_text_code_and_poems_pass_the_defaults(text):
    assert why_not(text, FilterConfig()) is None


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("min_characters", "short"),
        ("max_symbol_share", "-+-+-+=*/" * 20 + "abc"),
        ("min_letter_share", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"),
        ("max_repeated_line_share", "the same line again\n" * 9),
        ("max_mean_line_characters", "word " * 11_000),
        ("max_word_characters", "x " + "aGVsbG8gd29ybGQh" * 200),
        ("max_bullet_share", "\n".join(f"- item number {chr(97 + i)}" for i in range(20))),
        ("max_ellipsis_share", "\n".join(f"line {chr(97 + i)} goes on ..." for i in range(20))),
        ("max_repeated_phrase_share", "again and again and so on and on " * 40),
    ],
)
def test_each_rule_takes_what_it_is_for_and_can_be_switched_off(rule, text):
    only = dict.fromkeys(MEASURES) | {rule: getattr(FilterConfig(), rule)}
    reason, detail = why_not(text, FilterConfig(**only))
    assert reason == rule and "limit" in detail
    assert why_not(text, FilterConfig(**dict.fromkeys(MEASURES))) is None
    assert why_not(PROSE, FilterConfig(**only)) is None


def test_the_other_limits_need_a_value():
    assert why_not(PROSE, FilterConfig(max_characters=50))[0] == "max_characters"
    assert why_not(PROSE, FilterConfig(banned_phrases=("LAZY dog",)))[0] == "banned_phrases"


def test_equal_but_for_case_and_space_is_equal():
    assert text_hash("Hello  World\n") == text_hash("hello world")
    assert text_hash("hello world") != text_hash("hello worlds")
    assert clean_text(" \n ", CleanConfig()).reason == "empty"
