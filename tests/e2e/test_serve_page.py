"""The chat page in a real browser: it talks, stops, speaks two languages, and shows hostile text as text.

Screenshots are kept where ``OCTAVO_SCREENSHOTS`` names a folder.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from serving import chat_tokenizer, live

from octavo.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="NOT RUN: no Chromium found; `apt-get install chromium` to run these"),
]

HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\">",
    "<script>document.title='owned'</script>",
    "<svg/onload=document.title='owned'>",
    "![x](http://127.0.0.1:9/leak.png)",
    "[click](javascript:document.title='owned')",
    "<a href=\"javascript:document.title='owned'\">x</a>",
    "</div><iframe srcdoc=\"<script>parent.document.title='owned'</script>\"></iframe>",
    "<style>*{display:none}</style>",
    "{{constructor.constructor('document.title=1')()}}",
    '"><base href=http://127.0.0.1:9/>',
    "&lt;b&gt;not bold&lt;/b&gt; \u202egnp.exe",
]
ANSWER = """Of course. The json module turns Python values into text and back:

    json.dumps({'a': 1})

The reverse is json.loads."""
IDLE = "!document.querySelector('.running')"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


def texts(page: Page, kind: str) -> list[str]:
    return page.js(f"[...document.querySelectorAll('.{kind}')].map((node) => node.textContent)")


def keep(page: Page, name: str) -> None:
    if folder := os.environ.get("OCTAVO_SCREENSHOTS"):
        page.photograph(Path(folder) / f"{name}.png")


def test_a_conversation(page: Page, tokenizer: Tokenizer) -> None:
    with live(tokenizer, ANSWER) as server:
        page.problems.clear()
        page.show(1280, 800)
        page.open(server.url)
        assert page.js("document.getElementById('model').textContent") == "tiny"
        keep(page, "empty")
        for n in (1, 2):
            page.say("What does the json module do?")
            page.wait(f"document.querySelectorAll('.assistant').length === {n} && {IDLE}")
        assert texts(page, "user") == ["What does the json module do?"] * 2
        assert texts(page, "assistant") == [ANSWER] * 2
        keep(page, "desktop")
        page.js("document.getElementById('new').click()")
        assert texts(page, "turn") == [] and not page.js("document.getElementById('empty').hidden")
        assert page.problems == [] and all(url.startswith((server.url, "about:")) for url in page.requests)


def test_phone_dark_and_chinese(page: Page, tokenizer: Tokenizer) -> None:
    with live(tokenizer, "当然可以。八开本是一种小巧、便宜的书，" * 3) as server:
        page.show(390, 780, dark=True, language="zh-CN")
        page.open(server.url)
        assert page.js("document.getElementById('send').textContent") == "发送"
        assert page.js("document.documentElement.lang") == "zh-CN"
        page.say("你好！什么是八开本？")
        page.wait(f"document.querySelector('.assistant') && {IDLE}")
        keep(page, "phone-dark")
        page.js("document.getElementById('menu').click()")
        page.wait("document.getElementById('chats').getBoundingClientRect().left === 0")
        keep(page, "phone-conversations")
        page.js("document.getElementById('shade').click()")
        page.wait("getComputedStyle(document.getElementById('chats')).visibility === 'hidden'")
        assert page.js("document.getElementById('shade').hidden")
        page.js("document.getElementById('toggle').click()")
        keep(page, "phone-settings")
        for width in (320, 390, 1280):
            page.show(width, 700, language="zh-CN")
            assert page.js("document.documentElement.scrollWidth <= window.innerWidth"), f"wider than {width}"
        dark, light = "rgb(25, 23, 21)", "rgb(250, 248, 243)"
        assert page.js("getComputedStyle(document.body).backgroundColor") == light
        page.show(390, 780, dark=True)
        assert page.js("getComputedStyle(document.body).backgroundColor") == dark


def test_the_stop_button(page: Page, tokenizer: Tokenizer) -> None:
    with live(tokenizer, "word " * 400, delay_seconds=0.01) as server:
        page.show(1280, 800)
        page.open(server.url)
        page.say("Talk.")
        page.wait("(document.querySelector('.assistant') || {textContent: ''}).textContent.length > 20")
        assert page.js("document.getElementById('send').textContent") == "Stop"
        keep(page, "running")
        page.js("document.getElementById('send').click()")
        page.wait(IDLE)
        server.settled()
        assert 20 < len(texts(page, "assistant")[0]) < 1900 and texts(page, "hint") == ["Stopped."]
        assert page.js("document.getElementById('send').textContent") == "Send"


def test_settings_reach_the_model(page: Page, tokenizer: Tokenizer) -> None:
    with live(tokenizer, "ok") as server:
        page.show(1280, 800)
        page.open(server.url)
        page.js("document.getElementById('toggle').click()")
        page.js("document.getElementById('system').value = 'Be brief.'")
        page.js("t = document.getElementById('temperature'); t.value = '0.2'")
        page.js("t.dispatchEvent(new Event('input', {bubbles: true}))")
        assert page.js("document.getElementById('temperature-value').textContent") == "0.2"
        watch_requests(page)
        page.say("Hi")
        page.wait(f"document.querySelector('.assistant') && {IDLE}")
        keep(page, "settings")
        sent = json.loads(page.js("sent[0]"))
        assert sent["temperature"] == 0.2 and sent["stream"] is True
        assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_errors_are_said_and_nothing_typed_is_lost(page: Page, tokenizer: Tokenizer) -> None:
    with live(tokenizer, "ok", max_seq_len=64) as server:
        page.show(1280, 800)
        page.open(server.url)
        page.say("x" * 100)
        page.wait("document.querySelector('.error')")
        assert "no longer fits" in texts(page, "error")[0]
        assert page.js("document.getElementById('input').value") == "x" * 100
    page.js("document.getElementById('input').value = ''")
    page.say("still there?")
    page.wait("document.querySelectorAll('.error').length === 2")
    assert texts(page, "error")[1] == "The server does not answer."


def test_a_server_with_a_key(page: Page, tokenizer: Tokenizer) -> None:
    with live(tokenizer, "secret answer", settings={"api_keys": ("sesame",)}) as server:
        page.show(1280, 800)
        page.call("Page.navigate", url=server.url)
        page.wait("document.querySelector('.error') && !document.getElementById('key-field').hidden")
        page.js("k = document.getElementById('key'); k.value = 'sesame'; k.dispatchEvent(new Event('change'))")
        page.wait("document.getElementById('model').textContent === 'tiny'")
        page.say("Hi")
        page.wait(f"document.querySelector('.assistant') && {IDLE}")
        assert texts(page, "assistant") == ["secret answer"]


@pytest.mark.parametrize("payload", HOSTILE)
def test_hostile_text_is_shown_as_text(page: Page, tokenizer: Tokenizer, payload: str) -> None:
    """In an answer, in a message, and as the model's name."""
    with live(tokenizer, payload, name=payload) as server:
        page.requests.clear()
        page.problems.clear()
        page.show(1280, 800)
        page.open(server.url)
        page.say(payload)
        page.wait(f"document.querySelector('.assistant') && {IDLE}")
        assert texts(page, "assistant") == [payload] and texts(page, "user") == [payload]
        assert page.js("document.getElementById('model').textContent") == payload
        assert (
            page.js("document.querySelectorAll('#log img, #log script, #log svg, #log a, iframe, style, base').length")
            == 0
        )
        assert page.js("document.title") == "Octavo"
        assert page.problems == [], page.problems
        assert all(url.startswith(server.url) for url in page.requests), page.requests
    keep(page, "hostile")


