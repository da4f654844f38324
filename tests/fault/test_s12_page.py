"""S12: hostile text as an answer, a model's name and an error, in a real browser; it is shown, and does nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from serving import Live

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from browser import CHROMIUM, Page, browser

IDLE = "!document.querySelector('.running')"
AT_ONCE = 8
ACTS = ("window.ran.push(N)", "document.title='N'", "fetch('http://127.0.0.1:9/N')", "location='http://127.0.0.1:9/N'")
FORMS = (
    "<script>{}</script>", "<script src=http://127.0.0.1:9/N.js></script>", "<img src=x onerror={}>", "<svg onload={}>",
    "<iframe srcdoc=\"<script>parent.{}</script>\"></iframe>", "<a href=\"javascript:{}\">x</a>", "[x](javascript:{})",
    "![x](http://127.0.0.1:9/N.png)", "<body onload={}>", "<input autofocus onfocus={}>", "<details open ontoggle={}>",
    "<math><mtext></p><script>{}</script>", "</div></main><script>{}</script>", "\"><script>{}</script>",
    "' onmouseover='{}", "<object data=\"javascript:{}\"></object>", "<embed src=http://127.0.0.1:9/N.swf>",
    "<link rel=stylesheet href=http://127.0.0.1:9/N.css>", "<style>@import 'http://127.0.0.1:9/N.css';</style>",
    "<base href=http://127.0.0.1:9/N/>", "<meta http-equiv=refresh content=\"0;url=javascript:{}\">",
    "<form action=javascript:{}><button autofocus>", "<video><source onerror={}></video>", "<audio src=x onerror={}>",
    "<svg><script>{}</script></svg>", "<svg><a xlink:href=\"javascript:{}\"><text>x", "<marquee onstart={}>",
    "<!--><script>{}</script>-->", "<![CDATA[<script>{}</script>]]>",
    "<noscript><p title=\"</noscript><script>{}</script>\">",
    "<template><script>{}</script></template>", "{{{{constructor.constructor('{}')()}}}}", "${{{}}}", "`${{{}}}`",
    "<img src=`x`onerror={}>", "<IMG SRC=x OnErRoR={}>", "<scr\0ipt>{}</scr\0ipt>", "<%73cript>{}</script>",
    "&lt;script&gt;{}&lt;/script&gt;", "<x onclick={} tabindex=1 id=x autofocus>", "\u202e<script>{}</script>",
)  # fmt: skip
PAYLOADS = [
    f"{number:03d} "
    + form.replace("N", str(number)).format(ACTS[(number + turn) % len(ACTS)].replace("N", str(number)))
    for turn in (0, 1)
    for number, form in enumerate(FORMS, turn * len(FORMS))
][:80]
GROUPS = [PAYLOADS[i : i + AT_ONCE] for i in range(0, len(PAYLOADS), AT_ONCE)]
STRANGERS = "#log img, #log script, #log svg, #log a, #log form, #log iframe, iframe, object, embed, base, body > style"


def open_page(page: Page, server: Live) -> None:
    page.requests.clear()
    page.problems.clear()
    page.show(1280, 800)
    page.open(server.url)
    page.js("window.ran = []; window.addEventListener('securitypolicyviolation', (e) => window.ran.push(e.blockedURI))")


def did_anything(page: Page, server: Live) -> list[str]:
    """What the page did that it should not have done."""
    wrong = [f"it ran {page.js('JSON.stringify(window.ran)')}"] if page.js("window.ran.length") else []
    wrong += [f"its console: {text[:200]}" for text in page.problems if "400 (Bad Request)" not in text]
    wrong += [f"it asked for {url}" for url in page.requests if not url.startswith((server.url, "about:"))]
    if page.js("document.title") != "Octavo" or not page.js("location.href").startswith(server.url):
        wrong.append(f"it is now {page.js('document.title')} at {page.js('location.href')}")
    if n := page.js(f"document.querySelectorAll({json.dumps(STRANGERS)}).length"):
        wrong.append(f"{n} elements were made of text")
    return wrong


def texts(page: Page, selector: str) -> list[str]:
    return page.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")


def as_answers(page: Page, live: Any, wrong: list[str]) -> int:
    """Said by the model, and by the person."""
    (tokenizer,) = live.args
    with live("") as server:
        open_page(page, server)
        page.js("document.getElementById('probabilities').checked = false")
        for group in GROUPS:
            page.js("document.getElementById('new').click()")
            text = "\n".join(group).replace("\0", "")
            server.model.reply = [*tokenizer.encode(text), tokenizer.special.eos]
            page.say(text.replace("\n", " "))
            page.wait(f"document.querySelectorAll('.turn.assistant').length === 1 && {IDLE}", 60)
            if (shown := texts(page, ".turn.assistant")[-1]) != text:
                wrong.append(f"an answer is shown as {shown[:300]!r}, not {text[:300]!r}")
            if (shown := texts(page, ".turn.user")[-1]) != text.replace("\n", " "):
                wrong.append(f"a question is shown as {shown[:300]!r}")
        wrong += did_anything(page, server)
    return len(PAYLOADS)


def as_names(page: Page, live: Any, wrong: list[str]) -> int:
    """The names of models."""
    names = [payload.replace("\0", "") for payload in PAYLOADS]
    with live("ok", name=names[0], others=dict.fromkeys(names[1:], "ok")) as server:
        open_page(page, server)
        if (shown := texts(page, "#model option")) != names:
            wrong.append(f"names are shown as {[a for a, b in zip(shown, names, strict=False) if a != b][:2]}")
        page.say("hi")
        page.wait(f"document.querySelectorAll('.turn.assistant').length === 1 && {IDLE}", 60)
        wrong += did_anything(page, server)
    return len(names)


def as_errors(page: Page, live: Any, wrong: list[str]) -> int:
    """What a server, not this one, may say of a request; before the first token and after it."""
    with live("ok") as server:
        open_page(page, server)
        page.js("window.real = fetch")
        for number, group in enumerate(GROUPS):
            text = "\n".join(group).replace("\0", "")
            error = json.dumps(json.dumps({"error": {"message": text, "type": "x", "param": None, "code": None}}))
            if number % 2:
                answer = f"new Response('data: ' + {error} + '\\n\\n', {{status: 200}})"
            else:
                answer = f"new Response({error}, {{status: 400}})"
            page.js(f"window.fetch = (url, more) => more && more.method ? Promise.resolve({answer}) : real(url, more)")
            page.js("document.getElementById('input').value = ''")
            page.js("document.querySelectorAll('.error').forEach((node) => node.remove())")
            page.say("hi")
            page.wait(f"document.querySelector('.error') && {IDLE}", 60)
            if (shown := texts(page, ".error")[-1]) != text:
                wrong.append(f"an error is shown as {shown[:300]!r}, not {text[:300]!r}")
        wrong += did_anything(page, server)
    return len(PAYLOADS)


@pytest.fixture(scope="module")
def page(request: pytest.FixtureRequest) -> Any:
    with ExitStack() as stack:
        yield stack.enter_context(browser()) if CHROMIUM else None


@pytest.mark.timeout(300)
@pytest.mark.parametrize("where", [as_answers, as_names, as_errors], ids=["answers", "names", "errors"])
def test_hostile_text_is_shown_and_does_nothing(page: Any, live: Any, record: Callable[..., None], where: Any) -> None:
    if CHROMIUM is None:
        record("S12", 0, 0, skipped="no Chromium")
        pytest.skip("NOT RUN: no Chromium found; `apt-get install chromium` to run these")
    wrong = list[str]()
    n = where(page, live, wrong)
    record("S12", n, wrong, where=where.__name__)


def test_a_stream_that_ends_early_is_not_taken_for_an_answer(page: Any, live: Any) -> None:
    if CHROMIUM is None:
        pytest.skip("NOT RUN: no Chromium found; `apt-get install chromium` to run these")
    with live("ok") as server:
        open_page(page, server)
        chunk = json.dumps(json.dumps({"choices": [{"index": 0, "delta": {"content": "Half"}, "finish_reason": None}]}))
        page.js(f"window.fetch = () => Promise.resolve(new Response('data: ' + {chunk} + '\\n\\n'))")
        page.say("hi")
        page.wait(f"document.querySelector('.error') && {IDLE}")
        assert texts(page, ".turn.assistant") == ["Half"]
