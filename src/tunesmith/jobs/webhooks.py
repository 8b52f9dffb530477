"""Sends the events of ended jobs by Standard Webhooks: at least once, from the store, until they are taken."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

import httpx
import orjson
from standardwebhooks import Webhook

from tunesmith.jobs.rules import WebhookEndpoint
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import Record, webhooks
from tunesmith.serve.protocol import RequestError

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
    with (
        httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client,
        client.stream(
            "POST", url.copy_with(host=address), content=body, extensions={"sni_hostname": url.host},
            headers={**headers, "Host": url.netloc.decode(), "Content-Type": "application/json"},
        ) as answer,
    ):  # fmt: skip
        return answer.status_code


def _address(host: str, endpoint: WebhookEndpoint) -> str:
    """Raises OSError for a name that leads to this machine or a private network, if that is not allowed."""
    found = [str(one[4][0]) for one in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        if not endpoint.private and (not address.is_global or address.is_multicast):
            raise OSError(f"{address} is not a public address; private: true allows it")
    return found[0]


@dataclass
class WebhookSender:
    """Sends what is due, one `round` after another; `run` does that until `stop` is set."""

    store: Store
    on_note: Callable[[str], None]
    post: Post = post

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(POLL_S):
            try:
                self.round()
            except RequestError:  # the store cannot be reached, which the dispatcher says
                stop.wait(10 * POLL_S)

    def round(self) -> None:
        """Send what is due. A project whose endpoint has just failed waits for the next round."""
        failed = set[str]()
        for row in self.store.due_webhooks():
            if row["project"] not in failed and not self._send(row):
                failed.add(row["project"])

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
