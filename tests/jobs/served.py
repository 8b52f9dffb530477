"""A server of the routes of jobs, over a store without a dispatcher, and the unmodified openai client of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

openai = pytest.importorskip("openai", reason="the openai package is the client of these tests")

from jobs.places import BASES  # noqa: E402
from serve import running as servers  # noqa: E402
from serve.fake import FakeEngine  # noqa: E402
from tunesmith.jobs.bases import Bases  # noqa: E402
from tunesmith.jobs.engines import Engines  # noqa: E402
from tunesmith.jobs.kept_answers import KeptAnswers  # noqa: E402
from tunesmith.jobs.server import make_routers  # noqa: E402
from tunesmith.jobs.store import Store  # noqa: E402
from tunesmith.serve.app import make_app  # noqa: E402
from tunesmith.serve.middleware import AccessPolicy  # noqa: E402


@dataclass
class Served:
    """A server without a dispatcher."""

    running: servers.Running
    store: Store
    client: openai.OpenAI


@contextmanager
def serving(folder: Path, bases: Bases = BASES) -> Iterator[Served]:
    store = Store(folder / "store")

    routers = make_routers(store, bases, Engines({"tiny": FakeEngine()}, bases))
    patch = pytest.MonkeyPatch()
    patch.setattr(servers, "make_app", lambda engine, policy, listeners: make_app(engine, policy, listeners, routers))
    with servers.running(AccessPolicy(known=KeptAnswers(store).find), FakeEngine()) as it:
        yield Served(it, store, it.client())
    patch.undo()
    store.close()
