"""The noisy channel: search equals brute force, channels are distributions, and the language model makes it better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from octavo.channel.contract import Reading
from octavo.channel.decode import decode, rescore
from octavo.channel.edits import EditChannel, read_pairs
from octavo.channel.language import CharacterModel
from octavo.channel.pinyin import PinyinChannel
from octavo.errors import ConfigError, DataError
from octavo.language_model import LanguageModel
from octavo.predictors.kinds import PREDICTORS, count
from octavo.tokenizer import Tokenizer, train
from octavo.tokenizer.config import Byte, ByteBPE, Character


def counted(texts: Sequence[str], tokenizer: Tokenizer, **settings: Any) -> LanguageModel:
    """A model of ``settings`` counted from texts."""
    special = tokenizer.special
    kind = {"kind": "ngram", **settings}
    config = PREDICTORS[kind["kind"]].Config.model_validate({**kind, "vocab_size": tokenizer.vocab_size})
    documents = [np.array([special.bos, *tokenizer.encode(text), special.eos], np.int32) for text in texts]
    return LanguageModel(count(config, documents, bos=special.bos, eos=special.eos), tokenizer)


def letters(texts: Sequence[str]) -> Tokenizer:
    return train(Character(min_frequency=1), texts)


def characters(lm: LanguageModel) -> CharacterModel:
    return CharacterModel(lm.model, lm.tokenizer)  # type: ignore[arg-type]


TOY = ["abba", "abab", "baba", "aab", "abba", "ab"]


# ------------------------------------------------------------------------------------------ the channels


@pytest.mark.rows("N5")
@pytest.mark.parametrize("text", ["", "a", "ab", "aa", "abx", "bab"])
def test_the_typist_is_a_distribution_over_signals(text):
    heard = EditChannel("ab", insert=0.02, delete=0.1, substitute=0.1, transpose=0.08, confusions={("a", "b"): 3})
    longest = len(text) + 4
    signals = (
        "".join(signal) for n in range(longest + 1) for signal in itertools.product("abx", repeat=n) if n <= longest
    )
    total = sum(math.exp(heard.log_prob(signal, text)) for signal in signals)
    assert total == pytest.approx(1.0, abs=2e-5) and total <= 1 + 1e-12


def test_what_is_drawn_is_what_the_probability_says():
    heard, chance = EditChannel("ab", insert=0.05, delete=0.1, substitute=0.1, transpose=0.1), np.random.default_rng(1)
    drawn = [heard.sample("ab", chance) for _ in range(4000)]
    for signal in ("ab", "ba", "b", "aab", "aa", ""):
        p = math.exp(heard.log_prob(signal, "ab"))
        assert abs(drawn.count(signal) / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000) + 1e-9


def test_rates_and_confusions_are_learnt_from_pairs():
    true = EditChannel("abcdefgh ", insert=0.03, delete=0.06, substitute=0.05, transpose=0.03)
    chance = np.random.default_rng(2)
    texts = ["".join(chance.choice(list("abcdefgh "), 30)) for _ in range(60)]
    pairs = [(true.sample(text, chance).replace("a", "h"), text) for text in texts]
    learnt = EditChannel("abcdefgh ").learn(pairs)
    for name in ("insert", "delete", "transpose"):
        assert abs(getattr(learnt, name) - getattr(true, name)) < 0.015, name
    assert learnt.substitute > true.substitute + 0.05  # every a became an h
    assert learnt.mistaken("a", "h") > 0.6 > 0.3 > learnt.mistaken("a", "b")
    held_out = [(true.sample(text, chance).replace("a", "h"), text) for text in texts[:20]]
    before, after = (sum(c.log_prob(s, t) for s, t in held_out) for c in (EditChannel("abcdefgh "), learnt))
    assert after > before + 50


def test_an_alignment_names_every_operation():
    heard = EditChannel("abcdehlmort ")
    steps = heard.align("teh  roda", "the road")
    assert [name for name, _, _ in steps if name != "keep"] == ["transpose", "insert", "transpose"]
    assert [(m, t) for name, m, t in steps if name == "transpose"] == [("he", "eh"), ("ad", "da")]
    assert [s for s in heard.align("lomd", "load") if s[0] != "keep"] == [("substitute", "a", "m")]
    with pytest.raises(DataError, match="cannot be a misspelling"):
        heard.align("x", "a")


@pytest.mark.rows("N5")
def test_every_character_is_typed_as_one_of_its_syllables():
    heard = PinyinChannel.read(["# a comment", "", "le\t了乐", "yue\t乐月\t1 3", "liao\t了\t0.5"], "t.tsv")
    by_character: dict[str, float] = {}
    for syllable in heard.table:
        for edge in heard.edges(syllable, 0):
            if edge.text in heard.characters and edge.to == len(syllable):
                by_character[edge.text] = by_character.get(edge.text, 0.0) + math.exp(edge.log_prob)
    assert by_character == pytest.approx({"了": 1.0, "乐": 1.0, "月": 1.0})
    assert PinyinChannel.read(heard.lines(), "again").table == heard.table


def test_a_pinyin_table_is_learnt_from_aligned_pairs():
    heard = PinyinChannel.of_pairs([("yin yue le", "音乐了"), ("kuai le", "快乐"), ("kuai le", "快乐")])
    edges = {edge.text: math.exp(edge.log_prob) for edge in heard.edges("le", 0) if edge.to == 2}
    assert edges == pytest.approx({"了": 1.0, "乐": 2 / 3})
    more = heard.learn([("le", "乐")])
    assert {e.text: math.exp(e.log_prob) for e in more.edges("le", 0) if e.to == 2}["乐"] == pytest.approx(3 / 4)
    with pytest.raises(DataError, match="has 1 syllables, '快乐' 2 characters"):
        heard.learn([("kuai", "快乐")])


@pytest.mark.parametrize("line", ["ma", "ma\t", "ma\t妈\tx", "ma\t妈马\t1", "m a\t妈", "ma\t妈\t0", "ma\t妈\t1\t2"])
def test_a_line_that_is_no_table_is_refused_with_its_number(line):
    with pytest.raises(DataError, match=r"t\.tsv:2 is not pinyin"):
        PinyinChannel.read(["a\t啊", line], "t.tsv")


@pytest.mark.parametrize(
    "settings",
    [{"insert": 0.0}, {"delete": 0.5}, {"substitute": 0.4, "transpose": 0.4}, {"alphabet": "a"}, {"alphabet": "aab"}],
)
def test_settings_that_are_no_channel_are_refused(settings):
    with pytest.raises(ConfigError):
        EditChannel(**{"alphabet": "ab", **settings})


def test_pairs_are_one_a_line_with_one_tab():
    assert read_pairs(["teh\tthe", "", "a b\tab\n"], "p") == [("teh", "the"), ("a b", "ab")]
    with pytest.raises(DataError, match="p:2"):
        read_pairs(["a\tb", "a b"], "p")


# ------------------------------------------------------------------------------------------ the search


def best_alignment(heard: EditChannel, signal: str, text: str) -> float:
    """ln p(signal, likeliest alignment | text), by plain recursion."""

    def go(i: int, j: int) -> float:
        here = [heard.end] if i == len(signal) and j == len(text) else []
        for di, dj, log_prob in heard._ways(signal[i : i + 2], text[j : j + 2]):
            if i + di <= len(signal) and j + dj <= len(text) and di + dj:
                here.append(log_prob + go(i + di, j + dj))
        return max(here, default=-math.inf)

    return go(0, 0)


@pytest.mark.rows("N5")
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("signal", ["", "b", "ab", "bab", "aabb"])
def test_the_search_finds_what_brute_force_finds(signal, order, end):
    lm = counted(TOY, letters(TOY), order=order)
    words = characters(lm)
    heard = EditChannel("ab", insert=0.05, delete=0.1, substitute=0.15, transpose=0.1, max_gap=3)
    every = {}
    for n in range(len(signal) + 3):
        for text in map("".join, itertools.product("ab", repeat=n)):
            every[text] = words.log_prob(text, end=end) + best_alignment(heard, signal, text)
    wanted = sorted(every.items(), key=lambda item: -item[1])[:5]
    found = decode(words, heard, signal, beam=None, n_best=5, end=end)
    assert [reading.log_prob for reading in found] == pytest.approx([score for _, score in wanted])
    for reading in found:
        assert reading.log_prob == pytest.approx(every[reading.text])
        assert reading.language == pytest.approx(words.log_prob(reading.text, end=end))
    assert len({reading.text for reading in found}) == 5


@pytest.mark.rows("N5")
@pytest.mark.parametrize("tokenizer", ["character", "byte"])
@pytest.mark.parametrize("signal", ["le", "yuele", "le yue", "yin yue le", "xianle"])
def test_pinyin_is_searched_as_brute_force_would(tokenizer, signal):
    texts = ["音乐", "快乐了", "月了", "西安了", "先了", "现了乐月"]
    table = {"le": "了乐", "yue": "乐月", "yin": "音", "xian": "先现", "xi": "西", "an": "安"}
    heard = PinyinChannel({s: dict.fromkeys(characters, 1.0) for s, characters in table.items()})
    words = characters(counted(texts, letters(texts) if tokenizer == "character" else train(Byte(), []), order=4))

    def ways(at: int) -> list[tuple[str, float]]:
        if at == len(signal):
            return [("", 0.0)]
        return [(e.text + t, e.log_prob + p) for e in heard.edges(signal, at) for t, p in ways(e.to)]

    every: dict[str, float] = {}
    for text, log_prob in ways(0):
        every[text] = max(every.get(text, -math.inf), log_prob + words.log_prob(text, end=True))
    wanted = sorted(every.values(), reverse=True)[:4]
    found = decode(words, heard, signal, beam=None, n_best=4, end=True)
    assert [reading.log_prob for reading in found] == pytest.approx(wanted)
    assert all(reading.log_prob == pytest.approx(every[reading.text]) for reading in found)


def test_a_beam_is_never_better_than_the_exact_search():
    lm = counted(TOY, letters(TOY), order=3)
    heard = EditChannel("ab", delete=0.1, substitute=0.1)
    exact, narrow = (decode(characters(lm), heard, "abbbaab", beam=beam)[0] for beam in (None, 1))
    assert narrow.log_prob <= exact.log_prob + 1e-9
    assert decode(characters(lm), heard, "abbbaab", beam=64)[0] == exact


def test_the_text_before_is_read_and_characters_outside_the_alphabet_stay():
    texts = ["cat 1", "dog 2", "cat 1", "dog 2"]
    words = characters(counted(texts, letters([*texts, "#"]), order=5))
    heard = EditChannel("12", substitute=0.3)
    assert decode(words, heard, "1", before="dog ")[0].text == "2"
    assert decode(words, heard, "1", before="cat ")[0].text == "1"
    assert decode(words, heard, "#1")[0].text.startswith("#")


def test_a_model_whose_tokens_are_longer_than_characters_is_refused():
    lm = counted(["abababab" * 20], train(ByteBPE(vocab_size=280, min_frequency=1), ["abababab" * 20]), order=2)
    with pytest.raises(ConfigError, match="longer than a character"):
        characters(lm)


# ------------------------------------------------------------------------------------------ it helps


def errors(found: Sequence[str], meant: Sequence[str]) -> float:
    """Edit distance for each character that was meant."""
    total = 0
    for one, other in zip(found, meant, strict=True):
        row = list(range(len(other) + 1))
        for i, a in enumerate(one, 1):
            before, row[0] = row[0], i
            for j, b in enumerate(other, 1):
                before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
        total += row[-1]
    return total / sum(map(len, meant))


def manual(n_documents: int) -> list[str]:
    """Paragraphs of the language reference that comes with Python, in lower case."""
    from pydoc_data.topics import topics

    found = []
    for name in sorted(topics):
        found += [" ".join(part.split()).lower() for part in topics[name].split("\n\n")]
    plain = [
        text for text in found if 60 < len(text) < 400 and sum(c.isalpha() or c == " " for c in text) > 0.93 * len(text)
    ]
    return list(dict.fromkeys(plain))[:n_documents]


@pytest.mark.rows("N5")
def test_correction_makes_fewer_errors_than_the_channel_alone_on_held_out_text():
    texts = manual(500)
    meant, learnt = [text[:70] for text in texts[::50]], [text for i, text in enumerate(texts) if i % 50]
    assert len(meant) >= 8 and not set(meant) & set(learnt)
    tokenizer = train(Byte(), [])
    heard = EditChannel("abcdefghijklmnopqrstuvwxyz ", insert=0.01, delete=0.015, substitute=0.02, transpose=0.01)
    chance = np.random.default_rng(4)
    typed = [heard.sample(text, chance) for text in meant]
    rates = {}
    for name, settings in {"channel alone": {"kind": "uniform"}, "6-gram": {"order": 6}}.items():
        words = characters(counted(learnt, tokenizer, **settings))
        rates[name] = errors([decode(words, heard, text, beam=8)[0].text for text in typed], meant)
    assert errors(typed, meant) == rates["channel alone"] > 0.02
    assert rates["6-gram"] < 0.7 * rates["channel alone"], rates


CHINESE = """wo men xue xi zhong wen\t我们学习中文
ta men xue xi ying wen\t他们学习英文
wo xi huan chi ping guo\t我喜欢吃苹果
ta xi huan he cha\t他喜欢喝茶
jin tian tian qi hen hao\t今天天气很好
ming tian shi xing qi yi\t明天是星期一
wo men qu shi chang mai cha\t我们去市场买茶
ta zai shi chang mai ping guo\t他在市场卖苹果
zhong guo ren xi huan he cha\t中国人喜欢喝茶
lao shi jiao wo men zhong wen\t老师教我们中文
wo de lao shi hen hao\t我的老师很好
ta shi wo de peng you\t他是我的朋友
wo men shi peng you\t我们是朋友
shi jian bu zao le\t时间不早了
shi jie hen da\t世界很大
zhe jian shi hen hao\t这件事很好
wo you shi jian xue xi\t我有时间学习
ta bu he cha\t他不喝茶
jin tian shi xing qi tian\t今天是星期天
xue xi zhong wen hen hao\t学习中文很好""".splitlines()
ASKED = """ta men xi huan xue xi zhong wen\t他们喜欢学习中文
wo de peng you xi huan he cha\t我的朋友喜欢喝茶
ming tian tian qi hen hao\t明天天气很好
lao shi shi zhong guo ren\t老师是中国人
wo men you shi jian he cha\t我们有时间喝茶
ta qu shi chang mai cha\t他去市场买茶""".splitlines()


@pytest.mark.rows("N5")
def test_pinyin_becomes_chinese_by_the_language_model_and_not_by_the_channel_alone():
    pairs, asked = (read_pairs(lines, "pairs") for lines in (CHINESE, ASKED))
    heard = PinyinChannel.read([*PinyinChannel.of_pairs(pairs).lines(), "shi\t十石食", "he\t和河", "ta\t她它"], "t")
    heard = PinyinChannel({s: dict.fromkeys(c, 1.0) for s, c in heard.table.items()})  # it knows no character better
    texts = [text for _, text in pairs]
    tokenizer = letters([*texts, "".join(heard.characters)])
    rates = {}
    for name, settings in {"channel alone": {"kind": "uniform"}, "trigram": {"order": 3}}.items():
        words = characters(counted(texts, tokenizer, **settings))
        found = [decode(words, heard, signal, end=True)[0].text for signal, _ in asked]
        close = [decode(words, heard, signal.replace(" ", "'"), end=True)[0].text for signal, _ in asked]
        assert found == close
        rates[name] = errors(found, [text for _, text in asked])
    assert rates["channel alone"] > 0.15 and rates["trigram"] < 0.05, rates


@pytest.mark.rows("N5")
def test_a_better_model_puts_the_right_reading_first():
    pairs, asked = (read_pairs(lines, "pairs") for lines in (CHINESE, ASKED))
    heard = PinyinChannel.of_pairs(pairs)
    texts = [text for _, text in pairs]
    tokenizer = letters(texts)
    first, judge = (counted(texts, tokenizer, order=order) for order in (1, 3))
    lists = [decode(characters(first), heard, signal, n_best=30, beam=None) for signal, _ in asked]
    again = [rescore(readings, judge.log_probs) for readings in lists]
    before, after = (
        sum(readings[0].text == text for readings, (_, text) in zip(found, asked, strict=True))
        for found in (lists, again)
    )
    assert after > before
    for readings in again:
        for reading in readings:
            assert reading.language == pytest.approx(characters(judge).log_prob(reading.text))
        assert [r.log_prob for r in readings] == sorted((r.log_prob for r in readings), reverse=True)


def test_rescoring_adds_the_channel_and_weighs_the_model():
    readings = [Reading("a", -1.0, -0.5, -0.5), Reading("b", -2.0, -1.5, -0.5)]
    found = rescore(readings, lambda texts: [-9.0, -1.0], weight=2.0)
    assert [(r.text, r.log_prob, r.language) for r in found] == [("b", -2.5, -1.0), ("a", -18.5, -9.0)]
