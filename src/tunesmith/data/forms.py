"""What a chat template writes around texts that it never looks into: found by running it once on texts that tell.

Most templates only copy what plain messages say, so that conversations with the same roles differ in their texts
alone. A template runs once with a `_Copied` for each text: a string which lets itself be copied, joined to others and
stripped, and notices everything else that is done to it. What it could not notice raises in the template that runs, see
`_Guard`. Where nothing else was done, the template would have taken the same way with any other texts, and what it
writes is known without running it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_FORMS = 1024
MOST_MESSAGES = 32
"""Longer conversations seldom have the same roles as others."""

_OPEN, _CLOSE = "\ue000", "\ue001"
_PLACE = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_REFUSE = "tunesmith_refuse"
_NODES = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.NSRef, nodes.Getattr,
    nodes.Getitem, nodes.Slice, nodes.For, nodes.If, nodes.Assign, nodes.Compare, nodes.Operand, nodes.And, nodes.Or,
    nodes.Not, nodes.Add, nodes.Sub, nodes.Mod, nodes.Concat, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call,
    nodes.Keyword, nodes.List, nodes.Tuple, nodes.Break, nodes.Continue,
)  # fmt: skip
"""Macros, blocks that are set or filtered, and what else hands on a plain copy of a text, are not among them."""
_FILTERS = ("trim", "length", "count", "default", "first", "last")
_TESTS = ("defined", "undefined", "none", "string", "mapping")
_CALLED = ("raise_exception", "namespace", "range", "strftime_now")
MOST_SHOWN, MOST_CHARS = 8, 1_000_000
"""Times that a form may show each message, and its own characters: a template that writes more is run each time."""


@dataclass(slots=True)
class _Form:
    """What is written for one sequence of roles."""

    pieces: tuple[str, ...]
    """Between them stand texts; those places hold ""."""
    places: tuple[tuple[int, int], ...]
    """(index in pieces, index of the message whose text stands there)."""
    stripped: frozenset[int]
    """Messages whose text is stripped."""
    is_checked: bool = False
    """Whether it was once compared with what transformers makes of the template."""
    is_wrong: bool = False

    def fill(self, texts: Sequence[str]) -> str | None:
        """None: a text has white space at its sides that the template takes away."""
        if any(texts[i].strip() != texts[i] for i in self.stripped):
            return None
        pieces = list(self.pieces)
        for at, i in self.places:
            pieces[at] = texts[i]
        return "".join(pieces)


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation as its form gives it."""

    text: str
    form: _Form

    @property
    def is_checked(self) -> bool:
        """Whether this form was compared with the template itself; if not, have the first text compared."""
        return self.form.is_checked

    def check(self, *, agrees: bool) -> None:
        """Take the outcome of that comparison; a form that does not agree is not used again."""
        self.form.is_checked, self.form.is_wrong = agrees, not agrees


Found = tuple[Sequence[str], Sequence[Sequence[int]], Sequence[int]]
"""Pieces, places and stripped messages of a form."""


class Forms:
    """The forms of one template. `find` gives that of a prompt or none and the roles of its messages, see `Finder`."""

    def __init__(self, find: Callable[[bool, Sequence[str]], Found | None]) -> None:
        self._find = find
        self._found: dict[tuple[Any, ...], _Form | None] = {}

    def write(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool) -> Written | None:
        """A conversation as its form gives it; None: only the template itself can tell."""
        if len(messages) > MOST_MESSAGES:
            return None
        texts = []
        for message in messages:
            text = message.get("content")
            if len(message) != 2 or not isinstance(text, str) or not isinstance(message["role"], str):
                return None
            texts.append(text)
        key = (prompt, *(message["role"] for message in messages))
        if key not in self._found:
            if len(self._found) >= MOST_FORMS:
                self._found.clear()
            prompt, *roles = key
            found = self._find(prompt, roles)
            self._found[key] = None if found is None else _form_of(*found)
        form = self._found[key]
        if form is None or form.is_wrong:
            return None
        text = form.fill(texts)
        return None if text is None else Written(text, form)


def _form_of(pieces: Sequence[str], places: Sequence[Sequence[int]], stripped: Sequence[int]) -> _Form:
    return _Form(tuple(pieces), tuple((at, i) for at, i in places), frozenset(stripped))


class Finder:
    """Runs a template to find its forms: in a process that may be killed, since nothing bounds a template.

    `variables`: special tokens, by name. `clock`: the template's `strftime_now`; None: the date changes, so that what
    shows it has no form.
    """

    def __init__(self, text: str, variables: Mapping[str, Any], clock: Callable[[str], str] | None = None) -> None:
        self._variables = variables
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals = {name: environment.globals[name] for name in ("namespace", "range")}
        environment.globals |= {_REFUSE: _refuse, "raise_exception": _refuse, "strftime_now": clock or _refuse}
        self._template = None
        if _OPEN not in text and all(_is_plain(value) for value in variables.values()):
            try:
                self._template = environment.from_string(_Guard().visit(environment.parse(text)))
            except TemplateError:  # tags that only transformers knows
                self._template = None

    def find(self, prompt: bool, roles: Sequence[str]) -> Found | None:
        """None: only the template itself can tell."""
        if self._template is None:
            return None
        seen = _Seen()
        messages = [{"role": role, "content": _Copied.of(i, seen)} for i, role in enumerate(roles)]
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt}
        try:
            text = self._template.render(**{**given, **self._variables})
        except (MemoryError, RecursionError):
            raise
        except Exception:  # a program we did not write: the template itself will say what it refuses
            return None
        if seen.is_read:
            return None
        pieces = _PLACE.split(text)
        places = [(at, int(pieces[at])) for at in range(1, len(pieces), 2)]
        if len(places) > MOST_SHOWN * len(roles) or len(text) > MOST_CHARS:
            return None
        pieces[1::2] = [""] * len(places)
        return pieces, places, sorted(seen.stripped)


