"""Addresses, and the end of a server."""

from __future__ import annotations

import socket
import threading
import time

import openai
import pytest

from serve.fake import FakeEngine
from serve.running import running, wait_for
from tunesmith.errors import InputError
from tunesmith.serve.http import bind

SLOW = [{"role": "user", "content": "SLOW one two three"}]


@pytest.mark.parametrize(
    ("host", "said"),
    [("203.0.113.7", "203.0.113.7:0: "), ("nowhere.invalid", "nowhere.invalid:0: "), ("a..b", "a..b:0: ")],
)
def test_an_address_that_is_not_here_is_refused(host: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        bind(host, 0)


@pytest.mark.parametrize(
    ("host", "is_loopback", "url"), [("localhost", True, "http://127.0.0.1:"), ("0.0.0.0", False, "http://127.0.0.1:")]
)
def test_who_can_reach_an_address_is_told_from_the_address(host: str, is_loopback: bool, url: str) -> None:
    bound = bind(host, 0)
    with bound.socket:
        assert bound.is_loopback is is_loopback
        assert bound.url.startswith(url)


def test_a_port_in_use_is_said_without_the_address_twice() -> None:
    taken = bind("127.0.0.1", 0)
    with taken.socket, pytest.raises(InputError, match=rf"^127.0.0.1:{taken.port}: Address already in use\. Choose"):
        bind("127.0.0.1", taken.port)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_address_of_all_of_ipv6_takes_ipv4_too() -> None:
    bound = bind("::", 0)
    with bound.socket, socket.create_connection(("127.0.0.1", bound.port), timeout=5):
        pass


def test_what_takes_longer_than_the_grace_hears_why() -> None:
    engine = FakeEngine(pause_s=0.1)
    endless = [{"role": "user", "content": "SLOW ENDLESS " + "word " * 1000}]
    refused: list[openai.APIStatusError] = []
    with running(engine=engine, grace_s=0.5) as server:
        client = server.client()

        def ask() -> None:
            try:
                client.chat.completions.create(model="support", messages=endless)
            except openai.APIStatusError as error:
                refused.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(lambda: engine.open == 1)
        begun = time.monotonic()
    asking.join()
    assert [error.code for error in refused] == ["stopping"]
    assert time.monotonic() - begun < 5
