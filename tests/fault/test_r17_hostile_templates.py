"""R17: no chat template finds a way out of its box, or takes more than half a second and 256 MiB."""

import re
import time
from pathlib import Path

import pytest
from boxed import SCALE, Box
from hostile_templates import BOMBS, ESCAPES, HARMLESS, SECRET, render
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.errors import DataError
from octavo.tokenizer import Byte, Tokenizer, chat, train
from octavo.tokenizer.budget import Budget, BudgetError

SECONDS, MEBIBYTES = 0.5, 256
GENERATED = 400 * SCALE
# What Python writes for its own things; none of it may come out of a template.
LEAK = re.compile(
    rf"<(class|function|bound|built-in|module|generator|Template|jinja2|octavo|Macro)\b| object at 0x|\bos\.|"
    rf"{SECRET}|root:|uid=|site-packages"
)
HONEST = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def box():
    with Box("hostile_templates:render", memory_bytes=512 << 20, seconds=10, first=[HONEST]) as one:
        yield one


def problem_of(outcome):
    found = outcome.trouble(SECONDS, MEBIBYTES)
    if not found and (leak := LEAK.search(outcome.result or "")):
        found = f"gives {leak[0]!r}: {outcome.result[:200]!r}"
    return found


def test_the_box_renders_what_is_honest():
    assert render(HONEST).count("<|im_end|>") == 2


def test_no_known_way_leads_out(box, record):
    failures = [f"{name}: {found}" for name, source in ESCAPES.items() if (found := problem_of(box.ask(source)))]
    record("R17", len(ESCAPES), failures, attacks="escapes")


def test_what_once_went_wrong(box, record):
    corpus = sorted((Path(__file__).parents[1] / "corpus" / "r17").glob("*.jinja"))
    failures = [f"{path.name}: {found}" for path in corpus if (found := problem_of(box.ask(path.read_text())))]
    record("R17", len(corpus), failures, attacks="corpus")


def test_no_known_bomb_goes_off(box, record):
    failures = []
    for name, source in (BOMBS | HARMLESS).items():
        outcome = box.ask(source)
        found = problem_of(outcome)
        if not found and name in BOMBS and not outcome.error:
            found = f"was rendered in {outcome.seconds:.2f} s and {outcome.mebibytes:.0f} MiB"
        if not found and outcome.error and outcome.exit_code != 3:
            found = f"exit code {outcome.exit_code}"
        if found:
            failures.append(f"{name}: {found}")
    record("R17", len(BOMBS) + len(HARMLESS), failures, attacks="bombs")


SLOW = "{% for i in range(22000) %}{% endfor %}"
BUSY = "{% for i in range(90000) %}" + "{{ 'a' | upper | length }}" * 9 + "{% endfor %}"


def test_a_rendering_has_an_end_of_its_own(record):
    """Where neither steps nor characters run out, the clock does."""
    failures = []
    budget = Budget(1, 100)
    budget.steps, budget.seconds = 10**9, 0.1
    budget._stop, budget._clock = time.thread_time() + 0.1, 10**9
    began = time.thread_time()
    try:
        for _ in range(3_000_000):
            budget.step()
    except BudgetError as error:
        failures = [] if "longer than" in str(error) else [str(error)]
    spent = time.thread_time() - began
    if spent > 0.5:
        failures.append(f"{spent:.2f} s")
    record("R17", 1, failures, attacks="clock")


def test_many_renderings_of_one_conversation_have_an_end(monkeypatch, record):
    """A long conversation is rendered again and again: where the template is slow or never ends, not for each turn."""
    monkeypatch.setattr(chat, "_SECONDS", 0.5)
    monkeypatch.setattr(chat, "_SECONDS_PER_MESSAGE", 0.0)
    base, failures = train(Byte(), []), []
    told = [{"role": role, "content": "a"} for _ in range(60) for role in ("user", "assistant")]
    shown = "{% for m in messages %}{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
    shown += "{% if add_generation_prompt %}assistant{% endif %}"
    for name, template in (("slow", SLOW + shown), ("never ends", BUSY + shown)):
        tokenizer = Tokenizer(base.to_json(), special=base.special_text, chat_template=template)
        began, said = time.thread_time(), ""
        try:
            tokenizer.render(told)
        except DataError as error:
            said = str(error)
        spent = time.thread_time() - began
        if "the chat template refuses" not in said or spent > 2:
            failures.append(f"{name}: {spent:.2f} s, {said}")
    record("R17", 2, failures, attacks="many renderings")


