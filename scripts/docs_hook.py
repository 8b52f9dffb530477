"""For `make docs`: the site has pages alone, so that a link to another file of the repository becomes plain code."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The text of a page, its links out of docs/ as code."""
    folder = posixpath.dirname(page.file.src_uri)

    def plain(match: re.Match[str]) -> str:
        text, target = match[1], match[2].partition("#")[0]
        place = posixpath.normpath(posixpath.join(folder, target))
        if re.match(r"[a-z]+:|/", target) or not place.startswith("../"):
            return match[0]
        name = place.removeprefix("../")
        bare = text.strip("`")
        return f"`{bare}`" if posixpath.basename(name) in bare or bare in name else f"{text} (`{name}`)"

    return LINK.sub(plain, markdown)
