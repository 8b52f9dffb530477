"""Recipe text: the types people expect, exactly there and back, and nothing that surprises or blows up."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import RecipeError
from tunesmith.recipe.yaml_io import MAX_RECIPE_BYTES, dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 10_000),
        (".5", 0.5),
        ("5.0", 5.0),
        ("1_000", 1000),
        ("010", 10),
        ("-3", -3),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        (".inf", ".inf"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ("[1, a, null]", [1, "a", None]),
        ("{a: 1, 2: b}", {"a": 1, "2": "b"}),
        (r"re:layers\.[0-3]\..*", r"re:layers\.[0-3]\..*"),
        ("C:\\data\\x.jsonl", "C:\\data\\x.jsonl"),
    ],
)
def test_value_has_the_expected_type(text, value):
    found = parse(text, "x")
    assert (type(found), found) == (type(value), value)


def test_commas_and_tabs_of_json_are_read():
    found = parse('{\n\t"a": [1, 2.5e-3, null],\n\t"b": "\\u00e9"\n}', "recipe.json")
    assert found == {"a": [1, 0.0025, None], "b": "é"}
    assert parse("{a: 1, b: [x]}", "recipe.yaml") == {"a": 1, "b": ["x"]}


BROKEN = [
    ("a: 1\nb: 2\na: 3", "r.yaml:3: a: is there twice, first in line 1: keep one"),
    ("a:\n  b: 1\n  b: 2\nc: 1\nc: 2", "r.yaml:5: c: is there twice, first in line 4: keep one"),
    ('{"a": 1, "a": 2}', "r.yaml:1: a: is there twice, first in line 1: keep one"),
    ("a: [1,\nb: 2", "r.yaml:2: expected ',' or ']'"),
    ("a: 'x\nb: 1", "r.yaml:2: found unexpected end of stream"),
    ("a:\n\t- b", "r.yaml:2: found character '\\t'"),
    ("a: 1\n---\nb: 2", "r.yaml:2: expected a single document in the stream but found another document"),
    ("a: b: c", "r.yaml:1: mapping values are not allowed here"),
    ("a: &x 1\nb: *x", "r.yaml:1: & and * (anchors) are not for recipes"),
    ("a: !!python/object/apply:os.system [ls]", "r.yaml:1: tag:yaml.org,2002:python/object/apply:os.system (tags)"),
    ("a: !!int x", "r.yaml:1: tag:yaml.org,2002:int (tags) are not for recipes"),
    ("a: !!binary aGk=", "(tags) are not for recipes"),
    ("? [a]\n: 1", "r.yaml:1: a list or mapping cannot be a key"),
    ("a:\n" + "[" * 40, "r.yaml:2: nested deeper than 32"),
    ("a: 1\nb: \x07", "r.yaml:2: the character U+0007 is not allowed"),
    ("x" * (MAX_RECIPE_BYTES + 1), "r.yaml: larger than 256 KiB"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_text_is_named_with_its_line(text, message):
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    assert message in str(caught.value)


def test_an_alias_bomb_is_refused_at_once():
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    begun = time.monotonic()
    with pytest.raises(RecipeError, match="anchors"):
        parse(bomb, "r.yaml")
    assert time.monotonic() - begun < 5  # unrefused it is 2^40 items


KEYS = st.text(min_size=1, max_size=80)
"""Escaped, 960 characters at most: YAML takes no longer key on its line, and no option has one."""
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_dump_comes_back_exactly(value):
    line = dump(value)
    assert "\n" not in line
    assert same(parse(f"key: {line}  # a comment", "x")["key"], value)


def same(found, value) -> bool:
    """Equal; a whole float such as 1e22 may come back as the whole number it is."""
    if isinstance(value, dict):
        return found.keys() == value.keys() and all(same(found[key], value[key]) for key in value)
    if isinstance(value, list):
        return len(found) == len(value) and all(map(same, found, value))
    return found == value and (type(found) is type(value) or (isinstance(value, float) and type(found) is int))


@given(PLAIN)
def test_json_files_read_as_json_does(value):
    found = parse(json.dumps({"a": value}), "r.json")
    assert same(json.loads(json.dumps(found)), {"a": value})  # both halves of a character are there, as JSON has them
