"""Sends the events of ended jobs by Standard Webhooks: at least once, from the store, until they are taken."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone

import httpx
import orjson
from standardwebhooks import Webhook

from tunesmith.jobs.rules import WebhookEndpoint
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import webhooks
from tunesmith.serve.protocol import RequestError
from tunesmith.types import Record

POLL_S = 1.0
TIMEOUT_S = 10.0
DELAYS_S = (5, 30, 120, 600, 3600)
"""Before each repetition; the last one again and again."""
GIVEN_UP_AFTER_S = 72 * 3600
Post = Callable[[WebhookEndpoint, bytes, Mapping[str, str]], int]


def post(endpoint: WebhookEndpoint, body: bytes, headers: Mapping[str, str]) -> int:
    """The status of the answer, of which nothing else is read. Raises OSError, httpx.HTTPError.

    The name is resolved once, and that address is connected to: it cannot become another between check and use.
    """
    url = httpx.URL(endpoint.url)
    address = _address(url.host, endpoint)

    async def send() -> int:
        async with (
            httpx.AsyncClient(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client,
            client.stream(
                "POST", url.copy_with(host=address), content=body, extensions={"sni_hostname": url.host},
                headers={**headers, "Host": url.netloc.decode(), "Content-Type": "application/json"},
            ) as answer,
        ):  # fmt: skip
            return answer.status_code

    try:  # all of it, where httpx has a time for each read
        return asyncio.run(asyncio.wait_for(send(), TIMEOUT_S))
    except asyncio.TimeoutError:
        raise OSError(f"no answer within {TIMEOUT_S:g} s") from None


def _address(host: str, endpoint: WebhookEndpoint) -> str:
    """Raises OSError for a name that leads to this machine or a private network, if that is not allowed."""
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        if not endpoint.private and not _is_public(address):
            raise OSError(f"{address} is not a public address; private: true allows it")
    return addresses[0]


_INSIDE = tuple(map(ipaddress.IPv6Network, ("64:ff9b:1::/48", "::/96", "fec0::/10")))
"""IPv6 networks that reach private IPv4 addresses or a site, and that `ipaddress` calls global."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether the address, and the IPv4 address in it, are public: machines of others in the internet."""
    inner: ipaddress.IPv4Address | None = None
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in network for network in _INSIDE):
            return False
        inner = address.sixtofour or address.ipv4_mapped
        inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF) if address in _NAT64 else inner
    return address.is_global and not address.is_multicast and (inner is None or _is_public(inner))


@dataclass
class WebhookSender:
    """Sends what is due, one `round` after another; `run` does that until `stop` is set."""

    store: Store
    on_note: Callable[[str], None]
    post: Post = post
    sending: dict[str, threading.Thread] = field(default_factory=dict)
    """Threads at work, by their projects: an endpoint that hangs holds back its own project alone."""

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(POLL_S):
            try:
                self.round(POLL_S)
            except RequestError:  # the store cannot be reached, which the dispatcher says
                stop.wait(10 * POLL_S)
        self._wait(TIMEOUT_S)

    def round(self, wait_s: float = 2 * TIMEOUT_S) -> None:
        """Send what is due, each project's until its endpoint fails; returns when all is sent or in time."""
        self.sending = {project: thread for project, thread in self.sending.items() if thread.is_alive()}
        for row in self.store.due_webhooks():
            if (project := row["project"]) not in self.sending:
                self.sending[project] = threading.Thread(target=self._send_all, args=(project,), daemon=True)
                self.sending[project].start()
        self._wait(wait_s)

    def _wait(self, most_s: float) -> None:
        until = time.monotonic() + most_s
        for thread in self.sending.values():
            thread.join(max(0.0, until - time.monotonic()))

    def _send_all(self, project: str) -> None:
        with suppress(RequestError):  # the store cannot be reached, which the dispatcher says
            while rows := [row for row in self.store.due_webhooks() if row["project"] == project]:
                if not self._send(rows[0]):
                    break

    def _send(self, row: Record) -> bool:
        endpoint, now = self.store.rules.of(row["project"]).webhook, time.time()
        if endpoint is None:  # it was taken out of the rules
            return self.store.update(webhooks, {"ended_at": int(now), "failure": "no endpoint"}, id=row["id"])
        event = {
            "id": row["id"], "object": "event", "created_at": row["created_at"], "type": row["type"],
            "data": {"id": row["job"]},
        }  # fmt: skip
        body = orjson.dumps(event)
        try:
            signature = Webhook(endpoint.secret()).sign(
                row["id"], datetime.fromtimestamp(now, timezone.utc), body.decode()
            )
            headers = {"webhook-id": row["id"], "webhook-timestamp": str(int(now)), "webhook-signature": signature}
            status = self.post(endpoint, body, headers)
            failure = None if 200 <= status < 300 else f"status {status}"
        except (OSError, ValueError, httpx.HTTPError) as error:
            failure = f"{type(error).__name__}: {error}"[:200]
        if failure is None:
            return self.store.update(webhooks, {"ended_at": int(time.time())}, id=row["id"])
        is_over = now - row["created_at"] > GIVEN_UP_AFTER_S
        if is_over or row["attempts"] == 0:
            words = "given up after 72 h" if is_over else "it is sent again"
            self.on_note(f"webhooks: {row['type']} of {row['job']} was not taken ({failure}): {words}")
        delay = DELAYS_S[min(row["attempts"], len(DELAYS_S) - 1)]
        values = {"attempts": row["attempts"] + 1, "next_at": int(now) + delay, "failure": failure}
        self.store.update(webhooks, {**values, **({"ended_at": int(now)} if is_over else {})}, id=row["id"])
        return False
