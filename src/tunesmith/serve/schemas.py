"""Which JSON schemas the grammar of an answer keeps in full, and a process that tries how long one takes to compile.

    python -m tunesmith.serve.schemas

xgrammar leaves aside what it does not know, in silence. What passes `check` was tried keyword by keyword
(tests/inference/test_schemas.py).
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

ANNOTATIONS = frozenset({
    "$schema", "$comment", "$defs", "definitions", "title", "description", "default", "examples", "deprecated",
    "readOnly", "writeOnly", "discriminator",
})  # fmt: skip
"""Keywords that ask for nothing. Definitions are read where something refers to them."""
EMPTY: Mapping[str, Any] = {"uniqueItems": False, "propertyNames": {"type": "string"}}
"""Keywords with a value by which they ask for nothing, as zod and others write them."""
FORMATS = frozenset({
    "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "uri-reference",
    "uri-template",
})  # fmt: skip
"""Of those that it knows, but for JSON pointers: their strings can end in the middle, since a sign is not escaped."""
KEPT: dict[str, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset(),
    "null": frozenset(),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties", "minProperties", "maxProperties"}),
}
"""Keywords of each type that the grammar keeps."""
ALONE = ("$ref", "anyOf", "oneOf", "allOf")
"""Keywords beside which no other is kept."""
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
MOST_COUNT = 100_000
MOST_REPEATS = 256
"""The compiler fails on patterns that repeat something more often."""
MOST_BYTES = 4 * 1024**3
"""Of the process that compiles."""
NAMED = 10
"""Problems that are said at once."""

_PYTHON_TYPES: dict[str, Any] = {
    "string": str, "boolean": bool, "null": type(None), "array": list, "object": dict, "integer": int,
    "number": (int, float),
}  # fmt: skip


def check(schema: Mapping[str, Any]) -> str:
    """What of a schema would not be kept, in words for its sender; "": all of it is."""
    problems = list(dict.fromkeys(_Walk(schema).node(schema, "")))
    more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return "; ".join(problems[:NAMED]) + more


class _Walk:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._seen: set[str] = set()

    def node(self, schema: Any, place: str) -> Iterator[str]:
        """Problems of a schema and of those in it."""
        if schema is True:
            return
        if not isinstance(schema, dict):
            yield f"{place or 'the schema'}: should be an object"
            return
        here = f"{place}: " if place else ""
        keywords = [
            name for name, value in schema.items() if name not in ANNOTATIONS and value != EMPTY.get(name, _Walk)
        ]
        if first := next((name for name in ALONE if name in schema), None):
            yield from (f"{here}{name} is not kept beside {first}" for name in keywords if name != first)
            yield from self._choice(first, schema[first], place)
        elif "const" in schema or "enum" in schema:
            yield from self._values(schema, keywords, here)
        elif "type" in schema:
            yield from self._typed(schema, keywords, place)
        else:
            known = frozenset[str]().union(*KEPT.values())
            yield from (
                f"{here}{name} needs a type" if name in known else f"{here}{name} is not kept" for name in keywords
            )

    def _choice(self, keyword: str, given: Any, place: str) -> Iterator[str]:
        inside = f"{place}.{keyword}".lstrip(".")
        if keyword == "$ref":
            yield from self._reference(given, inside)
            return
        if not isinstance(given, list) or not given:
            yield f"{inside}: should be a list of schemas"
            return
        if keyword == "allOf" and len(given) > 1:
            yield f"{inside} of several schemas is not kept: write them as one"
        if keyword == "oneOf" and not self._exclude_each_other(given):
            yield f"{inside}: an answer could fit more than one of them: give them different types, or write anyOf"
        for i, one in enumerate(given):
            yield from self.node(one, f"{inside}[{i}]")

    def _reference(self, given: Any, place: str) -> Iterator[str]:
        found = self._resolved(given)
        if found is None:
            yield f"{place}: {str(given)[:80]!r} is no place in this schema (#/...)"
        elif given not in self._seen:
            self._seen.add(given)
            yield from self.node(found, str(given))

    def _resolved(self, given: Any) -> Any:
        if given == "#":
            return self._root
        found: Any = self._root
        if not isinstance(given, str) or not given.startswith("#/") or "~" in given or "%" in given:
            return None
        for part in given[2:].split("/"):
            if not isinstance(found, dict) or part not in found:
                return None
            found = found[part]
        return found

    def _exclude_each_other(self, schemas: Sequence[Any]) -> bool:
        """Whether no value fits two of them: other types, or another constant under a key that all must have."""
        found = [self._through(one) for one in schemas]
        kinds = [one.get("type") for one in found]
        if all(isinstance(kind, str) for kind in kinds):
            plain = ["number" if kind == "integer" else kind for kind in kinds]
            if len(set(plain)) == len(plain):
                return True
        if not all(kind == "object" for kind in kinds):
            return False
        for key in found[0].get("properties", {}):
            values: list[str] = []
            for one in found:
                of_key = one.get("properties", {}).get(key) if key in one.get("required", ()) else None
                of_key = of_key if isinstance(of_key, dict) else {}
                listed = [of_key["const"]] if "const" in of_key else of_key.get("enum")
                values += [json.dumps(value) for value in listed] if isinstance(listed, list) and listed else [""]
            if "" not in values and len(set(values)) == len(values):
                return True
        return False

    def _through(self, schema: Any) -> dict[str, Any]:
        if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
            schema = self._resolved(schema["$ref"])
        return schema if isinstance(schema, dict) else {}

    @staticmethod
    def _values(schema: Mapping[str, Any], keywords: Sequence[str], here: str) -> Iterator[str]:
        first = "const" if "const" in schema else "enum"
        yield from (f"{here}{name} is not kept beside {first}" for name in keywords if name not in (first, "type"))
        values = [schema["const"]] if first == "const" else schema["enum"]
        if not isinstance(values, list) or not values:
            yield f"{here}enum should be a list of values"
        elif "type" in schema and not all(_is_of(value, schema["type"]) for value in values):
            yield f"{here}{first} has a value that is not of its type"

    def _typed(self, schema: Mapping[str, Any], keywords: Sequence[str], place: str) -> Iterator[str]:
        here = f"{place}: " if place else ""
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        unknown = [kind for kind in types if not isinstance(kind, str) or kind not in KEPT]
        if unknown or not types:
            yield f"{here}type: there is no type {str((unknown or types)[:1])[1:-1][:40]}"
            return
        kept = frozenset({"type"}).union(*(KEPT[kind] for kind in types))
        yield from (f"{here}{name} is not kept" for name in keywords if name not in kept)
        for name in COUNTS:
            if name in schema and not (type(schema[name]) is int and 0 <= schema[name] <= MOST_COUNT):
                yield f"{here}{name} should be a whole number of at most {MOST_COUNT:,}"
        yield from (f"{here}{problem}" for problem in _string_problems(schema))
        yield from (f"{here}{problem}" for problem in _object_problems(schema))
        for name in ("items", "additionalProperties"):
            if name in schema and schema[name] is not False:
                yield from self.node(schema[name], f"{place}.{name}".lstrip("."))
        within = schema.get("prefixItems", [])
        yield from [] if isinstance(within, list) else [f"{here}prefixItems should be a list of schemas"]
        for i, one in enumerate(within if isinstance(within, list) else ()):
            yield from self.node(one, f"{place}.prefixItems[{i}]".lstrip("."))
        properties = schema.get("properties", {})
        for name, one in properties.items() if isinstance(properties, dict) else ():
            yield from self.node(one, f"{place}.{name}".lstrip("."))


def _is_of(value: Any, types: Any) -> bool:
    for kind in types if isinstance(types, list) else [types]:
        known = _PYTHON_TYPES.get(kind) if isinstance(kind, str) else None
        if known is not None and isinstance(value, known) and (kind == "boolean" or not isinstance(value, bool)):
            return True
    return False


def _string_problems(schema: Mapping[str, Any]) -> Iterator[str]:
    ways = [name for name in ("pattern", "format") if name in schema]
    ways += ["minLength or maxLength"] if {"minLength", "maxLength"} & schema.keys() else []
    if len(ways) > 1:
        yield f"{' and '.join(ways)} are not kept together"
    if "format" in schema and schema["format"] not in FORMATS:
        yield f"format {str(schema['format'])[:40]!r} is not kept; of formats {', '.join(sorted(FORMATS))} are"
    if "pattern" in schema and (why := _pattern_problem(schema["pattern"])):
        yield f"pattern: {why}"


def _pattern_problem(pattern: Any) -> str:
    if not isinstance(pattern, str):
        return "should be a text"
    counts = re.findall(r"\{(\d*),?(\d*)\}", pattern)
    if any(int(count[:9] or 0) > MOST_REPEATS for pair in counts for count in pair):
        return f"it repeats something more than {MOST_REPEATS} times"
    if re.search(r"\(\?(?!:)", pattern):
        return "groups that begin with (? are not kept, but for (?:"
    middle = re.sub(r"\\.|\[\^", "", re.sub(r"(^|[(|])\^|\$(?=$|[)|])", r"\1", pattern), flags=re.DOTALL)
    if "^" in middle or "$" in middle:
        return "^ and $ are kept at the ends alone"
    # Written into the answer as they stand, these would end its string or break it.
    signs = re.search(r'"|[\x00-\x1f]|\\[\\ntrfv0cbBkpP1-9]|\\x|\\u00[0-1]|\\u0022|\\u005[cC]', pattern)
    return f"{signs[0]!r} in it is not kept" if signs else ""


def _object_problems(schema: Mapping[str, Any]) -> Iterator[str]:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict):
        yield "properties should be an object"
        return
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        yield "required should be a list of names"
    elif missing := [name for name in required if name not in properties]:
        yield f"required names {missing[0][:40]!r}, which properties does not have"
    if schema.get("additionalProperties", False) is not False:
        # A key of such an object can be spelled twice, with an escape or without.
        if properties:
            yield "additionalProperties is not kept beside properties: leave it out, or write false"
        if isinstance(schema.get("minProperties"), int) and schema["minProperties"] > 1:
            yield "minProperties above 1 is not kept beside additionalProperties"


def main() -> None:
    """Compile each schema that comes in, a line each, and say of each whether it can be; {"tokenizer"} comes first."""
    import xgrammar

    _bound_memory()
    compiler: Any = None
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    while True:
        told, said = json.loads(lines.get()), ""
        try:
            if "tokenizer" in told:
                info = xgrammar.TokenizerInfo.deserialize_json(told["tokenizer"])
                compiler, said = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False), "ready"
            else:
                compiler.compile_json_schema(told["schema"], any_whitespace=False)
        except RuntimeError as error:  # what its C++ side raises, whatever is wrong
            said = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


def _listen(lines: SimpleQueue[str]) -> None:
    """When nobody is left to say anything this process ends, whatever it compiles."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _bound_memory() -> None:
    """A schema that wants more memory than this ends this process, and nothing else."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))


if __name__ == "__main__":
    main()
