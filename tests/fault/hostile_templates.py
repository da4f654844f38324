"""Chat templates that mean harm, and what the child of R17 does with them."""

from __future__ import annotations

import os

SECRET = "the-secret-of-the-process"
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def render(source: str) -> str:
    """The text of a template over two messages; an error in our form where the box refuses it."""
    import jinja2

    from octavo.errors import DataError
    from octavo.tokenizer.sandbox import Template

    os.environ["OCTAVO_SECRET"] = SECRET
    before = repr(MESSAGES)
    names = {"messages": MESSAGES, "bos_token": "<s>", "add_generation_prompt": True, "tools": None}
    try:
        text, _ = Template(source).render(len(MESSAGES), "userhiassistantho", names)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses the conversation: {error}", fix="use another template") from None
    finally:
        assert repr(MESSAGES) == before, "a template changed its input"
    return text[:2000]


# Ways from a template to Python's inside, each in its own manner: attributes, subscripts, filters, formats, globals.
ESCAPES = {
    "class of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by subscript": "{{ ''['__class__']['__mro__'] }}",
    "class by attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "class by a name made of parts": "{{ ''['__cl' ~ 'ass__'] }}{{ messages['__cl' + 'ass__'] }}",
    "class by join": "{{ ''[['__','class','__']|join] }}",
    "class by map": "{{ ['']|map(attribute='__class__')|list }}",
    "class by a dotted path": "{{ [['']]|map(attribute='0.__class__.__mro__')|list }}",
    "class by groupby": "{{ ['a']|groupby('__class__') }}",
    "class by sort": "{{ ['a']|sort(attribute='__class__.__name__') }}{{ ['a']|sum(attribute='__class__', start='') }}",
    "class by selectattr": "{{ messages|selectattr('__class__')|list }}{{ messages|rejectattr('__doc__')|list }}",
    "class by min": "{{ messages|min(attribute='__class__') }}{{ messages|unique(attribute='__class__')|list }}",
    "class in a format": "{{ '{0.__class__}'.format(messages) }}",
    "class in a format map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "class in a format filter": "{{ '{0.__class__}'|format(1) }}",
    "class through the method's owner": "{{ messages.append.__self__.__class__ }}",
    "globals of a global": "{{ range.__self__ }}{{ raise_exception.__globals__['json'] }}",
    "globals of strftime_now": "{{ strftime_now.__globals__.os.environ }}",
    "globals of namespace": "{{ namespace.__init__.__globals__.sys.modules.os.environ }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of joiner": "{{ joiner.__init__.__globals__.os.environ }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].environ }}",
    "globals of url_for": "{{ url_for.__globals__ }}{{ get_flashed_messages.__globals__ }}{{ config.items() }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m._environment }}{{ m._func.__globals__ }}",
    "environment of self": "{{ self._TemplateReference__context.environment }}",
    "environment of a block": "{% block b %}{{ self.b._context.environment }}{{ self.b.name }}{% endblock %}",
    "context of a loop": "{% for m in messages %}{{ loop._iterator.gi_frame.f_globals }}{% endfor %}",
    "frame of a generator": "{% set g = messages|map('upper') %}{{ g.gi_frame.f_back.f_globals }}",
    "frame of a generator by subscript": "{% set g = messages|select %}{{ g['gi_frame'] }}{{ g['gi_code'] }}",
    "code of a function": "{{ raise_exception.__code__ }}{{ dict.__code__ }}{{ strftime_now['__code__'] }}",
    "undefined's inside": "{{ nope.__doc__ }}{{ nope._undefined_exception }}{{ nope|default(nope._undefined_name) }}",
    "namespace with a name of Python's": "{{ namespace(__class__=1) }}{{ namespace(**{'__class__': 1}) }}",
    "set on a namespace": "{% set ns = namespace() %}{% set ns.__dict__ = {} %}{{ ns }}",
    "set on a message": "{% set messages.x = 1 %}",
    "change a list": "{{ messages.append({}) }}{{ messages.clear() }}{{ messages.sort() }}{{ messages.extend([1]) }}",
    "change a dict": "{{ messages[0].update({'role': 'system'}) }}{{ messages[0].setdefault('x', 1) }}",
    "change by popping": "{{ messages.pop() }}{{ messages[0].popitem() }}{{ messages[0].__setitem__('role', 1) }}",
    "include a file": "{% include '/etc/passwd' %}",
    "include without complaint": "{% include ['a', '/etc/passwd'] ignore missing %}",
    "import a module": "{% import 'os' as os %}{{ os.environ }}",
    "import from a module": "{% from 'os' import environ %}{{ environ }}",
    "extend a template": "{% extends '/etc/passwd' %}",
    "do statement": "{% do messages.append(1) %}",
    "debug statement": "{% debug %}",
    "call of a class": "{{ dict.fromkeys('ab') }}{{ dict.__subclasses__() }}{{ ''.join.__self__.__class__('a') }}",
    "encode and decode": "{{ 'x'.encode('utf-16') }}{{ 'x'.encode().decode('unicode_escape') }}{{ 'a'.maketrans }}",
    "print of functions": "{{ raise_exception }}{{ ''.upper }}{{ dict }}{{ messages.append }}{{ loop }}",
    "print of a generator": "{{ messages|map('upper') }}{{ messages|select }}{{ {}.items }}",
    "print of the namespace's class": "{{ namespace }}{{ range }}{{ strftime_now }}",
    "pprint": "{{ messages|pprint }}{{ self|pprint }}",
    "xmlattr and urlize": "{{ {'a': 1}|xmlattr }}{{ 'http://a.b'|urlize }}",
    "filter by a hidden name": "{{ ['a']|map('toll: loop', -1000000000)|list }}",
    "filter by its name": "{{ ['a']|map('attr', '__class__')|list }}",
    "test by name": "{{ messages|select('filter', 'x')|list }}{{ '__class__' is filter }}",
    "exception's inside": "{{ raise_exception(messages) }}",
    "error that quotes a class": "{{ messages[messages] }}{{ messages.x.__class__.y }}",
    "environment variables by strftime": "{{ strftime_now('%Z %z $HOME %s') }}",
    "caller's frame": "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}x{% endcall %}",
    "arguments of a macro": "{% macro m() %}{{ varargs.__class__ }}{{ kwargs.__class__ }}{% endmacro %}{{ m(1, a=2) }}",
    "super": "{% block a %}{{ super() }}{{ super.__globals__ }}{% endblock %}",
    "trans": "{% trans %}{{ x.__class__ }}{% endtrans %}",
    "autoescape": "{% autoescape true %}{{ messages.__html__ }}{{ ''.__html__() }}{% endautoescape %}",
}  # fmt: skip

