"""Jinja for templates that others wrote: what transformers gives them, and bounds on what it may compute.

Whatever a template makes passes through here: operators, literals, slices, calls, filters and what is written.
So no operation in C, which nothing can interrupt, takes much more than a second or `TEXT_CHARS`, and each looks
at the clock. Imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from itertools import chain, islice
from types import GeneratorType
from typing import Any

import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.nodes import Impossible
from jinja2.runtime import markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TEXT_CHARS = 64 * 1024 * 1024
"""Longest text, eight times `limits.line_bytes`."""
MADE_CHARS = 16 * TEXT_CHARS
"""Characters of everything that one rendering makes."""
VALUES = 1_000_000
"""Values of a list or object, those within it counted as often as they would be written."""
REPEATS = 100_000
"""Largest number of repetitions, turns of one loop, or columns."""
SLOW_CHARS, SLOW_VALUES = 100_000, 10_000
"""Limits for operations that take the square of their size."""
PRODUCT = 2**30
"""Largest product of the lengths of a text and of a text searched in it, where searching takes that long."""
INT_BITS = 4_096
COLUMNS = frozenset({"batch", "center", "indent", "ljust", "rjust", "round", "slice", "to_bytes", "wordwrap", "zfill"})
SLOW = frozenset({"pprint", "striptags", "urlize", "wordwrap", "xmlattr"})
SEARCHES = frozenset({"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim"})
PIECES = frozenset({"rsplit", "split", "splitlines"})
CONSUMERS = frozenset({"groupby", "join", "last", "list", "max", "min", "random", "reverse", "sort", "sum", "unique"})
SHORT_TEXT = PIECES | SEARCHES
BOUNDED = COLUMNS | SLOW | CONSUMERS | {"expandtabs", "format", "replace", "translate"}
_TEXTS, _SMALL = {str}, 2**31
_PERCENT = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*")
_BRACES = re.compile(r"\{[^{}]*\}")
_NESTED = re.compile(r"\{[^{}]*:[^{}]*\{")
_VIEWS = (KeysView, ValuesView, ItemsView)


class TooMuch(Exception):
    """Raised where a template computes more than it may. Its text follows "its chat template "."""


class TooLong(Exception):
    """The text of a template, or of a part of it, is longer than `TEXT_CHARS`."""


class _Bounded(CodeGenerator):
    """Writes the code of a template, so that loops, macros and literals are seen by its environment."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        repeated: Any
        for repeated in node.find_all((nodes.For, nodes.Macro)):
            repeated.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("turn")))
        super().visit_Template(node, frame)

    def visit_EnvironmentAttribute(self, node: nodes.EnvironmentAttribute, frame: Any) -> None:
        self.write(f"environment.{node.name}()")

    def _made(self, visit: Callable[[Any, Any], None], node: Any, frame: Any) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        if all(isinstance(item, nodes.Const) for item in node.items):  # ... in ["user", "tool"]
            super().visit_List(node, frame)
        else:
            self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
        else:
            self._made(super().visit_Tuple, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._made(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Add(self, node: nodes.BinExpr, frame: Any) -> None:
        """a + b + c in one go, where what each is does not depend on the sums before it."""
        terms: list[Any] = [node]
        while isinstance(terms[0], nodes.Add):
            terms[:1] = [terms[0].left, terms[0].right]
        if all(
            isinstance(term, (nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Filter)) for term in terms
        ):
            self.write("environment.added(context, (")
            for term in terms:
                self.visit(term, frame)
                self.write(", ")
            self.write("))")
        else:
            super().visit_Add(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined(context.eval_ctx.autoescape, (")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write("))")

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if isinstance(node, nodes.TemplateData):
            return super()._output_child_to_const(node, frame, finalize)
        raise Impossible  # nothing is computed while a template is compiled, when no bound is in force


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template, for one conversation at a time: `begin`, then `template.render`."""

    code_generator_class = _Bounded
    intercepted_binops = frozenset({"+", "*", "%", "//", "**"})

    def __init__(self, text: str) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], optimized=False,
            finalize=self._written,
        )  # fmt: skip
        self.filters = {name: self._bounded(name, used) for name, used in {**self.filters, "tojson": _tojson}.items()}
        self.globals |= {"raise_exception": _raise_exception, "dict": _Dict(), "namespace": _TemplateNamespace}
        self.globals["lipsum"] = _lipsum
        self.begin(math.inf)
        self.template = self.from_string(text)
        self.template.globals = dict(self.template.globals)  # a ChainMap takes a fifth of a short chat's time

    def begin(self, limit_s: float) -> None:
        """Begin a rendering, which may compute for `limit_s` seconds of this thread."""
        self._clock, self._computed = time.monotonic() + limit_s, time.thread_time() + limit_s
        self._num_made = 0
        self._sizes: dict[int, tuple[Any, int, int]] = {}

    def turn(self) -> None:
        """Raise TimeoutError once the rendering has computed for too long."""
        if time.monotonic() > self._clock and time.thread_time() > self._computed:
            raise TimeoutError

    def made(self, value: Any) -> Any:
        """Count the size of a value, and return it. Raises `TooMuch`."""
        self.turn()
        kind = type(value)
        if kind is GeneratorType:
            return self._watched(value)
        self._num_made += _room(len(value)) if kind is str else self._size(value)[1]
        if self._num_made > MADE_CHARS:
            raise TooMuch(f"makes texts of more than {MADE_CHARS:,} characters in all")
        return value

    def _watched(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.turn()
            if type(value) is not GeneratorType:
                self._size(value)
            yield self._watched(value) if type(value) is GeneratorType else value

    def _size(self, value: Any) -> tuple[int, int]:
        """About how large the text of a value would be: (values, characters). Raises `TooMuch`."""
        if isinstance(value, (str, bytes)):
            return 1, _room(len(value))
        if not isinstance(value, (list, tuple, dict, *_VIEWS)):
            return 1, 8
        known = self._sizes.get(id(value))
        if known is not None and known[0] is value:
            return known[1:]
        num, chars = 1, 8
        for item in chain(value, value.values()) if isinstance(value, dict) else value:
            if isinstance(item, Namespace):
                raise TooMuch("puts a namespace into a list or an object")
            more, longer = self._size(item)
            num, chars = num + more, chars + longer
            if num > VALUES:
                raise TooMuch(f"makes a list or an object of more than {VALUES:,} values")
        self._sizes[id(value)] = value, num, _room(chars)
        return num, chars

    def _written(self, value: Any) -> Any:
        return value if type(value) is str and len(value) < SLOW_CHARS else self.made(value)

    def concat(self, parts: Iterable[str]) -> str:
        """Join the text of a macro, of a block or of the whole. Raises `TooLong`."""
        texts = list(parts)
        num = sum(map(len, texts))
        if num > TEXT_CHARS:
            raise TooLong(f"it wrote {num} characters, more than {TEXT_CHARS}")
        self._num_made += num
        return "".join(texts)

    def joined(self, escapes: bool, values: Sequence[Any]) -> Any:
        """x ~ y."""
        _room(sum(self._size(value)[1] for value in values))
        return self.made((markup_join if escapes else str_join)(values))

    def added(self, context: Any, terms: tuple[Any, ...]) -> Any:
        """a + b + c."""
        if set(map(type, terms)) == _TEXTS:
            _room(sum(map(len, terms)))
            return self.made("".join(terms))
        return functools.reduce(functools.partial(self.call_binop, context, "+"), terms)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            if operator != "**" and abs(left) < _SMALL and abs(right) < _SMALL:
                return self.binop_table[operator](left, right)
            times = max(int(right), 1) if operator == "**" else 1
            if left.bit_length() * times + right.bit_length() > INT_BITS:
                what = "computes a power (**)" if operator == "**" else "computes a number"
                raise TooMuch(f"{what} of more than {INT_BITS:,} bits")
        elif operator == "%" and isinstance(left, (str, bytes)):
            self._check_format(_PERCENT, left, right)
        elif operator == "*":
            for times, value in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, (str, bytes, list, tuple)):
                    num, chars = self._size(value)
                    _room(max(times, 0) * (chars if isinstance(value, (str, bytes)) else max(chars, 64 * num)))
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __called: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls, within bounds."""
        __self.turn()
        options = {name: value for name, value in kwargs.items() if name[0] != "_"}
        if args or options:
            __self._size([*args, *options.values()])
        name, subject = getattr(__called, "__name__", ""), getattr(__called, "__self__", None)
        if name in ("format", "format_map"):
            text = getattr(getattr(__called, "__wrapped__", None), "__self__", "")
            __self._check_format(_BRACES, text, (args, options))
        elif isinstance(subject, (str, bytes, int)):
            if not _is_small(name, subject, args):
                __self._check(name, subject, args, options)
            if name == "join" and args:
                args = (__self._check("join", args[0], (subject,), {}), *args[1:])
        elif isinstance(__called, _Dict) and args and len(args[0]) > SLOW_VALUES:
            raise TooMuch(f"makes an object of more than {SLOW_VALUES:,} values")
        return __self.made(super().call(__context, __called, *args, **kwargs))

    def _bounded(self, name: str, used: Callable[..., Any]) -> Callable[..., Any]:
        """A filter, within bounds."""
        subject_at = int(hasattr(used, "jinja_pass_arg"))  # Jinja gives it the context too

        @functools.wraps(used)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            subject, rest = args[subject_at], args[subject_at + 1 :]
            if kwargs or not _is_small(name, subject, rest):
                subject = self._check(name, subject, rest, kwargs)
            return self.made(used(*args[:subject_at], subject, *rest, **kwargs))

        return bounded

    def _check(self, name: str, subject: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the subject of a filter or method, with a list for a consumed iterator. Raises `TooMuch`."""
        more = [*args, *kwargs.values()]
        if name in CONSUMERS and not isinstance(subject, (str, bytes, list, tuple, dict, int)):
            subject = subject if not isinstance(subject, Iterable) else list(islice(subject, VALUES + 1))
        num, chars = self._size(subject)
        texts, ints = [len(x) for x in more if isinstance(x, (str, bytes))], [x for x in more if type(x) is int]
        longest, largest = max(texts, default=0), max(map(abs, ints), default=0)
        if (name in COLUMNS and largest > REPEATS) or (name == "expandtabs" and largest > 100):
            raise TooMuch(f"repeats something {largest:,} times ({name})")
        if name in SLOW and (chars > SLOW_CHARS or num > SLOW_VALUES or longest > 1_000):
            raise TooMuch(f"uses {name} on more than {SLOW_CHARS:,} characters")
        if name in CONSUMERS | PIECES and isinstance(subject, (str, bytes)) and chars > TEXT_CHARS // 4:
            raise TooMuch(f"uses {name} on more than {TEXT_CHARS // 4:,} characters")
        if name in SEARCHES and chars * longest > PRODUCT:
            raise TooMuch(f"uses {name} with two long texts")
        if name == "sum" and more and num * len(subject) > PRODUCT:
            raise TooMuch("adds too many lists (sum)")
        if name == "replace" and len(texts) >= 2 and isinstance(subject, (str, bytes)):
            old: Any
            old, new = [x for x in more if isinstance(x, type(subject))][:2] or ("", "")
            _room(chars + (subject.count(old) if old else chars + 1) * len(new))
        elif name == "join":
            _room(chars + longest * (len(subject) if hasattr(subject, "__len__") else 0))
        elif name == "indent":
            _room(chars + (str(subject).count("\n") + 1) * max(longest, largest))
        elif name == "translate":
            _room(chars * self._size(more)[1])
        elif name == "expandtabs":
            _room(chars * max(largest, 8))
        elif name == "format":
            self._check_format(_PERCENT, subject, more)
        return subject

    def _check_format(self, fields: re.Pattern[str], text: Any, values: Any) -> None:
        """Raise `TooMuch` for columns without end: "%3000000000d" % 1, "{:>{}}".format(1, 3000000000)."""
        text = text.decode("latin-1") if isinstance(text, bytes) else str(text)
        if fields is _BRACES:
            text = text.replace("{{", "").replace("}}", "")
        places = fields.findall(text)
        width = max((int(digits[:9]) for place in places for digits in re.findall(r"\d+", place)), default=0)
        is_given = any("*" in place for place in places) if fields is _PERCENT else _NESTED.search(text)
        if width > REPEATS or is_given:
            raise TooMuch("writes columns of any width (format)")
        _room(len(text) + (len(places) + text.count("{")) * (width + self._size(values)[1]))


def _is_small(name: str, subject: Any, args: Sequence[Any]) -> bool:
    """Whether a filter or method needs no bound: nearly always."""
    if name in BOUNDED:
        return False
    if name not in SHORT_TEXT:
        return True
    return isinstance(subject, str) and len(subject) < SLOW_VALUES and not any(len(str(arg)) > 100 for arg in args)


def _room(num_chars: int) -> int:
    if num_chars > TEXT_CHARS:
        raise TooMuch(f"makes a text of more than {TEXT_CHARS:,} characters")
    return num_chars


class _Generation(jinja2.ext.Extension):
    """{% generation %}, which marks answers for other programs."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("write"), [], [], body).set_lineno(line)

    def write(self, caller: Any) -> str:
        return str(caller())


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """A namespace of a template. It takes no names that begin with an underscore, and no other namespace: the
    text of a circle would have no end."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805, RUF100 (so that one may be named self)
        self, *values = args
        Namespace.__init__(self)
        for name, value in dict(*values, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(
                f"Chat templates cannot store underscore-prefixed attributes on a namespace, but got {name!r}. "
                "Please rename the attribute."
            )
        if isinstance(value, Namespace):
            raise TooMuch("puts a namespace into another")
        Namespace.__setitem__(self, name, value)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    for space in (indent, *(separators or ())):
        if (len(space) if isinstance(space, str) else abs(space or 0)) > 100:
            raise TooMuch("indents JSON by more than 100 characters")
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _lipsum(*args: Any, **kwargs: Any) -> None:
    raise TooMuch("writes a text by chance (lipsum)")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