def press(page: Page, selector: str, at: int = 0) -> None:
    page.js(f"document.querySelectorAll({json.dumps(selector)})[{at}].click()")


def watch_requests(page: Page) -> None:
    page.js("sent = []; real = fetch; fetch = (url, options) => { sent.push(options.body); return real(url, options) }")


def test_conversations_are_kept_in_the_browser(page: Page, tokenizer: Tokenizer) -> None:
    with live(tokenizer, ANSWER) as server:
        page.show(1280, 800)
        page.open(server.url)
        for text in ("What does json do?", "And pickle?"):
            press(page, "#new")
            page.say(text)
            page.wait(f"document.querySelector('.assistant') && {IDLE}")
        page.open(server.url + "/?again")
        assert texts(page, "open") == ["And pickle?", "What does json do?"] and texts(page, "turn") == []
        press(page, ".open", 1)
        assert texts(page, "user") == ["What does json do?"] and texts(page, "assistant") == [ANSWER]
        keep(page, "conversations")
        page.js("URL.createObjectURL = (blob) => { written = blob.text(); return 'blob:x' }")
        page.js("HTMLAnchorElement.prototype.click = () => {}")
        press(page, "#export")
        exported = json.loads(page.js("written"))
        assert [chat["messages"][0]["content"] for chat in exported] == ["And pickle?", "What does json do?"]
        for text in ("Sure?", None):
            press(page, "#list .current .small")
            assert text is None or page.js("document.querySelector('#list .current .small').textContent") == text
        assert texts(page, "open") == ["And pickle?"] and texts(page, "turn") == []
        press(page, "#remove-all")
        press(page, "#remove-all")
        assert texts(page, "open") == [] and page.js("localStorage.getItem('octavo.chats')") is None