MILLION = "{% set x = 'a' * 1000000 %}"


def growing(start: str, step: str, end: str = "{{ ns.s }}") -> str:
    """``ns.s`` begins as ``start`` and becomes ``step`` 60 times."""
    return "{% set ns = namespace(s=" + start + ") %}{% for i in range(60) %}" + step + "{% endfor %}" + end


def many(item: str, n: int = 1500) -> str:
    """A list of ``n`` times the same expression: one statement, no loop."""
    return "{% set l = [" + f"{item}, " * n + "] %}{{ l|length }}"


# Ways to take time or memory. All of them must be refused.
BOMBS = {
    "loops in loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "a long range": "{{ range(1000000000)|list }}",
    "a sum of a long range": "{{ range(0, 10**9)|sum }}{{ range(1000000000)|sum }}",
    "a tower of powers": "{{ 9**9**9 }}",
    "a text times a billion": "{{ 'a' * 1000000000 }}",
    "a list times a billion": "{{ [0] * 1000000000 }}",
    "a tuple times a billion": "{{ 1000000000 * (1, 2) }}",
    "text that doubles by +": growing("'aaaa'", "{% set ns.s = ns.s + ns.s %}"),
    "text that doubles by ~": growing("'aaaa'", "{% set ns.s = ns.s ~ ns.s %}"),
    "text that doubles by join": growing("'ab'", "{% set ns.s = ns.s|join(ns.s) %}"),
    "text that doubles by replace": growing("'ab'", "{% set ns.s = ns.s.replace('a', ns.s) %}"),
    "text that doubles by a block": growing("'ab'", "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}"),
    "lists that double": growing("[1]", "{% set ns.s = [ns.s, ns.s] %}"),
    "tuples that double": growing("1", "{% set ns.s = (ns.s, ns.s) %}"),
    "dicts that double": growing("1", "{% set ns.s = {1: ns.s, 2: ns.s} %}"),
    "dict() that doubles": growing("1", "{% set ns.s = dict(a=ns.s, b=ns.s) %}"),
    "numbers that square": growing("3", "{% set ns.s = ns.s * ns.s %}"),
    "a number of a million hex digits": "{{ ('f' * 1000000)|int(base=16) }}",
    "a literal of 5,000 digits": "{{ " + "9" * 5000 + " }}",
    "a literal of 50,000 hex digits": "{{ 0x" + "f" * 50_000 + " }}",
    "a wide %": "{{ '%999999999d' % 1 }}",
    "a width from an argument": "{{ '%*d' % (999999999, 1) }}",
    "one field many times": "{% set x = 'a' * 900000 %}{{ ('%(a)s' * 1000) % {'a': x} }}",
    "many wide fields": "{{ ('%(a)999d' * 150000) % {'a': 1} }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "a deep indent": "{{ ('a\n' * 90000)|indent(1000) }}",
    "wide separators": "{{ ([0] * 30000)|tojson(separators=('x' * 100000, ':')) }}",
    "a deep indent in JSON": "{% set ns = namespace(s=[1]) %}{% for i in range(90) %}{% set ns.s = [ns.s] %}"
    "{% endfor %}{{ ([ns.s] * 900)|tojson(indent=16) }}",
    "slices in one expression": MILLION + many("x[1:]"),
    "copies in one expression": MILLION + many("x|upper"),
    "escapes in one expression": "{% set x = '&' * 900000 %}" + many("x|e"),
    "splits in one expression": "{% set x = 'a ' * 400000 %}" + many("x.split('q', 1)"),
    "parts in one expression": MILLION + many("x.partition('a')"),
    "reversals in one expression": MILLION + many("x|reverse"),
    "lists in one expression": "{% set x = [0] * 30000 %}" + many("x[1:]"),
    "ranges in one expression": many("range(99999)|list"),
    "comparisons in one expression": MILLION + "{% set y = x[1:] + 'a' %}" + many("x == y"),
    "searches in one expression": MILLION + many("'ab' in x"),
    "searches by a test": MILLION + many("'ab' is in(x)"),
    "counts in one expression": MILLION + many("x.count('ab')"),
    "searches in a list of texts": MILLION + "{% set y = x[1:] + 'b' %}{{ x in [y] * 29000 }}",
    "a search from the right": "{% set x = 'a' * 700000 %}{% set y = 'ab' + 'a' * 300000 %}{{ x.rfind(y) }}",
    "a split from the right": "{% set x = 'a' * 700000 %}{% set y = 'ab' + 'a' * 300000 %}{{ x.rsplit(y) }}",
    "a strip by many characters": "{% set x = 'a' * 700000 %}{{ x.strip('b' * 300000 + 'a')|length }}",
    "a trim by many characters": "{% set x = 'a' * 700000 %}{{ x|trim('b' * 300000 + 'a')|length }}",
    "sorting over and over": many("range(99999)|sort|length"),
    "sorting characters": MILLION + "{{ x|sort|length }}",
    "sorting long texts": MILLION + "{{ ([x] * 30000)|sort|length }}",
    "unique over and over": many("range(99999)|unique|list|length"),
    "grouping over and over": many("range(99999)|groupby('real')|length"),
    "selection in a long text": MILLION + "{{ (['ab'] * 30000)|select('in', x)|list|length }}",
    "an endless attribute": "{{ ([[1]] * 3000)|map(attribute='0.' * 300000)|list|length }}",
    "sums of lists": "{% set x = [[0] * 300] * 300 %}" + many("x|sum(start=[])"),
    "values of a dict": "{% set v = {'a': 'a' * 900000}.values() %}{{ " + " ~ ".join(["v"] * 2000) + " }}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "a macro that calls itself 2^60 times": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "a block that calls itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a loop that calls itself": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "text in a loop": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "not not not": "{{ " + "not " * 5000 + "1 }}",
    "a sum of thousands": "{{ " + "1+" * 5000 + "1 }}",
    "ifs in ifs": "{% if 1 %}" * 2500 + "{% endif %}" * 2500,
    "lists in lists": "{{ " + "[" * 400 + "]" * 400 + " }}",
    "60,000 variables": "{{ a }}" * 60_000,
    "50,000 elifs": "{% if 0 %}" + "{% elif 0 %}" * 50_000 + "{% endif %}",
    "an open comment": "{#" * 90_000,
    "300,000 characters": "x" * 300_000,
    "a wide date": "{{ strftime_now('%999999999Y') }}",
    "a long date": "{{ strftime_now('%A' * 100000) }}",
}  # fmt: skip
# Named after what they would do if a namespace were written out with what it holds: small as they are.
HARMLESS = {
    "namespaces that double": growing("1", "{% set ns.s = namespace(a=ns.s, b=ns.s) %}"),
    "namespaces in an error": growing("1", "{% set ns.s = namespace(a=ns.s, b=ns.s) %}", "{{ raise_exception(ns.s) }}"),
    "macros in a list": "{% macro m() %}x{% endmacro %}" + many("m"),
    "half a character": "{{ '\ud800' }}",
    "190,000 spaces": "{{ a" + " " * 190_000 + "}}",
    "a name of 190,000": "{{ " + "a" * 190_000 + " }}",
}  # fmt: skip
