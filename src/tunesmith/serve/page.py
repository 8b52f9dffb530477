"""The page that a browser gets at `/`: what this server is, and a chat with it. Nothing of it comes from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from tunesmith.serve.refusals import NOT_FOUND, Refusal

_TEXT = Path(__file__).with_name("page.html").read_text("utf-8")


def _hash_of(tag: str) -> str:
    found = re.search(f"<{tag}>(.*?)</{tag}>", _TEXT, re.DOTALL)
    assert found is not None, f"the page has one <{tag}>"
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"


_HEADERS = {
    # Only the script and the style of the page itself run, and they reach this server alone.
    "Content-Security-Policy": f"default-src 'none'; script-src {_hash_of('script')}; style-src {_hash_of('style')}; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


def is_wanted(scope: Scope) -> bool:
    """Whether a browser opens `/`. The page holds nothing secret: it is given without a key, and asks for one."""
    accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
    return scope["method"] == "GET" and scope["path"] == "/" and b"text/html" in accepted


async def page(request: Request) -> Response:
    """The page for a browser, and for others what a path that is not there is answered with."""
    if not is_wanted(request.scope):
        raise Refusal(404, "not_found", NOT_FOUND)
    return Response(_TEXT, 200, _HEADERS, "text/html")