# ------------------------------------------------------------------------------------------- generated

NAMES = "messages bos_token tools loop self ns x y i range dict namespace raise_exception nope".split()
ATTRIBUTES = (
    "__class__ __init__ __globals__ _x role content items keys get append s upper split join format replace index "
    "strip rfind cycle changed previtem length grouper count values rsplit mro gi_frame"
).split()
FILTERS = (
    "abs attr batch capitalize count default dictsort e first float format groupby indent int items join last length "
    "list lower map max min pprint reject rejectattr replace reverse round safe select selectattr slice sort string "
    "striptags sum title tojson trim unique upper urlize wordwrap xmlattr"
).split()
TESTS = "defined none string mapping in eq sameas callable iterable filter odd divisibleby lower gt".split()
LITERALS = [
    "1", "-1", "0", "60", "99999", "10**9", "1e308", "'a'", "''", "'__class__'", "'%s'", "'%999d'", "'ab ' * 30000",
    "'a' * 300000", "[]", "[0] * 9000", "{}", "none", "true", "range(9000)", "messages",
]  # fmt: skip
OPERATORS = "+ - * / // % ** ~ and or == != < > in".split()

atoms = st.sampled_from([*NAMES, *LITERALS])


def larger(inner):
    listed = st.lists(inner, min_size=1, max_size=4)
    return st.one_of(
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        st.tuples(inner, st.sampled_from(ATTRIBUTES)).map(lambda p: f"({p[0]}).{p[1]}"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]})[{p[1]}]"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]})[{p[1]}:]"),
        st.tuples(inner, st.sampled_from(FILTERS)).map(lambda p: f"({p[0]})|{p[1]}"),
        st.tuples(inner, st.sampled_from(FILTERS), listed).map(lambda p: f"({p[0]})|{p[1]}({', '.join(p[2])})"),
        st.tuples(inner, st.sampled_from(TESTS)).map(lambda p: f"({p[0]}) is {p[1]}"),
        st.tuples(inner, st.sampled_from(ATTRIBUTES), listed).map(lambda p: f"({p[0]}).{p[1]}({', '.join(p[2])})"),
        st.tuples(st.sampled_from(NAMES), listed).map(lambda p: f"{p[0]}({', '.join(p[1])})"),
        listed.map(lambda parts: f"[{', '.join(parts)}]"),
        st.tuples(inner, st.integers(1, 30)).map(lambda p: f"[{', '.join([p[0]] * p[1])}]"),
        listed.map(lambda parts: f"namespace(s={parts[0]}, a={parts[-1]})"),
    )


expressions = st.recursive(atoms, larger, max_leaves=8)


def blocks(inner):
    body = st.lists(inner, max_size=3).map("".join)
    return st.one_of(
        st.tuples(expressions, body).map(lambda p: "{% for i in " + p[0] + " %}" + p[1] + "{% endfor %}"),
        st.tuples(expressions, body).map(lambda p: "{% if " + p[0] + " %}" + p[1] + "{% else %}y{% endif %}"),
        st.tuples(st.sampled_from(["x", "y", "ns.s", "ns.a", "i"]), expressions).map(
            lambda p: "{% set " + p[0] + " = " + p[1] + " %}"
        ),
        body.map(lambda text: "{% set x %}" + text + "{% endset %}"),
        body.map(lambda text: "{% macro y(x) %}" + text + "{% endmacro %}{{ y(1) }}"),
        body.map(lambda text: "{% filter upper %}" + text + "{% endfilter %}"),
        body.map(lambda text: "{% generation %}" + text + "{% endgeneration %}"),
    )


pieces = st.recursive(expressions.map(lambda text: "{{ " + text + " }}") | st.just("text\n"), blocks, max_leaves=6)
templates = st.lists(pieces, min_size=1, max_size=4).map(
    lambda parts: "{% set ns = namespace(s='ab', a=[1]) %}{% set x = 'ab' %}{% set y = [1] %}" + "".join(parts)
)


def test_no_generated_template_finds_a_way(box, record):
    tried, refused, failures = 0, 0, []

    @settings(
        max_examples=GENERATED, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(templates)
    def holds(source):
        nonlocal tried, refused
        outcome = box.ask(source)
        tried += 1
        refused += bool(outcome.error)
        assert not (found := problem_of(outcome)), f"{found} by {source}"

    try:
        holds()
    except AssertionError as error:
        failures = [str(error)[:1000]]
    record("R17", tried, failures, attacks="generated", refused=refused)
