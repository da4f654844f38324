"""Hostile chat templates: no way out, and a bounded bill."""

import resource
import time

import pytest

from octavo.errors import DataError
from octavo.tokenizer.sandbox import Template, jinja2

MESSAGES = [{"role": "user", "content": "hi"}]


def run(source, messages=MESSAGES, **variables):
    inputs = "".join(str(m) for m in messages)
    names = {"messages": messages, "bos_token": "<s>", "add_generation_prompt": False, **variables}
    return Template(source).render(len(messages), inputs, names)[0]


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ messages[0].__init__.__globals__ }}",
    "{{ (messages|first).get.__self__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace(a=1) %}{% set ns.__class__ = 1 %}{{ ns }}",
    "{{ raise_exception.__globals__ }}",
    "{{ range.__class__ }}",
    "{{ dict.mro() }}",
    "{{ loop.__class__ }}{% for m in messages %}{{ loop.__class__ }}{% endfor %}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({}) }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|map('attr', '__class__')|list }}",
    "{{ messages|selectattr('__class__')|list }}{{ messages|map(attribute='__class__.__mro__')|list }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'x' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages.clear() }}",
    "{{ strftime_now.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ joiner.__init__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__class__ }}{{ m._func }}",
    "{{ messages|xmlattr }}",
    "{{ messages|pprint }}",
    "{{ 'x'.encode('utf-16') }}",
    "{{ ''.join.__self__ }}",
]

BOMBS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{{ range(10**9)|list }}",
    "{{ range(1000000000)|sum }}",
    "{{ 9**9**9 }}",
    "{{ 'a' * 1000000000 }}",
    "{{ 1000000000 * 'a' }}",
    "{{ [0] * 1000000000 }}",
    "{% set ns = namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=1) %}{% for i in range(60) %}{% set ns.s = {1: ns.s, 2: ns.s} %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=1) %}{% for i in range(60) %}{% set ns.s = (ns.s, ns.s) %}{% endfor %}{{ ns.s|string }}",
    "{% set ns = namespace(s=2) %}{% for i in range(60) %}{% set ns.s = ns.s * ns.s %}{% endfor %}{{ ns.s }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ 'a'|center(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'a'|indent(1000000000, true) }}" + "{{ ('a\n' * 100000)|indent(1000) }}",
    "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000)|join('b' * 100000) }}",
    "{{ ('b' * 100000).join('a' * 100000) }}",
    "{{ messages|tojson(indent=1000000000) }}",
    "{{ 1.5|round(1000000000, 'ceil') }}",
    "{{ lipsum(n=100000) }}",
    "{{ [1]|batch(1000000000)|list }}",
    "{{ [1]|slice(1000000000)|list }}",
    "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m(n) %}" + "x" * 50000 + "{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "{% set t %}{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endset %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "not " * 5000 + "1 }}",
    "{{ " + "[" * 300 + "]" * 300 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "x" * 300_000,
    "{{ strftime_now('%1000000000d') }}",
    "{{ strftime_now('%d' * 1000) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_leads_out(source):
    before = repr(MESSAGES)
    try:
        text = run(source)
    except (DataError, jinja2.TemplateError):
        text = ""
    assert not any(word in text for word in ("class", "uid", "globals", "built-in", "object at", "function", "bound"))
    assert repr(MESSAGES) == before


@pytest.mark.parametrize("function", ["raise_exception", "strftime_now"])
def test_what_leads_out_is_not_even_done(function, tmp_path):
    """The text of a rendering does not show what it did on the way: here a file would be there."""
    opened = f"{{{{ {function}.__globals__['__builtins__']['open'](path, 'w') }}}}"
    with pytest.raises((DataError, jinja2.TemplateError)):
        run(opened, path=str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_bombs_are_refused_soon_and_small(source):
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises((DataError, jinja2.TemplateError)):
        run(source)
    assert time.thread_time() - start < 2  # half a second where the machine is free
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 << 10  # KiB


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ messages[0].role }}", "<s>hiuser"),
        ("{% for m in messages -%}\n  {{ loop.index }}{{ loop.last }}{{ loop.index0 }}\n{%- endfor %}", "1True0"),
        ("{{ {'a': 'é', 'b': [1, none]} | tojson }}", '{"a": "é", "b": [1, null]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ '<x>' | tojson }}", '"<x>"'),
        ("{{ ['a', 'b'] | join(', ') }}{{ messages | map(attribute='content') | join }}", "a, bhi"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=hi;"),
        ("{% for k, v in messages[0] | items %}{{ k }}{% endfor %}", "rolecontent"),
        (
            "{% for i in range(6) %}{% if i==2 %}{% continue %}{% elif i>3 %}{% break %}{% endif %}{{i}}{% endfor %}",
            "013",
        ),
        ("{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "10"),
        ("{{ ' a '.strip() + 'b' * 3 ~ 'c' ~ 1 }}{{ 'aXb'.split('X')[-1] }}{{ 'abc'[1:] }}", "abbbc1bbc"),
        ("{{ 'a.b' | replace('.', '-') | upper }}{{ 'x'.replace('x', 'yy') }}", "A-Byy"),
        ("{% macro m(x, y='z') %}({{ x }}{{ y }}){% endmacro %}{{ m('a') }}{{ m('b', y='c') }}", "(az)(bc)"),
        ("{% if messages is defined and messages is iterable and nope is not defined %}ok{% endif %}", "ok"),
        ("{{ nope | default('d') }}{{ none | default('e', true) }}{{ nope }}", "de"),
        ("{{ '%s and %d' % ('a', 3) }}{{ dict(a=1).a }}", "a and 31"),
        ("{{ 'a\nb' | indent(2) }}|{{ 'a\nb' | indent(2, first=true) }}", "a\n  b|  a\n  b"),
        ("{{ messages | tojson | length > 5 }}{{ 7 // 2 }}{{ 2.567 | round(1) }}", "True32.6"),
        ("{% generation %}x{% endgeneration %}{{ '' | length }}", "x0"),
        ("{% set a, b = 1, 2 %}{{ a }}{{ b }}{{ (messages | last).content }}", "12hi"),
        ("{{ [3, 1, 2] | sort | reverse | list }}{{ {'b': 1, 'a': 2} | dictsort }}", "[3, 2, 1][('a', 2), ('b', 1)]"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}", "AB"),
        ("{% set t %}a{{ 'b' }}{% endset %}{{ t }}{{ t is string }}", "abTrue"),
    ],
)
def test_honest_templates_work(source, text):
    assert run(source) == text


def test_generation_blocks_are_noted_by_place():
    template = Template(
        "a{% generation %}bé{% endgeneration %}c"
        "{% for i in [1, 2] %}{% generation %}{{ i }}{% endgeneration %}{% endfor %}"
    )
    assert template.marks_generation
    assert template.render(1, "", {}) == ("abéc12", [(1, 3), (4, 5), (5, 6)])


def test_each_rendering_has_its_own_budget_and_mark():
    template = Template("{% for i in range(60000) %}{% endfor %}{% generation %}{{ x }}{% endgeneration %}")
    for _ in range(3):
        assert template.render(1, "\U0010fffd", {"x": "\U0010fffd"}) == ("\U0010fffd", [(0, 1)])


def test_time_is_that_of_now():
    assert run("{{ strftime_now('%Y') }}").isdigit()


def test_broken_template_names_its_line():
    with pytest.raises(DataError, match="chat template line 2"):
        Template("a\n{% for %}")


def test_template_says_why_it_refuses():
    with pytest.raises(jinja2.TemplateError, match="no system role"):
        run("{{ raise_exception('no system role') }}")
