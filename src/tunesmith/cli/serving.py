"""A server from its start to its end, and what is said on the way."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tunesmith.cli.render import one_line, visible
from tunesmith.cli.signals import stopping_on_signals
from tunesmith.cli.streams import console, json_line
from tunesmith.environment import install_command
from tunesmith.errors import InputError
from tunesmith.formatting import plural
from tunesmith.serve.protocol import EngineOptions, Served

if TYPE_CHECKING:
    from tunesmith.serve.gate import Answered, Rules
    from tunesmith.serve.keys import Keys
    from tunesmith.serve.listening import Bound

PATH_WIDTH = 60


@dataclass(frozen=True)
class Access:
    """Where a server is asked, and by whom."""

    host: str
    port: int
    key_file: Path | None = None
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


@dataclass
class Voice:
    """What a server says: lines for people, or JSON lines."""

    screen: Console
    quiet: bool
    as_json: bool
    has_begun: bool = False

    def note(self, text: str) -> None:
        if self.as_json:
            json_line({"kind": "note", "message": text})
        elif not self.quiet:
            self.screen.print(visible(text), style="bright_black")

    def serving(self, bound: Bound, served: Sequence[Served], *, has_key: bool) -> None:
        self.has_begun = True
        if self.as_json:
            json_line({"kind": "serving", "url": bound.url, "key": has_key, "models": [asdict(one) for one in served]})
            return
        if self.quiet:
            self.screen.print(bound.url)
            return
        width = max(len(one.name) for one in served)
        for one in served:
            what = "the untouched base" if one.is_base else "tuned"
            self.screen.print(
                f"  {visible(one.name):<{width}}  {one.task}, {what}, answers with {one.answers}, "
                f"{plural(one.max_tokens, 'token')} at most"
            )
        who = "only this machine" if bound.is_loopback else "every machine that reaches it"
        key = "with a key" if has_key else "without a key"
        self.screen.print(f"\n{bound.url}/v1 for {who}, {key}. Ctrl-C ends it. To try it:\n", style="bold")
        # Unwrapped, so that a line can be copied at any width.
        self.screen.print("\n\n".join(to_try(bound.url, served, has_key=has_key)) + "\n", soft_wrap=True)
        if any(one.answers == "text" for one in served):
            self.screen.print(
                f"Or open {bound.url}/ in a browser.\nA request without a temperature has 1, as in OpenAI's API, at "
                "which small models ramble; tunesmith chat has 0.\n",
                soft_wrap=True,
            )

    def answered(self, one: Answered) -> None:
        """A line a request; nothing of what was asked or answered."""
        values = {
            "id": one.id, "method": one.method, "path": one.route or one_line(one.path, PATH_WIDTH),
            "status": one.status, "ms": round(one.seconds * 1000), "prompt_tokens": one.counted.prompt_tokens,
            "completion_tokens": one.counted.completion_tokens, "failed": one.counted.failed, "fault": one.fault,
        }  # fmt: skip
        if self.as_json:
            json_line({"kind": "request", **values})
        elif one.fault:
            self.screen.print(f"{one.id}: {one.fault}. This is a fault in tunesmith; please report it.", style="red")
        elif not self.quiet:
            tokens = f"{one.counted.prompt_tokens} + {one.counted.completion_tokens} tokens"
            failed = f", {one.counted.failed}" if one.counted.failed else ""
            path = one_line(one.path, PATH_WIDTH)
            self.screen.print(f"{one.method} {path} {one.status} {values['ms']} ms, {tokens}{failed}")


def to_try(url: str, served: Sequence[Served], *, has_key: bool) -> list[str]:
    """A line for a shell, and lines of Python for the openai package, about the first model."""
    import orjson

    first = served[0]
    name, text = first.name, "The parcel never came."
    body: dict[str, Any] = {"model": name, "input": text}
    path = "/v1/classify" if first.answers == "labels" else "/v1/embeddings"
    if first.answers == "text":
        path, body = "/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
    key = ' -H "Authorization: Bearer $TUNESMITH_API_KEY"' if has_key else ""
    data = shlex.quote(orjson.dumps(body).decode())
    curl = f"  curl {url}{path} -H 'Content-Type: application/json'{key} -d {data}"
    if first.answers == "labels":
        return [curl]
    api_key = 'os.environ["TUNESMITH_API_KEY"]' if has_key else '"none"'
    call, result = (
        (f"embeddings.create(model={name!r}, input={text!r})", "data[0].embedding")
        if first.answers == "embeddings"
        else (f"chat.completions.create(model={name!r}, messages={body['messages']!r})", "choices[0].message.content")
    )
    return [
        curl,
        ("  import os\n" if has_key else "")
        + "  from openai import OpenAI\n"
        + f'  client = OpenAI(base_url="{url}/v1", api_key={api_key})\n'
        + f"  print(client.{call}.{result})",
    ]


def serve_own(
    targets: Sequence[str],
    access: Access,
    options: EngineOptions,
    *,
    root: Path,
    grace_s: float,
    quiet: bool,
    as_json: bool,
) -> None:
    """Answer until Ctrl-C or SIGTERM. Everything that can be refused is refused before a model is loaded."""
    check_extra()
    from tunesmith.serve.keys import Keys, read_keys
    from tunesmith.serve.listening import bind

    voice = Voice(console(stderr=as_json), quiet, as_json)
    keys, notes = read_keys(access.key_file, os.environ)
    for note in notes:
        voice.note(f"note: {note}")
    bound = bind(access.host, access.port)
    with bound.socket:
        rules = _rules(access, bound, Keys.of(keys))
        words = f"stopping: what is under way has {grace_s:g} s to end. Once more to leave at once."
        with stopping_on_signals(has_begun=lambda: voice.has_begun, say=voice.note, words=words) as should_stop:
            asyncio.run(_serve(targets, bound, rules, options, voice, should_stop, root=root, grace_s=grace_s))
    if not as_json and not quiet:
        voice.screen.print("ended")


def check_extra() -> None:
    """Raises InputError naming what the extra `serve` brings and is not here."""
    try:
        from tunesmith.serve import app, listening  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            f"serve needs the package {error.name}, which is not installed. Run {install_command('serve')}"
        ) from None


def refuse_open_door(access: Access, bound: Bound, *, has_key: bool) -> None:
    from tunesmith.serve.keys import VARIABLE

    if not has_key and not bound.is_loopback:
        raise InputError(
            f"--host {access.host}: other machines can reach that address, so it needs an API key: --key-file FILE, or "
            f'{VARIABLE}. Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )


def _rules(access: Access, bound: Bound, keys: Keys | None) -> Rules:
    from tunesmith.serve.gate import Rules

    refuse_open_door(access, bound, has_key=keys is not None)
    own = {"localhost"} if bound.is_loopback else {"localhost", socket.gethostname().lower()}
    hosts = own | {access.host.lower()} | {name.lower() for name in access.names}
    return Rules(keys, frozenset(hosts), frozenset(origin.rstrip("/") for origin in access.origins))


async def _serve(
    targets: Sequence[str],
    bound: Bound,
    rules: Rules,
    options: EngineOptions,
    voice: Voice,
    should_stop: Callable[[], bool],
    **how: Any,
) -> None:
    from tunesmith.serve.app import make_app
    from tunesmith.serve.engine import start_engine
    from tunesmith.serve.listening import make_server, serve

    voice.note(f"loading {', '.join(targets)}")
    engine = await start_engine(targets, root=how["root"], options=options, on_note=voice.note)
    try:
        server = make_server(make_app(engine, rules, [voice.answered]), grace_s=how["grace_s"])
        voice.serving(bound, engine.served, has_key=rules.keys is not None)
    except BaseException:
        await engine.close(0)
        raise
    await serve(server, bound, engine, grace_s=how["grace_s"], should_stop=should_stop)
