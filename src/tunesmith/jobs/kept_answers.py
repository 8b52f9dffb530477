"""A cache of answers for clients that poll jobs; any change of a job empties it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Scope

from tunesmith.jobs.store import Store
from tunesmith.serve.middleware import PROJECT
from tunesmith.serve.responses import json_response

MOST = 64


@dataclass
class KeptAnswers:
    """`answers` of a store, by project and request, each with the version of the store before it was read."""

    store: Store

    def find(self, scope: Scope) -> Response | None:
        """The answer to a request, if it is still right."""
        version, response, route = self.store.answers.get(_key(scope), (-1, None, None))
        known: Response | None = response if version == self.store.version else None
        if known is not None:
            scope["route"] = route  # which the log names
        return known

    def keep(self, request: Request, read: Callable[[], Any]) -> Response:
        """The answer to a request, read now."""
        version, response = self.store.version, json_response(read())
        if len(self.store.answers) >= MOST:
            self.store.answers.clear()
        self.store.answers[_key(request.scope)] = version, response, request.scope["route"]
        return response


def _key(scope: Scope) -> tuple[Any, ...]:
    return PROJECT.get(), scope["method"], scope["path"], scope["query_string"]