class _Seen:
    """What was done to the texts of one rendering."""

    def __init__(self) -> None:
        self.is_read = False
        self.stripped: set[int] = set()


class _ReadError(Exception):
    """A template looked into a text."""


class _Copied(str):
    """A text that notices when more is done to it than copying, joining and stripping."""

    message: int | None
    """Its index; None: joined to other text."""
    seen: _Seen

    @classmethod
    def of(cls, message: int, seen: _Seen) -> _Copied:
        return cls._made(f"{_OPEN}{message}{_CLOSE}", message, seen)

    @classmethod
    def _made(cls, text: str, message: int | None, seen: _Seen) -> _Copied:
        made = str.__new__(cls, text)
        made.message, made.seen = message, seen
        return made

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return self._made(str.__add__(self, other), None, self.seen)

    def __radd__(self, other: str) -> str:
        return self._made(str.__add__(other, self), None, self.seen)

    def strip(self, chars: str | None = None, /) -> str:
        if chars is not None or self.message is None:
            self._read()
        else:
            self.seen.stripped.add(self.message)
        return self

    lstrip = rstrip = strip

    def _read(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.is_read = True
        raise _ReadError


_KEPT = {
    "__new__", "__init__", "__init_subclass__", "__subclasshook__", "__class__", "__doc__", "__getattribute__",
    "__setattr__", "__delattr__", "__dict__", "__weakref__", "__module__", "__str__", "__add__", "__radd__",
    "strip", "lstrip", "rstrip",
}  # fmt: skip
for _name in [*dir(str), "__bool__", "__rmod__", "__rmul__"]:
    if _name not in _KEPT:
        setattr(_Copied, _name, _Copied._read)


class _Guard(NodeTransformer):
    """Puts an error in the place of all that could look into a text without its notice, for when it is reached."""

    def __init__(self) -> None:
        self._written: set[int] = set()
        """Joined texts that go no further than the output."""
        self._by_kind: dict[type[nodes.Node], Callable[[Any], bool]] = {
            nodes.Concat: lambda node: id(node) in self._written,
            nodes.Filter: lambda node: node.name in _FILTERS and _are_constant(node),
            nodes.Test: lambda node: node.name in _TESTS,
            nodes.Compare: _is_comparison,
            nodes.Call: _is_known_call,
        }

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if isinstance(node, nodes.Output) or (isinstance(node, nodes.Concat) and id(node) in self._written):
            self._written |= {id(part) for part in node.nodes if isinstance(part, nodes.Concat)}
        if self._is_noticed(node):
            return super().visit(node, *args, **kwargs)
        refusal = nodes.Call(nodes.Name(_REFUSE, "load"), [], [], None, None)
        instead = refusal if isinstance(node, nodes.Expr) else nodes.Output([refusal])
        assert node.environment is not None
        return instead.set_lineno(node.lineno).set_environment(node.environment)

    def _is_noticed(self, node: nodes.Node) -> bool:
        for kind, is_noticed in self._by_kind.items():
            if isinstance(node, kind):
                return is_noticed(node)
        return isinstance(node, _NODES)


def _is_known_call(node: nodes.Call) -> bool:
    if isinstance(node.node, nodes.Name):
        is_known = node.node.name in _CALLED and node.dyn_args is None and node.dyn_kwargs is None
        return is_known and (node.node.name != "strftime_now" or _are_constant(node))
    return isinstance(node.node, nodes.Getattr) and "format" not in node.node.attr and _are_constant(node)


def _is_comparison(node: nodes.Compare) -> bool:
    """A plain text does not tell what is looked for in it."""
    looks = any(operand.op in ("in", "notin") for operand in node.ops)
    return not looks or (len(node.ops) == 1 and _is_no_text(node.expr))


def _are_constant(node: nodes.Call | nodes.Filter) -> bool:
    return (
        all(isinstance(value, nodes.Const) for value in node.args)
        and not node.kwargs
        and node.dyn_args is None
        and node.dyn_kwargs is None
    )


def _is_no_text(node: nodes.Node) -> bool:
    """Whether this is a word of the template's own, or a role."""
    if isinstance(node, nodes.Getattr):
        return node.attr == "role"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "role"
    return isinstance(node, nodes.Const)


def _is_plain(value: Any) -> bool:
    return type(value) is str and _OPEN not in value


def _refuse(*args: Any) -> None:
    raise _ReadError
