"""Chat templates that never end, or take all memory, by their names."""

LOOP = "{% for i in range(99999) %}"
DOUBLED = (
    "{% set n = namespace(a=[], b=[]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}"
)
NESTED = DOUBLED + "{% endfor %}"
TEXTS = "{% set n = namespace(s='ab') %}{% for i in range(60) %}"
MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
HOSTILE = {
    "squaring": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "powers of powers": "{% set x = 7 ** 9999 ** 99 %}",
    "lists compared": NESTED + "{% if n.a == n.b %}{% endif %}",
    "lists printed": NESTED + "{{ n.a }}",
    "lists as text": NESTED + "{% set t = n.a | string %}",
    "lists as JSON": NESTED + "{{ n.a | tojson }}",
    "lists laid out": NESTED + "{{ n.a | pprint }}",
    "lists in lists": NESTED + "{% if n.a in [n.b, 1] %}{% endif %}",
    "lists sorted": NESTED + "{{ [n.a, n.b] | sort }}",
    "objects printed": "{% set n = namespace(a={}) %}{% for i in range(60) %}"
    "{% set n.a = {'x': n.a, 'y': n.a} %}{% endfor %}{{ n.a }}",
    "pairs compared": "{% set n = namespace(a=(), b=()) %}{% for i in range(60) %}{% set n.a = (n.a, n.a) %}"
    "{% set n.b = (n.b, n.b) %}{% endfor %}{{ n.a == n.b }}",
    "views printed": "{% set n = namespace(a={}) %}{% for i in range(60) %}"
    "{% set n.a = {'x': n.a.items(), 'y': n.a.items()} %}{% endfor %}{{ n.a }}",
    "arguments kept": "{% set n = namespace(a=1, b=1) %}{% macro f() %}{% set n.a = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ f(n.a, n.a) }}{% endfor %}{{ n.a }}",
    "batches filled": "{% set n = namespace(a=1) %}{% for i in range(60) %}{% for x in [n.a] | batch(2, n.a) %}"
    "{% set n.a = x %}{% endfor %}{% endfor %}{{ n.a }}",
    "doubling a text": TEXTS + "{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by ~": TEXTS + "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by a block": TEXTS + "{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}{% endfor %}",
    "doubling by replace": TEXTS + "{% set n.s = n.s | replace('a', 'aaaa') %}{% endfor %}",
    "doubling by a method": TEXTS + "{% set n.s = n.s.replace('b', 'bbbb') %}{% endfor %}",
    "doubling by join": TEXTS + "{% set n.s = [n.s, n.s] | join(n.s) %}{% endfor %}",
    "doubling by a format": TEXTS + "{% set n.s = '%s%s' % (n.s, n.s) %}{% endfor %}",
    "doubling by format()": TEXTS + "{% set n.s = '{0}{0}'.format(n.s) %}{% endfor %}",
    "a column while it is compiled": "{{ '%3000000000d' % 1 }}",
    "a column by a number": "{{ '%*d' % (3000000000, 1) }}",
    "a column in braces": "{{ '{:>3000000000}'.format(1) }}",
    "a column in braces by a number": "{{ '{:>{}}'.format(1, 3000000000) }}",
    "a repeated text": "{{ 'a' * 3000000000 }}",
    "a repeated text, turned": "{{ 3000000000 * 'a' }}",
    "a repeated list": "{% set x = [1] * 3000000000 %}",
    "centered": "{{ 'a' | center(3000000000) }}",
    "filled": "{{ 'a'.ljust(3000000000) }}",
    "sorted": "{{ ([2, 1] * 100000000) | sort | length }}",
    "sliced": "{{ [1] | slice(2000000000) | list | length }}",
    "words by chance": "{{ lipsum(2000000000) }}",
    "indented JSON": "{{ [[1]] | tojson(indent=3000000000) }}",
    "indented": "{{ ('\\n' * 60000000) | indent(90000) }}",
    "loops": LOOP * 3 + "{% set x = 1 %}" + "{% endfor %}" * 3,
    "loops that go on": LOOP * 2 + "{% if false %}{{ i }}{% else %}{% continue %}{% endif %}" + "{% endfor %}" * 2,
    "loops over nothing": LOOP + "{% for j in range(99999) if j < 0 %}{% else %}{% endfor %}{% endfor %}",
    "macros": MACRO + "{{ f(60) }}",
    "a macro that calls itself": "{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(1) }}",
    "a loop that calls itself": "{% for x in [60] recursive %}"
    "{% if x %}{{ loop([x - 1, x - 1]) }}{% endif %}{% endfor %}",
    "a block that calls itself": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "a search": "{% set a = 'a' * 30000000 %}{{ a.rfind('b' + 'a' * 15000000) }}",
    "a text stripped": "{% set a = 'a' * 30000000 %}{{ (a + 'c').strip('b' * 30000000 + 'a') | length }}",
    "texts kept": "{% set x %}{% for i in range(99999) %}{{ 'a' * (60000000 + i) }}{% endfor %}{% endset %}",
    "lists added": "{{ range(99999) | batch(1) | sum(start=[]) | length }}",
    "a whole text": LOOP + "{{ 'a' * 1000 }}{% endfor %}",
}