def test_a_message_is_edited_and_an_answer_made_again(page: Page, tokenizer: Tokenizer) -> None:
    with live(tokenizer, "as you say") as server:
        page.show(1280, 800)
        page.open(server.url)
        watch_requests(page)
        for n, text in enumerate(("one", "two"), start=1):
            page.say(text)
            page.wait(f"document.querySelectorAll('.assistant').length === {n} && {IDLE}")
        press(page, ".assistant-tools button", 3)
        page.wait(f"sent.length === 3 && {IDLE}")
        press(page, ".user-tools button", 0)
        page.js("document.querySelector('textarea.edit').value = 'three'")
        press(page, ".user-tools button", 1)
        page.wait(f"sent.length === 4 && document.querySelectorAll('.assistant').length === 1 && {IDLE}")
        said = [[m["content"] for m in json.loads(body)["messages"]] for body in page.js("sent")]
        assert said == [["one"], ["one", "as you say", "two"], ["one", "as you say", "two"], ["three"]]
        assert texts(page, "user") == ["three"] and texts(page, "assistant") == ["as you say"]


def test_probabilities_and_speed(page: Page, tokenizer: Tokenizer) -> None:
    with live(tokenizer, ANSWER, delay_seconds=0.002) as server:
        page.show(1280, 800)
        page.open(server.url)
        page.say("What does the json module do?")
        page.wait(f"document.querySelector('.assistant') && {IDLE}")
        assert "tokens/s" in texts(page, "speed")[0] and texts(page, "speed")[0].startswith(f"{len(ANSWER) + 1} tokens")
        page.js("document.querySelectorAll('.t')[16].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))")
        shown = texts(page, "share")
        assert len(shown) == 5 and shown[0] == ANSWER[16].replace(" ", "␣") + "100 %"
        keep(page, "probabilities")
        page.js("document.getElementById('probabilities').click()")
        watch_requests(page)
        press(page, ".assistant-tools button", 1)
        page.wait(f"sent.length === 1 && {IDLE}")
        assert (
            "logprobs" not in json.loads(page.js("sent[0]")) and page.js("document.querySelectorAll('.t').length") == 0
        )


def test_language_colours_and_model_are_chosen(page: Page, tokenizer: Tokenizer) -> None:
    with live(tokenizer, "I am tiny", others={"second": "I am the second"}) as server:
        page.show(1280, 800)
        page.open(server.url)
        page.js("document.getElementById('toggle').click()")
        for name, value in (("language", "zh"), ("theme", "dark"), ("temperature", "0.2"), ("top_k", "7")):
            page.js(f"e = document.getElementById('{name}'); e.value = '{value}'")
            page.js("for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true}))")
        assert page.js("document.getElementById('send').textContent") == "发送"
        assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(25, 23, 21)"
        keep(page, "desktop-dark-chinese")
        page.open(server.url + "/?again")
        assert page.js("document.documentElement.lang") == "zh-CN"
        assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(25, 23, 21)"
        assert page.js("document.getElementById('temperature-value').textContent") == "0.2"
        page.js("m = document.getElementById('model'); m.value = 'second'; m.dispatchEvent(new Event('change'))")
        watch_requests(page)
        page.say("你是谁？")
        page.wait(f"document.querySelector('.assistant') && {IDLE}")
        assert texts(page, "assistant") == ["I am the second"] and json.loads(page.js("sent[0]"))["top_k"] == 7


def test_the_page_never_makes_markup_from_text() -> None:
    folder = Path(__file__).parents[2] / "src/octavo/serve/page"
    source = "".join(path.read_text() for path in sorted(folder.glob("*.js")))
    assert "textContent" in source
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
    ):
        assert word not in source
