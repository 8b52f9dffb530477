"""Pages from templates. Every text in them goes through `visible` and is escaped, unless it is Markup."""

from __future__ import annotations

import hashlib
import time
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
from fastapi import Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import Response

from tunesmith import phrases
from tunesmith.environment.version import __version__
from tunesmith.evaluation.metrics import info_of
from tunesmith.pages import pictures
from tunesmith.serve.protocol import RequestError
from tunesmith.summaries import checks, words
from tunesmith.summaries.runs import model_name

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types tunesmith"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
THEME = "tunesmith-theme"
"""Cookie with the look that a person chose, so that the first paint is right."""
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HERE = Path(str(files("tunesmith.pages")))
MOST_CHARACTERS = 20_000
"""Most characters of one text of the data; the page says how many more there are."""


def shown(value: Any) -> Any:
    """A value as it is put into a template: the control characters of texts made visible."""
    return phrases.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def data(text: Any) -> Markup:
    """A text of the data, set apart from the page's own."""
    text = str(text)
    cut = len(text) - MOST_CHARACTERS
    more = f"… ({cut:,} more characters)" if cut > 0 else ""
    return Markup("<bdi>{}</bdi>{}").format(phrases.visible(text[:MOST_CHARACTERS]), more)


def prose(text: Any) -> Markup:
    """A sentence with its parts in backticks as code."""
    parts = phrases.visible(str(text)).split("`")
    if len(parts) % 2 == 0:
        return Markup("{}").format(phrases.visible(str(text)))
    code = Markup("<code>{}</code>")
    return Markup("").join(code.format(part) if i % 2 else Markup("{}").format(part) for i, part in enumerate(parts))


@cache
def environment() -> Environment:
    """The templates with the words that commands use."""
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=shown,
    )  # fmt: skip
    made.filters |= {"data": data, "prose": prose, "line": phrases.one_line, "loss": words.loss, "size": phrases.size}
    made.filters |= {"percent": phrases.percent, "option": words.option, "plural": phrases.plural}
    made.filters["day"] = lambda seconds: time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    made.globals |= {"asset": asset, "words": words, "checks": checks, "pictures": pictures, "version": __version__}
    made.globals |= {"info_of": info_of, "about": phrases.about, "names": lambda model: model_name(Path(model))}
    made.globals["age"] = lambda created: words.age(time.time() - created)
    return made


def page(request: Request, template: str, status: int = 200, /, **values: Any) -> Response:
    """A page from a template, with the values that every page has."""
    theme = request.cookies.get(THEME, "")
    common = {"theme": theme if theme in ("light", "dark") else "", "path": request.url.path, "machine": machine()}
    text = environment().get_template(template).render(**common, **values)
    return Response(text, status, HEADERS, "text/html")


def machine() -> str:
    """The memory of this machine in words."""
    memory = psutil.virtual_memory()
    return f"{phrases.size(memory.available)} of {phrases.size(memory.total)} free"


def error_page(request: Request, error: RequestError) -> Response:
    """A refusal as a page: its message, and links that lead on."""
    answer = page(request, "error.html", error.status, message=str(error), number=error.status)
    answer.headers.update(error.headers)
    return answer


def asset(name: str) -> str:
    """The address of a file of `static`, which changes with any of them: they import each other."""
    return f"/ui/static/{_static()[0]}/{name}"


def asset_response(digest: str, name: str) -> Response:
    """A file of `static`. Raises RequestError 404."""
    now, contents = _static()
    if name not in contents or digest != now:
        raise RequestError("There is no such file.", status=404, code="not_found")
    kind = KINDS.get(Path(name).suffix, "text/plain")
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "Cross-Origin-Resource-Policy": "same-origin"}
    return Response(contents[name], 200, headers, kind)


@cache
def _static() -> tuple[str, dict[str, bytes]]:
    """The beginning of a SHA-256 of all files of `static`, and the content of each by its path there."""
    root = HERE / "static"
    files_here = (path for path in sorted(root.rglob("*")) if path.is_file())
    contents = {path.relative_to(root).as_posix(): path.read_bytes() for path in files_here}
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()[:12], contents
