"""The processes that send to trackers, as a command has them."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from tunesmith.runs.folder import Run
from tunesmith.trackers.sender import tracked


@contextmanager
def begun(
    name: str, run: Run | None = None, *, offline: bool = False, wait_s: float | None = None
) -> Iterator[list[tuple[bool, str]]]:
    """A block in which a run is sent, if there is one; the lines that are said."""
    said: list[tuple[bool, str]] = []
    with tracked([name], offline=offline, say=lambda *line: said.append(line), wait_s=wait_s) as begin:
        if run is not None:
            begin(run)
        yield said


def finish(name: str, run: Run) -> str:
    """Send a run; the line that says so."""
    with begun(name, run) as said:
        pass
    is_sent, line = said[-1]
    assert is_sent, said
    return line


def processes() -> list[psutil.Process]:
    """Those of trackers, and no zombies."""
    found = psutil.Process().children()
    return [one for one in found if one.status() != "zombie" and "tunesmith.trackers.sender" in one.cmdline()]


def process_of(name: str) -> psutil.Process:
    """The one process of a tracker."""
    (found,) = [one for one in processes() if name in one.cmdline()]
    return found


class Answers(http.server.BaseHTTPRequestHandler):
    """Says 200 and an empty object to everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def answering() -> Iterator[str]:
    """A block with a server that is no tracker's; its host and port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
