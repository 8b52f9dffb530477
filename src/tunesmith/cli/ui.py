"""tunesmith ui: pages in a browser"""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import Json, Offline, Quiet, Root
from tunesmith.cli.serve import LOOPBACK, Host, KeyFile, ServerOutput, check_extra
from tunesmith.cli.signals import stopping_on_signals
from tunesmith.cli.streams import console, json_line
from tunesmith.errors import InputError
from tunesmith.serve.protocol import EngineOptions

if TYPE_CHECKING:
    from tunesmith.pages.site import Site
    from tunesmith.serve.http import BoundSocket
    from tunesmith.serve.middleware import RequestLog

LAST_REQUESTS_S = 5.0
"""Time for requests under way at the end: a page that waits asks again."""


def ui(
    host: Host = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Folder with files of rows and models; uploads go there.")
    ] = Path(),
    key_file: KeyFile = None,
    allow_host: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Another name of this server.")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the pages in a browser.")] = True,
    root: Root = Path("runs"),
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Look at runs, data and plans in a browser, start runs, and chat with what they made.

    tunesmith ui

    tunesmith ui --port 8001 --data ~/rows --no-browser
    """
    if os.name != "posix":
        raise InputError("ui: runs on Linux and macOS only. `tunesmith serve` has a chat page on every system.")
    if not data.is_dir():
        raise InputError(f"--data: {data}: is no folder. Make it, or name another.")
    check_extra("serve")
    from tunesmith.pages.chat_engine import ChatEngine
    from tunesmith.pages.local_files import LocalFiles
    from tunesmith.pages.site import Site
    from tunesmith.serve import http
    from tunesmith.serve.commands import CommandRunner
    from tunesmith.serve.middleware import ApiKeys, read_keys
    from tunesmith.serve.sessions import Access
    from tunesmith.serve.spare import IMPORTS

    keys, bound = ApiKeys.of(read_keys(key_file, os.environ)), http.bind(host, port)
    output = ServerOutput(console(stderr=as_json), quiet, as_json)
    access = Access(root / ".ui" / "sessions.json", bound.port, keys)
    engine = ChatEngine(root, EngineOptions(offline=offline), output.note)
    site = Site(root, LocalFiles(data, root), access, engine, CommandRunner(IMPORTS), offline)
    machine = () if bound.is_loopback else (socket.gethostname(),)
    names = frozenset(name.lower() for name in ("localhost", host, *machine, *(allow_host or ())))
    has_screen = sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)  # else lynx would open
    _serve(site, bound, names, output, opens_browser=bool(browser and has_screen and not as_json))


def _serve(site: Site, bound: BoundSocket, names: frozenset[str], output: ServerOutput, *, opens_browser: bool) -> None:
    import asyncio
    from functools import partial

    from tunesmith.pages.api import make_api
    from tunesmith.pages.routes import make_pages, refused
    from tunesmith.serve import http
    from tunesmith.serve.app import make_app
    from tunesmith.serve.middleware import AccessPolicy

    def heard(log: RequestLog) -> None:
        """Pages ask all the time: only faults are worth a line."""
        if log.fault:
            output.request(log)

    policy = AccessPolicy(hosts=names, admission=site.access.admit, refused=partial(refused, site))
    app = make_app(site.engine, policy, [heard], [make_pages(site), make_api(site)])
    has_begun = False
    words = "stopping. Runs go on; `tunesmith ui` shows them again."
    signals = stopping_on_signals(has_begun=lambda: has_begun, say=output.note, words=words)
    with bound.socket, signals as should_stop:
        has_begun = True
        link = bound.url + site.access.new_link()
        threading.Thread(target=site.run_list.page, daemon=True).start()  # so that the first page is there at once
        _say(bound, link, output)
        door = site.root / ".ui" / "open.html"
        if opens_browser:
            import webbrowser

            address = door_to(link, door)  # some browsers are waited for
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        try:
            server = http.HttpServer(app, site.engine, grace_s=LAST_REQUESTS_S, should_stop=should_stop)
            asyncio.run(server.serve([bound.socket]))
        finally:
            site.commands.close()
            door.unlink(missing_ok=True)
    if not output.as_json and not output.quiet:
        output.screen.print("ended")


def _say(bound: BoundSocket, link: str, output: ServerOutput) -> None:
    output.has_started = True
    if output.as_json:
        json_line({"kind": "pages", "url": bound.url, "link": link})
        return
    if output.quiet:
        output.screen.print(link, soft_wrap=True)
        return
    output.screen.print("Open this link; it works once:\n", style="bold")
    output.screen.print(f"  {link}\n", soft_wrap=True)
    who = "this machine only" if bound.is_loopback else "every machine that reaches this address"
    output.screen.print(f"Pages for {who}. Ctrl-C ends them; runs that were started go on.")
    if not bound.is_loopback:
        port = bound.port
        tunnel = f"ssh -L {port}:127.0.0.1:{port} THIS-MACHINE"
        output.screen.print(f"Without https others on the way can read along; better: {tunnel}", style="yellow")


def door_to(link: str, door: Path) -> str:
    """The address of a file that leads to the link and that this user alone can read; the link itself where it
    cannot be written. Other users see the words that a process was started with, also of a browser."""
    try:
        door.parent.mkdir(parents=True, exist_ok=True)
        door.unlink(missing_ok=True)
        with os.fdopen(os.open(door, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f'<!DOCTYPE html><meta http-equiv="refresh" content="0;url={link}"><title>Tunesmith</title>')
    except OSError:
        return link
    return door.absolute().as_uri()
